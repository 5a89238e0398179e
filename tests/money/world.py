"""A small economy of real parts: identity's ledger on PostgreSQL, and routers' budgets and journals in this process,
all on one clock that a test moves. What engines made is counted apart from all of them, to be held against them.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from aiaas.identity.v1 import budget_service_pb2 as pb
from aiaas.type.v1.usage_event_pb2 import (
    ENDPOINT_CHAT_COMPLETIONS,
    OUTCOME_SUCCEEDED,
    OUTCOME_TRUNCATED,
    USAGE_SOURCE_ENGINE,
    Outcome,
    TokenUsage,
    UsageEvent,
)
from identity.budget_changes import BudgetChanges
from identity.budget_leases import BudgetLeases
from identity.budget_overrides import BudgetOverride, BudgetOverrides
from identity.budget_service import BudgetService
from identity.budgets import Budgets as IdentityBudgets
from identity.organizations import Organization
from identity.stores import Store
from mesh.auth import Principal
from mesh.database import Database
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.migrate import migrate
from router.budget_ledger import Ledger
from router.budgets import Budgets
from router.ceilings import Ceiling
from router.journal import Entry, Journal
from router.journal_queries import Selection, select
from router.prices import Price
from router.usage import UsageRecord, abort_event, close_event, open_event

T = TypeVar("T")

MODEL = "m"
_LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
PRICE = Price("price_1", MODEL, 1_000_000, 1_000_000, 1_000_000, _LONG_AGO, _LONG_AGO)
"""A micro-dollar a token, so that a budget of cost counts what one of tokens does."""

SHIFTED_CLOCK = """
CREATE SCHEMA shifted;
CREATE TABLE shifted.clock (shift interval NOT NULL);
INSERT INTO shifted.clock VALUES ('0');
CREATE FUNCTION shifted.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS
    'SELECT pg_catalog.clock_timestamp() + shift FROM shifted.clock';
"""
"""A clock_timestamp() that a test can move; with the schema before pg_catalog in the search path, it is the one that
is found."""


class ShiftedClock:
    """The machine's clock, and what a test has let pass besides."""

    def __init__(self) -> None:
        self.shift_s = 0.0

    def now(self) -> datetime:
        """The time of day, in UTC."""
        return datetime.now(UTC) + timedelta(seconds=self.shift_s)

    def monotonic(self) -> float:
        """Seconds."""
        return time.monotonic() + self.shift_s


