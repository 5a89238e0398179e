"""Questions over gRPC: sums by every dimension and zone, single requests, pages, and nobody else's usage."""

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import pytest

from aiaas.analytics.v1 import usage_service_pb2 as pb
from aiaas.analytics.v1 import usage_service_pb2_grpc
from aiaas.type.v1.usage_event_pb2 import Outcome, UsageEvent
from analytics.events import read_event
from analytics.freshness import DELAYED, STALE
from analytics.store import UsageStore
from mesh.database import Database
from mesh.errors import PlatformError, Reason, from_rpc_error
from tests.doubles.clock import ManualClock
from tests.doubles.usage_events import NOW, usage_event
from tests.integration.analytics.questions import DIMENSIONS, FILTERS, START, asking, many_events, own, stamp


@dataclass
class Usage:
    """A stub whose calls carry the credential of an organization, and what that organization used."""

    stub: usage_service_pb2_grpc.UsageServiceStub
    store: UsageStore
    clock: ManualClock

    async def query(self, request: pb.QueryUsageRequest, credential: str = "org_a") -> pb.QueryUsageResponse:
        metadata = (("authorization", f"Bearer {credential}"),)
        return await self.stub.QueryUsage(request, metadata=metadata, timeout=10)

    async def records(self, credential: str = "org_a", **fields: Any) -> pb.ListUsageRecordsResponse:
        request = pb.ListUsageRecordsRequest(organization_id="org_a", **fields)
        metadata = (("authorization", f"Bearer {credential}"),)
        return await self.stub.ListUsageRecords(request, metadata=metadata, timeout=10)

    async def explain(
        self, organization_id: str, request_id: str, credential: str = "org_a"
    ) -> pb.ExplainChargeResponse:
        request = pb.ExplainChargeRequest(organization_id=organization_id, request_id=request_id)
        metadata = (("authorization", f"Bearer {credential}"),)
        return await self.stub.ExplainCharge(request, metadata=metadata, timeout=10)

    async def insert(self, *events: UsageEvent) -> None:
        await self.store.insert_events([read_event(event.SerializeToString(), NOW) for event in events])


@pytest.fixture
async def usage(database: Database, tmp_path: Path) -> AsyncIterator[Usage]:
    """A running UsageService."""
    async with asking(database, tmp_path) as asked:
        yield Usage(asked.usage, asked.store, asked.clock)


def question(start: datetime = START, end: datetime = NOW, **fields: Any) -> pb.QueryUsageRequest:
    return pb.QueryUsageRequest(organization_id="org_a", start_time=stamp(start), end_time=stamp(end), **fields)


def sums(events: Sequence[UsageEvent]) -> pb.UsageTotals:
    refused = [event for event in events if event.outcome == Outcome.OUTCOME_REFUSED]
    succeeded = [event for event in events if event.outcome == Outcome.OUTCOME_SUCCEEDED]
    return pb.UsageTotals(
        requests=len(events) - len(refused),
        failed_requests=len(events) - len(refused) - len(succeeded),
        refused_requests=len(refused),
        prompt_tokens=sum(event.usage.prompt_tokens for event in events),
        cached_prompt_tokens=sum(event.usage.cached_prompt_tokens for event in events),
        completion_tokens=sum(event.usage.completion_tokens for event in events),
        cost_micros=sum(event.cost_micros for event in events),
    )


def by_group(
    events: Sequence[UsageEvent], dimensions: Sequence[pb.UsageDimension.ValueType]
) -> dict[tuple[str, ...], pb.UsageTotals]:
    groups = defaultdict(list)
    for event in events:
        groups[tuple(DIMENSIONS[dimension](event) for dimension in dimensions)].append(event)
    return {group: sums(members) for group, members in groups.items()}


def told_groups(answer: pb.QueryUsageResponse) -> dict[tuple[str, ...], pb.UsageTotals]:
    told = {tuple(value.value for value in bucket.group): bucket.totals for bucket in answer.buckets}
    assert len(told) == len(answer.buckets)
    return told


async def test_nothing_used_is_an_empty_answer(usage: Usage) -> None:
    answer = await usage.query(question())
    assert not answer.buckets
    assert answer.totals == pb.UsageTotals()
    assert answer.next_page_token == ""
    assert not (await usage.records()).records


@pytest.mark.parametrize(
    "dimensions", [[], *([dimension] for dimension in DIMENSIONS), [4, 1], [1, 4, 7], list(reversed(list(DIMENSIONS)))]
)
async def test_groups_are_the_sums_of_their_requests(
    usage: Usage, dimensions: list[pb.UsageDimension.ValueType]
) -> None:
    events = many_events()
    await usage.insert(*events)
    answer = await usage.query(question(group_by=dimensions))
    assert told_groups(answer) == by_group(own(events), dimensions)
    assert answer.totals == sums(own(events))
    for bucket in answer.buckets:
        assert [value.dimension for value in bucket.group] == dimensions
        assert bucket.start_time == stamp(START.replace(minute=0, second=0, microsecond=0))


