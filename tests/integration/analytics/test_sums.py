"""Questions about spend and reliability over gRPC: the raw events' own, by any grouping, zone, filter and page."""

import asyncio
import math
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiaas.analytics.v1 import reliability_service_pb2 as reliability_pb
from aiaas.analytics.v1 import spend_service_pb2 as spend_pb
from aiaas.analytics.v1 import usage_service_pb2 as pb
from aiaas.type.v1.usage_event_pb2 import Outcome, TokenUsage, UsageEvent
from analytics.charges import cost_parts
from analytics.usage_range import DAY
from analytics.usage_retention import Kept, close_days, remove_old
from mesh.database import Database
from mesh.errors import Reason
from tests.doubles.usage_events import NOW, usage_event
from tests.integration.analytics.questions import (
    DIMENSIONS,
    FILTERS,
    PRICE,
    START,
    Asked,
    asking,
    many_events,
    moment,
    own,
    stamp,
    within,
)

KEPT = Kept()
FAILURES = {
    *(Outcome.OUTCOME_FAILED, Outcome.OUTCOME_TRUNCATED),
    *(Outcome.OUTCOME_DEADLINE_EXCEEDED, Outcome.OUTCOME_ABORTED),
}
TODAY = NOW.replace(hour=0, minute=0, second=0, microsecond=0)


@pytest.fixture
async def asked(database: Database, tmp_path: Path) -> AsyncIterator[Asked]:
    """The services, while nothing was used."""
    async with asking(database, tmp_path) as asked:
        yield asked


def admitted(events: Sequence[UsageEvent]) -> list[UsageEvent]:
    return [event for event in events if event.outcome != Outcome.OUTCOME_REFUSED]


def spent(events: Sequence[UsageEvent]) -> spend_pb.SpendTotals:
    parts = [cost_parts(event.price, event.usage, event.cost_micros) for event in events]
    prompt, cached_prompt, completion = map(sum, zip(*parts, strict=True)) if parts else (0, 0, 0)
    return spend_pb.SpendTotals(
        cost_micros=sum(event.cost_micros for event in events),
        prompt_cost_micros=prompt,
        cached_prompt_cost_micros=cached_prompt,
        completion_cost_micros=completion,
        requests=len(admitted(events)),
    )


def assert_spend(told: spend_pb.SpendTotals, events: Sequence[UsageEvent]) -> None:
    assert told == spent(events)
    assert told.cost_micros == told.prompt_cost_micros + told.cached_prompt_cost_micros + told.completion_cost_micros


def assert_percentiles(told: reliability_pb.Percentiles, durations: list[int]) -> None:
    assert told.samples == len(durations)
    found = (told.p50_micros, told.p95_micros, told.p99_micros)
    if not durations:
        assert found == (0, 0, 0)
        return
    durations.sort()
    for quantile, micros in zip((0.50, 0.95, 0.99), found, strict=True):
        exact = durations[math.floor(quantile * (len(durations) - 1))]
        # Told in whole microseconds.
        assert abs(micros - exact) <= 0.01 * exact + 0.5


def assert_reliability(told: reliability_pb.ReliabilityTotals, events: Sequence[UsageEvent]) -> None:
    requests = admitted(events)
    assert told.requests == len(requests)
    assert {(count.outcome, count.reason): count.requests for count in told.outcomes} == Counter(
        (event.outcome, event.reason) for event in events
    )
    failed = sum(event.outcome in FAILURES for event in events)
    assert told.error_rate == (failed / len(requests) if requests else 0)
    assert_percentiles(told.latency, [event.duration_micros for event in requests if event.duration_micros])
    streamed = [event.ttft_micros for event in requests if event.streamed and event.ttft_micros]
    assert_percentiles(told.ttft, streamed)


KINDS: dict[str, tuple[Any, Any, Callable[[Any, Sequence[UsageEvent]], None]]] = {
    "spend": (spend_pb.QuerySpendRequest, "QuerySpend", assert_spend),
    "reliability": (reliability_pb.QueryReliabilityRequest, "QueryReliability", assert_reliability),
}


