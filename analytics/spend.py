"""Which spend is asked for, held to the contract, and what such a question is answered with; it never reads a row."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from aiaas.analytics.v1 import spend_service_pb2
from aiaas.analytics.v1.usage_service_pb2 import UsageInterval
from analytics.usage import UsageQuery, check_dimension, read_filter, read_text
from analytics.usage_range import Coverage, check_range, edges_of, read_moment, read_zone
from mesh.fields import invalid

_TOP = 10
_TOP_MOST = 100
_TOP_SINCE = timedelta(hours=24)


class SpendTotals(NamedTuple):
    """Cost, named as in the contract's SpendTotals."""

    cost_micros: int
    prompt_cost_micros: int
    cached_prompt_cost_micros: int
    completion_cost_micros: int
    requests: int

    def without(self, others: list[SpendTotals]) -> SpendTotals:
        """What is left of these when `others` are taken away."""
        return SpendTotals(*(own - sum(column) for own, *column in zip(self, *others, strict=True)))


def read_top_query(request: spend_service_pb2.QueryTopSpendRequest, now: datetime, coverage: Coverage) -> UsageQuery:
    """What `request` asks for, as a query in one bucket whose page is as long as the list. Raises
    PlatformError(INVALID_ARGUMENT) that names the first field that is wrong."""
    end = read_moment(request.end_time, "end_time") if request.HasField("end_time") else now
    start = read_moment(request.start_time, "start_time") if request.HasField("start_time") else now - _TOP_SINCE
    check_range(start, end)
    check_dimension(request.dimension, "dimension")
    if request.limit < 0:
        raise invalid("limit", "must not be negative")
    return UsageQuery(
        organization_id=read_text(request.organization_id, "organization_id"),
        edges=edges_of(start, end, UsageInterval.USAGE_INTERVAL_UNSPECIFIED, read_zone(""), coverage.hourly_since),
        group_by=(request.dimension,),
        filter=read_filter(request.filter),
        page_size=min(request.limit or _TOP, _TOP_MOST),
        after=None,
        coverage=coverage,
    )
