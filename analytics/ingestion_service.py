"""IngestionService over gRPC: requests to the domain, its answers back; it never decides anything."""

from __future__ import annotations

from aiaas.analytics.v1 import ingestion_service_pb2 as pb
from aiaas.analytics.v1 import ingestion_service_pb2_grpc
from analytics.freshness import freshness_message
from analytics.ingestion import Ingestion
from analytics.store import UsageStore
from mesh.clock import Clock
from mesh.fields import require


class IngestionService(ingestion_service_pb2_grpc.IngestionServiceServicer):
    """aiaas.analytics.v1.IngestionService."""

    def __init__(self, ingestion: Ingestion, store: UsageStore, clock: Clock) -> None:
        self._ingestion = ingestion
        self._store = store
        self._clock = clock

    async def GetIngestionStatus(
        self, request: pb.GetIngestionStatusRequest, context: object
    ) -> pb.GetIngestionStatusResponse:
        """How ingestion stands."""
        freshness = await freshness_message(self._store, self._clock)
        standing = await self._ingestion.standing()
        return pb.GetIngestionStatusResponse(**standing._asdict(), freshness=freshness)

    async def ReplayDeadLetters(
        self, request: pb.ReplayDeadLettersRequest, context: object
    ) -> pb.ReplayDeadLettersResponse:
        """A second try for what was put aside."""
        require(request.limit >= 0, "limit", "must not be negative")
        return pb.ReplayDeadLettersResponse(replayed=await self._ingestion.replay(request.limit))