def question(kind: str, start: datetime = START, end: datetime = NOW, **fields: Any) -> Any:
    return KINDS[kind][0](organization_id="org_a", start_time=stamp(start), end_time=stamp(end), **fields)


def rpc(asked: Asked, kind: str) -> Any:
    return getattr(getattr(asked, kind), KINDS[kind][1])


def hour_after(time: datetime) -> datetime:
    return (time - timedelta.resolution).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    group_by=st.lists(st.sampled_from(list(DIMENSIONS)), max_size=3, unique=True),
    interval=st.sampled_from(pb.UsageInterval.values()),
    zone=st.sampled_from(["", "Europe/Berlin", "Asia/Kolkata", "America/Los_Angeles"]),
    narrow=st.sampled_from([None, *FILTERS]),
    ago=st.timedeltas(timedelta(hours=1), timedelta(days=70)),
    length=st.timedeltas(timedelta(hours=1), timedelta(days=60)),
    page_size=st.sampled_from([0, 7, 100]),
    compare=st.booleans(),
)
async def test_answers_are_those_of_the_raw_events(
    asked: Asked,
    kind: str,
    group_by: list[pb.UsageDimension.ValueType],
    interval: pb.UsageInterval.ValueType,
    zone: str,
    narrow: tuple[dict[str, Any], Callable[[UsageEvent], bool]] | None,
    ago: timedelta,
    length: timedelta,
    page_size: int,
    compare: bool,
) -> None:
    events = many_events()
    # Repeated with each example, which changes nothing; all but today is closed.
    await asked.insert(*events)
    await close_days(asked.store, asked.clock)
    events = [event for event in own(events) if narrow is None or narrow[1](event)]
    start, end = NOW - ago, NOW - ago + length
    request = question(
        kind,
        start,
        end,
        group_by=group_by,
        interval=interval,
        time_zone=zone,
        filter=pb.UsageFilter(**narrow[0]) if narrow else None,
        page_size=page_size,
        compare=compare,
    )
    buckets, pages = await asked.pages(rpc(asked, kind), request, page_size or 1000)
    start, end = start.replace(minute=0, second=0, microsecond=0), hour_after(end)
    check = KINDS[kind][2]
    for page in pages:
        check(page.totals, within(events, start, end))
        assert page.HasField("previous_totals") == compare
        if compare:
            check(page.previous_totals, within(events, start - (end - start), start))
    places = []
    seen = 0
    for bucket in buckets:
        assert [value.dimension for value in bucket.group] == group_by
        group = [value.value for value in bucket.group]
        first, last = moment(bucket.start_time), moment(bucket.end_time)
        members = [
            event
            for event in within(events, first, last)
            if [DIMENSIONS[dimension](event) for dimension in group_by] == group
        ]
        assert members
        check(bucket.totals, members)
        seen += len(members)
        places.append((first, last, group))
    assert seen == len(within(events, start, end))
    if not {pb.USAGE_DIMENSION_ENDPOINT, pb.USAGE_DIMENSION_OUTCOME} & set(group_by):
        assert places == sorted(places)
    edges = {first for first, *_ in places} | {last for _, last, _ in places}
    assert all(not first < edge < last for first, last, _ in places for edge in edges)


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_used_is_an_empty_answer(asked: Asked, kind: str) -> None:
    answer = await asked.answer(rpc(asked, kind), question(kind, compare=True))
    assert not answer.buckets
    KINDS[kind][2](answer.totals, [])
    KINDS[kind][2](answer.previous_totals, [])


