"""Ships usage events to RabbitMQ in the background; the request path only appends, and never waits for the broker.

The queue lies in memory and is bounded: when RabbitMQ is away for so long that it is full, the newest events are
dropped, each counted in a metric, and an error is logged. What is queued when the process is killed is lost too.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from random import Random
from typing import Protocol

from aiaas.type.v1.usage_event_pb2 import UsageEvent
from mesh.errors import PlatformError
from mesh.topology import USAGE
from router import metrics

logger = logging.getLogger(__name__)

_BATCH_EVENTS = 64
_PUBLISH_TIMEOUT_S = 5.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0


class UsageRecorder(Protocol):
    """Takes the one usage event of each request."""

    def record(self, event: UsageEvent) -> None:
        """Keep the event; returns at once and raises nothing."""


class Publishing(Protocol):
    """The broker, as far as it is needed here."""

    async def publish(self, exchange: str, routing_key: str, body: bytes, *, message_id: str, timeout_s: float) -> None:
        """Returns when the broker has confirmed. Raises PlatformError."""


class UsagePublisher:
    """A bounded queue and the task that empties it. An event stays queued until the broker has confirmed it, so the
    broker may see it twice; consumers count it once."""

    def __init__(self, broker: Publishing, random: Random, *, limit_events: int = 100_000) -> None:
        self._broker = broker
        self._random = random
        self._limit_events = limit_events
        self._queue: deque[UsageEvent] = deque()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()

    def record(self, event: UsageEvent) -> None:
        """Queue the event. A full queue drops it, with a metric and an error log: the promise ends there until the
        events have a durable journal."""
        if len(self._queue) >= self._limit_events:
            metrics.USAGE_DROPPED.inc()
            logger.error("a usage event was dropped: the queue is full")
            return
        self._queue.append(event)
        metrics.USAGE_QUEUE.set(len(self._queue))
        self._emptied.clear()
        self._filled.set()

    async def run(self) -> None:
        """Publish what is queued, in batches, until cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            if not self._queue:
                self._filled.clear()
                self._emptied.set()
                await self._filled.wait()
            if await self._publish_batch():
                pause_s = _FIRST_PAUSE_S
            else:
                await asyncio.sleep(pause_s * self._random.uniform(0.5, 1.0))
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)

    async def flush(self, timeout_s: float) -> None:
        """Wait until `run` has published everything, `timeout_s` at most; logs how many events were left."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._emptied.wait()
        except TimeoutError:
            logger.error("%d usage events could not be published before the end", len(self._queue))

    async def _publish_batch(self) -> bool:
        """Publish the oldest events at once; those that fail stay queued. Returns whether all were confirmed."""
        batch = [self._queue[index] for index in range(min(_BATCH_EVENTS, len(self._queue)))]
        outcomes = await asyncio.gather(*map(self._publish, batch))
        for _ in batch:
            self._queue.popleft()
        failed = [event for event, confirmed in zip(batch, outcomes, strict=True) if not confirmed]
        self._queue.extendleft(reversed(failed))
        metrics.USAGE_QUEUE.set(len(self._queue))
        return not failed

    async def _publish(self, event: UsageEvent) -> bool:
        try:
            await self._broker.publish(
                USAGE.exchange,
                USAGE.routing_key,
                event.SerializeToString(),
                message_id=event.request_id,
                timeout_s=_PUBLISH_TIMEOUT_S,
            )
        except PlatformError as error:
            metrics.USAGE_PUBLISH_FAILURES.inc()
            logger.warning("a usage event could not be published: %s", error.reason.value)
            return False
        return True
