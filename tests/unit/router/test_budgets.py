"""What a router's budgets do while the ledger takes its time; the ledger itself is scripted, as identity's answers at
once."""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from datetime import UTC, datetime

from aiaas.identity.v1 import budget_service_pb2 as pb
from mesh.clock import SystemClock
from router.budgets import Budgets
from router.ceilings import Ceiling
from router.leases import Spender
from tests.unit.router.world import PRICE, PRINCIPAL, until


class SlowLedger:
    """One budget of requests, whose leases are taken back only when `is_open` is set."""

    def __init__(self) -> None:
        self.is_open = asyncio.Event()
        self.released: list[str] = []

    async def resolve(self, organization_id: str) -> pb.ResolveBudgetsResponse:
        budget = pb.Budget(
            budget_id="budget_1",
            organization_id=organization_id,
            unit=pb.BUDGET_UNIT_REQUESTS,
            enforcement=pb.BUDGET_ENFORCEMENT_HARD,
        )
        return pb.ResolveBudgetsResponse(revision=1, budgets=[budget])

    async def watch(self, after_revision: int) -> AsyncIterator[pb.WatchBudgetsResponse]:
        await asyncio.Event().wait()
        yield pb.WatchBudgetsResponse()

    async def lease(self, request: pb.LeaseRequest) -> pb.LeaseResponse:
        lease = pb.BudgetLease(
            budget_lease_id="lease_1",
            budget_id="budget_1",
            amount=100,
            state=pb.BUDGET_LEASE_STATE_ACTIVE,
        )
        lease.admit_for.FromSeconds(60)
        lease.valid_for.FromSeconds(60)
        return pb.LeaseResponse(revision=1, leases=[lease])

    async def renew(self, request: pb.RenewRequest) -> pb.RenewResponse:
        raise AssertionError("what closes is not extended")

    async def release(self, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        self.released += [report.budget_lease_id for report in request.reports]
        await self.is_open.wait()
        return pb.ReleaseResponse(
            leases=[pb.BudgetLease(budget_lease_id="lease_1", state=pb.BUDGET_LEASE_STATE_SETTLED)]
        )

    async def settle(self, request: pb.SettleRequest) -> pb.SettleResponse:
        return pb.SettleResponse()

    async def unsettled(self, router_id: str) -> list[pb.BudgetLease]:
        return []


class Charges:
    """A journal that has been told everything."""

    router_id, instance_id = "router_1", "instance_1"

    def commit(self) -> None:
        """All is there."""

    async def lease_totals(self, lease_ids: Collection[str]) -> Mapping[str, Mapping[Spender, tuple[int, int]]]:
        return {}


async def test_lease_is_given_back_once_though_a_router_stops_while_it_is() -> None:
    ledger = SlowLedger()
    budgets = Budgets(ledger, SystemClock(), Charges())
    ceiling = Ceiling(1, 1, 1, PRICE)
    reservation = await budgets.reserve(PRINCIPAL, "m", ceiling, datetime.now(UTC), lambda: None)
    assert reservation is not None
    reservation.settle(0, 0, 1)
    closing = [asyncio.create_task(budgets.close()) for _ in range(2)]
    await until(lambda: bool(ledger.released))
    ledger.is_open.set()
    await asyncio.gather(*closing)
    assert ledger.released == ["lease_1"]
