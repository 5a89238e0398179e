"""Which usage is asked for: its range, buckets, groups and filter, held to the contract; it never reads a row itself.

Sums are kept for whole hours of UTC, so ranges and buckets begin and end on these. Where a zone is half an hour off,
its days and months begin at the full hour before midnight; every bucket tells its own bounds.
"""

from __future__ import annotations

import functools
import zoneinfo
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.analytics.v1 import usage_service_pb2
from aiaas.analytics.v1.usage_service_pb2 import UsageDimension, UsageInterval
from aiaas.type.v1.usage_event_pb2 import Endpoint, Outcome
from mesh import pages
from mesh.errors import PlatformError, Reason

RANGE = timedelta(days=400)
"""How long a range may be: as long as events are kept."""

BUCKETS = 1000
BUCKETS_MOST = 10_000

_RECORDS_SINCE = timedelta(hours=24)
_HOUR = timedelta(hours=1)
_DAY = timedelta(days=1)
# Beyond these, arithmetic in zones leaves the calendar.
_YEARS = range(1970, 9999)

_INTERVALS = frozenset(UsageInterval.values())
_DIMENSIONS = frozenset(UsageDimension.values()) - {UsageDimension.USAGE_DIMENSION_UNSPECIFIED}
_ENDPOINTS = frozenset(Endpoint.values()) - {Endpoint.ENDPOINT_UNSPECIFIED}
_OUTCOMES = frozenset(Outcome.values()) - {Outcome.OUTCOME_UNSPECIFIED}


@dataclass(frozen=True, slots=True)
class Filter:
    """Which usage counts; an empty field does not narrow."""

    api_key_ids: tuple[str, ...] = ()
    user_ids: tuple[str, ...] = ()
    service_account_ids: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    backend_ids: tuple[str, ...] = ()
    endpoints: tuple[int, ...] = ()
    outcomes: tuple[int, ...] = ()


class BucketPlace(msgspec.Struct, frozen=True, array_like=True):
    """A place in the order of buckets: the bucket's number, counted from 1, and the values of its group."""

    bucket: int
    group: tuple[pages.Text, ...]


class RecordPlace(msgspec.Struct, frozen=True, array_like=True):
    """A place in the order of records. `start_time` is where the range began when the first page was asked for."""

    start_time: pages.Moment
    admit_time: pages.Moment
    request_id: pages.Text


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Sums of `organization_id`. `edges` are the bounds of the buckets, ascending, one more than there are buckets."""

    organization_id: str
    edges: tuple[datetime, ...]
    group_by: tuple[UsageDimension.ValueType, ...]
    filter: Filter
    page_size: int
    after: BucketPlace | None


@dataclass(frozen=True, slots=True)
class RecordQuery:
    """Single requests of `organization_id` with `start_time` <= admit_time < `end_time`."""

    organization_id: str
    start_time: datetime
    end_time: datetime
    filter: Filter
    request_id: str
    page_size: int
    after: RecordPlace | None


class Totals(NamedTuple):
    """Sums, named as in UsageTotals."""

    requests: int
    failed_requests: int
    refused_requests: int
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    cost_micros: int


class Bucket(NamedTuple):
    """The sums of one group in one bucket. An enum's value in `group` is its number."""

    place: BucketPlace
    totals: Totals


class Record(NamedTuple):
    """One request; `event` is the serialized UsageEvent."""

    admit_time: datetime
    request_id: str
    event: bytes


def read_usage_query(request: usage_service_pb2.QueryUsageRequest, now: datetime) -> UsageQuery:
    """What `request` asks for. Raises PlatformError(INVALID_ARGUMENT) that names the first field that is wrong."""
    start = _moment(request.start_time, "start_time") if request.HasField("start_time") else None
    if start is None:
        raise _invalid("start_time", "is required")
    end = _moment(request.end_time, "end_time") if request.HasField("end_time") else now
    _check_range(start, end)
    if request.interval not in _INTERVALS:
        raise _invalid("interval", "must be a known interval")
    edges = tuple(
        _edges(_hour_of(start), _hour_of(end - timedelta.resolution) + _HOUR, request.interval, _zone(request))
    )
    group_by = tuple(request.group_by)
    for index, dimension in enumerate(group_by):
        if dimension not in _DIMENSIONS:
            raise _invalid(f"group_by[{index}]", "must be a known dimension")
        if dimension in group_by[:index]:
            raise _invalid(f"group_by[{index}]", "repeats a dimension")
    after = pages.read_token(request, BucketPlace)
    if after is not None and not (0 < after.bucket < len(edges) and len(after.group) == len(group_by)):
        raise pages.wrong_token()
    return UsageQuery(
        organization_id=_text(request.organization_id, "organization_id"),
        edges=edges,
        group_by=group_by,
        filter=read_filter(request.filter),
        page_size=pages.read_page_size(request.page_size, BUCKETS, BUCKETS_MOST),
        after=after,
    )


def read_record_query(request: usage_service_pb2.ListUsageRecordsRequest, now: datetime) -> RecordQuery:
    """What `request` asks for. Raises PlatformError(INVALID_ARGUMENT) that names the first field that is wrong."""
    after = pages.read_token(request, RecordPlace)
    if request.HasField("start_time"):
        start = _moment(request.start_time, "start_time")
    else:
        start = after.start_time if after else now - _RECORDS_SINCE
    end = _moment(request.end_time, "end_time") if request.HasField("end_time") else now
    _check_range(start, end)
    return RecordQuery(
        organization_id=_text(request.organization_id, "organization_id"),
        start_time=start,
        end_time=end,
        filter=read_filter(request.filter),
        request_id=_text(request.request_id, "request_id"),
        page_size=pages.read_page_size(request.page_size),
        after=after,
    )


