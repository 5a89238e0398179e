"""How ingestion stands, and a second try for what was put aside; it never counts an event or throws one away."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

from aiaas.type.v1.usage_event_pb2 import UsageEventBatch
from analytics import metrics
from analytics.consumer import Consumer
from analytics.events import UnacceptableEvent, read_batch
from mesh.broker import Broker, Queue
from mesh.clock import Clock
from mesh.errors import PlatformError

logger = logging.getLogger(__name__)

REPLAY_S = 10.0
"""Seconds after which a replay begins no further message."""

_INTERVAL_S = 10.0
_TIMEOUT_S = 5.0


class Standing(NamedTuple):
    """Events that wait, events that were put aside, and consumers."""

    queued_events: int
    dead_lettered_events: int
    consumers: int


class Ingestion:
    """The queue of usage events, and its dead letters."""

    def __init__(self, broker: Broker, queue: Queue, consumer: Consumer, clock: Clock) -> None:
        self._broker = broker
        self._queue = queue
        self._consumer = consumer
        self._clock = clock

    async def run(self) -> None:
        """Measure every ten seconds, until cancelled."""
        while True:
            standing: tuple[float, ...] = (math.nan,) * len(Standing._fields)
            try:
                standing = await self.standing()
            except PlatformError as error:
                logger.debug("the queue is not measured: %s", error.reason.value)
            gauges = (metrics.QUEUED_EVENTS, metrics.DEAD_LETTERED_EVENTS, metrics.CONSUMERS)
            for gauge, value in zip(gauges, standing, strict=True):
                gauge.set(value)
            await asyncio.sleep(_INTERVAL_S)

    async def standing(self) -> Standing:
        """How it stands now. Raises PlatformError(UNAVAILABLE)."""
        depth = await self._broker.depth(self._queue, timeout_s=_TIMEOUT_S)
        # The broker counts messages; what is in those that wait is known only once they are taken.
        queued = math.ceil(depth.messages * self._consumer.events_per_message)
        return Standing(queued, depth.dead_messages, depth.consumers)

    async def replay(self, limit: int) -> int:
        """Put events back into the queue, at most `limit`, or with 0 all that are there now; returns how many.

        A message is removed from the dead letters once its copy is confirmed. Whoever dies in between leaves both, of
        which one counts. Raises PlatformError(UNAVAILABLE) when the broker goes away; what was moved stays moved.
        """
        depth = await self._broker.depth(self._queue, timeout_s=_TIMEOUT_S)
        end_s, replayed = self._clock.monotonic() + REPLAY_S, 0
        async with self._broker.dead_letters(self._queue, timeout_s=REPLAY_S + 3 * _TIMEOUT_S) as letters:
            # No more than were there: what still cannot be counted comes back to the end.
            for _ in range(depth.dead_messages):
                if (limit and replayed >= limit) or self._clock.monotonic() >= end_s:
                    break
                if (body := await letters.next()) is None:
                    break
                parts = _split(body, limit - replayed) if limit else _split(body)
                await self._publish(self._queue.name, parts.wanted)
                if parts.rest:
                    await self._publish(self._queue.dead_name, parts.rest)
                await letters.accept()
                replayed += parts.events
        logger.info("%d events that were put aside are in the queue again", replayed)
        return replayed

    async def _publish(self, queue_name: str, body: bytes) -> None:
        # The nameless exchange leads to the queue of that name alone.
        await self._broker.publish("", queue_name, body, timeout_s=_TIMEOUT_S)


class _Parts(NamedTuple):
    """A body with so many events of a message, and one with the rest, empty if there is none."""

    wanted: bytes
    events: int
    rest: bytes


def _split(body: bytes, most: int | None = None) -> _Parts:
    try:
        events = read_batch(body)
    except UnacceptableEvent:
        return _Parts(body, 1, b"")
    wanted, rest = events[:most], events[most:] if most else ()
    if not rest:
        return _Parts(body, len(wanted), b"")
    return _Parts(_batch(wanted), len(wanted), _batch(rest))


def _batch(events: Sequence[bytes]) -> bytes:
    return UsageEventBatch(events=events).SerializeToString()
