"""Puts sums into the words of the contract: bounds, groups; it decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from aiaas.analytics.v1.usage_service_pb2 import UsageDimension, UsageGroupValue
from aiaas.type.v1.usage_event_pb2 import Endpoint, Outcome
from analytics.usage import Bucket, UsageQuery
from mesh.conversions import to_timestamp

M = TypeVar("M", bound=Message)

# Dimensions whose values are numbers of an enum, and the names of these.
_NAMES: dict[UsageDimension.ValueType, dict[str, str]] = {
    UsageDimension.USAGE_DIMENSION_ENDPOINT: {str(number): name for name, number in Endpoint.items()},
    UsageDimension.USAGE_DIMENSION_OUTCOME: {str(number): name for name, number in Outcome.items()},
}


def bucket_message(kind: type[M], query: UsageQuery, totals: Callable[[Any], Message]) -> Callable[[Bucket[Any]], M]:
    """What makes a bucket of an answer, a message of `kind`; `totals` makes that of its sums."""
    bounds = list(map(to_timestamp, query.edges))

    def to_message(bucket: Bucket[Any]) -> M:
        number, values = bucket.place.bucket, bucket.place.group
        return kind(
            start_time=bounds[number - 1],
            end_time=bounds[number],
            group=group_message(query.group_by, values),
            totals=totals(bucket.totals),
        )

    return to_message


def group_message(group_by: Sequence[UsageDimension.ValueType], values: Sequence[str]) -> list[UsageGroupValue]:
    """The values of a group. One that is newer than this code is told by its number."""
    return [
        UsageGroupValue(dimension=dimension, value=_NAMES.get(dimension, {}).get(value, value))
        for dimension, value in zip(group_by, values, strict=True)
    ]