def check_charge_query(request: usage_service_pb2.ExplainChargeRequest) -> None:
    """Raises PlatformError(INVALID_ARGUMENT) that names the field if `request` can name no request."""
    if not request.request_id:
        raise _invalid("request_id", "is required")
    _text(request.organization_id, "organization_id")
    _text(request.request_id, "request_id")


def _edges(
    start: datetime, end: datetime, interval: UsageInterval.ValueType, zone: zoneinfo.ZoneInfo
) -> Iterator[datetime]:
    """`start`, every beginning of a bucket between, `end`; each once and ascending."""
    edge = start
    yield edge
    for beginning in _beginnings(start, interval, zone):
        if beginning >= end:
            break
        if beginning > edge:
            edge = beginning
            yield edge
    yield end


def _beginnings(start: datetime, interval: UsageInterval.ValueType, zone: zoneinfo.ZoneInfo) -> Iterator[datetime]:
    """Where the buckets after the one with `start` begin, without an end."""
    if interval == UsageInterval.USAGE_INTERVAL_HOUR:
        while True:
            start += _HOUR
            yield start
    day = start.astimezone(zone).date()
    while interval != UsageInterval.USAGE_INTERVAL_UNSPECIFIED:
        if interval == UsageInterval.USAGE_INTERVAL_DAY:
            day += _DAY
        else:
            day = (day.replace(day=1) + 31 * _DAY).replace(day=1)
        yield _hour_of(_midnight(day, zone))


def _midnight(day: date, zone: zoneinfo.ZoneInfo) -> datetime:
    """The first moment of a day, in UTC. Where clocks skip midnight or pass it twice, that is what fold=0 means."""
    return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)


def _hour_of(moment: datetime) -> datetime:
    return moment.replace(minute=0, second=0, microsecond=0)


def _moment(timestamp: Timestamp, field: str) -> datetime:
    try:
        moment = timestamp.ToDatetime(UTC)
    except (ValueError, OverflowError):
        raise _invalid(field, "must be a time") from None
    if moment.year not in _YEARS:
        raise _invalid(field, f"must be in the years {_YEARS[0]} to {_YEARS[-1]}")
    return moment


def _check_range(start: datetime, end: datetime) -> None:
    if start >= end:
        raise _invalid("start_time", "must be before the end of the range")
    if end - start > RANGE:
        raise _invalid("start_time", f"must be at most {RANGE.days} days before the end of the range")


@functools.cache
def _zones() -> frozenset[str]:
    # Trying to load a name instead would open files by what a client wrote.
    return frozenset(zoneinfo.available_timezones())


def _zone(request: usage_service_pb2.QueryUsageRequest) -> zoneinfo.ZoneInfo:
    name = request.time_zone or "UTC"
    if name not in _zones():
        raise _invalid("time_zone", 'must be a zone of the IANA database, such as "Europe/Berlin"')
    return zoneinfo.ZoneInfo(name)


def read_filter(message: usage_service_pb2.UsageFilter) -> Filter:
    """Which usage a request asks for. Raises PlatformError(INVALID_ARGUMENT) naming the field."""
    return Filter(
        api_key_ids=_texts(message.api_key_ids, "filter.api_key_ids"),
        user_ids=_texts(message.user_ids, "filter.user_ids"),
        service_account_ids=_texts(message.service_account_ids, "filter.service_account_ids"),
        models=_texts(message.models, "filter.models"),
        backend_ids=_texts(message.backend_ids, "filter.backend_ids"),
        endpoints=_numbers(message.endpoints, _ENDPOINTS, "filter.endpoints"),
        outcomes=_numbers(message.outcomes, _OUTCOMES, "filter.outcomes"),
    )


def filter_message(usage_filter: Filter) -> usage_service_pb2.UsageFilter:
    """A filter as it travels."""
    return usage_service_pb2.UsageFilter(
        api_key_ids=usage_filter.api_key_ids,
        user_ids=usage_filter.user_ids,
        service_account_ids=usage_filter.service_account_ids,
        models=usage_filter.models,
        backend_ids=usage_filter.backend_ids,
        endpoints=usage_filter.endpoints,  # type: ignore[arg-type]
        outcomes=usage_filter.outcomes,  # type: ignore[arg-type]
    )


def _text(value: str, field: str) -> str:
    # PostgreSQL has no NUL in text.
    if "\0" in value:
        raise _invalid(field, "must not hold a NUL character")
    return value


def _texts(values: Iterable[str], field: str) -> tuple[str, ...]:
    return tuple(_text(value, field) for value in values)


def _numbers(values: Iterable[int], known: frozenset[int], field: str) -> tuple[int, ...]:
    numbers = tuple(values)
    for index, number in enumerate(numbers):
        if number not in known:
            raise _invalid(f"{field}[{index}]", "must be a known value")
    return numbers


def _invalid(field: str, rule: str) -> PlatformError:
    return PlatformError(Reason.INVALID_ARGUMENT, field=field, description=f"'{field}' {rule}.")
