"""The gRPC face of events: questions in, events out; it decides nothing itself."""

from __future__ import annotations

from aiaas.analytics.v1 import event_service_pb2 as pb
from aiaas.analytics.v1 import event_service_pb2_grpc
from aiaas.type.v1.platform_event_pb2 import PlatformEvent
from analytics.event_store import EventStore
from analytics.platform_events import Event, EventPlace, read_query
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.fields import check_id
from mesh.pages import cut


class EventService(event_service_pb2_grpc.EventServiceServicer):
    """aiaas.analytics.v1.EventService."""

    def __init__(self, store: EventStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def ListEvents(self, request: pb.ListEventsRequest, context: object) -> pb.ListEventsResponse:
        """List events, newest first."""
        query = read_query(request, self._clock.now())
        found = await self._store.page(query)
        events, token = cut(
            request,
            found,
            query.page_size,
            _message,
            lambda event: EventPlace(query.start_time, event.event_time, event.event_id),
        )
        return pb.ListEventsResponse(events=events, next_page_token=token)

    async def GetEvent(self, request: pb.GetEventRequest, context: object) -> pb.GetEventResponse:
        """Return one event."""
        organization_id = check_id(request.organization_id, "organization_id")
        if "\0" in request.event_id:
            # PostgreSQL has no NUL in text, and no event has one in its id.
            raise PlatformError(Reason.NOT_FOUND)
        event = await self._store.get(organization_id, request.event_id)
        if event is None:
            raise PlatformError(Reason.NOT_FOUND)
        return pb.GetEventResponse(event=PlatformEvent.FromString(event))


def _message(event: Event) -> PlatformEvent:
    return PlatformEvent.FromString(event.body)
