"""The gRPC face of reliability: questions in, error rates and percentiles out; it decides nothing itself."""

from __future__ import annotations

from aiaas.analytics.v1 import reliability_service_pb2 as pb
from aiaas.analytics.v1 import reliability_service_pb2_grpc
from analytics.freshness import freshness_message
from analytics.reliability import Percentiles, ReliabilityTotals
from analytics.store import UsageStore
from analytics.sums_store import SumsStore
from analytics.usage import read_usage_query
from analytics.usage_messages import bucket_message
from mesh.clock import Clock
from mesh.pages import cut


class ReliabilityService(reliability_service_pb2_grpc.ReliabilityServiceServicer):
    """aiaas.analytics.v1.ReliabilityService."""

    def __init__(self, store: UsageStore, sums: SumsStore, clock: Clock) -> None:
        self._store = store
        self._sums = sums
        self._clock = clock

    async def QueryReliability(
        self, request: pb.QueryReliabilityRequest, context: object
    ) -> pb.QueryReliabilityResponse:
        """Error rates and percentiles over a range of time, in buckets and groups."""
        query = read_usage_query(request, self._clock.now(), await self._sums.coverage())
        freshness = await freshness_message(self._store, self._clock)
        buckets, totals, previous = await self._sums.reliability(query, query.before if request.compare else None)
        to_message = bucket_message(pb.ReliabilityBucket, query, _totals_message)
        messages, token = cut(request, buckets, query.page_size, to_message, lambda bucket: bucket.place)
        return pb.QueryReliabilityResponse(
            buckets=messages,
            totals=_totals_message(totals),
            previous_totals=None if previous is None else _totals_message(previous),
            freshness=freshness,
            next_page_token=token,
        )


def _totals_message(totals: ReliabilityTotals) -> pb.ReliabilityTotals:
    return pb.ReliabilityTotals(
        requests=totals.requests,
        outcomes=[pb.OutcomeCount(**count._asdict()) for count in totals.outcomes],
        error_rate=totals.error_rate,
        latency=_percentiles_message(totals.latency),
        ttft=_percentiles_message(totals.ttft),
    )


def _percentiles_message(percentiles: Percentiles) -> pb.Percentiles:
    p50_micros, p95_micros, p99_micros = percentiles.micros
    return pb.Percentiles(
        p50_micros=p50_micros, p95_micros=p95_micros, p99_micros=p99_micros, samples=percentiles.samples
    )
