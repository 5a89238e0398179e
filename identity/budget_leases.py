"""Leases of budgets: given, reported on, given back, settled; it never lets routers hold more than a hard budget has.

Whoever changes a lease holds its period's lock, and a lease is as old as `read_time` says, which was read under it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from identity import fields
from identity.budgets import LARGEST, BudgetPeriod, BudgetUnit, PeriodKey, check_model
from identity.organizations import existing
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.pages import Moment, Text, TimePlace

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

logger = logging.getLogger(__name__)

LEASE_TTL = timedelta(seconds=10)
"""So long a lease lasts from when it was given or extended."""

DENIED_FOR = timedelta(seconds=1)
"""When asking again may help, where routers hold what they do not use: they report each second."""

SHARE = 8
"""Ahead of need a router gets at most this part of what a hard budget has left, so that near the limit slices shrink to
single requests."""

REMEMBERED = timedelta(days=7)
"""So long a settled lease is remembered, for a settlement or a report that comes again."""

_FORGET_INTERVAL_S = 60.0
_FORGOTTEN_AT_ONCE = 1000
_ASKS = 64
_REPORTS = 1000


class BudgetLeaseState(StrEnum):
    """Where a lease is in its life."""

    ACTIVE = "active"
    EXPIRED = "expired"
    SETTLED = "settled"


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a router."""

    router_id: str
    router_instance_id: str


@dataclass(frozen=True, slots=True)
class LeaseAsk:
    """What a router needs of a budget at least, and what it would like to hold ahead of need, in the budget's unit."""

    budget_id: str
    needed: int
    wanted: int


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """Spending and requests in one hour by one key on one model, in all since the lease was given."""

    hour_start: datetime
    api_key_id: str
    model: str
    spent: int
    requests: int


@dataclass(frozen=True, slots=True)
class LeaseReport:
    """What became of a lease so far. `reserved` is for requests that run, `wanted` what to keep beyond that."""

    budget_lease_id: str
    sequence: int
    spent: int
    reserved: int
    wanted: int
    lines: tuple[LedgerLine, ...]


@dataclass(frozen=True, slots=True)
class LeaseSettlement:
    """What became of an expired lease in all."""

    budget_lease_id: str
    spent: int
    lines: tuple[LedgerLine, ...]


@dataclass(frozen=True, slots=True)
class BudgetLease:
    """A slice of one period of a budget, in the hands of one run of a router, as it was at `read_time`.

    Until it is settled, all of `amount` counts against the limit: as spent what was reported so, the rest as leased.
    """

    budget_lease_id: str
    organization_id: str
    budget_id: str
    period_start: datetime
    period_end: datetime | None
    holder: Run
    amount: int
    expire_time: datetime
    create_time: datetime
    read_time: datetime
    sequence: int = 0
    spent: int = 0
    reserved: int = 0
    state: BudgetLeaseState = BudgetLeaseState.ACTIVE

    @property
    def leased(self) -> int:
        """What is held and not spent; a settled one has nothing left."""
        return self.amount - self.spent

    @property
    def valid_for(self) -> timedelta | None:
        """How long requests may run on it."""
        return self.expire_time - self.read_time if self.state is BudgetLeaseState.ACTIVE else None

    @property
    def admit_for(self) -> timedelta | None:
        """How long requests may begin on it, which no longer helps once its period has ended."""
        if self.valid_for is None or self.period_end is None:
            return self.valid_for
        left = self.period_end - self.read_time
        return min(self.valid_for, left) if left > timedelta() else None


@dataclass(frozen=True, slots=True)
class LeaseDenial:
    """A budget that could not give what was needed. `may_return` tells whether some of it is held idle."""

    period: BudgetPeriod
    may_return: bool


@dataclass(frozen=True, slots=True)
class LeaseAnswer:
    """All leases that were asked for, or none and those budgets that are the reason; neither where the revision that
    was asked with is not the organization's any more."""

    revision: int
    leases: tuple[BudgetLease, ...] = ()
    denials: tuple[LeaseDenial, ...] = ()


