"""Expired leases and how they are settled, lists of leases and the ledger's totals, over gRPC and a real database."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aiaas.identity.v1 import budget_service_pb2 as pb
from identity.budget_leases import BudgetLeases
from identity.stores import Store
from mesh.clock import SystemClock
from mesh.database import Database
from mesh.errors import Reason
from tests.integration.identity.budgeting import Ledger, create
from tests.integration.identity.harness import Identity
from tests.integration.identity.leasing import (
    ACTIVE,
    EXPIRED,
    HOUR,
    NEXT_HOUR,
    SETTLED,
    Router,
    let_expire,
    line,
    period,
    report,
    settlement,
    totals,
)


async def expired(router: Router, ledger: Ledger, budget: pb.Budget, amount: int = 100) -> pb.BudgetLease:
    """A lease whose router was not heard of in time; it had reported 10."""
    lease = await router.lease(budget, needed=amount)
    await router.renew(report(lease, 1, spent=10, wanted=amount))
    await let_expire(ledger, lease)
    return lease


def by_hand(lease: pb.BudgetLease, spent: int | None, **fields: Any) -> pb.SettleBudgetLeaseRequest:
    """A settlement by a person."""
    return pb.SettleBudgetLeaseRequest(
        **{
            "organization_id": lease.organization_id,
            "budget_id": lease.budget_id,
            "budget_lease_id": lease.budget_lease_id,
            "spent": spent,
            **fields,
        }
    )


async def test_settlement_charges_what_was_spent_and_frees_the_rest(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id, limit=100)
    lease = await expired(router, ledger, budget)
    assert await period(identity, budget) == (10, 90)
    # The journal is the next run's.
    next_run = Router(identity, router_instance_id="run_2")
    lines = [line(15, requests=2), line(25, hour=NEXT_HOUR, key="key_2")]
    (settled,) = await next_run.settle(settlement(lease, 40, lines))
    assert (settled.state, settled.spent, settled.amount) == (SETTLED, 40, 40)
    assert await period(identity, budget) == (40, 0)
    both = [(budget.budget_id, "key_1", "m", 15, 2), (budget.budget_id, "key_2", "m", 25, 1)]
    assert await totals(identity) == both
    # The same again is the answer that was lost.
    assert await next_run.settle(settlement(lease, 40, lines)) == [settled]
    error = await next_run.settle_refused(settlement(lease, 41))
    assert error.reason is Reason.FAILED_PRECONDITION
    assert await totals(identity) == both
    assert (await router.lease(budget, needed=60)).amount == 60


async def test_journal_has_the_last_word_on_where_it_was_spent(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease = await expired(router, ledger, budget)
    await router.settle(settlement(lease, 40, [line(5), line(35, key="key_2")]))
    assert await totals(identity) == [(budget.budget_id, "key_1", "m", 5, 1), (budget.budget_id, "key_2", "m", 35, 1)]


async def test_same_settlement_at_the_same_time_counts_once(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease = await expired(router, ledger, budget)
    await asyncio.gather(*(router.settle(settlement(lease, 40)) for _ in range(8)))
    assert await totals(identity) == [(budget.budget_id, "key_1", "m", 40, 1)]
    assert await period(identity, budget) == (40, 0)


async def test_lease_that_may_still_be_used_is_not_settled(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease = await router.lease(budget, needed=100)
    assert (await router.settle_refused(settlement(lease, 0))).reason is Reason.FAILED_PRECONDITION
    # Its run has not heard yet that the next one has had it fenced.
    (fenced,) = await Router(identity, router_instance_id="run_2").renew(report(lease, 1))
    assert fenced.state == EXPIRED
    assert (await router.settle_refused(settlement(lease, 0))).reason is Reason.FAILED_PRECONDITION
    assert (await identity.refused(identity.budgets.SettleBudgetLease, by_hand(lease, 0))).reason is (
        Reason.FAILED_PRECONDITION
    )
    assert await period(identity, budget) == (0, 100)
    await let_expire(ledger, lease)
    assert (await router.settle(settlement(lease, 0)))[0].state == SETTLED
    assert await period(identity, budget) == (0, 0)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"budget_lease_id": ""}, "[1].budget_lease_id"),
        ({"spent": 9, "lines": [line(9)]}, "[1].spent"),
        ({"spent": 101, "lines": [line(101)]}, "[1].spent"),
        ({"spent": -1}, "[1].lines"),
        ({"spent": 20, "lines": [line(19)]}, "[1].lines"),
        ({"spent": 20, "lines": [line(10), line(10)]}, "[1].lines"),
        ({"spent": 20, "lines": [line(21), line(-1, key="")]}, "[1].lines[1].spent"),
        ({"spent": 20, "lines": [pb.LedgerLine(spent=20)]}, "[1].lines[0].hour_start"),
    ],
)
async def test_wrong_field_of_a_settlement_is_named_and_nothing_of_the_call_counts(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str, wrong: dict[str, Any], field: str
) -> None:
    budget = await create(identity, organization_id)
    good, bad = await expired(router, ledger, budget), await expired(router, ledger, budget)
    settlements = [
        settlement(good, 50),
        pb.LeaseSettlement(**{"budget_lease_id": bad.budget_lease_id, "spent": 10, **wrong}),
    ]
    error = await router.settle_refused(*settlements)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, f"settlements{field}")
    assert await period(identity, budget) == (20, 180)


async def test_settlements_beyond_number_or_of_one_lease_twice_are_refused(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    lease = await expired(router, ledger, await create(identity, organization_id))
    for many in ([settlement(lease, 50)] * 2, [settlement(lease, 50)] * 1001):
        error = await router.settle_refused(*many)
        assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "settlements")


async def test_lease_of_another_router_is_not_found(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease = await expired(router, ledger, budget)
    for unknown in (lease, pb.BudgetLease(budget_lease_id="lease_0")):
        error = await Router(identity, router_id="router_2").settle_refused(settlement(unknown, 50))
        assert error.reason is Reason.NOT_FOUND
    assert await period(identity, budget) == (10, 90)


async def test_person_settles_what_no_router_will(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease = await expired(router, ledger, budget)
    settle = identity.budgets.SettleBudgetLease
    answer = await identity.call(settle, by_hand(lease, 70, reason="Its disk is gone."))
    assert (answer.budget_lease.state, answer.budget_lease.spent, answer.budget_lease.amount) == (SETTLED, 70, 70)
    assert await period(identity, budget) == (70, 0)
    # Nobody knows whose the part is that was not reported.
    assert await totals(identity) == [(budget.budget_id, "key_1", "m", 10, 1), (budget.budget_id, "", "", 60, 0)]
    rows = await ledger.fetch("SELECT hour_start FROM budget_ledger WHERE model = ''")
    made = lease.create_time.ToDatetime(UTC)
    assert [row["hour_start"] for row in rows] == [made.replace(minute=0, second=0, microsecond=0)]
    assert await identity.call(settle, by_hand(lease, 70)) == answer
    error = await identity.refused(settle, by_hand(lease, 71))
    assert (error.reason, error.field) == (Reason.FAILED_PRECONDITION, "spent")
    # A router that comes back after all is told.
    assert (await router.settle_refused(settlement(lease, 40))).reason is Reason.FAILED_PRECONDITION


async def test_thresholds_that_a_settlement_passes_are_told(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id, limit=100)
    first, second = await expired(router, ledger, budget, 60), await expired(router, ledger, budget, 40)
    await router.settle(settlement(first, 50))
    await identity.call(identity.budgets.SettleBudgetLease, by_hand(second, 40))
    rows = await ledger.fetch("SELECT percent, spent FROM budget_alerts ORDER BY percent")
    assert [(row["percent"], row["spent"]) for row in rows] == [(50, 60), (80, 90)]


@pytest.mark.parametrize(
    ("spent", "fields", "field"),
    [
        (None, {}, "spent"),
        (9, {}, "spent"),
        (101, {}, "spent"),
        (50, {"reason": "x" * 1001}, "reason"),
        (50, {"budget_lease_id": ""}, "budget_lease_id"),
    ],
)
async def test_wrong_field_of_a_settlement_by_hand_is_named(
    identity: Identity,
    router: Router,
    ledger: Ledger,
    organization_id: str,
    spent: int | None,
    fields: dict[str, Any],
    field: str,
) -> None:
    budget = await create(identity, organization_id)
    lease = await expired(router, ledger, budget)
    error = await identity.refused(identity.budgets.SettleBudgetLease, by_hand(lease, spent, **fields))
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)
    assert await period(identity, budget) == (10, 90)


async def test_lease_is_settled_by_the_platform_only_and_in_its_own_place(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease = await expired(router, ledger, budget)
    owner = await identity.member(organization_id, "owner")
    settle = identity.budgets.SettleBudgetLease
    assert (await identity.refused(settle, by_hand(lease, 50), owner.secret)).reason is Reason.PERMISSION_DENIED
    other = await identity.organization()
    for fields in (
        {"organization_id": other},
        {"budget_id": (await create(identity, organization_id, model="m")).budget_id},
        {"budget_lease_id": "lease_0"},
    ):
        assert (await identity.refused(settle, by_hand(lease, 50, **fields))).reason is Reason.NOT_FOUND
    assert await period(identity, budget) == (10, 90)


async def test_router_lists_the_unsettled_leases_of_all_its_runs(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lost = await expired(router, ledger, budget)
    running = await Router(identity, router_instance_id="run_2").lease(budget, needed=10)
    await Router(identity, router_id="router_2").lease(budget, needed=10)
    done = await router.lease(budget, needed=10)
    await router.release(report(done, 1))
    assert [(lease.budget_lease_id, lease.state, lease.spent) for lease in await router.unsettled()] == [
        (lost.budget_lease_id, EXPIRED, 10),
        (running.budget_lease_id, ACTIVE, 0),
    ]
    method = identity.budgets.ListRouterLeases
    first = await identity.call(method, pb.ListRouterLeasesRequest(router_id="router_1", page_size=1))
    second = await identity.call(
        method, pb.ListRouterLeasesRequest(router_id="router_1", page_size=1, page_token=first.next_page_token)
    )
    assert [lease.budget_lease_id for lease in (*first.leases, *second.leases)] == [
        lost.budget_lease_id,
        running.budget_lease_id,
    ]
    assert second.next_page_token == ""
    error = await identity.refused(method, pb.ListRouterLeasesRequest())
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "router_id")


async def test_people_list_the_leases_of_a_budget_by_state(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget, other = await create(identity, organization_id), await create(identity, organization_id, model="m")
    leases = [await router.lease(budget, needed=10) for _ in range(4)]
    await router.lease(other, needed=10)
    await router.release(report(leases[0], 1))
    await let_expire(ledger, *leases[1:3])
    await router.renew(report(leases[2], 1))
    viewer = await identity.member(organization_id, "finance")
    method = identity.budgets.ListBudgetLeases

    async def ids(**fields: Any) -> list[str]:
        request = pb.ListBudgetLeasesRequest(
            organization_id=organization_id, budget_id=budget.budget_id, page_size=2, **fields
        )
        found: list[str] = []
        while True:
            page = await identity.call(method, request, viewer.secret)
            found += [lease.budget_lease_id for lease in page.budget_leases]
            request.page_token = page.next_page_token
            if not request.page_token:
                return found

    made = [lease.budget_lease_id for lease in leases]
    assert await ids() == made
    assert await ids(state=SETTLED) == made[:1]
    assert await ids(state=EXPIRED) == made[1:3]
    assert await ids(state=ACTIVE) == made[3:]
    # A removed budget's leases are there to be settled.
    removal = pb.DeleteBudgetRequest(organization_id=organization_id, budget_id=budget.budget_id)
    await identity.call(identity.budgets.DeleteBudget, removal)
    assert await ids() == made
    await identity.call(identity.budgets.SettleBudgetLease, by_hand(leases[1], 5))
    strange = pb.ListBudgetLeasesRequest(organization_id=await identity.organization(), budget_id=budget.budget_id)
    assert list((await identity.call(method, strange)).budget_leases) == []
    assert (await identity.refused(method, strange, viewer.secret)).reason is Reason.NOT_FOUND
    strange.state = 99  # type: ignore[assignment]  # no such state
    assert (await identity.refused(method, strange)).field == "state"


async def test_totals_hold_settled_and_unsettled_leases_of_all_routers(
    identity: Identity, router: Router, organization_id: str
) -> None:
    cost = await create(identity, organization_id)
    tokens = await create(identity, await identity.organization(), unit=pb.BUDGET_UNIT_TOKENS)
    other = Router(identity, router_id="router_2")
    done, running = await router.lease(cost, needed=100), await other.lease(cost, needed=100)
    await router.release(report(done, 1, spent=30, lines=[line(10), line(20, hour=NEXT_HOUR)]))
    await other.renew(report(running, 1, spent=7, wanted=93, lines=[line(5), line(2, key="key_0", model="n")]))
    await router.renew(report(await router.lease(tokens, needed=50), 1, spent=50, lines=[line(50, requests=3)]))
    mine = [
        (cost.budget_id, "key_0", "n", 2, 1),
        (cost.budget_id, "key_1", "m", 15, 2),
        (cost.budget_id, "key_1", "m", 20, 1),
    ]
    assert await totals(identity, organization_id) == mine
    assert sorted(await totals(identity)) == sorted([*mine, (tokens.budget_id, "key_1", "m", 50, 3)])
    assert await totals(identity, organization_id, start_time=NEXT_HOUR) == mine[2:]
    assert await totals(identity, organization_id, end_time=NEXT_HOUR) == mine[:2]
    request = pb.QueryLedgerRequest(start_time=HOUR, end_time=NEXT_HOUR, page_size=1)
    pages = []
    while True:
        page = await identity.call(identity.budgets.QueryLedger, request)
        pages.append(page.totals[0])
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    assert {(total.budget_id, total.unit, total.spent) for total in pages} == {
        (cost.budget_id, pb.BUDGET_UNIT_COST, 2),
        (cost.budget_id, pb.BUDGET_UNIT_COST, 15),
        (tokens.budget_id, pb.BUDGET_UNIT_TOKENS, 50),
    }
    assert all(total.hour_start == HOUR for total in pages)
    assert {total.organization_id for total in pages} == {organization_id, tokens.organization_id}
    # A lease's lines are counted once, before it is settled and after.
    await other.release(report(running, 2, spent=7, lines=[]))
    assert await totals(identity, organization_id) == mine


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"start_time": None}, "start_time"),
        ({"end_time": None}, "end_time"),
        ({"start_time": datetime(2024, 1, 1, 0, 30, tzinfo=UTC)}, "start_time"),
        ({"end_time": datetime(2024, 1, 1, 2, 0, 1, tzinfo=UTC)}, "end_time"),
        ({"end_time": datetime(2024, 1, 1, tzinfo=UTC)}, "end_time"),
        ({"organization_id": "a b"}, "organization_id"),
        ({"page_size": -1}, "page_size"),
        ({"page_token": "x"}, "page_token"),
    ],
)
async def test_wrong_field_of_a_query_is_named(identity: Identity, fields: dict[str, Any], field: str) -> None:
    start = datetime(2024, 1, 1, tzinfo=UTC)
    request = pb.QueryLedgerRequest(**{"start_time": start, "end_time": start + timedelta(hours=1), **fields})
    error = await identity.refused(identity.budgets.QueryLedger, request)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)


async def test_old_settled_leases_are_forgotten_and_their_spending_is_not(
    identity: Identity, ledger: Ledger, organization_id: str, database_url: str
) -> None:
    router = Router(identity)
    budget = await create(identity, organization_id, limit=100)
    settled, open_one = await expired(router, ledger, budget, 30), await router.lease(budget, needed=10)
    await router.settle(settlement(settled, 20))
    before = await totals(identity, organization_id)
    database = Database(database_url)
    leases = BudgetLeases(Store(database, announce_nothing), SystemClock())
    assert await leases.forget() == 0
    await ledger.fetch("UPDATE budget_leases SET expire_time = expire_time - interval '8 days' RETURNING 1")
    assert await leases.forget() == 1
    await database.close()
    assert [lease.budget_lease_id for lease in await router.unsettled()] == [open_one.budget_lease_id]
    assert await totals(identity, organization_id) == before
    assert (await period(identity, budget))[0] == 20


async def announce_nothing(_: object) -> None:
    """No key is revoked here."""
