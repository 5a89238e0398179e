"""Slices of budgets in this router's hands: what is free, reserved and spent of each; it never asks identity for one.

Everything here is plain arithmetic in memory without an await, so between looking and taking nothing can come. Times
are seconds of this router's own monotonic clock, counted from before the call that gave or extended the lease, so a
lease never lasts longer here than in the ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.identity.v1 import budget_service_pb2 as pb
from router.ceilings import Ceiling

FENCE_S = 1.0
"""So long before a hard lease ends, what still runs on it is stopped; nothing new is admitted in that time either."""

IDLE_S = 1.0
"""A lease that was not used for so long goes back."""

AHEAD = 8
"""A slice is asked for that holds so many requests like the one that needs it."""


class Spender(NamedTuple):
    """Who spent: a line of the ledger, but for its hour, which is that of admission, in seconds since the epoch."""

    hour_start_s: int
    api_key_id: str
    model: str


class Charge(NamedTuple):
    """What a request reserved of a lease."""

    lease: Lease
    reserved: int


class Reservation:
    """What one request holds of all the budgets that bind it, until it is settled.

    `ceiling` is what it may use, less than it asked for where a budget is nearly spent.
    """

    __slots__ = ("_spender", "_stop", "ceiling", "charges")

    def __init__(self, charges: list[Charge], ceiling: Ceiling, spender: Spender, stop: Callable[[], None]) -> None:
        self.charges = charges
        self.ceiling = ceiling
        self._spender = spender
        # None once it is settled: the two who know each other by it are to be freed without the collector.
        self._stop: Callable[[], None] | None = stop
        for lease, reserved in charges:
            lease.reserved += reserved
            lease.running.add(self)

    def settle(self, cost_micros: int, tokens: int, requests: int) -> list[int]:
        """Turn what is reserved into what was used; returns the charge of each of `charges`, in its budget's unit.

        No charge is above what was reserved. Once only: the caller sees to that.
        """
        self._stop = None
        amounts = {
            pb.BUDGET_UNIT_COST: cost_micros,
            pb.BUDGET_UNIT_TOKENS: tokens,
            pb.BUDGET_UNIT_REQUESTS: requests,
        }
        return [
            lease.settle(self, reserved, min(reserved, amounts[lease.account.unit]), self._spender, requests)
            for lease, reserved in self.charges
        ]

    def stop(self) -> None:
        """A lease of it ends: whoever runs the request must end it, unless it has ended."""
        if self._stop is not None:
            self._stop()


class Lease:
    """A slice of one period of a budget. `amount` is what this router may use of it, which falls before a call that
    gives some back, not after it."""

    __slots__ = (
        "account",
        "admit_until",
        "amount",
        "changed",
        "closing",
        "expired",
        "lease_id",
        "lines",
        "period_start",
        "reserved",
        "running",
        "sequence",
        "settle_tries",
        "spent",
        "used_at",
        "valid_until",
    )

    def __init__(self, account: Account, message: pb.BudgetLease, asked_at: float) -> None:
        self.account = account
        self.lease_id = message.budget_lease_id
        self.period_start: Timestamp = message.period_start
        self.amount = message.amount
        self.reserved = 0
        self.spent = 0
        self.sequence = 0
        self.running: set[Reservation] = set()
        self.lines: dict[Spender, list[int]] = {}
        self.changed: set[Spender] = set()
        self.closing = False
        self.expired = False
        self.settle_tries = 0
        self.used_at = asked_at
        self.admit_until = self.valid_until = 0.0
        self.extend(message, asked_at)

    @property
    def free(self) -> int:
        """What can be reserved."""
        return self.amount - self.spent - self.reserved

    def extend(self, message: pb.BudgetLease, asked_at: float) -> None:
        """Take the ledger's answer to a call that began at `asked_at`."""
        self.valid_until = asked_at + _seconds(message.valid_for)
        self.admit_until = asked_at + _seconds(message.admit_for) if message.HasField("admit_for") else 0.0
        if message.state != pb.BUDGET_LEASE_STATE_ACTIVE:
            self.expired = True

    def admits(self, now: float) -> bool:
        """Whether requests may begin on it."""
        return not (self.closing or self.expired) and now < self.admit_until and not self.is_ending(now)

    def is_ending(self, now: float) -> bool:
        """Whether what runs on it must stop: its end is near, and nobody has extended it."""
        return self.expired or now >= self.valid_until - FENCE_S

    def is_idle(self, now: float) -> bool:
        """Whether it is worth giving back whole."""
        return not self.running and (now - self.used_at >= IDLE_S or now >= self.admit_until)

    def settle(self, reservation: Reservation, reserved: int, charged: int, spender: Spender, requests: int) -> int:
        """Turn what a reservation holds into what it used; returns that."""
        self.running.discard(reservation)
        self.reserved -= reserved
        self.spent += charged
        line = self.lines.setdefault(spender, [0, 0])
        line[0] += charged
        line[1] += requests
        self.changed.add(spender)
        return charged

    def report(self, wanted: int) -> pb.LeaseReport:
        """The next report, which gives back what is free beyond `wanted`: from now on, whether or not it arrives."""
        self.sequence += 1
        wanted = max(0, min(wanted, self.free))
        self.amount = self.spent + self.reserved + wanted
        changed, self.changed = self.changed, set()
        return pb.LeaseReport(
            budget_lease_id=self.lease_id,
            sequence=self.sequence,
            spent=self.spent,
            reserved=self.reserved,
            wanted=wanted,
            lines=self._lines(changed),
        )

    def unreport(self, report: pb.LeaseReport) -> None:
        """The report may not have arrived: the next one tells its lines again."""
        for line in report.lines:
            self.changed.add(Spender(line.hour_start.seconds, line.api_key_id, line.model))

    def settlement(self) -> pb.LeaseSettlement:
        """What became of it, once it has expired and nothing runs on it."""
        lines = {spender: (spent, requests) for spender, (spent, requests) in self.lines.items()}
        return to_settlement(self.lease_id, lines)

    def _lines(self, spenders: Iterable[Spender]) -> list[pb.LedgerLine]:
        return [_to_line(spender, *self.lines[spender]) for spender in spenders]