async def test_filters_narrow_sums_and_records_alike(usage: Usage) -> None:
    events = many_events()
    await usage.insert(*events)
    for usage_filter, matches in FILTERS:
        expected = [event for event in own(events) if matches(event)]
        answer = await usage.query(question(filter=pb.UsageFilter(**usage_filter)))
        assert answer.totals == sums(expected), usage_filter
        records = await usage.records(start_time=stamp(START), filter=pb.UsageFilter(**usage_filter), page_size=500)
        assert sorted(record.request_id for record in records.records) == [event.request_id for event in expected]


@pytest.mark.parametrize(
    ("zone", "start"),
    [
        ("Europe/Berlin", datetime(2026, 3, 27, tzinfo=UTC)),
        ("Europe/Berlin", datetime(2026, 10, 23, tzinfo=UTC)),
        ("America/New_York", datetime(2026, 10, 30, tzinfo=UTC)),
        ("Pacific/Auckland", datetime(2026, 9, 25, tzinfo=UTC)),
        ("America/Havana", datetime(2026, 10, 31, tzinfo=UTC)),
        ("", datetime(2026, 10, 23, tzinfo=UTC)),
    ],
)
@pytest.mark.parametrize("interval", [pb.USAGE_INTERVAL_DAY, pb.USAGE_INTERVAL_MONTH])
async def test_days_and_months_are_those_of_the_zone_when_clocks_change(
    usage: Usage, zone: str, start: datetime, interval: pb.UsageInterval.ValueType
) -> None:
    end = start + timedelta(days=10)
    events = [usage_event(f"req_{hour}", start + timedelta(hours=hour, minutes=59)) for hour in range(10 * 24)]
    await usage.insert(*events)
    per_bucket: dict[date, int] = defaultdict(int)
    for event in events:
        local = event.admit_time.ToDatetime(UTC).astimezone(ZoneInfo(zone or "UTC"))
        per_bucket[local.date() if interval == pb.USAGE_INTERVAL_DAY else local.date().replace(day=1)] += 1
    answer = await usage.query(question(start, end, interval=interval, time_zone=zone))
    assert [bucket.totals.requests for bucket in answer.buckets] == list(per_bucket.values())
    assert answer.buckets[0].start_time == stamp(start)
    assert answer.buckets[-1].end_time == stamp(end)
    for before, after in zip(answer.buckets, answer.buckets[1:], strict=False):
        assert before.end_time == after.start_time
        local = after.start_time.ToDatetime(UTC).astimezone(ZoneInfo(zone or "UTC"))
        assert (local.hour, local.minute) == (0, 0)


async def test_hours_without_requests_are_left_out(usage: Usage) -> None:
    await usage.insert(usage_event("req_1", NOW - timedelta(hours=5)), usage_event("req_2", NOW))
    answer = await usage.query(question(end=NOW + timedelta(hours=1), interval=pb.USAGE_INTERVAL_HOUR))
    assert [bucket.start_time.ToDatetime(UTC).hour for bucket in answer.buckets] == [7, 12]


async def test_pages_of_sums_are_complete_in_order_and_agree_on_the_totals(usage: Usage) -> None:
    events = many_events()
    await usage.insert(*events)
    fields: dict[str, Any] = {
        "interval": pb.USAGE_INTERVAL_DAY,
        "group_by": [pb.USAGE_DIMENSION_OUTCOME, pb.USAGE_DIMENSION_MODEL],
        "time_zone": "Asia/Tokyo",
    }
    whole = await usage.query(question(**fields))
    assert whole.next_page_token == ""
    buckets: list[pb.UsageBucket] = []
    token = ""
    while True:
        page = await usage.query(question(page_size=7, page_token=token, **fields))
        assert page.totals == whole.totals
        buckets += page.buckets
        token = page.next_page_token
        if not token:
            break
        assert len(page.buckets) == 7
    assert buckets == list(whole.buckets)
    places = [(b.start_time.ToSeconds(), [value.value for value in b.group]) for b in buckets]
    assert [start for start, _ in places] == sorted(start for start, _ in places)
    assert len(buckets) > 100


async def test_records_come_newest_first_page_by_page_as_they_were_sent(usage: Usage) -> None:
    events = many_events()
    twins = [usage_event(f"req_twin_{number}", NOW - timedelta(days=1)) for number in range(12)]
    await usage.insert(*events, *twins)
    expected = sorted(
        [*own(events), *twins], key=lambda event: (event.admit_time.ToNanoseconds(), event.request_id), reverse=True
    )
    told: list[UsageEvent] = []
    token = ""
    while True:
        page = await usage.records(start_time=stamp(START), page_size=9, page_token=token)
        told += page.records
        token = page.next_page_token
        if not token:
            break
        # What arrives between two pages is newer than both.
        await usage.insert(usage_event(f"req_new_{len(told)}", NOW - timedelta(seconds=1)))
    assert told == expected


