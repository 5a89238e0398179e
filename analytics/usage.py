"""Which usage is asked for: its range, buckets, groups and filter, held to the contract; it never reads a row itself.

Questions about usage, spend and reliability have these in common; analytics/usage_range.py says what a range is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import msgspec

from aiaas.analytics.v1 import reliability_service_pb2, spend_service_pb2, usage_service_pb2
from aiaas.analytics.v1.usage_service_pb2 import UsageDimension, UsageInterval
from aiaas.type.v1.usage_event_pb2 import Endpoint, Outcome
from analytics.usage_range import Coverage, check_range, edges_of, read_moment, read_zone
from mesh import pages
from mesh.fields import invalid

T = TypeVar("T")

Question: TypeAlias = (
    usage_service_pb2.QueryUsageRequest
    | spend_service_pb2.QuerySpendRequest
    | reliability_service_pb2.QueryReliabilityRequest
)
"""A request for sums in buckets and groups."""

BUCKETS = 1000
BUCKETS_MOST = 10_000

_NEVER_CLOSED = Coverage()
_RECORDS_SINCE = timedelta(hours=24)

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
    coverage: Coverage

    @property
    def as_whole(self) -> UsageQuery:
        """The same without buckets, groups and pages."""
        return replace(self, edges=(self.edges[0], self.edges[-1]), group_by=(), page_size=1, after=None)

    @property
    def before(self) -> UsageQuery:
        """As a whole, of the time of the same length just before."""
        start, end = self.edges[0], self.edges[-1]
        whole = UsageInterval.USAGE_INTERVAL_UNSPECIFIED
        edges = edges_of(start - (end - start), start, whole, read_zone(""), self.coverage.hourly_since)
        return replace(self.as_whole, edges=edges)


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


class Bucket(NamedTuple, Generic[T]):
    """The sums of one group in one bucket. An enum's value in `group` is its number."""

    place: BucketPlace
    totals: T


class Record(NamedTuple):
    """One request; `event` is the serialized UsageEvent."""

    admit_time: datetime
    request_id: str
    event: bytes


def read_usage_query(request: Question, now: datetime, coverage: Coverage = _NEVER_CLOSED) -> UsageQuery:
    """What `request` asks for. Raises PlatformError(INVALID_ARGUMENT) that names the first field that is wrong."""
    if not request.HasField("start_time"):
        raise invalid("start_time", "is required")
    start = read_moment(request.start_time, "start_time")
    end = read_moment(request.end_time, "end_time") if request.HasField("end_time") else now
    check_range(start, end)
    if request.interval not in _INTERVALS:
        raise invalid("interval", "must be a known interval")
    edges = edges_of(start, end, request.interval, read_zone(request.time_zone), coverage.hourly_since)
    group_by = tuple(request.group_by)
    for index, dimension in enumerate(group_by):
        check_dimension(dimension, f"group_by[{index}]")
        if dimension in group_by[:index]:
            raise invalid(f"group_by[{index}]", "repeats a dimension")
    after = pages.read_token(request, BucketPlace)
    if after is not None and not (0 < after.bucket < len(edges) and len(after.group) == len(group_by)):
        raise pages.wrong_token()
    return UsageQuery(
        organization_id=read_text(request.organization_id, "organization_id"),
        edges=edges,
        group_by=group_by,
        filter=read_filter(request.filter),
        page_size=pages.read_page_size(request.page_size, BUCKETS, BUCKETS_MOST),
        after=after,
        coverage=coverage,
    )


def read_record_query(request: usage_service_pb2.ListUsageRecordsRequest, now: datetime) -> RecordQuery:
    """What `request` asks for. Raises PlatformError(INVALID_ARGUMENT) that names the first field that is wrong."""
    after = pages.read_token(request, RecordPlace)
    if request.HasField("start_time"):
        start = read_moment(request.start_time, "start_time")
    else:
        start = after.start_time if after else now - _RECORDS_SINCE
    end = read_moment(request.end_time, "end_time") if request.HasField("end_time") else now
    check_range(start, end)
    return RecordQuery(
        organization_id=read_text(request.organization_id, "organization_id"),
        start_time=start,
        end_time=end,
        filter=read_filter(request.filter),
        request_id=read_text(request.request_id, "request_id"),
        page_size=pages.read_page_size(request.page_size),
        after=after,
    )


def check_charge_query(request: usage_service_pb2.ExplainChargeRequest) -> None:
    """Raises PlatformError(INVALID_ARGUMENT) that names the field if `request` can name no request."""
    if not request.request_id:
        raise invalid("request_id", "is required")
    read_text(request.organization_id, "organization_id")
    read_text(request.request_id, "request_id")


def check_dimension(dimension: int, field: str) -> None:
    """Raises PlatformError(INVALID_ARGUMENT) if it is none."""
    if dimension not in _DIMENSIONS:
        raise invalid(field, "must be a known dimension")


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


def read_text(value: str, field: str) -> str:
    """Text of a request. Raises PlatformError(INVALID_ARGUMENT) for a NUL, which PostgreSQL has not."""
    if "\0" in value:
        raise invalid(field, "must not hold a NUL character")
    return value


def _texts(values: Iterable[str], field: str) -> tuple[str, ...]:
    return tuple(read_text(value, field) for value in values)


def _numbers(values: Iterable[int], known: frozenset[int], field: str) -> tuple[int, ...]:
    numbers = tuple(values)
    for index, number in enumerate(numbers):
        if number not in known:
            raise invalid(f"{field}[{index}]", "must be a known value")
    return numbers