@dataclass(frozen=True, slots=True)
class LedgerTotal:
    """The ledger's sum over all leases of a budget, in one hour, of one key and one model."""

    organization_id: str
    budget_id: str
    unit: BudgetUnit
    hour_start: datetime
    api_key_id: str
    model: str
    spent: int
    requests: int


class LedgerPlace(msgspec.Struct, frozen=True, array_like=True):
    """A place in the order of the ledger's totals."""

    organization_id: Text
    budget_id: Text
    hour_start: Moment
    api_key_id: Text
    model: Text


class BudgetLeases:
    """The operations on leases. Callers' permissions were held to the contract before."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def lease(
        self, holder: Run, request_id: str, organization_id: str, revision: int, asks: Sequence[LeaseAsk]
    ) -> LeaseAnswer:
        """Give a slice of each budget, or of none; a repeat with the same `request_id` gives the same ones.

        Raises PlatformError(INVALID_ARGUMENT) naming the field.
        """
        _check_asks(request_id, asks)
        budget_ids = sorted(ask.budget_id for ask in asks)
        async with self._store.transaction() as stored:
            given = await _given(stored, holder, request_id, asks)
            current = await stored.budget_leases.binding(organization_id, budget_ids)
            if given or current != (revision, budget_ids):
                return LeaseAnswer(current[0], given)
            periods = {budget_id: await stored.budget_periods.lock_current(budget_id) for budget_id in budget_ids}
            # Meanwhile the same request may have been answered, or a budget changed.
            given = await _given(stored, holder, request_id, asks)
            current = await stored.budget_leases.binding(organization_id, budget_ids)
            if given or current != (revision, budget_ids):
                return LeaseAnswer(current[0], given)
            short = [periods[ask.budget_id] for ask in asks if ask.needed > _room(periods[ask.budget_id])]
            if short:
                idle = await stored.budget_leases.find_idle(short)
                denials = tuple(LeaseDenial(period, period.budget_id in idle) for period in short)
                return LeaseAnswer(revision, denials=denials)
            now = await stored.budget_leases.now()
            new = tuple(self._new(holder, organization_id, ask, periods[ask.budget_id], now) for ask in asks)
            await stored.budget_leases.add(new, request_id)
            await stored.budget_periods.move({_period_of(lease): (0, lease.amount) for lease in new})
            return LeaseAnswer(revision, new)

    async def renew(self, holder: Run, reports: Sequence[LeaseReport]) -> list[BudgetLease | None]:
        """Take reports and extend their leases; None for one that the router never had. A lease that has expired, or
        that another run holds, is fenced: its report is not taken, and it is never active again.

        Raises PlatformError: INVALID_ARGUMENT naming the field, FAILED_PRECONDITION for a report older than the last.
        """
        return await self._report(holder, reports, _extended)

    async def release(self, holder: Run, reports: Sequence[LeaseReport]) -> list[BudgetLease | None]:
        """Take last reports and what is left of their leases. Raises PlatformError as `renew` does, and
        FAILED_PRECONDITION where requests still run."""
        for index, report in enumerate(reports):
            if report.reserved:
                raise _refused("Requests still run on this lease.", f"reports[{index}].reserved")
            if report.wanted:
                raise fields.invalid(f"reports[{index}].wanted", "must be 0 for a lease that is given back")
        return await self._report(holder, reports, _released)

    async def settle(self, router_id: str, settlements: Sequence[LeaseSettlement]) -> list[BudgetLease]:
        """Charge what was spent of expired leases of any run of a router, and free the rest. The same again changes
        nothing.

        Raises PlatformError: INVALID_ARGUMENT naming the field, NOT_FOUND, FAILED_PRECONDITION for a lease that has not
        expired and for one that was settled with another value.
        """
        _check_count(settlements, "settlements")
        for index, settlement in enumerate(settlements):
            _check_lines(settlement.lines, f"settlements[{index}].lines")
            if sum(line.spent for line in settlement.lines) != settlement.spent:
                raise fields.invalid(f"settlements[{index}].lines", "must be as much together as spent")
        ids = [settlement.budget_lease_id for settlement in settlements]
        async with self._store.transaction() as stored:
            leases = await stored.budget_leases.lock(router_id, ids)
            settled, changes, lines = [], [], {}
            for index, settlement in enumerate(settlements):
                lease = leases.get(settlement.budget_lease_id)
                if lease is None:
                    raise PlatformError(Reason.NOT_FOUND, field=f"settlements[{index}].budget_lease_id")
                after = _settled(lease, settlement.spent, f"settlements[{index}].spent")
                settled.append(after)
                if after is not lease:
                    changes.append((lease, after))
                    lines[lease.budget_lease_id] = settlement.lines
            # The journal knows of all of it, the reports perhaps not.
            await stored.budget_leases.drop_lines(list(lines))
            await stored.budget_leases.put_lines(lines)
            await _write(stored, changes)
            return settled

    async def settle_by_hand(
        self, organization_id: str, budget_id: str, budget_lease_id: str, spent: int, reason: str
    ) -> BudgetLease:
        """Charge so much of an expired lease, and free the rest. What no report said the key and the model of goes to a
        line without them. The same again changes nothing.

        Raises PlatformError as `settle` does.
        """
        fields.check_reason(reason, "reason", required=False)
        async with self._store.transaction() as stored:
            router_id = await stored.budget_leases.find_router(organization_id, budget_id, budget_lease_id)
            if router_id is None:
                raise PlatformError(Reason.NOT_FOUND)
            lease = (await stored.budget_leases.lock(router_id, [budget_lease_id]))[budget_lease_id]
            after = _settled(lease, spent, "spent")
            if after is not lease:
                await _write(stored, [(lease, after)])
            return after

    async def list_of_router(self, router_id: str, after: TimePlace | None, limit: int) -> list[BudgetLease]:
        """Up to `limit` leases of a router that are not settled, oldest first."""
        async with self._store.transaction() as stored:
            return await stored.budget_leases.page_of_router(router_id, after, limit)

    async def list_of_budget(
        self,
        organization_id: str,
        budget_id: str,
        after: TimePlace | None,
        limit: int,
        state: BudgetLeaseState | None,
    ) -> list[BudgetLease]:
        """Up to `limit` leases of a budget, oldest first; a removed budget still has them.

        Raises PlatformError(NOT_FOUND) for a stranger's organization.
        """
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            return await stored.budget_leases.page(organization_id, budget_id, after, limit, state)

    async def query(
        self, organization_id: str, start_time: datetime, end_time: datetime, after: LedgerPlace | None, limit: int
    ) -> list[LedgerTotal]:
        """Up to `limit` totals of the hours from `start_time` until before `end_time`, of all organizations where none
        is named. Raises PlatformError(INVALID_ARGUMENT) naming the field."""
        for moment, field in ((start_time, "start_time"), (end_time, "end_time")):
            _check_hour(moment, field)
        if end_time <= start_time:
            raise fields.invalid("end_time", "must lie after start_time")
        async with self._store.transaction() as stored:
            return await stored.budget_leases.total(organization_id, start_time, end_time, after, limit)

    async def run(self, stop: asyncio.Event) -> None:
        """Forget old leases every minute until `stop` is set."""
        while not stop.is_set():
            try:
                while await self.forget() == _FORGOTTEN_AT_ONCE and not stop.is_set():
                    pass
            except PlatformError as error:
                logger.warning("old leases were not removed: %s", error.reason.value)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FORGET_INTERVAL_S):
                    await stop.wait()

    async def forget(self) -> int:
        """Remove settled leases that are older than anybody asks for, some at a time; gives how many."""
        async with self._store.transaction() as stored:
            return await stored.budget_leases.forget_settled(REMEMBERED, _FORGOTTEN_AT_ONCE)

    def _new(
        self, holder: Run, organization_id: str, ask: LeaseAsk, period: BudgetPeriod, now: datetime
    ) -> BudgetLease:
        """A lease of at least what is needed, which the period has."""
        return BudgetLease(
            budget_lease_id=new_id("lease", clock=self._clock),
            organization_id=organization_id,
            budget_id=ask.budget_id,
            period_start=period.start_time,
            period_end=period.end_time,
            holder=holder,
            amount=max(ask.needed, min(ask.wanted, _room(period) // SHARE)),
            expire_time=now + LEASE_TTL,
            create_time=now,
            read_time=now,
        )

    async def _report(self, holder: Run, reports: Sequence[LeaseReport], taken: _Taken) -> list[BudgetLease | None]:
        _check_count(reports, "reports")
        for index, report in enumerate(reports):
            _check_report(report, f"reports[{index}]")
        ids = [report.budget_lease_id for report in reports]
        async with self._store.transaction() as stored:
            leases = await stored.budget_leases.lock(holder.router_id, ids)
            changes, lines = [], {}
            for index, report in enumerate(reports):
                lease = leases.get(report.budget_lease_id)
                if lease is None or lease.state is BudgetLeaseState.SETTLED:
                    continue
                if lease.state is BudgetLeaseState.EXPIRED or lease.holder != holder:
                    changes.append((lease, replace(lease, state=BudgetLeaseState.EXPIRED)))
                elif report.sequence != lease.sequence:
                    _check_progress(lease, report, f"reports[{index}]")
                    changes.append((lease, taken(lease, report)))
                    lines[lease.budget_lease_id] = report.lines
            await stored.budget_leases.put_lines(lines)
            too_much = await stored.budget_leases.find_beyond(
                {after.budget_lease_id: after.spent for _, after in changes if lines.get(after.budget_lease_id)}
            )
            if too_much is not None:
                raise fields.invalid(f"reports[{ids.index(too_much)}].lines", "are more together than spent")
            await _write(stored, changes)
        leases |= {after.budget_lease_id: after for _, after in changes}
        return [leases.get(budget_lease_id) for budget_lease_id in ids]


_Taken: TypeAlias = Callable[[BudgetLease, LeaseReport], BudgetLease]


async def _given(
    stored: Transaction, holder: Run, request_id: str, asks: Sequence[LeaseAsk]
) -> tuple[BudgetLease, ...]:
    """What the request was given before, in the order of its asks. Raises PlatformError(INVALID_ARGUMENT)."""
    given = {lease.budget_id: lease for lease in await stored.budget_leases.list_given(holder.router_id, request_id)}
    if given and given.keys() != {ask.budget_id for ask in asks}:
        raise fields.invalid("request_id", "was used to ask for other budgets")
    return tuple(given[ask.budget_id] for ask in asks) if given else ()


async def _write(stored: Transaction, changes: Sequence[tuple[BudgetLease, BudgetLease]]) -> None:
    """Store locked leases as they are after, and move their periods' amounts by the difference to before."""
    moves: dict[PeriodKey, tuple[int, int]] = {}
    for before, after in changes:
        spent, leased = moves.get(_period_of(after), (0, 0))
        moves[_period_of(after)] = (spent + after.spent - before.spent, leased + after.leased - before.leased)
    moves = {key: move for key, move in moves.items() if any(move)}
    await stored.budget_leases.change([after for _, after in changes])
    for falling in await stored.budget_periods.move(moves):
        await stored.budgets.fit(*falling)
    await stored.budget_leases.fold(
        [after.budget_lease_id for _, after in changes if after.state is BudgetLeaseState.SETTLED]
    )
    await stored.budget_alerts.record_crossed([key for key, (spent, _) in moves.items() if spent])


