"""Budgets at admission: reserves a request's ceiling from slices leased of the ledger, and settles the truth.

While a slice lasts, nothing is asked of anybody: a request that no budget binds costs one look into a dictionary, one
that is bound some additions. The ledger is asked for slices ahead of need, told each second what was spent, and given
back what is not used. A request never runs on more than was leased before, so no number of routers can overspend; soft
budgets alone let a request pass for which no slice could be had.

A lease that nobody could extend ends: what runs on it is stopped before that, and it is settled afterwards, by this run
of the router or, from its journal, by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from aiaas.identity.v1 import budget_service_pb2 as pb
from mesh.auth import Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from router import metrics
from router.budget_ledger import Ledger
from router.ceilings import Ceiling
from router.leases import Account, Charge, Lease, Reservation, Spender, to_settlement

logger = logging.getLogger(__name__)

WAIT_S = 2.5
"""A request waits so long at most for what routers hold idle; they give it back within two seconds."""

_ASK_AGAIN_S = 0.25
_DENIED_S = 1.0
_AWAY_S = 3.0
_RENEW_S = 1.0
_LOOK_S = 0.25
_FORMER_S = 5.0
_REPORTS = 1000
_SETTLE_TRIES = 30
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 2.0
_HOUR_S = 3600


class Charged(Protocol):
    """What the journal knows of charges."""

    @property
    def router_id(self) -> str:
        """The router whose journal it is."""

    @property
    def instance_id(self) -> str:
        """This run of it."""

    def commit(self) -> None:
        """Make all that was charged so far outlive this process. Raises PlatformError(USAGE_UNRECORDABLE)."""

    async def lease_totals(self, lease_ids: Collection[str]) -> Mapping[str, Mapping[Spender, tuple[int, int]]]:
        """What was charged to leases, by their ids: units and requests of each spender."""


class _Organization:
    """The budgets of one organization, as they were resolved last; `due_at` is when they must be again."""

    def __init__(self, organization_id: str) -> None:
        self.organization_id = organization_id
        self.revision: int | None = None
        self.due_at = 0.0
        self.accounts: dict[str, Account] = {}
        self.bindings: dict[tuple[str, str], _Binding] = {}
        self.resolving = asyncio.Lock()

    def replace(self, response: pb.ResolveBudgetsResponse) -> None:
        """Take the budgets as they are now. A budget that stays keeps its leases."""
        before = self.accounts
        self.accounts = {}
        for budget in response.budgets:
            account = before.get(budget.budget_id)
            if account is None:
                account = Account(budget)
            else:
                account.change(budget)
            self.accounts[budget.budget_id] = account
        self.bindings.clear()
        self.revision = response.revision
        self.due_at = math.inf

    def binding(self, principal: Principal, model: str) -> _Binding:
        """The budgets that bind a principal's requests for a model."""
        key = (principal.id, model)
        binding = self.bindings.get(key)
        if binding is None:
            actor = (principal.user_id, principal.service_account_id, principal.api_key_id)
            accounts = tuple(account for account in self.accounts.values() if account.binds(*actor, model))
            binding = self.bindings[key] = _Binding(self, accounts)
        return binding


class _Binding:
    """The budgets that bind one principal's requests for one model. Who has to wait for a lease does so in line."""

    __slots__ = ("accounts", "line", "organization")

    def __init__(self, organization: _Organization, accounts: tuple[Account, ...]) -> None:
        self.organization = organization
        self.accounts = accounts
        self.line = asyncio.Lock()


class _Request:
    """A request that asks to be admitted. `ceiling` becomes less where a budget is nearly spent; `passing` are soft
    budgets that do not hear of it."""

    __slots__ = ("ceiling", "passing", "spender", "stop")

    def __init__(self, ceiling: Ceiling, spender: Spender, stop: Callable[[], None]) -> None:
        self.ceiling = ceiling
        self.spender = spender
        self.stop = stop
        self.passing: set[Account] = set()


class _Ask(NamedTuple):
    account: Account
    amount: int


