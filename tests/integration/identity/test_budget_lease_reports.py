"""Leases that routers report on, give back and lose, over gRPC and a real database."""

from datetime import UTC, timedelta
from typing import Any

import pytest

from aiaas.identity.v1 import budget_service_pb2 as pb
from aiaas.type.v1.platform_event_pb2 import PlatformEvent
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
    totals,
)

TTL = timedelta(seconds=10)
LARGEST = 1 << 62


async def test_renewal_turns_what_is_leased_into_what_is_spent_and_extends(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease = await router.lease(budget, needed=100)
    await ledger.execute("UPDATE budget_leases SET expire_time = expire_time - interval '5 s'")
    (renewed,) = await router.renew(report(lease, 1, spent=30, reserved=20, wanted=50))
    assert (renewed.amount, renewed.spent, renewed.sequence, renewed.state) == (100, 30, 1, ACTIVE)
    assert renewed.valid_for.ToTimedelta() == TTL
    assert renewed.expire_time.ToDatetime(UTC) > lease.expire_time.ToDatetime(UTC)
    assert await period(identity, budget) == (30, 70)


async def test_renewal_takes_back_what_is_not_wanted_and_never_gives_more(
    identity: Identity, router: Router, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease = await router.lease(budget, needed=100)
    (renewed,) = await router.renew(report(lease, 1, spent=30, reserved=20, wanted=10))
    assert renewed.amount == 60
    assert await period(identity, budget) == (30, 30)
    (renewed,) = await router.renew(report(lease, 2, spent=30, reserved=20, wanted=LARGEST))
    assert renewed.amount == 60


async def test_report_that_was_taken_changes_nothing_and_an_older_one_is_refused(
    identity: Identity, router: Router, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease = await router.lease(budget, needed=100)
    (first,) = await router.renew(report(lease, 2, spent=30, wanted=70))
    (again,) = await router.renew(report(lease, 2, spent=30, wanted=70))
    assert (again.amount, again.spent, again.expire_time) == (100, 30, first.expire_time)
    assert await period(identity, budget) == (30, 70)
    assert await totals(identity) == [(budget.budget_id, "key_1", "m", 30, 1)]
    error = await router.renew_refused(report(lease, 1, spent=30))
    assert (error.reason, error.field) == (Reason.FAILED_PRECONDITION, "reports[0].sequence")


async def test_lines_are_running_totals(identity: Identity, router: Router, organization_id: str) -> None:
    budget = await create(identity, organization_id)
    lease = await router.lease(budget, needed=100)
    await router.renew(report(lease, 1, 30, wanted=70, lines=[line(10), line(20, key="")]))
    # Lines that have not grown are not told again.
    await router.renew(report(lease, 2, 45, wanted=55, lines=[line(25, requests=3), line(0, model="n")]))
    assert await totals(identity) == [
        (budget.budget_id, "", "m", 20, 1),
        (budget.budget_id, "key_1", "m", 25, 3),
        (budget.budget_id, "key_1", "n", 0, 1),
    ]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"budget_lease_id": ""}, "budget_lease_id"),
        ({"sequence": 0}, "sequence"),
        ({"sequence": -1}, "sequence"),
        ({"spent": 9}, "spent"),
        ({"spent": 101}, "spent"),
        ({"spent": -1}, "spent"),
        ({"reserved": -1}, "reserved"),
        ({"reserved": 91}, "reserved"),
        ({"wanted": -1}, "wanted"),
        ({"lines": [line(11)]}, "lines"),
        ({"lines": [line(1), line(1)]}, "lines"),
        ({"lines": [line(-1)]}, "lines[0].spent"),
        ({"lines": [line(1), line(1, requests=-1, key="")]}, "lines[1].requests"),
        ({"lines": [line(1, key="a b")]}, "lines[0].api_key_id"),
        ({"lines": [line(1, model="a\x00b")]}, "lines[0].model"),
        ({"lines": [pb.LedgerLine(spent=1)]}, "lines[0].hour_start"),
        ({"lines": [line(1, hour=type(HOUR)(seconds=HOUR.seconds + 1))]}, "lines[0].hour_start"),
        ({"lines": [line(1, hour=type(HOUR)(seconds=1 << 60))]}, "lines[0].hour_start"),
    ],
)
async def test_wrong_field_of_a_report_is_named_and_nothing_of_the_call_counts(
    identity: Identity, router: Router, organization_id: str, fields: dict[str, Any], field: str
) -> None:
    budget = await create(identity, organization_id)
    good, bad = await router.lease(budget, needed=100), await router.lease(budget, needed=100)
    await router.renew(report(bad, 1, spent=10, wanted=90, lines=[line(0, key="key_2")]))
    wrong = report(bad, 2, spent=10, lines=[])
    lines = fields.pop("lines", [])
    for name, value in fields.items():
        setattr(wrong, name, value)
    wrong.lines.extend(lines)
    error = await router.renew_refused(report(good, 1, spent=50), wrong)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, f"reports[1].{field}")
    assert await period(identity, budget) == (10, 190)


