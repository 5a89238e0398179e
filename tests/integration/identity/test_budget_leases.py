"""Leases as routers ask for them, over gRPC and a real database."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aiaas.identity.v1 import budget_service_pb2 as pb
from identity.stores.budget_periods import BudgetPeriodRows
from identity.stores.budgets import BudgetRows
from mesh.errors import Reason
from tests.integration.identity.budgeting import HARD, SOFT, Ledger, create, update
from tests.integration.identity.harness import Identity
from tests.integration.identity.leasing import (
    ACTIVE,
    SETTLED,
    UNBALANCED,
    Router,
    let_expire,
    period,
    report,
)

TTL = timedelta(seconds=10)
LARGEST = 1 << 62


async def test_lease_counts_as_a_whole_from_when_it_is_given(
    identity: Identity, router: Router, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    before = datetime.now(UTC)
    lease = await router.lease(budget, needed=10, wanted=50)
    assert (lease.organization_id, lease.budget_id) == (organization_id, budget.budget_id)
    assert (lease.router_id, lease.router_instance_id) == ("router_1", "run_1")
    assert (lease.amount, lease.spent, lease.sequence, lease.state) == (50, 0, 0, ACTIVE)
    assert lease.period_start == budget.current_period.start_time
    assert lease.valid_for.ToTimedelta() == TTL
    assert lease.expire_time.ToDatetime(UTC) >= before + TTL
    assert lease.expire_time.ToDatetime(UTC) - lease.create_time.ToDatetime(UTC) == TTL
    assert await period(identity, budget) == (0, 50)


async def test_slices_shrink_to_single_requests_near_the_limit(
    identity: Identity, router: Router, organization_id: str
) -> None:
    budget = await create(identity, organization_id, limit=100)
    amounts = [(await router.lease(budget, needed=5, wanted=1000)).amount for _ in range(14)]
    assert amounts == [12, 11, 9, 8, 7, 6, 5, 5, 5, 5, 5, 5, 5, 5]
    assert await period(identity, budget) == (0, 93)


async def test_all_that_is_left_can_be_leased_and_no_more(
    identity: Identity, router: Router, organization_id: str
) -> None:
    budget = await create(identity, organization_id, limit=100)
    await router.lease(budget, needed=60)
    refused = await router.ask((budget, 41, 41))
    assert not refused.leases
    (denial,) = refused.denials
    assert (denial.budget_id, denial.limit, denial.spent, denial.leased) == (budget.budget_id, 100, 0, 60)
    assert denial.period_end == budget.current_period.end_time
    assert refused.revision == router.revisions[organization_id]
    await router.lease(budget, needed=40)
    assert await period(identity, budget) == (0, 100)


async def test_denial_tells_to_ask_again_only_while_somebody_holds_what_is_idle(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id, limit=100)
    lease = await router.lease(budget, needed=80)
    other = Router(identity, router_id="router_2")
    (denial,) = (await other.ask((budget, 40, 40))).denials
    assert denial.retry_after.ToTimedelta() == timedelta(seconds=1)
    await router.renew(report(lease, 1, spent=30, reserved=50))
    (denial,) = (await other.ask((budget, 40, 40))).denials
    assert (denial.spent, denial.leased) == (30, 50)
    assert not denial.HasField("retry_after")
    await router.renew(report(lease, 2, spent=40, reserved=10, wanted=30))
    assert (await other.ask((budget, 40, 40))).denials[0].HasField("retry_after")
    # What an expired lease holds comes back only with its settlement.
    await let_expire(ledger, lease)
    assert not (await other.ask((budget, 40, 40))).denials[0].HasField("retry_after")


async def test_soft_budget_always_gives(identity: Identity, router: Router, organization_id: str) -> None:
    budget = await create(identity, organization_id, limit=100, enforcement=SOFT)
    assert (await router.lease(budget, needed=90, wanted=500)).amount == 500
    assert (await router.lease(budget, needed=900, wanted=5)).amount == 900
    assert await period(identity, budget) == (0, 1400)


async def test_soft_budget_gives_no_more_than_can_be_counted(
    identity: Identity, router: Router, organization_id: str
) -> None:
    budget = await create(identity, organization_id, limit=100, enforcement=SOFT)
    assert (await router.lease(budget, needed=LARGEST, wanted=LARGEST)).amount == LARGEST
    assert len((await router.ask((budget, 1, 1))).denials) == 1


async def test_all_budgets_are_leased_or_none(identity: Identity, router: Router, organization_id: str) -> None:
    wide = await create(identity, organization_id)
    narrow = await create(identity, organization_id, limit=10, model="m")
    narrower = await create(identity, organization_id, limit=5, model="n")
    refused = await router.ask((narrower, 20, 20), (wide, 20, 20), (narrow, 20, 20))
    assert not refused.leases
    assert [denial.budget_id for denial in refused.denials] == [narrower.budget_id, narrow.budget_id]
    assert await period(identity, wide) == (0, 0)
    answer = await router.ask((narrow, 5, 0), (wide, 20, 0), (narrower, 5, 0))
    assert [lease.budget_id for lease in answer.leases] == [narrow.budget_id, wide.budget_id, narrower.budget_id]
    assert [lease.amount for lease in answer.leases] == [5, 20, 5]


async def test_nothing_is_leased_on_budgets_that_have_changed(
    identity: Identity, router: Router, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    old = await router.resolve(organization_id)
    await update(identity, budget, limit=2000)
    answer = await router.ask((budget, 1, 1))
    assert (list(answer.leases), list(answer.denials)) == ([], [])
    assert answer.revision > old
    router.revisions[organization_id] = answer.revision
    assert (await router.lease(budget, needed=1)).amount == 1


async def test_nothing_is_leased_on_budgets_that_change_while_it_waits_for_them(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    await router.lease(budget, needed=1)
    async with ledger.database.transaction() as change:
        await BudgetRows(change).change_revision(organization_id)
        await BudgetPeriodRows(change).lock_current(budget.budget_id)
        asking = asyncio.create_task(router.ask((budget, 1, 1)))
        async with asyncio.timeout(10):
            while not await ledger.fetch("SELECT FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
    answer = await asking
    assert list(answer.leases) == []
    assert answer.revision > router.revisions[organization_id]


async def test_nothing_is_leased_on_budgets_that_bind_nothing(
    identity: Identity, router: Router, organization_id: str
) -> None:
    good = await create(identity, organization_id)
    disabled = await create(identity, organization_id, model="a", disabled=True)
    removed = await create(identity, organization_id, model="b")
    request = pb.DeleteBudgetRequest(organization_id=organization_id, budget_id=removed.budget_id)
    await identity.call(identity.budgets.DeleteBudget, request)
    strange = await create(identity, await identity.organization())
    unknown = pb.Budget(organization_id=organization_id, budget_id="budget_0")
    await router.resolve(organization_id)
    for budget in (disabled, removed, strange, unknown):
        answer = await router.ask((good, 1, 1), (budget, 1, 1))
        assert (list(answer.leases), list(answer.denials)) == ([], [])
    assert await period(identity, good) == (0, 0)


async def test_same_request_gets_the_same_leases(identity: Identity, router: Router, organization_id: str) -> None:
    first, second = await create(identity, organization_id), await create(identity, organization_id, model="m")
    asks = (second, 5, 5), (first, 10, 10)
    answer = await router.ask(*asks, request_id="r1")
    await create(identity, organization_id, model="n")
    again = await router.ask(*asks, request_id="r1")
    ids = [lease.budget_lease_id for lease in answer.leases]
    assert [lease.budget_lease_id for lease in again.leases] == ids
    assert again.revision > answer.revision
    assert again.leases[0].expire_time == answer.leases[0].expire_time
    # It was given before, so it does not last as long.
    assert again.leases[0].valid_for.ToTimedelta() < TTL
    assert await period(identity, first) == (0, 10)
    error = await identity.refused(identity.budgets.Lease, await router.to_ask((first, 10, 10), request_id="r1"))
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "request_id")
    # Another router's request is another one.
    other = Router(identity, router_id="router_2")
    (lease,) = (await other.ask((first, 10, 10), request_id="r1")).leases
    assert lease.budget_lease_id not in ids


async def test_same_request_at_the_same_time_gets_the_same_leases(
    identity: Identity, router: Router, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    await router.resolve(organization_id)
    answers = await asyncio.gather(*(router.ask((budget, 10, 10), request_id="r1") for _ in range(8)))
    assert len({lease.budget_lease_id for answer in answers for lease in answer.leases}) == 1
    assert all(len(answer.leases) == 1 for answer in answers)
    assert await period(identity, budget) == (0, 10)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"router_id": ""}, "router_id"),
        ({"router_instance_id": "a b"}, "router_instance_id"),
        ({"organization_id": ""}, "organization_id"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "a\x00b"}, "request_id"),
        ({"asks": []}, "asks"),
        ({"asks": [pb.LeaseAsk(budget_id=f"budget_{index}", needed=1) for index in range(65)]}, "asks"),
        ({"asks": [pb.LeaseAsk(budget_id="budget_1", needed=1)] * 2}, "asks"),
        ({"asks": [pb.LeaseAsk(needed=1)]}, "asks[0].budget_id"),
        ({"asks": [pb.LeaseAsk(budget_id="budget_1")]}, "asks[0].needed"),
        ({"asks": [pb.LeaseAsk(budget_id="budget_1", needed=-1)]}, "asks[0].needed"),
        ({"asks": [pb.LeaseAsk(budget_id="budget_1", needed=LARGEST + 1)]}, "asks[0].needed"),
        ({"asks": [pb.LeaseAsk(budget_id="budget_1", needed=1, wanted=-1)]}, "asks[0].wanted"),
    ],
)
async def test_wrong_field_of_a_lease_is_named(
    identity: Identity, router: Router, organization_id: str, fields: dict[str, Any], field: str
) -> None:
    budget = await create(identity, organization_id)
    error = await identity.refused(identity.budgets.Lease, await router.to_ask((budget, 1, 1), **fields))
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)
    assert await period(identity, budget) == (0, 0)


async def test_fifty_at_once_get_all_that_is_affordable_and_never_more(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id, limit=1000, enforcement=HARD)
    routers = [router, Router(identity, router_id="router_2"), Router(identity, router_id="router_3")]
    for router in routers:
        await router.resolve(organization_id)
    done = asyncio.Event()

    async def sample() -> int:
        samples = 0
        while not done.is_set():
            assert await ledger.fetch(UNBALANCED) == []
            samples += 1
        return samples

    async def take(number: int) -> int:
        router, taken = routers[number % 3], 0
        while leases := (await router.ask((budget, 7, 40))).leases:
            taken += leases[0].amount
        return taken

    async with asyncio.TaskGroup() as tasks:
        sampling = tasks.create_task(sample())
        taken = sum(await asyncio.gather(*(take(number) for number in range(50))))
        done.set()
    assert sampling.result() > 3
    assert 1000 - 7 < taken <= 1000
    assert await period(identity, budget) == (0, taken)


async def test_budgets_in_any_order_never_lock_each_other_out(
    identity: Identity, router: Router, organization_id: str
) -> None:
    budgets = [await create(identity, organization_id, model=model) for model in "abc"]
    await router.resolve(organization_id)

    async def live(number: int) -> None:
        order = budgets if number % 2 else budgets[::-1]
        leases = (await router.ask(*((budget, 2, 2) for budget in order))).leases
        await router.renew(*(report(lease, 1, spent=1, wanted=1) for lease in leases[:: 1 if number % 3 else -1]))
        released = await router.release(*(report(lease, 2, spent=2) for lease in leases[::-1]))
        assert [lease.state for lease in released] == [SETTLED] * 3

    await asyncio.gather(*(live(number) for number in range(40)))
    for budget in budgets:
        assert await period(identity, budget) == (80, 0)
