"""Reading questions: buckets in every zone, and each wrong field by its name."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.analytics.v1.usage_service_pb2 import (
    ListUsageRecordsRequest,
    QueryUsageRequest,
    UsageDimension,
    UsageFilter,
    UsageInterval,
)
from aiaas.type.v1.usage_event_pb2 import Endpoint, Outcome
from analytics.usage import BucketPlace, RecordPlace, read_record_query, read_usage_query
from mesh.errors import PlatformError, Reason
from mesh.pages import write_token
from tests.doubles.usage_events import NOW

HOUR, DAY, MONTH = (
    UsageInterval.USAGE_INTERVAL_HOUR,
    UsageInterval.USAGE_INTERVAL_DAY,
    UsageInterval.USAGE_INTERVAL_MONTH,
)
MODEL, KEY = UsageDimension.USAGE_DIMENSION_MODEL, UsageDimension.USAGE_DIMENSION_API_KEY


def at(*moment: int) -> datetime:
    return datetime(*moment, tzinfo=UTC)  # type: ignore[misc, arg-type]


def question(start: datetime | None, end: datetime | None = None, **fields: Any) -> QueryUsageRequest:
    request = QueryUsageRequest(organization_id="org_a", **fields)
    if start is not None:
        request.start_time.FromDatetime(start)
    if end is not None:
        request.end_time.FromDatetime(end)
    return request


def edges(start: datetime, end: datetime, **fields: Any) -> list[datetime]:
    return list(read_usage_query(question(start, end, **fields), NOW).edges)


def lengths_h(moments: list[datetime]) -> list[float]:
    return [(b - a) / timedelta(hours=1) for a, b in itertools.pairwise(moments)]


def wrong_field(request: QueryUsageRequest | ListUsageRecordsRequest) -> str | None:
    read: Any = read_usage_query if isinstance(request, QueryUsageRequest) else read_record_query
    with pytest.raises(PlatformError) as caught:
        read(request, NOW)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    return caught.value.field


def test_range_is_widened_to_whole_hours() -> None:
    assert edges(at(2026, 11, 20, 1, 30), at(2026, 11, 20, 3, 0, 1)) == [at(2026, 11, 20, 1), at(2026, 11, 20, 4)]
    assert edges(at(2026, 11, 20, 1), at(2026, 11, 20, 3)) == [at(2026, 11, 20, 1), at(2026, 11, 20, 3)]


def test_absent_end_means_now() -> None:
    assert read_usage_query(question(at(2026, 11, 20)), NOW).edges == (at(2026, 11, 20), at(2026, 11, 20, 13))


def test_hours() -> None:
    assert edges(at(2026, 11, 20, 1), at(2026, 11, 20, 4), interval=HOUR) == [at(2026, 11, 20, h) for h in range(1, 5)]


def test_first_and_last_day_are_as_long_as_the_range_lets_them() -> None:
    moments = edges(at(2026, 11, 18, 22), at(2026, 11, 20, 5), interval=DAY)
    assert moments == [at(2026, 11, 18, 22), at(2026, 11, 19), at(2026, 11, 20), at(2026, 11, 20, 5)]


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [
        ("Europe/Berlin", at(2026, 3, 28, 23), 23),  # clocks go forward at 02:00
        ("Europe/Berlin", at(2026, 10, 24, 22), 25),  # and back at 03:00
        ("America/New_York", at(2026, 3, 8, 5), 23),
        ("America/New_York", at(2026, 11, 1, 4), 25),
        ("America/Sao_Paulo", at(2018, 11, 4, 3), 23),  # there was no midnight
        ("America/Sao_Paulo", at(2018, 2, 17, 2), 25),  # the hour before midnight came twice
        ("America/Havana", at(2026, 11, 1, 4), 25),  # the hour after midnight comes twice
        ("UTC", at(2026, 3, 29), 24),
        ("", at(2026, 3, 29), 24),
    ],
)
def test_day_on_which_clocks_change_has_its_own_length(zone: str, day: datetime, hours: int) -> None:
    moments = edges(day - timedelta(days=2), day + timedelta(days=3), interval=DAY, time_zone=zone)
    index = moments.index(day)
    assert lengths_h(moments[index : index + 2]) == [hours]
    assert sum(lengths_h(moments)) == 120


def test_day_that_never_was_has_no_bucket() -> None:
    moments = edges(at(2011, 12, 28, 10), at(2012, 1, 1, 10), interval=DAY, time_zone="Pacific/Apia")
    assert lengths_h(moments) == [24, 24, 24, 24]


def test_days_of_a_zone_with_half_an_hour_begin_at_the_full_hour_before_midnight() -> None:
    moments = edges(at(2026, 11, 18, 18, 30), at(2026, 11, 20, 18), interval=DAY, time_zone="Asia/Kolkata")
    assert moments == [at(2026, 11, 18, 18), at(2026, 11, 19, 18), at(2026, 11, 20, 18)]


def test_months_follow_the_calendar_of_the_zone() -> None:
    moments = edges(at(2027, 1, 15), at(2027, 5, 1), interval=MONTH, time_zone="Europe/Berlin")
    assert moments == [
        at(2027, 1, 15),
        at(2027, 1, 31, 23),
        at(2027, 2, 28, 23),
        at(2027, 3, 31, 22),
        at(2027, 4, 30, 22),
        at(2027, 5, 1),
    ]


def test_four_hundred_days_of_hours_are_a_question() -> None:
    assert len(edges(at(2025, 10, 1), at(2025, 10, 1) + timedelta(days=400), interval=HOUR)) == 9601


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (question(None), "start_time"),
        (question(at(2026, 11, 2), at(2026, 11, 1)), "start_time"),
        (question(at(2026, 11, 1), at(2026, 11, 1)), "start_time"),
        (question(NOW + timedelta(hours=1)), "start_time"),
        (question(at(2025, 1, 1), at(2026, 11, 1)), "start_time"),
        (question(at(1, 1, 1), at(2026, 11, 1)), "start_time"),
        (question(at(2026, 11, 1), at(9999, 12, 31, 23)), "end_time"),
        (QueryUsageRequest(organization_id="org_a", start_time=Timestamp(seconds=2**60)), "start_time"),
        (QueryUsageRequest(organization_id="org_a", start_time=Timestamp(nanos=-5)), "start_time"),
        (question(at(2026, 11, 1), interval=9), "interval"),
        (question(at(2026, 11, 1), time_zone="Mars/Olympus"), "time_zone"),
        (question(at(2026, 11, 1), time_zone="../etc/passwd"), "time_zone"),
        (question(at(2026, 11, 1), time_zone="America"), "time_zone"),
        (question(at(2026, 11, 1), time_zone="UTC\0"), "time_zone"),
        (question(at(2026, 11, 1), group_by=[MODEL, UsageDimension.USAGE_DIMENSION_UNSPECIFIED]), "group_by[1]"),
        (question(at(2026, 11, 1), group_by=[UsageDimension.ValueType(99)]), "group_by[0]"),
        (question(at(2026, 11, 1), group_by=[MODEL, KEY, MODEL]), "group_by[2]"),
        (question(at(2026, 11, 1), page_size=-1), "page_size"),
        (question(at(2026, 11, 1), page_token="rubbish"), "page_token"),
        (question(at(2026, 11, 1), page_token="ö"), "page_token"),
        (
            question(
                at(2026, 11, 1),
                filter=UsageFilter(endpoints=[Endpoint.ENDPOINT_EMBEDDINGS, Endpoint.ENDPOINT_UNSPECIFIED]),
            ),
            "filter.endpoints[1]",
        ),
        (question(at(2026, 11, 1), filter=UsageFilter(outcomes=[Outcome.ValueType(99)])), "filter.outcomes[0]"),
        (question(at(2026, 11, 1), filter=UsageFilter(models=["a\0"])), "filter.models"),
        (ListUsageRecordsRequest(organization_id="org_a", page_size=-1), "page_size"),
        (ListUsageRecordsRequest(organization_id="org_a", page_token="rubbish"), "page_token"),
        (ListUsageRecordsRequest(organization_id="org_a", request_id="\0"), "request_id"),
        (ListUsageRecordsRequest(organization_id="org_\0"), "organization_id"),
    ],
)
def test_wrong_field_is_named(request_: QueryUsageRequest | ListUsageRecordsRequest, field: str) -> None:
    assert wrong_field(request_) == field


def test_page_sizes_have_a_default_and_a_limit() -> None:
    for asked, size in ((0, 1000), (7, 7), (20_000, 10_000)):
        assert read_usage_query(question(at(2026, 11, 1), page_size=asked), NOW).page_size == size
    for asked, size in ((0, 50), (7, 7), (20_000, 500)):
        assert (
            read_record_query(ListUsageRecordsRequest(organization_id="org_a", page_size=asked), NOW).page_size == size
        )


def test_token_continues_the_same_question_with_any_page_size() -> None:
    asked = question(at(2026, 11, 1), group_by=[MODEL], page_size=2)
    token = write_token(asked, BucketPlace(1, ("m",)))
    again = question(at(2026, 11, 1), group_by=[MODEL], page_size=9, page_token=token)
    assert read_usage_query(again, NOW).after == BucketPlace(1, ("m",))


def test_token_of_another_question_is_refused() -> None:
    token = write_token(question(at(2026, 11, 1), group_by=[MODEL]), BucketPlace(1, ("m",)))
    other = question(at(2026, 11, 1), group_by=[KEY], page_token=token)
    assert wrong_field(other) == "page_token"
    stranger = question(at(2026, 11, 1), group_by=[MODEL], page_token=token)
    stranger.organization_id = "org_b"
    assert wrong_field(stranger) == "page_token"


@pytest.mark.parametrize(
    "place", [BucketPlace(0, ("m",)), BucketPlace(9, ("m",)), BucketPlace(1, ()), BucketPlace(1, ("\0",))]
)
def test_forged_token_that_means_nothing_is_refused(place: BucketPlace) -> None:
    asked = question(at(2026, 11, 1), group_by=[MODEL])
    asked.page_token = write_token(asked, place)
    assert wrong_field(asked) == "page_token"


def test_records_of_later_pages_keep_the_range_of_the_first() -> None:
    asked = ListUsageRecordsRequest(organization_id="org_a")
    first = read_record_query(asked, NOW)
    assert (first.start_time, first.end_time) == (NOW - timedelta(hours=24), NOW)
    asked.page_token = write_token(asked, RecordPlace(first.start_time, NOW, "req_1"))
    assert read_record_query(asked, NOW + timedelta(hours=1)).start_time == first.start_time


def test_filter_is_taken_over() -> None:
    usage_filter = UsageFilter(
        api_key_ids=["k"], endpoints=[Endpoint.ENDPOINT_EMBEDDINGS], outcomes=[Outcome.OUTCOME_FAILED]
    )
    read = read_usage_query(question(at(2026, 11, 1), filter=usage_filter), NOW).filter
    assert (read.api_key_ids, read.models, read.endpoints, read.outcomes) == (("k",), (), (3,), (3,))