async def test_records_are_those_of_the_last_day_unless_told(usage: Usage) -> None:
    old, new = usage_event("req_old", NOW - timedelta(hours=25)), usage_event("req_new", NOW - timedelta(hours=23))
    await usage.insert(old, new)
    assert list((await usage.records()).records) == [new]
    assert list((await usage.records(request_id="req_old", start_time=stamp(START))).records) == [old]
    assert not (await usage.records(request_id="req_none", start_time=stamp(START))).records


async def test_page_never_exceeds_what_grpc_carries(usage: Usage) -> None:
    big = [usage_event(f"req_{number:03}", reason="x" * 60_000) for number in range(120)]
    await usage.insert(*big)
    told: list[str] = []
    token = ""
    while True:
        page = await usage.records(page_size=500, page_token=token, end_time=stamp(NOW + timedelta(hours=1)))
        assert page.ByteSize() < 4 * 1024 * 1024
        told += [record.request_id for record in page.records]
        token = page.next_page_token
        if not token:
            break
    assert told == [f"req_{number:03}" for number in reversed(range(120))]


async def refusal(answer: Any) -> PlatformError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return from_rpc_error(caught.value)


async def test_other_organization_sees_nothing(usage: Usage) -> None:
    await usage.insert(usage_event())
    for credential in ("org_b", ""):
        error = await refusal(usage.query(question(), credential))
        assert error.reason in (Reason.NOT_FOUND, Reason.MISSING_CREDENTIALS)
    assert (await refusal(usage.records("org_b"))).reason is Reason.NOT_FOUND
    mine = pb.QueryUsageRequest(organization_id="org_b", start_time=stamp(START), end_time=stamp(NOW))
    answer = await usage.query(mine, "org_b")
    assert answer.totals == pb.UsageTotals()
    assert not answer.buckets


async def test_permission_is_needed(usage: Usage) -> None:
    request = question()
    request.organization_id = "nothing"
    assert (await refusal(usage.query(request, "nothing"))).reason is Reason.PERMISSION_DENIED


async def test_wrong_field_is_named_on_the_wire(usage: Usage) -> None:
    error = await refusal(usage.query(question(time_zone="Mars/Olympus")))
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "time_zone")
    error = await refusal(usage.records(page_token="rubbish"))
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "page_token")


async def test_token_of_another_organization_is_refused(usage: Usage) -> None:
    events = [usage_event(f"req_{number}", organization_id=f"org_{'ab'[number % 2]}") for number in range(8)]
    await usage.insert(*events)
    token = (await usage.records(page_size=1, end_time=stamp(NOW + timedelta(hours=1)))).next_page_token
    request = pb.ListUsageRecordsRequest(
        organization_id="org_b", page_size=1, page_token=token, end_time=stamp(NOW + timedelta(hours=1))
    )
    metadata = (("authorization", "Bearer org_b"),)
    error = await refusal(usage.stub.ListUsageRecords(request, metadata=metadata))
    assert error.field == "page_token"


async def test_charge_is_explained_from_its_newest_record(usage: Usage) -> None:
    older = usage_event("req_1", NOW - timedelta(days=3))
    newer = usage_event("req_1", NOW - timedelta(hours=1), model="model-9")
    await usage.insert(older, newer, usage_event("req_2"))
    answer = await usage.explain("org_a", "req_1")
    assert answer.record == newer
    assert answer.steps[0] == "Admitted at 2026-11-20 11:30:15 UTC, the request for model-9 was answered in full."


async def test_charge_that_is_not_there_or_not_ones_own_is_not_found(usage: Usage) -> None:
    await usage.insert(usage_event("req_1"))
    assert (await refusal(usage.explain("org_a", "req_2"))).reason is Reason.NOT_FOUND
    assert (await refusal(usage.explain("org_b", "req_1", "org_b"))).reason is Reason.NOT_FOUND
    assert (await refusal(usage.explain("org_a", "req_1", "org_b"))).reason is Reason.NOT_FOUND
    for nothing in ("", "req\0"):
        error = await refusal(usage.explain("org_a", nothing))
        assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "request_id")


async def test_freshness_is_told_and_unknown_at_first(usage: Usage) -> None:
    unknown = (await usage.query(question())).freshness
    assert unknown == pb.Freshness(state=pb.FRESHNESS_STATE_UNSPECIFIED)
    await usage.store.set_complete_until(NOW)
    fresh = (await usage.records()).freshness
    assert (fresh.state, fresh.complete_until) == (pb.FRESHNESS_STATE_FRESH, stamp(NOW))
    usage.clock.advance(STALE.total_seconds())
    stale = (await usage.query(question())).freshness
    assert (stale.state, stale.lag.ToTimedelta()) == (pb.FRESHNESS_STATE_STALE, STALE)
    usage.clock.advance((DELAYED - STALE).total_seconds())
    assert (await usage.query(question())).freshness.state == pb.FRESHNESS_STATE_DELAYED
