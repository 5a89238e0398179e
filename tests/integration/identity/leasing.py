"""Routers that lease of identity's ledger as real ones do, and the books that must balance after whatever they did."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.identity.v1 import budget_service_pb2 as pb
from mesh.errors import PlatformError
from tests.integration.identity.budgeting import Ledger, get
from tests.integration.identity.harness import Identity

ACTIVE = pb.BUDGET_LEASE_STATE_ACTIVE
EXPIRED = pb.BUDGET_LEASE_STATE_EXPIRED
SETTLED = pb.BUDGET_LEASE_STATE_SETTLED

HOUR = Timestamp(seconds=1_700_002_800)
NEXT_HOUR = Timestamp(seconds=1_700_006_400)

_request_ids = count(1)


def line(spent: int, requests: int = 1, key: str = "key_1", model: str = "m", hour: Timestamp = HOUR) -> pb.LedgerLine:
    """Spending of one key on one model in one hour."""
    return pb.LedgerLine(hour_start=hour, api_key_id=key, model=model, spent=spent, requests=requests)


def report(
    lease: pb.BudgetLease,
    sequence: int,
    spent: int = 0,
    reserved: int = 0,
    wanted: int = 0,
    lines: Sequence[pb.LedgerLine] | None = None,
) -> pb.LeaseReport:
    """What became of a lease so far, all of it spent by one key unless told."""
    if lines is None:
        lines = [line(spent)] if spent else []
    return pb.LeaseReport(
        budget_lease_id=lease.budget_lease_id,
        sequence=sequence,
        spent=spent,
        reserved=reserved,
        wanted=wanted,
        lines=lines,
    )


def settlement(lease: pb.BudgetLease, spent: int, lines: Sequence[pb.LedgerLine] | None = None) -> pb.LeaseSettlement:
    """What became of a lease in all."""
    if lines is None:
        lines = [line(spent)] if spent else []
    return pb.LeaseSettlement(budget_lease_id=lease.budget_lease_id, spent=spent, lines=lines)


@dataclass
class Router:
    """One run of a router."""

    identity: Identity
    router_id: str = "router_1"
    router_instance_id: str = "run_1"
    revisions: dict[str, int] = field(default_factory=dict)

    async def resolve(self, organization_id: str) -> int:
        """The revision of an organization's budgets, which is sent from now on."""
        request = pb.ResolveBudgetsRequest(organization_id=organization_id)
        answer = await self.identity.call(self.identity.budgets.ResolveBudgets, request)
        self.revisions[organization_id] = answer.revision
        return answer.revision

    async def ask(self, *asks: tuple[pb.Budget, int, int], **fields: Any) -> pb.LeaseResponse:
        """The answer to asks of (budget, needed, wanted)."""
        return await self.identity.call(self.identity.budgets.Lease, await self.to_ask(*asks, **fields))

    async def to_ask(self, *asks: tuple[pb.Budget, int, int], **fields: Any) -> pb.LeaseRequest:
        """A request as `ask` sends it."""
        organization_id = asks[0][0].organization_id if asks else ""
        if organization_id not in self.revisions and asks:
            await self.resolve(organization_id)
        return pb.LeaseRequest(
            **{
                "router_id": self.router_id,
                "router_instance_id": self.router_instance_id,
                "request_id": f"ask_{next(_request_ids)}",
                "organization_id": organization_id,
                "revision": self.revisions.get(organization_id, 0),
                "asks": [
                    pb.LeaseAsk(budget_id=budget.budget_id, needed=needed, wanted=wanted)
                    for budget, needed, wanted in asks
                ],
                **fields,
            }
        )

    async def lease(self, budget: pb.Budget, needed: int, wanted: int = 0) -> pb.BudgetLease:
        """A lease of a budget that can give it."""
        (lease,) = (await self.ask((budget, needed, wanted))).leases
        return lease

    async def renew(self, *reports: pb.LeaseReport) -> list[pb.BudgetLease]:
        """The leases after their reports."""
        return list((await self.identity.call(self.identity.budgets.Renew, self.to_renew(*reports))).leases)

    def to_renew(self, *reports: pb.LeaseReport) -> pb.RenewRequest:
        """A request as `renew` sends it."""
        return pb.RenewRequest(router_id=self.router_id, router_instance_id=self.router_instance_id, reports=reports)

    async def renew_refused(self, *reports: pb.LeaseReport) -> PlatformError:
        """The error of reports that must be refused."""
        return await self.identity.refused(self.identity.budgets.Renew, self.to_renew(*reports))

    async def release(self, *reports: pb.LeaseReport) -> list[pb.BudgetLease]:
        """The leases after they were given back."""
        return list((await self.identity.call(self.identity.budgets.Release, self.to_release(*reports))).leases)

    def to_release(self, *reports: pb.LeaseReport) -> pb.ReleaseRequest:
        """A request as `release` sends it."""
        return pb.ReleaseRequest(router_id=self.router_id, router_instance_id=self.router_instance_id, reports=reports)

    async def settle(self, *settlements: pb.LeaseSettlement) -> list[pb.BudgetLease]:
        """The leases after their settlements."""
        request = pb.SettleRequest(router_id=self.router_id, settlements=settlements)
        return list((await self.identity.call(self.identity.budgets.Settle, request)).leases)

    async def settle_refused(self, *settlements: pb.LeaseSettlement) -> PlatformError:
        """The error of settlements that must be refused."""
        request = pb.SettleRequest(router_id=self.router_id, settlements=settlements)
        return await self.identity.refused(self.identity.budgets.Settle, request)

    async def unsettled(self) -> list[pb.BudgetLease]:
        """The leases of all its runs."""
        request = pb.ListRouterLeasesRequest(router_id=self.router_id)
        return list((await self.identity.call(self.identity.budgets.ListRouterLeases, request)).leases)


