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

from aiaas.type.v1.usage_event_pb2 import UsageEvent, UsageEventBatch
from mesh.errors import PlatformError
from mesh.topology import USAGE
from router import metrics

logger = logging.getLogger(__name__)

# A message costs the broker and its client about as much as 500 events do.
_BATCH_EVENTS = 500
_BATCH_BYTES = 256 * 1024
_MESSAGES_IN_FLIGHT = 4
# How long the first event of a message waits for others.
_GATHER_S = 0.2
_PUBLISH_TIMEOUT_S = 5.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0


class UsageRecorder(Protocol):
    """Takes the one usage event of each request."""

    def record(self, event: UsageEvent) -> None:
        """Keep the event; returns at once and raises nothing."""


class Publishing(Protocol):
    """The broker, as far as it is needed here."""

    async def publish(self, exchange: str, routing_key: str, body: bytes, *, timeout_s: float) -> None:
        """Returns when the broker has confirmed. Raises PlatformError."""


class UsagePublisher:
    """A bounded queue and the tasks that empty it. An event is kept until the broker has confirmed it, so the broker
    may see it twice, and in any order; consumers count it once."""

    def __init__(self, broker: Publishing, random: Random, *, limit_events: int = 100_000) -> None:
        self._broker = broker
        self._random = random
        self._limit_events = limit_events
        # Serialized, since bytes are several times smaller than a message and become a batch without being read.
        self._queue: deque[bytes] = deque()
        # Queued or in flight.
        self._unconfirmed = 0
        self._full = False
        self._gathering = asyncio.Lock()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        metrics.USAGE_QUEUE.set_function(lambda: self._unconfirmed)

    def record(self, event: UsageEvent) -> None:
        """Queue the event. A full queue drops it, with a metric and an error log: the promise ends there until the
        events have a durable journal."""
        if self._unconfirmed >= self._limit_events:
            metrics.USAGE_DROPPED.inc()
            if not self._full:
                self._full = True
                logger.error("usage events are dropped: the queue is full")
            return
        self._queue.append(event.SerializeToString())
        self._unconfirmed += 1
        self._filled.set()

    async def run(self) -> None:
        """Publish what is queued, in batches, several at a time, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(_MESSAGES_IN_FLIGHT):
                tasks.create_task(self._ship())

    async def flush(self, timeout_s: float) -> None:
        """Wait until `run` has published everything, `timeout_s` at most; logs how many events were left."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._unconfirmed:
                    self._emptied.clear()
                    await self._emptied.wait()
        except TimeoutError:
            logger.error("%d usage events could not be published before the end", self._unconfirmed)

    async def _ship(self) -> None:
        """Publish batch after batch; one that fails is tried again, with pauses, before the next is taken."""
        while True:
            async with self._gathering:
                batch = await self._gather()
            body = UsageEventBatch(events=batch).SerializeToString()
            pause_s = _FIRST_PAUSE_S
            while not await self._publish(body):
                await asyncio.sleep(pause_s * self._random.uniform(0.5, 1.0))
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)
            self._unconfirmed -= len(batch)
            self._full = False
            if not self._unconfirmed:
                self._emptied.set()

    async def _gather(self) -> list[bytes]:
        """The next batch, complete or `_GATHER_S` after its first event."""
        if not self._queue:
            self._filled.clear()
            await self._filled.wait()
        if len(self._queue) < _BATCH_EVENTS:
            await asyncio.sleep(_GATHER_S)
        batch: list[bytes] = []
        size_bytes = 0
        while self._queue and len(batch) < _BATCH_EVENTS and size_bytes < _BATCH_BYTES:
            batch.append(self._queue.popleft())
            size_bytes += len(batch[-1])
        return batch

    async def _publish(self, body: bytes) -> bool:
        try:
            await self._broker.publish(USAGE.exchange, USAGE.routing_key, body, timeout_s=_PUBLISH_TIMEOUT_S)
        except PlatformError as error:
            metrics.USAGE_PUBLISH_FAILURES.inc()
            logger.warning("usage events could not be published: %s", error.reason.value)
            return False
        return True
