"""Events that people may want to be told of: taken from their queue, each once into effect; it never sends one.

An event and its deliveries to the webhooks that want it are stored in one transaction, and only then acknowledged.
Whoever dies in between meets the event again, and knows it by its id.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from aiaas.analytics.v1 import event_service_pb2
from aiaas.type.v1.platform_event_pb2 import EventType, PlatformEvent
from analytics import metrics
from mesh import fields, pages
from mesh.broker import Broker, Queue
from mesh.clock import Clock
from mesh.conversions import from_timestamp

if TYPE_CHECKING:
    from analytics.event_store import EventStore

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
"""The meaning of events that is understood here."""

PLATFORM = "platform"
"""The organization id under which events are kept that concern the platform."""

KEPT = timedelta(days=400)
"""How long an event is kept; older ones are refused."""

TYPES = frozenset(EventType.values()) - {EventType.EVENT_TYPE_UNSPECIFIED}
"""The types that are understood here."""

_EVENT_BYTES = 64 * 1024
_AHEAD = timedelta(hours=1)
# Without a full stop, as a webhook's signature is made over the id, a full stop and what follows.
_EVENT_ID = re.compile(r"[0-9A-Za-z_:-]{1,128}")
_ORGANIZATION_ID = re.compile(r"[0-9A-Za-z_-]{0,64}")
_LISTED_SINCE = timedelta(hours=24)
_MESSAGES = 50
_WAIT_S = 0.1


class UnacceptableEvent(Exception):
    """No event that can be kept. Says what is wrong, and repeats nothing of it."""


class Event(NamedTuple):
    """One event as it is stored: the columns of platform_events, in their order."""

    event_id: str
    organization_id: str
    type: int
    event_time: datetime
    body: bytes


def read_event(body: bytes, now: datetime) -> Event:
    """The event in `body`, a serialized PlatformEvent. Raises UnacceptableEvent."""
    if len(body) > _EVENT_BYTES:
        raise UnacceptableEvent("event is too large")
    try:
        message = PlatformEvent.FromString(body)
    except DecodeError:
        raise UnacceptableEvent("body is no PlatformEvent") from None
    if message.schema_version != SCHEMA_VERSION:
        raise UnacceptableEvent("schema_version is unknown")
    if not _EVENT_ID.fullmatch(message.event_id):
        raise UnacceptableEvent("event_id is no id")
    if message.type not in TYPES:
        raise UnacceptableEvent("type is unknown")
    if not _ORGANIZATION_ID.fullmatch(message.organization_id):
        raise UnacceptableEvent("organization_id is no id")
    try:
        as_json(message)
    except (ValueError, OverflowError, json_format.SerializeToJsonError):
        raise UnacceptableEvent("a value is absurd") from None
    return Event(
        event_id=message.event_id,
        organization_id=message.organization_id or PLATFORM,
        type=message.type,
        event_time=_event_time(message, now),
        body=body,
    )


def as_json(message: PlatformEvent) -> bytes:
    """An event as receivers get it: protobuf's JSON, with the names and defaults that REST has.

    Raises ValueError, OverflowError or SerializeToJsonError for values that JSON has no form for.
    """
    document = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _event_time(message: PlatformEvent, now: datetime) -> datetime:
    if not message.HasField("event_time"):
        raise UnacceptableEvent("event_time is missing")
    try:
        moment = message.event_time.ToDatetime(UTC)
    except (ValueError, OverflowError):
        raise UnacceptableEvent("event_time is absurd") from None
    if not now - KEPT <= moment <= now + _AHEAD:
        raise UnacceptableEvent("event_time is absurd")
    return moment


class EventPlace(msgspec.Struct, frozen=True, array_like=True):
    """A place in the order of events. `start_time` is where the range began when the first page was asked for."""

    start_time: pages.Moment
    event_time: pages.Moment
    event_id: pages.Text


class EventQuery(NamedTuple):
    """Events of `organization_id` that happened in a range, of some types or, without any, of all."""

    organization_id: str
    start_time: datetime
    end_time: datetime
    types: tuple[int, ...]
    page_size: int
    before: EventPlace | None


def read_query(request: event_service_pb2.ListEventsRequest, now: datetime) -> EventQuery:
    """What `request` asks for. Raises PlatformError(INVALID_ARGUMENT) that names the first field that is wrong."""
    before = pages.read_token(request, EventPlace)
    if request.HasField("start_time"):
        start_time = from_timestamp(request.start_time, "start_time")
    else:
        start_time = before.start_time if before else now - _LISTED_SINCE
    end_time = from_timestamp(request.end_time, "end_time") if request.HasField("end_time") else now
    if start_time >= end_time:
        raise fields.invalid("start_time", "must be before the end of the range")
    check_types(request.types, "types")
    return EventQuery(
        organization_id=fields.check_id(request.organization_id, "organization_id"),
        start_time=start_time,
        end_time=end_time,
        types=tuple(request.types),
        page_size=pages.read_page_size(request.page_size),
        before=before,
    )


def check_types(types: Sequence[int], field: str) -> None:
    """Types of events, each once. Raises PlatformError(INVALID_ARGUMENT) that names the first that is wrong."""
    for index, number in enumerate(types):
        if number not in TYPES:
            raise fields.invalid(f"{field}[{index}]", "must be a known type")
        if number in types[:index]:
            raise fields.invalid(f"{field}[{index}]", "repeats a type")


class EventConsumer:
    """Keeps what arrives in a queue; `on_deliveries` is told when there is something to send."""

    def __init__(
        self, store: EventStore, broker: Broker, queue: Queue, clock: Clock, on_deliveries: Callable[[], None]
    ) -> None:
        self._store = store
        self._broker = broker
        self._queue = queue
        self._clock = clock
        self._on_deliveries = on_deliveries

    async def run(self) -> None:
        """Take what arrives until cancelled."""
        await self._broker.consume(self._queue, self.take, batch_size=_MESSAGES, wait_s=_WAIT_S)

    async def take(self, bodies: Sequence[bytes]) -> set[int]:
        """Keep what can be kept; returns, once it is committed, the positions of bodies that cannot.

        Raises PlatformError(UNAVAILABLE) while PostgreSQL is away.
        """
        now = self._clock.now()
        events, refused = [], set()
        for position, body in enumerate(bodies):
            try:
                events.append(read_event(body, now))
            except UnacceptableEvent as error:
                refused.add(position)
                logger.warning("an event cannot be kept: %s", error)
        kept, deliveries = await self._store.add(events, now)
        metrics.EVENTS_KEPT.inc(kept)
        metrics.EVENTS_REPEATED.inc(len(events) - kept)
        metrics.EVENTS_REFUSED.inc(len(refused))
        if deliveries:
            self._on_deliveries()
        return refused