@pytest.mark.parametrize("kind", KINDS)
async def test_beyond_the_time_for_hours_days_are_those_of_utc(asked: Asked, database: Database, kind: str) -> None:
    events = own(many_events(600, 120))
    await asked.insert(*events)
    await close_days(asked.store, asked.clock)
    await remove_old(asked.store, asked.clock, KEPT)
    since = KEPT.hourly_since(NOW)
    start = NOW - timedelta(days=115)
    request = question(kind, start, interval=pb.USAGE_INTERVAL_DAY, time_zone="America/New_York", compare=True)
    buckets, (page,) = await asked.pages(rpc(asked, kind), request, 1000)
    start = start.replace(hour=0, minute=0, second=0, microsecond=0)
    check = KINDS[kind][2]
    check(page.totals, within(events, start, hour_after(NOW)))
    check(page.previous_totals, within(events, START - DAY * 300, start))
    for bucket in buckets:
        first, last = moment(bucket.start_time), moment(bucket.end_time)
        check(bucket.totals, within(events, first, last))
        if last <= since:
            assert (first.hour, last.hour) == (0, 0)
    assert any(moment(bucket.start_time).hour in (4, 5) for bucket in buckets)


@pytest.mark.parametrize("kind", KINDS)
async def test_other_organization_sees_nothing(asked: Asked, kind: str) -> None:
    await asked.insert(*many_events(50))
    for credential in ("org_b", "org_c"):
        assert (await asked.refusal(rpc(asked, kind), question(kind), credential)).reason is Reason.NOT_FOUND
    request = question(kind)
    request.organization_id = "nothing"
    assert (await asked.refusal(rpc(asked, kind), request, "nothing")).reason is Reason.PERMISSION_DENIED
    request.organization_id = "org_c"
    answer = await asked.answer(rpc(asked, kind), request, "org_c")
    assert not answer.buckets
    assert answer.totals.requests == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_wrong_field_is_named(asked: Asked, kind: str) -> None:
    for fields, field in (
        ({"time_zone": "Mars/Olympus"}, "time_zone"),
        ({"page_token": "rubbish"}, "page_token"),
        ({"start": NOW}, "start_time"),
        ({"group_by": [pb.UsageDimension.ValueType(99)]}, "group_by[0]"),
    ):
        error = await asked.refusal(rpc(asked, kind), question(kind, **fields))
        assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)


async def test_answers_say_how_fresh_they_are(asked: Asked) -> None:
    await asked.store.set_complete_until(NOW)
    top = spend_pb.QueryTopSpendRequest(organization_id="org_a", dimension=pb.USAGE_DIMENSION_MODEL)
    for method, request in (
        (asked.spend.QuerySpend, question("spend")),
        (asked.spend.QueryTopSpend, top),
        (asked.spend.ForecastSpend, spend_pb.ForecastSpendRequest(organization_id="org_a")),
        (asked.reliability.QueryReliability, question("reliability")),
    ):
        answer = await asked.answer(method, request)
        assert answer.freshness.state == pb.FRESHNESS_STATE_FRESH
        assert answer.freshness.complete_until == stamp(NOW)


async def test_answers_are_of_one_moment_while_events_arrive(asked: Asked) -> None:
    events = [usage_event(f"req_{number}", NOW - timedelta(hours=number)) for number in range(50)]
    await asked.insert(*events[:25])
    inserting = asked.insert(*events[25:])
    request = question("reliability", interval=pb.USAGE_INTERVAL_HOUR, end=NOW + timedelta(hours=1))
    answer = asked.answer(asked.reliability.QueryReliability, request)
    page, _ = await asyncio.gather(answer, inserting)
    assert page.totals.requests == sum(bucket.totals.requests for bucket in page.buckets)
    assert page.totals.requests in (25, 50)


async def test_top_is_costliest_first_with_its_share_and_the_rest_together(asked: Asked) -> None:
    events = many_events()
    await asked.insert(*events)
    await close_days(asked.store, asked.clock)
    for dimension, value_of in DIMENSIONS.items():
        for limit in (0, 1, 2):
            request = spend_pb.QueryTopSpendRequest(
                organization_id="org_a", start_time=stamp(START), dimension=dimension, limit=limit
            )
            answer = await asked.answer(asked.spend.QueryTopSpend, request)
            groups = defaultdict(list)
            for event in own(events):
                groups[value_of(event)].append(event)
            costs = {value: spent(members) for value, members in groups.items()}
            ranked = sorted(
                (value for value in costs if costs[value].cost_micros), key=lambda value: -costs[value].cost_micros
            )[: limit or 10]
            assert [entry.value.value for entry in answer.top] == ranked
            assert {entry.value.dimension for entry in answer.top} == {dimension}
            everything = spent(own(events)).cost_micros
            for entry in answer.top:
                assert entry.totals == costs[entry.value.value]
                assert entry.share == entry.totals.cost_micros / everything
            assert_spend(answer.others, [event for event in own(events) if value_of(event) not in ranked])