class Budgets:
    """All budgets that this router's requests are bound by, as long as `run()` runs.

    The journal's ids are the router's: one that stays over restarts, and one of this run.
    """

    def __init__(self, ledger: Ledger, clock: Clock, journal: Charged) -> None:
        self._ledger = ledger
        self._clock = clock
        self._journal = journal
        self._router_id = journal.router_id
        self._router_instance_id = journal.instance_id
        self._organizations: dict[str, _Organization] = {}
        self._leases: dict[str, Lease] = {}
        self._renewing = asyncio.Lock()
        self._calls: set[asyncio.Task[Any]] = set()
        self._revision = 0
        # Until then nobody waits for the ledger just to learn that it is still away.
        self._away_until = 0.0
        metrics.BUDGET_LEASES.set_function(lambda: len(self._leases))

    async def reserve(
        self, principal: Principal, model: str, ceiling: Ceiling, admit_time: datetime, stop: Callable[[], None]
    ) -> Reservation | None:
        """Reserve the ceiling in every budget that binds the request, or in none; None if no budget does.

        Where a hard budget has too little left, the reservation's own ceiling is what it has. `stop` is called when a
        lease ends under the request, and may be called again. Raises PlatformError: INSUFFICIENT_QUOTA; UNAVAILABLE for
        a hard budget while the ledger is away, and for all while it is not known whether there are any.
        """
        organization = self._organizations.get(principal.organization_id)
        if organization is None or self._clock.monotonic() >= organization.due_at:
            organization = await self._resolve(principal.organization_id)
        if not organization.accounts:
            return None
        binding = organization.binding(principal, model)
        if not binding.accounts:
            return None
        hour_start_s = int(admit_time.timestamp()) // _HOUR_S * _HOUR_S
        request = _Request(ceiling, Spender(hour_start_s, principal.api_key_id, model), stop)
        if not binding.line.locked() and (reservation := self._take(binding, request)) is not None:
            return reservation
        return await self._wait(binding, principal, model, request)

    def unbound_organizations(self) -> list[str]:
        """The organizations of which it is known that they have no budgets."""
        return [
            organization.organization_id
            for organization in self._organizations.values()
            if organization.revision is not None and not organization.accounts
        ]

    def restore(self, organization_ids: Iterable[str]) -> None:
        """Begin with organizations that had no budgets. Each is asked about when it comes; it goes on without while the
        ledger is away."""
        for organization_id in organization_ids:
            self._organizations[organization_id] = organization = _Organization(organization_id)
            organization.revision = 0

    async def run(self) -> None:
        """Watch for changes, report and extend leases, stop what runs on those that end, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for task in (self._watch, self._keep_renewing, self._keep_fencing, self._keep_settling_former):
                tasks.create_task(task())

    async def close(self) -> None:
        """Give back everything, once nothing runs any more; what cannot be given back expires."""
        if self._calls:
            await asyncio.wait(self._calls)
        for lease in self._leases.values():
            lease.closing = True
        await self._renew()

    def _take(self, binding: _Binding, request: _Request) -> Reservation | None:
        """Reserve, if this router holds enough of every budget that counts something of the request."""
        now = self._clock.monotonic()
        charges = []
        for account in binding.accounts:
            amount = request.ceiling.amount(account.unit)
            if amount and account not in request.passing:
                lease = account.find(amount, now)
                if lease is None:
                    return None
                charges.append(Charge(lease, amount))
        for lease, amount in charges:
            lease.used_at = now
            lease.account.took(amount)
        reservation = Reservation(charges, request.ceiling, request.spender, request.stop)
        for lease, amount in charges:
            if lease.account.is_low(amount, now):
                lease.account.refilling = True
                self._call(self._refill(binding.organization, _Ask(lease.account, amount)))
        return reservation

    async def _wait(self, binding: _Binding, principal: Principal, model: str, request: _Request) -> Reservation:
        """Stand in line for leases. Raises what `reserve` does."""
        give_up = self._clock.monotonic() + WAIT_S
        organization = binding.organization
        pause_s = 0.0
        while True:
            with _waiting(binding, request.ceiling):
                async with binding.line:
                    while self._clock.monotonic() < organization.due_at:
                        if (reservation := self._take(binding, request)) is not None:
                            return reservation
                        if denials := await self._ask(binding, request):
                            await self._yield_to(denials, binding, request, give_up)
            # The budgets have changed, and others may bind the request now. A ledger that always says so is followed
            # neither at once nor for ever.
            if self._clock.monotonic() >= give_up:
                self._do_without(binding.accounts, request)
            await asyncio.sleep(pause_s)
            pause_s = _ASK_AGAIN_S
            organization = await self._resolve(organization.organization_id)
            binding = organization.binding(principal, model)

    async def _ask(self, binding: _Binding, request: _Request) -> Collection[pb.LeaseDenial]:
        """Ask the ledger for what the request lacks; returns what it refuses, or has just refused to another. Raises
        PlatformError(UNAVAILABLE)."""
        now = self._clock.monotonic()
        asks = []
        for account in binding.accounts:
            amount = request.ceiling.amount(account.unit)
            if not amount or account in request.passing or account.find(amount, now) is not None:
                continue
            if (denial := account.known_denial(amount, now)) is not None:
                return [denial]
            asks.append(_Ask(account, amount))
        try:
            if now < self._away_until:
                raise PlatformError(Reason.UNAVAILABLE)
            response: pb.LeaseResponse = await asyncio.shield(self._call(self._lease(binding.organization, asks)))
            if not response.denials and len(response.leases) < len(asks) and now < binding.organization.due_at:
                # It gave nothing, refused nothing and knows of no change: it would say the same again.
                raise PlatformError(Reason.UNAVAILABLE)
        except PlatformError as error:
            self._do_without([account for account, _ in asks], request, error)
            return ()
        return response.denials

    def _do_without(self, accounts: Iterable[Account], request: _Request, error: PlatformError | None = None) -> None:
        """The ledger does not say. Soft budgets are there to tell, not to refuse: the request goes on, and they do not
        hear of it. Raises PlatformError(UNAVAILABLE) where no more of them are soft."""
        soft = {account for account in accounts if not account.is_hard} - request.passing
        if not soft:
            metrics.BUDGET_REFUSALS.labels("unavailable").inc()
            raise PlatformError(Reason.UNAVAILABLE, retry_after_s=_DENIED_S) from error
        request.passing |= soft

    async def _yield_to(
        self, denials: Collection[pb.LeaseDenial], binding: _Binding, request: _Request, give_up: float
    ) -> None:
        """Returns when it makes sense to ask again, perhaps for less. Raises PlatformError(INSUFFICIENT_QUOTA)."""
        now = self._clock.monotonic()
        accounts = {account.budget_id: account for account in binding.accounts}
        is_idle_elsewhere = all(denial.HasField("retry_after") for denial in denials)
        if now < give_up and (is_idle_elsewhere or any(accounts[denial.budget_id].has_pieces for denial in denials)):
            await asyncio.sleep(_ASK_AGAIN_S)
            return
        for denial in denials:
            account = accounts[denial.budget_id]
            left = denial.limit - denial.spent - denial.leased
            amount = request.ceiling.amount(account.unit)
            if amount > left:
                account.deny(denial, amount, now + _DENIED_S)
            ceiling = request.ceiling.within(account.unit, left)
            if ceiling is None:
                metrics.BUDGET_REFUSALS.labels("spent").inc()
                raise PlatformError(Reason.INSUFFICIENT_QUOTA, budget_id=denial.budget_id)
            request.ceiling = ceiling

    async def _refill(self, organization: _Organization, ask: _Ask) -> None:
        """Ask for a slice ahead of need."""
        try:
            await self._lease(organization, [ask])
        except PlatformError as error:
            logger.info("a budget's lease could not be had ahead of need: %s", error.reason.value)
        finally:
            ask.account.refilling = False

    async def _lease(self, organization: _Organization, asks: list[_Ask]) -> pb.LeaseResponse:
        wanted = [account.wanted(amount) for account, amount in asks]
        request = pb.LeaseRequest(
            router_id=self._router_id,
            router_instance_id=self._router_instance_id,
            request_id=new_id("ask"),
            organization_id=organization.organization_id,
            revision=organization.revision or 0,
            asks=[
                pb.LeaseAsk(budget_id=account.budget_id, needed=amount, wanted=more)
                for (account, amount), more in zip(asks, wanted, strict=True)
            ],
        )
        asked_at = self._clock.monotonic()
        try:
            response = await self._ledger.lease(request)
        except PlatformError:
            # It may have been given, and only the answer was lost; the same request gets the same leases.
            self._away_until = self._clock.monotonic() + _AWAY_S
            response = await self._ledger.lease(request)
        self._away_until = 0.0
        if response.revision != organization.revision:
            organization.due_at = 0.0
        for (account, _), more, message in zip(asks, wanted, response.leases, strict=False):
            lease = Lease(account, message, asked_at)
            self._leases[lease.lease_id] = lease
            account.leases.append(lease)
            account.is_scarce = account.is_hard and message.amount < more
        for denial in response.denials:
            if (denied := organization.accounts.get(denial.budget_id)) is not None:
                denied.is_scarce = True
        return response

    async def _resolve(self, organization_id: str) -> _Organization:
        """An organization's budgets. Raises PlatformError(UNAVAILABLE) if they were never known; those that were go on
        counting while the ledger is away."""
        organization = self._organizations.setdefault(organization_id, _Organization(organization_id))
        async with organization.resolving:
            if self._clock.monotonic() >= organization.due_at:
                try:
                    response = await asyncio.shield(self._call(self._ledger.resolve(organization_id)))
                except PlatformError as error:
                    if organization.revision is None:
                        raise PlatformError(Reason.UNAVAILABLE, retry_after_s=_DENIED_S) from error
                    organization.due_at = self._clock.monotonic() + _DENIED_S
                else:
                    organization.replace(response)
        return organization

    async def _watch(self) -> None:
        """Learn which organizations' budgets change."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                async for change in self._ledger.watch(self._revision):
                    pause_s = _FIRST_PAUSE_S
                    if not self._revision:
                        # Nobody can tell what changed before this first answer.
                        for organization in self._organizations.values():
                            organization.due_at = 0.0
                    self._revision = max(self._revision, change.revision)
                    changed = self._organizations.get(change.organization_id)
                    if changed is not None and changed.revision != change.revision:
                        changed.due_at = 0.0
            except PlatformError as error:
                logger.warning("changes of budgets cannot be watched: %s", error.reason.value)
            await asyncio.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    async def _keep_renewing(self) -> None:
        while True:
            await self._renew()
            await asyncio.sleep(_RENEW_S)

    async def _renew(self) -> None:
        """Report on every lease: extend it, give it back, or settle it. Two at a time would give one back twice."""
        async with self._renewing:
            await self._report()

    async def _report(self) -> None:
        try:
            # What the ledger has heard must not be forgotten by a router that is killed in this moment: its next run
            # could never settle the lease.
            self._journal.commit()
        except PlatformError as error:
            logger.error("leases of budgets are not renewed, as the journal cannot be written: %s", error.reason.value)
            return
        now = self._clock.monotonic()
        kept: dict[str, int] = {}
        for account in {lease.account for lease in self._leases.values()}:
            kept |= account.share_out(now)
        renewed, released, expired = [], [], []
        for lease in self._leases.values():
            if lease.expired:
                if not lease.running:
                    expired.append(lease)
            elif lease.closing or lease.is_idle(now):
                lease.closing = True
                released.append(lease)
            else:
                renewed.append(lease)
        async with asyncio.TaskGroup() as calls:
            for start in range(0, len(renewed), _REPORTS):
                calls.create_task(self._extend(renewed[start : start + _REPORTS], kept))
            for start in range(0, len(released), _REPORTS):
                calls.create_task(self._give_back(released[start : start + _REPORTS]))
            for lease in expired:
                calls.create_task(self._settle(lease))

    async def _extend(self, leases: list[Lease], kept: Mapping[str, int]) -> None:
        asked_at = self._clock.monotonic()
        reports = [lease.report(kept.get(lease.lease_id, 0)) for lease in leases]
        request = pb.RenewRequest(
            router_id=self._router_id, router_instance_id=self._router_instance_id, reports=reports
        )
        try:
            response = await self._ledger.renew(request)
        except PlatformError as error:
            self._unreport(leases, reports, error)
            return
        for lease, message in zip(leases, response.leases, strict=True):
            lease.extend(message, asked_at)
            if message.state == pb.BUDGET_LEASE_STATE_SETTLED:
                # Somebody settled it by hand.
                self._stop(lease)
                self._drop(lease)

    async def _give_back(self, leases: list[Lease]) -> None:
        asked_at = self._clock.monotonic()
        reports = [lease.report(0) for lease in leases]
        request = pb.ReleaseRequest(
            router_id=self._router_id, router_instance_id=self._router_instance_id, reports=reports
        )
        try:
            response = await self._ledger.release(request)
        except PlatformError as error:
            self._unreport(leases, reports, error)
            return
        for lease, message in zip(leases, response.leases, strict=True):
            if message.state == pb.BUDGET_LEASE_STATE_SETTLED:
                self._drop(lease)
            else:
                lease.extend(message, asked_at)

    def _unreport(self, leases: list[Lease], reports: list[pb.LeaseReport], error: PlatformError) -> None:
        metrics.BUDGET_RENEWAL_FAILURES.inc()
        logger.warning("%d leases of budgets could not be renewed: %s", len(leases), error.reason.value)
        for lease, report in zip(leases, reports, strict=True):
            lease.unreport(report)

    async def _settle(self, lease: Lease) -> None:
        """Settle an expired lease. One that is refused for long is left to what the journal says of it."""
        lease.settle_tries += 1
        try:
            await self._ledger.settle(pb.SettleRequest(router_id=self._router_id, settlements=[lease.settlement()]))
        except PlatformError as error:
            if error.reason is Reason.UNAVAILABLE or lease.settle_tries < _SETTLE_TRIES:
                return
            logger.error("lease %s could not be settled: %s", lease.lease_id, error.reason.value)
        self._drop(lease)

    def _drop(self, lease: Lease) -> None:
        del self._leases[lease.lease_id]
        lease.account.leases.remove(lease)

    async def _keep_fencing(self) -> None:
        while True:
            self.fence()
            await asyncio.sleep(_LOOK_S)

    def fence(self) -> None:
        """Stop what runs on leases of hard budgets that end."""
        now = self._clock.monotonic()
        for lease in self._leases.values():
            if lease.running and lease.account.is_hard and lease.is_ending(now):
                self._stop(lease)

    def _stop(self, lease: Lease) -> None:
        for reservation in tuple(lease.running):
            metrics.BUDGET_REFUSALS.labels("stopped").inc()
            reservation.stop()

    async def _keep_settling_former(self) -> None:
        while True:
            with contextlib.suppress(PlatformError):
                await self.settle_former()
            await asyncio.sleep(_FORMER_S)

    async def settle_former(self) -> None:
        """Settle expired leases that this run does not know: those of former runs, and one whose giving was answered to
        nobody. Raises PlatformError(UNAVAILABLE)."""
        lost = {
            lease.budget_lease_id: lease
            for lease in await self._ledger.unsettled(self._router_id)
            if lease.state == pb.BUDGET_LEASE_STATE_EXPIRED and lease.budget_lease_id not in self._leases
        }
        if not lost:
            return
        charges = await self._journal.lease_totals(lost.keys())
        for lease_id, lease in lost.items():
            lines = dict(charges.get(lease_id, {}))
            known = sum(spent for spent, _ in lines.values())
            if known < lease.spent:
                # The machine lost power right after a report. What was reported is charged.
                nobody = Spender(lease.create_time.seconds // _HOUR_S * _HOUR_S, "", "")
                lines[nobody] = (lease.spent - known, 0)
            settlement = to_settlement(lease_id, lines)
            try:
                await self._ledger.settle(pb.SettleRequest(router_id=self._router_id, settlements=[settlement]))
            except PlatformError as error:
                # One that cannot be settled must not keep the others from it.
                logger.error("lease %s of a former run could not be settled: %s", lease_id, error.reason.value)

    def _call(self, call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a call that goes on if the request that wants it is cancelled: what it brings is of use to others. It
        is nobody's request, so it carries no credential and no deadline of one."""
        task = asyncio.create_task(call, context=contextvars.Context())
        self._calls.add(task)
        task.add_done_callback(self._called)
        return task

    def _called(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            # Whoever waits for it gets its error; it is no surprise if nobody does.
            task.exception()


@contextlib.contextmanager
def _waiting(binding: _Binding, ceiling: Ceiling) -> Iterator[None]:
    """Have whoever asks for a lease ask for this request as well."""
    amounts = [ceiling.amount(account.unit) for account in binding.accounts]
    for account, amount in zip(binding.accounts, amounts, strict=True):
        account.waiting += amount
    try:
        yield
    finally:
        for account, amount in zip(binding.accounts, amounts, strict=True):
            account.waiting -= amount
