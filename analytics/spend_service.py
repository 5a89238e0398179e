"""The gRPC face of spend: questions in, costs and forecasts out; it decides nothing itself."""

from __future__ import annotations

from aiaas.analytics.v1 import spend_service_pb2 as pb
from aiaas.analytics.v1 import spend_service_pb2_grpc
from analytics.forecast import forecast, read_forecast_query
from analytics.freshness import freshness_message
from analytics.spend import SpendTotals, read_top_query
from analytics.store import UsageStore
from analytics.sums_store import SumsStore
from analytics.usage import read_usage_query
from analytics.usage_messages import bucket_message, group_message
from mesh.clock import Clock
from mesh.conversions import to_timestamp
from mesh.pages import cut


class SpendService(spend_service_pb2_grpc.SpendServiceServicer):
    """aiaas.analytics.v1.SpendService."""

    def __init__(self, store: UsageStore, sums: SumsStore, clock: Clock) -> None:
        self._store = store
        self._sums = sums
        self._clock = clock

    async def QuerySpend(self, request: pb.QuerySpendRequest, context: object) -> pb.QuerySpendResponse:
        """Cost over a range of time, in buckets and groups."""
        query = read_usage_query(request, self._clock.now(), await self._sums.coverage())
        freshness = await freshness_message(self._store, self._clock)
        buckets, totals = await self._sums.spend(query)
        to_message = bucket_message(pb.SpendBucket, query, _totals_message)
        messages, token = cut(request, buckets, query.page_size, to_message, lambda bucket: bucket.place)
        answer = pb.QuerySpendResponse(
            buckets=messages, totals=_totals_message(totals), freshness=freshness, next_page_token=token
        )
        if request.compare:
            _, previous = await self._sums.spend(query.before)
            answer.previous_totals.CopyFrom(_totals_message(previous))
        return answer

    async def QueryTopSpend(self, request: pb.QueryTopSpendRequest, context: object) -> pb.QueryTopSpendResponse:
        """The costliest values of one dimension."""
        query = read_top_query(request, self._clock.now(), await self._sums.coverage())
        freshness = await freshness_message(self._store, self._clock)
        top, totals = await self._sums.top_spend(query)
        return pb.QueryTopSpendResponse(
            top=[
                pb.TopSpend(
                    value=group_message(query.group_by, (value,))[0],
                    totals=_totals_message(own),
                    # Something costs something, or nothing would be among them.
                    share=own.cost_micros / totals.cost_micros,
                )
                for value, own in top
            ],
            others=_totals_message(totals.without([own for _, own in top])),
            freshness=freshness,
        )

    async def ForecastSpend(self, request: pb.ForecastSpendRequest, context: object) -> pb.ForecastSpendResponse:
        """Spend at the end of the running period."""
        query = read_forecast_query(request, self._clock.now(), await self._sums.coverage())
        freshness = await freshness_message(self._store, self._clock)
        hours, _ = await self._sums.spend(query.hours)
        made = forecast(query, query.days(hours))
        start, end = query.period
        return pb.ForecastSpendResponse(
            period_start=to_timestamp(start),
            period_end=to_timestamp(end),
            spent_micros=made.spent,
            forecast_micros=made.expected,
            low_micros=made.low,
            high_micros=made.high,
            enough_history=made.enough_history,
            freshness=freshness,
        )


def _totals_message(totals: SpendTotals) -> pb.SpendTotals:
    return pb.SpendTotals(**totals._asdict())