async def test_top_is_that_of_the_last_day_unless_told(asked: Asked) -> None:
    request = spend_pb.QueryTopSpendRequest(organization_id="org_a", dimension=pb.USAGE_DIMENSION_MODEL)
    empty = await asked.answer(asked.spend.QueryTopSpend, request)
    assert (list(empty.top), empty.others) == ([], spend_pb.SpendTotals())
    await asked.insert(
        usage_event("req_1", NOW - timedelta(hours=23), model="new"),
        usage_event("req_2", NOW - timedelta(hours=26), model="old"),
    )
    answer = await asked.answer(asked.spend.QueryTopSpend, request)
    assert [(entry.value.value, entry.share) for entry in answer.top] == [("new", 1.0)]


async def test_top_names_what_is_wrong(asked: Asked) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "dimension"),
        ({"dimension": 4, "limit": -1}, "limit"),
        ({"dimension": 99}, "dimension"),
    ]
    for fields, field in wrong:
        request = spend_pb.QueryTopSpendRequest(organization_id="org_a", **fields)
        assert (await asked.refusal(asked.spend.QueryTopSpend, request)).field == field
    request = spend_pb.QueryTopSpendRequest(organization_id="org_a", dimension=pb.USAGE_DIMENSION_MODEL)
    assert (await asked.refusal(asked.spend.QueryTopSpend, request, "org_b")).reason is Reason.NOT_FOUND


def daily(cost: int, days: int, hour: int = 9) -> list[UsageEvent]:
    """One request on each of some days before today, and today."""
    return [
        usage_event(
            f"req_{ago}_{hour}",
            TODAY - DAY * ago + timedelta(hours=hour),
            cost_micros=cost,
            usage=TokenUsage(prompt_tokens=1, completion_tokens=1),
            price=PRICE,
        )
        for ago in range(days + 1)
    ]


async def test_month_is_forecast_from_its_days(asked: Asked) -> None:
    await asked.insert(*daily(100, 60), usage_event("req_b", organization_id="org_b", cost_micros=10**9))
    await close_days(asked.store, asked.clock)
    request = spend_pb.ForecastSpendRequest(organization_id="org_a")
    answer = await asked.answer(asked.spend.ForecastSpend, request)
    assert moment(answer.period_start) == datetime(2026, 11, 1, tzinfo=UTC)
    assert moment(answer.period_end) == datetime(2026, 12, 1, tzinfo=UTC)
    assert (answer.spent_micros, answer.forecast_micros, answer.enough_history) == (2000, 3000, True)
    assert (answer.low_micros, answer.high_micros) == (3000, 3000)
    assert (await asked.refusal(asked.spend.ForecastSpend, request, "org_b")).reason is Reason.NOT_FOUND


async def test_day_is_forecast_from_what_days_cost_after_this_hour(asked: Asked) -> None:
    # Today's at 20:00 is still to come.
    await asked.insert(*daily(100, 20), *daily(30, 20, hour=20)[1:])
    for zone, spent_micros, expected in (("", 100, 130), ("Asia/Tokyo", 130, 130)):
        request = spend_pb.ForecastSpendRequest(organization_id="org_a", interval=pb.USAGE_INTERVAL_DAY, time_zone=zone)
        answer = await asked.answer(asked.spend.ForecastSpend, request)
        assert (answer.spent_micros, answer.forecast_micros) == (spent_micros, expected)
        assert answer.enough_history