async def let_expire(ledger: Ledger, *leases: pb.BudgetLease) -> None:
    """Have the time of leases be over."""
    await ledger.execute(
        "UPDATE budget_leases SET expire_time = clock_timestamp() - interval '1 ms'"
        " WHERE budget_lease_id = ANY ($1::text[])",
        [lease.budget_lease_id for lease in leases],
    )


async def period(identity: Identity, budget: pb.Budget) -> tuple[int, int]:
    """What is spent and what is leased of the running period."""
    current = (await get(identity, budget)).current_period
    return current.spent, current.leased


async def totals(identity: Identity, organization_id: str = "", **fields: Any) -> list[tuple[str, str, str, int, int]]:
    """Budget, key, model, spending and requests of all hours."""
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    request = pb.QueryLedgerRequest(
        **{
            "organization_id": organization_id,
            "start_time": datetime(2020, 1, 1, tzinfo=UTC),
            "end_time": now + timedelta(hours=2),
            **fields,
        }
    )
    answer = await identity.call(identity.budgets.QueryLedger, request)
    return [(total.budget_id, total.api_key_id, total.model, total.spent, total.requests) for total in answer.totals]


UNBALANCED = """
    SELECT p.budget_id, p.spent, p.leased, held.* FROM budget_periods p LEFT JOIN LATERAL (
        SELECT coalesce(sum(l.spent), 0) AS spent_of_leases, coalesce(sum(l.amount - l.spent), 0) AS left_of_leases
        FROM budget_leases l WHERE l.budget_id = p.budget_id AND l.period_start = p.period_start
    ) held ON true
    WHERE p.spent <> held.spent_of_leases OR p.leased <> held.left_of_leases
        OR p.is_hard AND p.spent + p.leased > p.limit_amount
"""
"""Periods that say anything else than their leases do. What a settled lease had not spent is not its own any more."""

UNTOLD = """
    SELECT b.budget_id FROM budgets b
    WHERE (SELECT coalesce(sum(spent), 0) FROM budget_leases l WHERE l.budget_id = b.budget_id AND state = 'settled')
        <> (SELECT coalesce(sum(spent), 0) FROM budget_ledger l WHERE l.budget_id = b.budget_id)
"""
"""Budgets whose ledger says anything else than their settled leases do."""