class Line:
    """The way from one router to the ledger, which can be cut: calls do not arrive, or their answers do not."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.is_cut = False
        self.loses_answers = False

    async def resolve(self, organization_id: str) -> pb.ResolveBudgetsResponse:
        return await self._call(self._ledger.resolve(organization_id))

    async def watch(self, after_revision: int) -> AsyncIterator[pb.WatchBudgetsResponse]:
        """Nobody watches here: a test says when a router learns of a change."""
        changes: tuple[pb.WatchBudgetsResponse, ...] = ()
        for change in changes:
            yield change

    async def lease(self, request: pb.LeaseRequest) -> pb.LeaseResponse:
        return await self._call(self._ledger.lease(request))

    async def renew(self, request: pb.RenewRequest) -> pb.RenewResponse:
        return await self._call(self._ledger.renew(request))

    async def release(self, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        return await self._call(self._ledger.release(request))

    async def settle(self, request: pb.SettleRequest) -> pb.SettleResponse:
        return await self._call(self._ledger.settle(request))

    async def unsettled(self, router_id: str) -> list[pb.BudgetLease]:
        return await self._call(self._ledger.unsettled(router_id))

    async def _call(self, call: Awaitable[T]) -> T:
        if self.is_cut:
            call.close()  # type: ignore[attr-defined]  # it is a coroutine
            raise PlatformError(Reason.UNAVAILABLE)
        answer = await call
        if self.loses_answers:
            raise PlatformError(Reason.UNAVAILABLE)
        return answer


@dataclass(eq=False)
class Running:
    """A request that was admitted, and what its engine has made so far."""

    record: UsageRecord
    event: UsageEvent
    entry: Entry
    ceiling: Ceiling
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_stopped: bool = False

    @property
    def usage(self) -> TokenUsage:
        return TokenUsage(prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens)

    def progress(self) -> bytes | None:
        """What the journal keeps of it each second."""
        if not self.prompt_tokens:
            return None
        return UsageEvent(usage=self.usage, usage_source=USAGE_SOURCE_ENGINE).SerializeToString()


@dataclass(eq=False)
class RouterLife:
    """One run of a router: its journal, its budgets, and the requests that run."""

    folder: Path
    line: Line
    clock: ShiftedClock
    running: list[Running] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.charged: Counter[Place] = Counter()
        self.journal = Journal(self.folder, 1 << 28, self.clock, abort_event)
        self.budgets = Budgets(self.line, self.clock, self.journal)

    async def admit(self, principal: Principal, ceiling: Ceiling) -> Running:
        """Admit a request as an inference does. Raises PlatformError."""
        record = UsageRecord(
            request_id=f"req_{time.monotonic_ns()}",
            endpoint=ENDPOINT_CHAT_COMPLETIONS,
            principal=principal,
            admit_time=self.clock.now(),
            admitted=self.clock.monotonic(),
            model=MODEL,
            price=PRICE,
        )
        made: list[Running] = []

        def stop() -> None:
            made[0].is_stopped = True

        record.reservation = await self.budgets.reserve(principal, MODEL, ceiling, record.admit_time, stop)
        event = open_event(record, self.journal.router_id)
        entry = self.journal.begin(event.SerializeToString())
        allowed = ceiling if record.reservation is None else record.reservation.ceiling
        running = Running(record, event, entry, allowed)
        made.append(running)
        entry.progress = running.progress
        self.journal.commit()
        self.running.append(running)
        return running

    def produce(self, running: Running, tokens: int) -> None:
        """Have the engine make tokens, never more than it was told."""
        running.prompt_tokens = running.ceiling.prompt_tokens
        running.completion_tokens = min(running.ceiling.all_completion_tokens, running.completion_tokens + tokens)

    def finish(self, running: Running, outcome: Outcome.ValueType = OUTCOME_SUCCEEDED) -> None:
        """End a request as an inference does."""
        self.running.remove(running)
        running.record.usage = running.usage
        running.record.usage_source = USAGE_SOURCE_ENGINE
        close_event(running.event, running.record, outcome, "", self.clock.monotonic())
        for charge in running.event.budgets:
            self.charged[charge.budget_id, charge.period_start.ToDatetime(UTC)] += charge.charged
        running.entry.end(running.event.SerializeToString())

    def end_stopped(self) -> None:
        """End the requests that have to stop."""
        for running in [running for running in self.running if running.is_stopped]:
            self.finish(running, OUTCOME_TRUNCATED)

    async def checkpoint(self) -> None:
        """Have the journal write what runs, as it does each second."""
        for running in self.running:
            if (fragment := running.progress()) is not None:
                running.entry.checkpoint(fragment)
        self.journal.commit()

    def fence(self) -> None:
        """Stop what runs on leases that end, as the router looks for four times a second."""
        self.budgets.fence()
        self.end_stopped()

    async def ended(self) -> list[UsageEvent]:
        """All terminal events of all its lives."""
        await self.journal.sync()
        stored = await self.journal.read(lambda: list(select(self.journal.store, Selection())))
        return [UsageEvent.FromString(entry.event) for entry in stored]

    async def settle_former(self) -> None:
        """Settle leases of former lives; while the ledger is away, it is tried again later."""
        with contextlib.suppress(PlatformError):
            await self.budgets.settle_former()

    def forget_budgets(self) -> None:
        """Hear that budgets have changed."""
        for organization in self.budgets._organizations.values():
            organization.due_at = 0.0

    async def crash(self) -> None:
        """kill -9: what was only in memory is gone."""
        for task in self.budgets._calls:
            task.cancel()
        self.journal._writing.shutdown()
        self.journal._reading.shutdown()
        self.journal._held.close()


@dataclass(frozen=True)
class Tenant:
    """An organization with two hard budgets over the same requests: of tokens, and of cost."""

    organization_id: str
    budget_ids: tuple[str, str]
    is_daily: bool


Place = tuple[str, datetime]
"""A budget and the start of its period."""


class Economy:
    """The ledger on PostgreSQL, and the clock of everybody."""

    def __init__(self, database: Database, clock: ShiftedClock) -> None:
        self.clock = clock
        self.database = database
        self.store = Store(database, _announce_nothing)
        self.overrides = BudgetOverrides(self.store, clock)
        self.service = BudgetService(
            IdentityBudgets(self.store, clock),
            self.overrides,
            BudgetLeases(self.store, clock),
            BudgetChanges(self.store),
        )
        self.settled_by_hand: set[str] = set()

    @classmethod
    async def open(cls, database_url: str) -> Economy:
        """An economy on an empty database."""
        await migrate(database_url, "identity.migrations")
        database = Database(database_url)
        name = urlsplit(database_url).path[1:]
        await database.execute(SHIFTED_CLOCK)
        await database.execute(f'ALTER DATABASE "{name}" SET search_path = shifted, pg_catalog, public')
        await database.close()
        return cls(Database(database_url), ShiftedClock())

    async def close(self) -> None:
        """Let go of the database."""
        await self.database.close()

    def line(self) -> Line:
        """A router's way to the ledger."""
        return Line(DirectLedger(self.service))

    async def advance(self, seconds: float) -> None:
        """Let time pass for everybody."""
        self.clock.shift_s += seconds
        shift = timedelta(seconds=self.clock.shift_s)
        await self.database.execute("UPDATE shifted.clock SET shift = $1", shift)

    async def free_what_expired(self) -> None:
        """What the ledger must never do: take leases back from routers of which it has not heard."""
        await self.database.execute("""
            WITH freed AS (
                UPDATE budget_leases SET state = 'settled'
                WHERE state <> 'settled' AND expire_time <= clock_timestamp() RETURNING *
            )
            UPDATE budget_periods p SET leased = p.leased - f.amount
            FROM (
                SELECT budget_id, period_start, sum(amount - spent) AS amount FROM freed GROUP BY 1, 2
            ) f WHERE (p.budget_id, p.period_start) = (f.budget_id, f.period_start)
        """)

    def seconds_to_midnight(self) -> float:
        """Until the next day begins, and a little more."""
        now = self.clock.now()
        return 86_400.5 - (now - now.replace(hour=0, minute=0, second=0, microsecond=0)).total_seconds()

    async def new_tenant(self, limit: int, *, daily: bool) -> Tenant:
        """An organization that may use so many tokens, and spend as many micro-dollars."""
        interval = pb.BUDGET_INTERVAL_DAILY if daily else pb.BUDGET_INTERVAL_TOTAL
        return Tenant(*await self._organization(limit, interval, pb.BUDGET_ENFORCEMENT_HARD), daily)

    async def new_soft_tenant(self, limit: int) -> Tenant:
        """An organization that is told when it has used as much."""
        return Tenant(*await self._organization(limit, pb.BUDGET_INTERVAL_TOTAL, pb.BUDGET_ENFORCEMENT_SOFT), False)

    async def _organization(
        self, limit: int, interval: pb.BudgetInterval.ValueType, enforcement: pb.BudgetEnforcement.ValueType
    ) -> tuple[str, tuple[str, str]]:
        now = self.clock.now()
        async with self.store.transaction() as stored:
            organization = Organization(new_id("org", clock=self.clock), "Tenant", create_time=now, update_time=now)
            await stored.organizations.add(organization)
        made = []
        for unit in (pb.BUDGET_UNIT_TOKENS, pb.BUDGET_UNIT_COST):
            budget = pb.Budget(
                display_name="Budget", unit=unit, interval=interval, enforcement=enforcement, limit=limit
            )
            request = pb.CreateBudgetRequest(organization_id=organization.organization_id, budget=budget)
            made.append((await self.service.CreateBudget(request, None)).budget.budget_id)
        return organization.organization_id, (made[0], made[1])

    async def change_limit(self, tenant: Tenant, limit: int) -> None:
        """Set the limit of both budgets; too low a one is refused."""
        for budget_id in tenant.budget_ids:
            request = pb.UpdateBudgetRequest(
                organization_id=tenant.organization_id, budget_id=budget_id, budget=pb.Budget(limit=limit)
            )
            request.update_mask.paths.append("limit")
            with contextlib.suppress(PlatformError):
                await self.service.UpdateBudget(request, None)

    async def override(self, tenant: Tenant, amount: int, seconds: int) -> None:
        """Raise the limit of both budgets for a while, as one person asks for it and another approves."""
        expire_time = self.clock.now() + timedelta(seconds=seconds)
        for budget_id in tenant.budget_ids:
            wanted = BudgetOverride("", tenant.organization_id, budget_id, amount, expire_time, "more is needed")
            with contextlib.suppress(PlatformError):
                asked = await self.overrides.create(Principal("user", "user_1", tenant.organization_id), wanted, "")
                await self.overrides.approve(
                    Principal("user", "user_2", tenant.organization_id),
                    tenant.organization_id,
                    budget_id,
                    asked.budget_override_id,
                    "",
                )

    async def settle_by_hand(self, tenant: Tenant, routers: list[RouterLife]) -> None:
        """Settle expired leases by what was charged to them, and by what their requests have had so far."""
        for budget_id in tenant.budget_ids:
            request = pb.ListBudgetLeasesRequest(
                organization_id=tenant.organization_id,
                budget_id=budget_id,
                page_size=500,
                state=pb.BUDGET_LEASE_STATE_EXPIRED,
            )
            for lease in (await self.service.ListBudgetLeases(request, None)).budget_leases:
                held = [router.budgets._leases.get(lease.budget_lease_id) for router in routers]
                known = next((one for one in held if one is not None), None)
                if known is None:
                    # Its router is down, and its journal tells when it is back.
                    continue
                self.settled_by_hand.add(tenant.organization_id)
                spent = known.spent + sum(
                    running.usage.prompt_tokens + running.usage.completion_tokens
                    for router in routers
                    for running in router.running
                    if running.record.reservation in known.running
                )
                await self.service.SettleBudgetLease(
                    pb.SettleBudgetLeaseRequest(
                        organization_id=tenant.organization_id,
                        budget_id=budget_id,
                        budget_lease_id=lease.budget_lease_id,
                        spent=spent,
                    ),
                    None,
                )

    async def check_not_overspent(self, tenant: Tenant, routers: list[RouterLife]) -> None:
        """What journals were charged and what runs has used is covered by the ledger, and the ledger by the limit."""
        used: Counter[Place] = Counter()
        for router in routers:
            used += router.charged
            for running in router.running:
                for charge in running.event.budgets:
                    used[charge.budget_id, charge.period_start.ToDatetime(UTC)] += (
                        running.usage.prompt_tokens + running.usage.completion_tokens
                    )
        rows = await self.database.fetch(
            "SELECT * FROM budget_periods WHERE budget_id = ANY($1)", list(tenant.budget_ids)
        )
        for row in rows:
            assert row["spent"] + row["leased"] <= row["limit_amount"]
            place = (row["budget_id"], row["period_start"])
            assert used.pop(place, 0) <= row["spent"] + row["leased"], "more was used than the ledger knows of"
        assert not used

    async def check_books(self, tenant: Tenant, routers: list[RouterLife]) -> None:
        """Nothing is leased any more, and what is spent is what the journals of all routers say."""
        charged: Counter[Place] = Counter()
        by_line: Counter[tuple[str, datetime, str, str]] = Counter()
        requests: Counter[str] = Counter()
        for router in routers:
            for event in await router.ended():
                requests[event.request_id] += 1
                hour = event.admit_time.ToDatetime(UTC).replace(minute=0, second=0, microsecond=0)
                for charge in event.budgets:
                    charged[charge.budget_id, charge.period_start.ToDatetime(UTC)] += charge.charged
                    by_line[charge.budget_id, hour, event.api_key_id, event.model] += charge.charged
        assert set(requests.values()) <= {1}, "a request has more than one terminal record"
        ids = list(tenant.budget_ids)
        for row in await self.database.fetch("SELECT * FROM budget_periods WHERE budget_id = ANY($1)", ids):
            assert row["leased"] == 0, "something stays reserved for nobody"
            assert row["spent"] == charged.pop((row["budget_id"], row["period_start"]), 0)
        assert not +charged
        lines = await self.database.fetch("SELECT * FROM budget_ledger WHERE budget_id = ANY($1)", ids)
        if tenant.organization_id in self.settled_by_hand:
            # By then nobody could tell which key and model it was.
            assert sum(row["spent"] for row in lines) == by_line.total()
        else:
            for row in lines:
                place = (row["budget_id"], row["hour_start"], row["api_key_id"], row["model"])
                assert row["spent"] == by_line.pop(place, 0)
            assert not +by_line
        assert not await self.database.fetch(
            "SELECT 1 FROM budget_lease_lines JOIN budget_leases USING (budget_lease_id) WHERE budget_id = ANY($1)", ids
        )

    async def sweep(self) -> None:
        """End the overrides whose time is over."""
        await self.overrides.sweep()


class DirectLedger:
    """identity's BudgetService without gRPC between."""

    def __init__(self, service: BudgetService) -> None:
        self._service = service

    async def resolve(self, organization_id: str) -> pb.ResolveBudgetsResponse:
        return await self._service.ResolveBudgets(pb.ResolveBudgetsRequest(organization_id=organization_id), None)

    async def watch(self, after_revision: int) -> AsyncIterator[pb.WatchBudgetsResponse]:
        changes: tuple[pb.WatchBudgetsResponse, ...] = ()
        for change in changes:
            yield change

    async def lease(self, request: pb.LeaseRequest) -> pb.LeaseResponse:
        return await self._service.Lease(request, None)

    async def renew(self, request: pb.RenewRequest) -> pb.RenewResponse:
        return await self._service.Renew(request, None)

    async def release(self, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        return await self._service.Release(request, None)

    async def settle(self, request: pb.SettleRequest) -> pb.SettleResponse:
        return await self._service.Settle(request, None)

    async def unsettled(self, router_id: str) -> list[pb.BudgetLease]:
        request = pb.ListRouterLeasesRequest(router_id=router_id, page_size=500)
        return list((await self._service.ListRouterLeases(request, None)).leases)


async def _announce_nothing(_: object) -> None:
    pass
