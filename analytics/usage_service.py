"""The gRPC face of usage: questions in, sums and records out; it decides nothing itself."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.analytics.v1 import usage_service_pb2, usage_service_pb2_grpc
from aiaas.analytics.v1.usage_service_pb2 import UsageDimension, UsageTotals
from aiaas.type.v1.usage_event_pb2 import Endpoint, Outcome, UsageEvent
from analytics.charges import explain
from analytics.freshness import Freshness, freshness_message
from analytics.store import UsageStore
from analytics.usage import (
    Bucket,
    Record,
    RecordPlace,
    UsageQuery,
    check_charge_query,
    read_record_query,
    read_usage_query,
)
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.pages import cut

# Dimensions whose values are numbers of an enum, and the names of these.
_NAMES: dict[UsageDimension.ValueType, dict[str, str]] = {
    UsageDimension.USAGE_DIMENSION_ENDPOINT: {str(number): name for name, number in Endpoint.items()},
    UsageDimension.USAGE_DIMENSION_OUTCOME: {str(number): name for name, number in Outcome.items()},
}


class UsageService(usage_service_pb2_grpc.UsageServiceServicer):
    """aiaas.analytics.v1.UsageService."""

    def __init__(self, store: UsageStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def QueryUsage(
        self, request: usage_service_pb2.QueryUsageRequest, context: object
    ) -> usage_service_pb2.QueryUsageResponse:
        """Sums over a range of time, in buckets and groups."""
        query = read_usage_query(request, self._clock.now())
        freshness = await self._freshness()
        buckets, totals = await self._store.query_usage(query)
        messages, token = cut(request, buckets, query.page_size, _bucket_message(query), lambda bucket: bucket.place)
        return usage_service_pb2.QueryUsageResponse(
            buckets=messages,
            totals=UsageTotals(**totals._asdict()),
            freshness=freshness,
            next_page_token=token,
        )

    async def ListUsageRecords(
        self, request: usage_service_pb2.ListUsageRecordsRequest, context: object
    ) -> usage_service_pb2.ListUsageRecordsResponse:
        """Single requests, newest first."""
        query = read_record_query(request, self._clock.now())
        freshness = await self._freshness()
        records = await self._store.list_records(query)
        messages, token = cut(
            request,
            records,
            query.page_size,
            _record_message,
            lambda record: RecordPlace(query.start_time, record.admit_time, record.request_id),
        )
        return usage_service_pb2.ListUsageRecordsResponse(records=messages, freshness=freshness, next_page_token=token)

    async def ExplainCharge(
        self, request: usage_service_pb2.ExplainChargeRequest, context: object
    ) -> usage_service_pb2.ExplainChargeResponse:
        """How one request was charged; of several under one id, which its client chose, the newest."""
        check_charge_query(request)
        event = await self._store.find_record(request.organization_id, request.request_id)
        if event is None:
            raise PlatformError(Reason.NOT_FOUND)
        record = UsageEvent.FromString(event)
        return usage_service_pb2.ExplainChargeResponse(record=record, steps=explain(record))

    async def _freshness(self) -> usage_service_pb2.Freshness:
        """Read before the sums, so that it never promises more than they hold."""
        return freshness_message(Freshness(await self._store.complete_until(), self._clock.now()))


def _bucket_message(query: UsageQuery) -> Callable[[Bucket], usage_service_pb2.UsageBucket]:
    bounds = []
    for edge in query.edges:
        bounds.append(Timestamp())
        bounds[-1].FromDatetime(edge)

    def to_message(bucket: Bucket) -> usage_service_pb2.UsageBucket:
        number, values = bucket.place.bucket, bucket.place.group
        return usage_service_pb2.UsageBucket(
            start_time=bounds[number - 1],
            end_time=bounds[number],
            group=[
                usage_service_pb2.UsageGroupValue(
                    dimension=dimension,
                    # A value that is newer than this code is told by its number.
                    value=_NAMES[dimension].get(value, value) if dimension in _NAMES else value,
                )
                for dimension, value in zip(query.group_by, values, strict=True)
            ],
            totals=UsageTotals(**bucket.totals._asdict()),
        )

    return to_message


def _record_message(record: Record) -> UsageEvent:
    return UsageEvent.FromString(record.event)
