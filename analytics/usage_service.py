"""The gRPC face of usage: questions in, sums and records out; it decides nothing itself."""

from __future__ import annotations

from aiaas.analytics.v1 import usage_service_pb2, usage_service_pb2_grpc
from aiaas.analytics.v1.usage_service_pb2 import UsageBucket, UsageTotals
from aiaas.type.v1.usage_event_pb2 import UsageEvent
from analytics.charges import explain
from analytics.freshness import freshness_message
from analytics.store import UsageStore
from analytics.sums_store import SumsStore
from analytics.usage import Record, RecordPlace, Totals, check_charge_query, read_record_query, read_usage_query
from analytics.usage_messages import bucket_message
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.pages import cut


class UsageService(usage_service_pb2_grpc.UsageServiceServicer):
    """aiaas.analytics.v1.UsageService."""

    def __init__(self, store: UsageStore, sums: SumsStore, clock: Clock) -> None:
        self._store = store
        self._sums = sums
        self._clock = clock

    async def QueryUsage(
        self, request: usage_service_pb2.QueryUsageRequest, context: object
    ) -> usage_service_pb2.QueryUsageResponse:
        """Sums over a range of time, in buckets and groups."""
        query = read_usage_query(request, self._clock.now(), await self._sums.coverage())
        freshness = await freshness_message(self._store, self._clock)
        buckets, totals = await self._sums.usage(query)
        to_message = bucket_message(UsageBucket, query, _totals_message)
        messages, token = cut(request, buckets, query.page_size, to_message, lambda bucket: bucket.place)
        return usage_service_pb2.QueryUsageResponse(
            buckets=messages,
            totals=_totals_message(totals),
            freshness=freshness,
            next_page_token=token,
        )

    async def ListUsageRecords(
        self, request: usage_service_pb2.ListUsageRecordsRequest, context: object
    ) -> usage_service_pb2.ListUsageRecordsResponse:
        """Single requests, newest first."""
        query = read_record_query(request, self._clock.now())
        freshness = await freshness_message(self._store, self._clock)
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


def _totals_message(totals: Totals) -> UsageTotals:
    return UsageTotals(**totals._asdict())


def _record_message(record: Record) -> UsageEvent:
    return UsageEvent.FromString(record.event)