def _period_of(lease: BudgetLease) -> PeriodKey:
    return lease.budget_id, lease.period_start


def _room(period: BudgetPeriod) -> int:
    """What can be leased; of a soft budget as much as can be counted."""
    return (period.limit if period.is_hard else LARGEST) - period.spent - period.leased


def _extended(lease: BudgetLease, report: LeaseReport) -> BudgetLease:
    """The lease after a report, which gives back what is not wanted and never takes more."""
    return replace(
        lease,
        sequence=report.sequence,
        amount=min(lease.amount, report.spent + report.reserved + report.wanted),
        spent=report.spent,
        reserved=report.reserved,
        expire_time=lease.read_time + LEASE_TTL,
    )


def _released(lease: BudgetLease, report: LeaseReport) -> BudgetLease:
    """The lease after its last report."""
    return replace(_closed(lease, report.spent), sequence=report.sequence)


def _settled(lease: BudgetLease, spent: int, field: str) -> BudgetLease:
    """The lease after its settlement; the same object if that was so already. Raises PlatformError."""
    if lease.state is BudgetLeaseState.SETTLED:
        if spent != lease.spent:
            raise _refused(f"The lease was settled with {lease.spent}.", field)
        return lease
    # One that was fenced before its time may still be used by a run that has not heard of it.
    if lease.read_time < lease.expire_time:
        raise _refused(f"The lease '{lease.budget_lease_id}' has not expired.")
    if not lease.spent <= spent <= lease.amount:
        raise fields.invalid(field, f"must be {lease.spent} to {lease.amount}, as was reported and leased")
    return _closed(lease, spent)