class Account:
    """This router's share in one budget: the leases it has of it, and how much it needs of them."""

    def __init__(self, budget: pb.Budget) -> None:
        self.leases: list[Lease] = []
        self.waiting = 0
        """What those need together that wait for a lease."""
        self.is_scarce = False
        """Whether the ledger last gave less than was wanted: nothing is held ahead of need then."""
        self.refilling = False
        """Whether more is being asked for ahead of need."""
        self._denial: pb.LeaseDenial | None = None
        self._denied_amount = 0
        self._denied_until = 0.0
        self._taken = 0
        self._taken_before = 0
        self.change(budget)

    def change(self, budget: pb.Budget) -> None:
        """Take the budget as it is now. What was refused before may be given now."""
        self.budget_id = budget.budget_id
        self.unit = budget.unit
        self.is_hard = budget.enforcement == pb.BUDGET_ENFORCEMENT_HARD
        self.is_scarce = False
        self._denial = None
        self._user_id = budget.user_id
        self._service_account_id = budget.service_account_id
        self._api_key_id = budget.api_key_id
        self._model = budget.model

    def binds(self, user_id: str, service_account_id: str, api_key_id: str, model: str) -> bool:
        """Whether requests of this principal for this model count."""
        return (
            self._model in ("", model)
            and self._user_id in ("", user_id)
            and self._service_account_id in ("", service_account_id)
            and self._api_key_id in ("", api_key_id)
        )

    def find(self, amount: int, now: float) -> Lease | None:
        """A lease with room for `amount`, the oldest first, so that the others become idle and go back."""
        for lease in self.leases:
            if lease.free >= amount and lease.admits(now):
                return lease
        return None

    @property
    def has_pieces(self) -> bool:
        """Whether leases have something free, though it was not enough: it goes back with the next report."""
        return any(lease.free and not (lease.closing or lease.expired) for lease in self.leases)

    def deny(self, denial: pb.LeaseDenial, amount: int, until: float) -> None:
        """Remember that the ledger has too little left for `amount`, and that waiting does not help."""
        self._denial, self._denied_amount, self._denied_until = denial, amount, until

    def known_denial(self, amount: int, now: float) -> pb.LeaseDenial | None:
        """The ledger's answer to as much or less, a moment ago. Without it, every client that goes on trying would have
        it asked."""
        return self._denial if amount >= self._denied_amount and now < self._denied_until else None

    def took(self, amount: int) -> None:
        """Count what was reserved."""
        self._taken += amount

    def wanted(self, amount: int) -> int:
        """How much to ask for where `amount` is needed."""
        return max(AHEAD * amount, self.waiting, self._taken + self._taken_before)

    def is_low(self, amount: int, now: float) -> bool:
        """Whether to ask for more before it is needed: few requests such as the last fit in what is left."""
        if self.is_scarce or self.refilling:
            return False
        enough = max(AHEAD * amount, self._taken) // 4
        # The newest has the most; the look at the others is rarely needed, and each request has this one.
        for lease in reversed(self.leases):
            if enough <= 0:
                break
            if lease.admits(now):
                enough -= lease.free
        return enough > 0

    def share_out(self, now: float) -> dict[str, int]:
        """How much of each lease to keep, by its id, as a second has passed: what the last one took, and some."""
        self._taken_before, self._taken = self._taken, 0
        left = 0 if self.is_scarce else 2 * self._taken_before
        kept = {}
        for lease in self.leases:
            keep = min(left, lease.free) if lease.admits(now) else 0
            kept[lease.lease_id] = keep
            left -= keep
        return kept


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def to_settlement(lease_id: str, lines: Mapping[Spender, tuple[int, int]]) -> pb.LeaseSettlement:
    """A settlement of units and requests by spender."""
    return pb.LeaseSettlement(
        budget_lease_id=lease_id,
        spent=sum(spent for spent, _ in lines.values()),
        lines=[_to_line(spender, *line) for spender, line in lines.items()],
    )


def _to_line(spender: Spender, spent: int, requests: int) -> pb.LedgerLine:
    return pb.LedgerLine(
        hour_start=Timestamp(seconds=spender.hour_start_s),
        api_key_id=spender.api_key_id,
        model=spender.model,
        spent=spent,
        requests=requests,
    )
