"""Budgets as people see them and as routers resolve and watch them, over gRPC and a real database."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from aiaas.identity.v1 import budget_service_pb2 as pb
from mesh.errors import Reason
from tests.integration.identity.budgeting import HARD, SOFT, Ledger, create, get, to_update, update, wanted
from tests.integration.identity.harness import Identity, running_identity

LARGEST = 1 << 62


def moment(timestamp: Any) -> datetime:
    return timestamp.ToDatetime(UTC)  # type: ignore[no-any-return]


async def test_new_budget_is_answered_as_stored_with_its_running_period(identity: Identity) -> None:
    organization_id = await identity.organization()
    made = await create(identity, organization_id, model="llama-3", alert_percents=[90, 10])
    assert made.budget_id.startswith("budget_")
    assert (made.display_name, made.model, made.limit, made.enforcement) == ("Research", "llama-3", 1000, HARD)
    assert list(made.alert_percents) == [10, 90]
    assert made.WhichOneof("subject") is None
    assert made.current_period.limit == 1000
    assert (made.current_period.spent, made.current_period.leased) == (0, 0)
    assert await get(identity, made) == made


async def test_budget_without_thresholds_has_the_usual_ones(identity: Identity) -> None:
    made = await create(identity, await identity.organization())
    assert list(made.alert_percents) == [50, 80, 100]


@pytest.mark.parametrize(
    ("interval", "is_start"),
    [
        (pb.BUDGET_INTERVAL_DAILY, lambda start: True),
        (pb.BUDGET_INTERVAL_MONTHLY, lambda start: start.day == 1),
        (pb.BUDGET_INTERVAL_QUARTERLY, lambda start: (start.month % 3, start.day) == (1, 1)),
        (pb.BUDGET_INTERVAL_ANNUAL, lambda start: (start.month, start.day) == (1, 1)),
    ],
)
async def test_periods_follow_the_utc_calendar(identity: Identity, interval: Any, is_start: Any) -> None:
    period = (await create(identity, await identity.organization(), interval=interval)).current_period
    start, end = moment(period.start_time), moment(period.end_time)
    assert start <= datetime.now(UTC) < end
    for edge in (start, end):
        assert (edge.hour, edge.minute, edge.second, edge.microsecond) == (0, 0, 0, 0)
        assert is_start(edge)
    days = (end - start).days
    assert {1: (1, 1), 2: (28, 31), 3: (90, 92), 4: (365, 366)}[interval][0] <= days
    assert days <= {1: (1, 1), 2: (28, 31), 3: (90, 92), 4: (365, 366)}[interval][1]


async def test_total_budget_has_one_period_without_an_end_from_its_making_on(identity: Identity) -> None:
    made = await create(identity, await identity.organization(), interval=pb.BUDGET_INTERVAL_TOTAL)
    assert made.current_period.start_time == made.create_time
    assert not made.current_period.HasField("end_time")


async def test_total_budget_made_by_a_clock_that_is_ahead_has_its_period_at_once(
    identity: Identity, ledger: Ledger
) -> None:
    made = await create(identity, await identity.organization(), interval=pb.BUDGET_INTERVAL_TOTAL)
    await ledger.execute("UPDATE budgets SET create_time = create_time + interval '1 hour'")
    async with asyncio.timeout(5):
        assert await ledger.limit(made) == 1000
    assert (await update(identity, made, limit=7)).current_period.limit == 7


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"display_name": ""}, "budget.display_name"),
        ({"display_name": "a\nb"}, "budget.display_name"),
        ({"unit": 0}, "budget.unit"),
        ({"unit": 99}, "budget.unit"),
        ({"interval": 0}, "budget.interval"),
        ({"interval": 99}, "budget.interval"),
        ({"enforcement": 0}, "budget.enforcement"),
        ({"enforcement": 99}, "budget.enforcement"),
        ({"limit": None}, "budget.limit"),
        ({"limit": -1}, "budget.limit"),
        ({"limit": LARGEST + 1}, "budget.limit"),
        ({"alert_percents": [0]}, "budget.alert_percents"),
        ({"alert_percents": [1001]}, "budget.alert_percents"),
        ({"alert_percents": [50, 50]}, "budget.alert_percents"),
        ({"model": "m" * 201}, "budget.model"),
        ({"model": "a\x00b"}, "budget.model"),
        ({"user_id": "user_nobody"}, "budget.user_id"),
        ({"user_id": ""}, "budget.user_id"),
        ({"service_account_id": "sa_nobody"}, "budget.service_account_id"),
        ({"api_key_id": "key_nobody"}, "budget.api_key_id"),
    ],
)
async def test_wrong_field_is_named_and_nothing_is_stored(
    identity: Identity, ledger: Ledger, fields: dict[str, Any], field: str
) -> None:
    organization_id = await identity.organization()
    request = pb.CreateBudgetRequest(organization_id=organization_id, budget=wanted(**fields), request_id="r1")
    error = await identity.refused(identity.budgets.CreateBudget, request)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)
    for table in ("budgets", "budget_periods", "organization_budgets"):
        assert await ledger.fetch(f"SELECT FROM {table}") == []
    # What was refused has not used up its request_id.
    request = pb.CreateBudgetRequest(organization_id=organization_id, budget=wanted(), request_id="r1")
    assert (await identity.call(identity.budgets.CreateBudget, request)).budget.limit == 1000


@pytest.mark.parametrize("limit", [0, 1, LARGEST])
async def test_limits_at_the_edges_are_taken(identity: Identity, limit: int) -> None:
    made = await create(identity, await identity.organization(), limit=limit)
    assert made.limit == made.current_period.limit == limit


async def test_subject_of_another_organization_is_refused(identity: Identity) -> None:
    organization_id, other = await identity.organization(), await identity.organization()
    member = await identity.member(other, "developer")
    account = await identity.service_account(other)
    key = await identity.key(other)
    for name, subject in (
        ("user_id", member.user_id),
        ("service_account_id", account.service_account_id),
        ("api_key_id", key.api_key.api_key_id),
    ):
        fields: dict[str, Any] = {name: subject}
        request = pb.CreateBudgetRequest(organization_id=organization_id, budget=wanted(**fields))
        error = await identity.refused(identity.budgets.CreateBudget, request)
        assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, f"budget.{name}")
        made = await create(identity, other, **fields)
        assert getattr(made, name) == subject


async def test_same_thing_is_not_limited_twice(identity: Identity) -> None:
    organization_id = await identity.organization()
    first = await create(identity, organization_id)
    request = pb.CreateBudgetRequest(organization_id=organization_id, budget=wanted(limit=5, display_name="Other"))
    error = await identity.refused(identity.budgets.CreateBudget, request)
    assert (error.reason, error.field) == (Reason.ALREADY_EXISTS, "budget")
    assert first.budget_id in error.message
    for other in ({"model": "m"}, {"unit": pb.BUDGET_UNIT_TOKENS}, {"interval": pb.BUDGET_INTERVAL_DAILY}):
        await create(identity, organization_id, **other)
    await identity.call(
        identity.budgets.DeleteBudget,
        pb.DeleteBudgetRequest(organization_id=organization_id, budget_id=first.budget_id),
    )
    assert (await create(identity, organization_id)).budget_id != first.budget_id


async def test_repeated_request_id_gives_the_first_budget(identity: Identity) -> None:
    organization_id = await identity.organization()
    request = pb.CreateBudgetRequest(organization_id=organization_id, budget=wanted(), request_id="once")
    made = await asyncio.gather(*(identity.call(identity.budgets.CreateBudget, request) for _ in range(4)))
    assert len({answer.budget.budget_id for answer in made}) == 1
    listed = await identity.call(identity.budgets.ListBudgets, pb.ListBudgetsRequest(organization_id=organization_id))
    assert len(listed.budgets) == 1


async def test_list_is_paged_oldest_first_and_filtered(identity: Identity) -> None:
    organization_id = await identity.organization()
    member = await identity.member(organization_id, "developer")
    made = [await create(identity, organization_id, model=f"m{number}") for number in range(3)]
    made.append(await create(identity, organization_id, user_id=member.user_id))
    seen: list[pb.Budget] = []
    request = pb.ListBudgetsRequest(organization_id=organization_id, page_size=2)
    while True:
        page = await identity.call(identity.budgets.ListBudgets, request)
        seen += page.budgets
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert seen == made
    for only, expected in (({"model": "m1"}, made[1]), ({"user_id": member.user_id}, made[3])):
        request = pb.ListBudgetsRequest(organization_id=organization_id, **only)  # type: ignore[arg-type]
        assert list((await identity.call(identity.budgets.ListBudgets, request)).budgets) == [expected]


async def test_budget_of_another_organization_is_not_found(identity: Identity) -> None:
    made = await create(identity, await identity.organization())
    other = await identity.organization()
    ids: dict[str, Any] = {"organization_id": other, "budget_id": made.budget_id}
    calls: list[tuple[Any, Any]] = [
        (identity.budgets.GetBudget, pb.GetBudgetRequest(**ids)),
        (identity.budgets.UpdateBudget, pb.UpdateBudgetRequest(**ids, budget=pb.Budget(limit=1))),
        (identity.budgets.DeleteBudget, pb.DeleteBudgetRequest(**ids)),
        (identity.budgets.ListBudgetPeriods, pb.ListBudgetPeriodsRequest(**ids)),
    ]
    stranger = await identity.member(other, "owner")
    for method, request in calls:
        assert (await identity.refused(method, request)).reason is Reason.NOT_FOUND
        request.organization_id = made.organization_id
        assert (await identity.refused(method, request, stranger.secret)).reason is Reason.NOT_FOUND
    assert await get(identity, made) == made


async def test_update_changes_what_the_mask_names_and_the_running_period(identity: Identity, ledger: Ledger) -> None:
    made = await create(identity, await identity.organization())
    await ledger.set(made, spent=300, leased=200)
    changed = await update(identity, made, limit=500, display_name="Smaller", alert_percents=[])
    assert (changed.limit, changed.display_name, changed.etag != made.etag) == (500, "Smaller", True)
    assert (changed.current_period.limit, changed.current_period.spent, changed.current_period.leased) == (
        500,
        300,
        200,
    )
    assert list(changed.alert_percents) == [50, 80, 100]
    assert changed.update_time.ToNanoseconds() > made.update_time.ToNanoseconds()
    assert await ledger.limit(made) == 500
    without_mask = pb.UpdateBudgetRequest(
        organization_id=made.organization_id, budget_id=made.budget_id, budget=pb.Budget(limit=700, model="ignored")
    )
    changed = (await identity.call(identity.budgets.UpdateBudget, without_mask)).budget
    assert (changed.limit, changed.model, changed.display_name) == (700, "", "Smaller")


@pytest.mark.parametrize("path", ["unit", "interval", "model", "user_id", "current_period", "no_such"])
async def test_what_is_fixed_cannot_be_changed(identity: Identity, path: str) -> None:
    made = await create(identity, await identity.organization())
    request = to_update(made)
    request.update_mask.CopyFrom(FieldMask(paths=[path]))
    error = await identity.refused(identity.budgets.UpdateBudget, request)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "update_mask")


async def test_hard_limit_below_what_is_spent_and_leased_is_refused_with_the_numbers(
    identity: Identity, ledger: Ledger
) -> None:
    made = await create(identity, await identity.organization())
    await ledger.set(made, spent=300, leased=200)
    error = await identity.refused(identity.budgets.UpdateBudget, to_update(made, limit=499))
    assert (error.reason, error.field) == (Reason.FAILED_PRECONDITION, "budget.limit")
    for number in ("500", "300", "200"):
        assert number in error.message
    assert (await get(identity, made)).limit == 1000
    assert await ledger.limit(made) == 1000


async def test_soft_budget_becomes_hard_only_within_its_limit(identity: Identity, ledger: Ledger) -> None:
    made = await create(identity, await identity.organization(), enforcement=SOFT)
    await ledger.set(made, spent=1500)
    error = await identity.refused(identity.budgets.UpdateBudget, to_update(made, enforcement=HARD))
    assert error.reason is Reason.FAILED_PRECONDITION
    assert (await update(identity, made, limit=10)).current_period.limit == 10
    changed = await update(identity, made, enforcement=HARD, limit=1500)
    assert (changed.enforcement, changed.current_period.limit) == (HARD, 1500)
    assert (await ledger.fetch("SELECT is_hard FROM budget_periods"))[0]["is_hard"]
    assert (await update(identity, made, enforcement=SOFT, limit=0)).current_period.limit == 0


async def test_change_of_another_version_is_refused(identity: Identity) -> None:
    made = await create(identity, await identity.organization())
    await update(identity, made, limit=5, etag=made.etag)
    error = await identity.refused(identity.budgets.UpdateBudget, to_update(made, limit=6, etag=made.etag))
    assert (error.reason, error.field) == (Reason.FAILED_PRECONDITION, "budget.etag")
    request = pb.DeleteBudgetRequest(organization_id=made.organization_id, budget_id=made.budget_id, etag=made.etag)
    assert (await identity.refused(identity.budgets.DeleteBudget, request)).field == "etag"
    assert (await get(identity, made)).limit == 5


async def test_removed_budget_is_gone_and_its_ledger_stays(identity: Identity, ledger: Ledger) -> None:
    made = await create(identity, await identity.organization())
    await ledger.set(made, spent=10)
    request = pb.DeleteBudgetRequest(organization_id=made.organization_id, budget_id=made.budget_id, etag=made.etag)
    await identity.call(identity.budgets.DeleteBudget, request)
    for method, wrong in (
        (identity.budgets.DeleteBudget, request),
        (
            identity.budgets.GetBudget,
            pb.GetBudgetRequest(organization_id=made.organization_id, budget_id=made.budget_id),
        ),
    ):
        assert (await identity.refused(method, wrong)).reason is Reason.NOT_FOUND
    assert [row["spent"] for row in await ledger.fetch("SELECT spent FROM budget_periods")] == [10]


async def test_periods_are_listed_newest_first(identity: Identity, ledger: Ledger) -> None:
    made = await create(identity, await identity.organization())
    await ledger.set(made, spent=7)
    await ledger.execute(
        "INSERT INTO budget_periods (budget_id, period_start, period_end, is_hard, limit_amount, spent)"
        " VALUES ($1, '2020-01-01Z', '2020-02-01Z', true, 900, 800)",
        made.budget_id,
    )
    request = pb.ListBudgetPeriodsRequest(organization_id=made.organization_id, budget_id=made.budget_id, page_size=1)
    first = await identity.call(identity.budgets.ListBudgetPeriods, request)
    assert list(first.budget_periods) == [(await get(identity, made)).current_period]
    request.page_token = first.next_page_token
    second = await identity.call(identity.budgets.ListBudgetPeriods, request)
    assert [(period.spent, period.limit) for period in second.budget_periods] == [(800, 900)]
    assert not second.next_page_token


async def test_each_threshold_is_passed_once_in_a_period(identity: Identity, ledger: Ledger) -> None:
    organization_id = await identity.organization()
    made = await create(identity, organization_id)
    assert await ledger.set(made, spent=499) == 0
    assert await ledger.set(made, spent=500) == 1
    assert await ledger.set(made, spent=501) == 0
    assert await ledger.set(made, spent=1000) == 2
    request = pb.ListBudgetAlertsRequest(organization_id=organization_id, page_size=2)
    page = await identity.call(identity.budgets.ListBudgetAlerts, request)
    request.page_token = page.next_page_token
    alerts = [*page.budget_alerts, *(await identity.call(identity.budgets.ListBudgetAlerts, request)).budget_alerts]
    assert sorted((alert.percent, alert.spent, alert.limit) for alert in alerts) == [
        (50, 500, 1000),
        (80, 1000, 1000),
        (100, 1000, 1000),
    ]
    assert alerts[-1].percent == 50
    assert {alert.budget_id for alert in alerts} == {made.budget_id}
    only = pb.ListBudgetAlertsRequest(organization_id=organization_id, budget_id="budget_other")
    assert not (await identity.call(identity.budgets.ListBudgetAlerts, only)).budget_alerts


async def test_amounts_near_the_largest_pass_their_thresholds(identity: Identity, ledger: Ledger) -> None:
    made = await create(identity, await identity.organization(), limit=LARGEST, alert_percents=[50, 1000])
    assert await ledger.set(made, spent=LARGEST // 2 - 1) == 0
    assert await ledger.set(made, spent=LARGEST // 2) == 1


async def test_limit_of_zero_is_passed_by_anything(identity: Identity, ledger: Ledger) -> None:
    made = await create(identity, await identity.organization(), limit=0, enforcement=SOFT)
    assert await ledger.set(made, spent=0) == 0
    assert await ledger.set(made, spent=1) == 3


async def test_lower_limit_and_new_threshold_are_passed_at_once(identity: Identity, ledger: Ledger) -> None:
    made = await create(identity, await identity.organization(), alert_percents=[100])
    await ledger.set(made, spent=600)
    await update(identity, made, limit=600)
    await update(identity, made, alert_percents=[90, 100])
    rows = await ledger.fetch("SELECT percent FROM budget_alerts ORDER BY percent")
    assert [row["percent"] for row in rows] == [90, 100]


async def resolve(identity: Identity, organization_id: str) -> pb.ResolveBudgetsResponse:
    return await identity.budgets.ResolveBudgets(pb.ResolveBudgetsRequest(organization_id=organization_id), timeout=5)


async def test_routers_resolve_what_binds_in_the_order_of_ids(identity: Identity, ledger: Ledger) -> None:
    organization_id = await identity.organization()
    assert await resolve(identity, organization_id) == pb.ResolveBudgetsResponse()
    made = [await create(identity, organization_id, model=model) for model in ("b", "a", "off", "gone")]
    await update(identity, made[2], disabled=True)
    request = pb.DeleteBudgetRequest(organization_id=organization_id, budget_id=made[3].budget_id)
    await identity.call(identity.budgets.DeleteBudget, request)
    await ledger.set(made[0], spent=10, leased=5)
    resolved = await resolve(identity, organization_id)
    assert [budget.budget_id for budget in resolved.budgets] == sorted(budget.budget_id for budget in made[:2])
    first = next(budget for budget in resolved.budgets if budget.model == "b")
    assert (first.current_period.spent, first.current_period.leased, first.current_period.limit) == (10, 5, 1000)


async def test_every_change_makes_a_new_revision(identity: Identity) -> None:
    organization_id = await identity.organization()
    made = await create(identity, organization_id)
    revisions = [(await resolve(identity, organization_id)).revision]
    await update(identity, made, limit=5)
    revisions.append((await resolve(identity, organization_id)).revision)
    await create(identity, await identity.organization())
    assert (await resolve(identity, organization_id)).revision == revisions[-1]
    request = pb.DeleteBudgetRequest(organization_id=organization_id, budget_id=made.budget_id)
    await identity.call(identity.budgets.DeleteBudget, request)
    revisions.append((await resolve(identity, organization_id)).revision)
    assert sorted(set(revisions)) == revisions
    assert revisions[0] > 0


async def test_changes_at_the_same_time_have_revisions_of_their_own(identity: Identity) -> None:
    organization_ids = [await identity.organization() for _ in range(4)]
    await asyncio.gather(
        *(create(identity, organization_id, model=f"m{n}") for organization_id in organization_ids for n in range(3))
    )
    revisions = [(await resolve(identity, organization_id)).revision for organization_id in organization_ids]
    assert len(set(revisions)) == 4
    assert max(revisions) == 1 + 12


async def read(watch: Any) -> tuple[int, str]:
    answer = await asyncio.wait_for(watch.read(), 5)
    return answer.revision, answer.organization_id


async def test_watch_says_from_when_on_it_tells_and_then_tells_each_change(identity: Identity) -> None:
    organization_id = await identity.organization()
    made = await create(identity, organization_id)
    now = (await resolve(identity, organization_id)).revision
    watches: list[Any] = [identity.budgets.WatchBudgets(pb.WatchBudgetsRequest(), timeout=30) for _ in range(2)]
    for watch in watches:
        assert await read(watch) == (now, "")
    await update(identity, made, limit=5)
    for watch in watches:
        assert await read(watch) == (now + 1, organization_id)
    other = await identity.organization()
    await create(identity, other)
    for watch in watches:
        assert await read(watch) == (now + 2, other)
        watch.cancel()


async def test_watch_goes_on_after_the_revision_that_was_seen(identity: Identity) -> None:
    organization_ids = [await identity.organization() for _ in range(3)]
    for organization_id in organization_ids:
        await create(identity, organization_id)
    first = (await resolve(identity, organization_ids[0])).revision
    watch: Any = identity.budgets.WatchBudgets(pb.WatchBudgetsRequest(after_revision=first), timeout=30)
    assert [await read(watch) for _ in range(3)] == [
        (first, ""),
        (first + 1, organization_ids[1]),
        (first + 2, organization_ids[2]),
    ]
    watch.cancel()


async def test_watches_end_with_the_server_and_do_not_hold_up_its_drain(database_url: str, tmp_path: Any) -> None:
    loop = asyncio.get_running_loop()
    async with running_identity(database_url, tmp_path, drain_s=20.0) as identity:
        watch: Any = identity.budgets.WatchBudgets(pb.WatchBudgetsRequest())
        await asyncio.wait_for(anext(aiter(watch)), 5)
        identity.stop()
        began = loop.time()
        async with asyncio.timeout(5):
            assert [answer async for answer in watch] == []
        assert await watch.code() is grpc.StatusCode.OK
    assert loop.time() - began < 5


async def test_period_never_begins_with_a_limit_that_is_being_replaced(identity: Identity, ledger: Ledger) -> None:
    made = await create(identity, await identity.organization())
    async with ledger.database.transaction() as connection:
        await connection.execute("UPDATE budgets SET limit_amount = 5 WHERE budget_id = $1", made.budget_id)
        opening = asyncio.create_task(ledger.limit(made))
        async with asyncio.timeout(5):
            while not await ledger.fetch(
                "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            ):
                await asyncio.sleep(0.02)
    assert await opening == 5