def _closed(lease: BudgetLease, spent: int) -> BudgetLease:
    return replace(lease, amount=spent, spent=spent, reserved=0, state=BudgetLeaseState.SETTLED)


def _check_asks(request_id: str, asks: Sequence[LeaseAsk]) -> None:
    if not request_id:
        raise fields.invalid("request_id", "is required")
    fields.check_request_id(request_id)
    if not 1 <= len(asks) <= _ASKS:
        raise fields.invalid("asks", f"must have 1 to {_ASKS} values")
    fields.check_once([ask.budget_id for ask in asks], "asks")
    for index, ask in enumerate(asks):
        if not 1 <= ask.needed <= LARGEST:
            raise fields.invalid(f"asks[{index}].needed", f"must be 1 to {LARGEST}")
        _check_amount(ask.wanted, f"asks[{index}].wanted")


def _check_count(items: Sequence[LeaseReport] | Sequence[LeaseSettlement], field: str) -> None:
    if len(items) > _REPORTS:
        raise fields.invalid(field, f"may have {_REPORTS} values")
    fields.check_once([item.budget_lease_id for item in items], field)


def _check_report(report: LeaseReport, field: str) -> None:
    if report.sequence < 1:
        raise fields.invalid(f"{field}.sequence", "must be 1 or more")
    for name in ("spent", "reserved", "wanted"):
        _check_amount(getattr(report, name), f"{field}.{name}")
    _check_lines(report.lines, f"{field}.lines")