async def test_too_many_reports_and_two_of_one_lease_are_refused(
    identity: Identity, router: Router, organization_id: str
) -> None:
    lease = await router.lease(await create(identity, organization_id), needed=100)
    for reports in ([report(lease, 1), report(lease, 2)], [report(lease, 1)] * 1001):
        error = await router.renew_refused(*reports)
        assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "reports")


async def test_expired_lease_is_fenced_for_good_and_stays_charged(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease, healthy = await router.lease(budget, needed=100), await router.lease(budget, needed=100)
    await router.renew(report(lease, 1, spent=10, wanted=90))
    await let_expire(ledger, lease)
    fenced, renewed = await router.renew(report(lease, 2, spent=50), report(healthy, 1, spent=5, wanted=95))
    assert (fenced.state, fenced.amount, fenced.spent, fenced.sequence) == (EXPIRED, 100, 10, 1)
    assert not fenced.HasField("valid_for")
    assert not fenced.HasField("admit_for")
    assert renewed.state == ACTIVE
    assert await period(identity, budget) == (15, 185)
    # Whatever the clock does, it has been told.
    await ledger.execute("UPDATE budget_leases SET expire_time = clock_timestamp() + interval '1 h'")
    (fenced,) = await router.renew(report(lease, 3, spent=50))
    assert (fenced.state, fenced.spent) == (EXPIRED, 10)
    (fenced,) = await router.release(report(lease, 4, spent=50))
    assert (fenced.state, fenced.spent) == (EXPIRED, 10)
    assert await period(identity, budget) == (15, 185)


async def test_lease_of_another_run_is_fenced(identity: Identity, router: Router, organization_id: str) -> None:
    budget = await create(identity, organization_id)
    lease = await router.lease(budget, needed=100)
    next_run = Router(identity, router_instance_id="run_2")
    (fenced,) = await next_run.renew(report(lease, 1, spent=50))
    assert (fenced.state, fenced.amount, fenced.spent) == (EXPIRED, 100, 0)
    (fenced,) = await router.renew(report(lease, 1, spent=50))
    assert (fenced.state, fenced.spent) == (EXPIRED, 0)
    assert await period(identity, budget) == (0, 100)


async def test_unknown_lease_is_fenced_and_another_routers_is_left_alone(
    identity: Identity, router: Router, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease = await router.lease(budget, needed=100)
    other = Router(identity, router_id="router_2")
    fenced = await other.renew(report(lease, 1), report(pb.BudgetLease(budget_lease_id="lease_0"), 1))
    assert [answer.state for answer in fenced] == [EXPIRED, EXPIRED]
    assert [answer.budget_lease_id for answer in fenced] == [lease.budget_lease_id, "lease_0"]
    assert fenced[0].organization_id == ""
    assert (await router.renew(report(lease, 1, wanted=100)))[0].state == ACTIVE


async def test_new_requests_are_admitted_no_longer_than_the_period_lasts(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease = await router.lease(budget, needed=100)
    assert timedelta() < lease.admit_for.ToTimedelta() <= TTL
    await ledger.execute("UPDATE budget_periods SET period_end = clock_timestamp() + interval '5 s'")
    (renewed,) = await router.renew(report(lease, 1, wanted=100))
    assert timedelta() < renewed.admit_for.ToTimedelta() <= timedelta(seconds=5)
    assert renewed.valid_for.ToTimedelta() == TTL
    # What runs goes on.
    await ledger.execute("UPDATE budget_periods SET period_end = clock_timestamp() - interval '1 s'")
    (renewed,) = await router.renew(report(lease, 2, spent=10, reserved=90))
    assert not renewed.HasField("admit_for")
    assert (renewed.valid_for.ToTimedelta(), renewed.state, renewed.spent) == (TTL, ACTIVE, 10)


async def test_lease_of_a_budget_without_an_end_admits_as_long_as_it_is_valid(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id, interval=pb.BUDGET_INTERVAL_TOTAL)
    # The database's clock may be behind the one that the budget was made by.
    await ledger.execute("UPDATE budgets SET create_time = clock_timestamp() + interval '1 h'")
    lease = await router.lease(budget, needed=600)
    assert lease.admit_for.ToTimedelta() == lease.valid_for.ToTimedelta() == TTL
    (denial,) = (await router.ask((budget, 600, 0))).denials
    assert not denial.HasField("period_end")


async def test_released_lease_is_charged_what_was_spent_and_no_more(
    identity: Identity, router: Router, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease = await router.lease(budget, needed=100)
    await router.renew(report(lease, 1, spent=10, wanted=90))
    lines = [line(10), line(20, hour=NEXT_HOUR)]
    (released,) = await router.release(report(lease, 2, spent=30, lines=lines))
    assert (released.state, released.amount, released.spent, released.sequence) == (SETTLED, 30, 30, 2)
    assert not released.HasField("valid_for")
    assert await period(identity, budget) == (30, 0)
    both = [(budget.budget_id, "key_1", "m", 10, 1), (budget.budget_id, "key_1", "m", 20, 1)]
    assert await totals(identity) == both
    # The answer was lost, and a late report comes after it: nothing happens twice.
    for answer in (*await router.release(report(lease, 3, spent=30)), *await router.renew(report(lease, 3, spent=30))):
        assert answer == released
    assert await totals(identity) == both
    assert await router.unsettled() == []


async def test_spending_without_a_line_gets_one_without_a_key_and_a_model(
    identity: Identity, router: Router, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease = await router.lease(budget, needed=100)
    await router.release(report(lease, 1, spent=30, lines=[line(10)]))
    assert await totals(identity) == [(budget.budget_id, "key_1", "m", 10, 1), (budget.budget_id, "", "", 20, 0)]


async def test_lease_on_which_requests_run_is_not_released(
    identity: Identity, router: Router, organization_id: str
) -> None:
    budget = await create(identity, organization_id)
    lease = await router.lease(budget, needed=100)
    for wrong, field, reason in (
        (report(lease, 1, spent=10, reserved=1), "reserved", Reason.FAILED_PRECONDITION),
        (report(lease, 1, spent=10, wanted=1), "wanted", Reason.INVALID_ARGUMENT),
    ):
        error = await identity.refused(identity.budgets.Release, router.to_release(wrong))
        assert (error.reason, error.field) == (reason, f"reports[0].{field}")
    assert await period(identity, budget) == (0, 100)


async def test_what_comes_back_above_a_fallen_limit_is_gone(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id, limit=100)
    await router.lease(budget, needed=1)
    await ledger.execute("UPDATE budget_periods SET limit_amount = 200")
    big, small = await router.lease(budget, needed=99), await router.lease(budget, needed=80)
    # As an override's end leaves it.
    await ledger.execute("UPDATE budget_periods SET limit_amount = 180, falling = true")
    await router.release(report(small, 1))
    assert await ledger.limit(budget) == 100
    assert len((await router.ask((budget, 1, 1))).denials) == 1
    await router.release(report(big, 1, spent=40))
    assert (await router.lease(budget, needed=59)).amount == 59


async def test_thresholds_are_told_once_in_the_transaction_that_passes_them(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budget = await create(identity, organization_id, limit=100)
    lease = await router.lease(budget, needed=100)
    for sequence, (spent, percents) in enumerate([(49, []), (50, [50]), (60, [50]), (100, [50, 80, 100])], start=1):
        await router.renew(report(lease, sequence, spent=spent, wanted=100))
        rows = await ledger.fetch("SELECT event FROM unpublished_events ORDER BY create_time")
        events = [PlatformEvent.FromString(row["event"]).budget_threshold_crossed for row in rows]
        assert [event.percent for event in events] == percents
        assert all(event.budget_id == budget.budget_id for event in events)


async def test_thousand_leases_are_renewed_in_one_call(
    identity: Identity, router: Router, ledger: Ledger, organization_id: str
) -> None:
    budgets = [await create(identity, organization_id, model=model, limit=2000) for model in "abcd"]
    answers = [await router.ask(*((budget, 1, 1) for budget in budgets)) for _ in range(250)]
    leases = [lease for answer in answers for lease in answer.leases]
    renewed = await router.renew(*(report(lease, 1, spent=1) for lease in leases))
    assert [lease.budget_lease_id for lease in renewed] == [lease.budget_lease_id for lease in leases]
    assert all((lease.spent, lease.amount, lease.state) == (1, 1, ACTIVE) for lease in renewed)
    for budget in budgets:
        assert await period(identity, budget) == (250, 0)