def _check_progress(lease: BudgetLease, report: LeaseReport, field: str) -> None:
    """Raise PlatformError if a report cannot be the next of a lease."""
    if report.sequence < lease.sequence:
        raise _refused(f"Report {lease.sequence} of this lease was taken before.", f"{field}.sequence")
    if not lease.spent <= report.spent <= lease.amount:
        raise fields.invalid(f"{field}.spent", f"must be {lease.spent} to {lease.amount}, as was reported and leased")
    if report.reserved > lease.amount - report.spent:
        raise fields.invalid(f"{field}.reserved", "is more than what is left of the lease")


def _check_lines(lines: Sequence[LedgerLine], field: str) -> None:
    fields.check_once([(line.hour_start, line.api_key_id, line.model) for line in lines], field)
    for index, line in enumerate(lines):
        _check_hour(line.hour_start, f"{field}[{index}].hour_start")
        fields.check_filter(line.api_key_id, f"{field}[{index}].api_key_id")
        check_model(line.model, f"{field}[{index}].model")
        _check_amount(line.spent, f"{field}[{index}].spent")
        _check_amount(line.requests, f"{field}[{index}].requests")


def _check_amount(amount: int, field: str) -> None:
    if not 0 <= amount <= LARGEST:
        raise fields.invalid(field, f"must be 0 to {LARGEST}")


def _check_hour(moment: datetime, field: str) -> None:
    if moment.minute or moment.second or moment.microsecond:
        raise fields.invalid(field, "must be on the hour")


def _refused(description: str, field: str | None = None) -> PlatformError:
    return PlatformError(Reason.FAILED_PRECONDITION, field=field, description=description)
