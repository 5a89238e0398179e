"""Ships usage events from the journal to RabbitMQ in the background; it never forgets one, and keeps few in memory.

What has just ended comes from the journal as it is; what does not fit into memory, or was there before, is read from
its disk when its turn comes. The journal learns what the broker has confirmed, so an outage of any length costs nothing
but room on the disk.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from random import Random
from typing import Protocol

import lmdb
from opentelemetry.trace import SpanKind

from aiaas.type.v1.usage_event_pb2 import UsageEventBatch
from mesh import tracing
from mesh.errors import PlatformError, Reason
from mesh.topology import USAGE
from mesh.tracing import Span
from mesh.usage_traces import traceparents
from router import metrics
from router.journal import Journal

logger = logging.getLogger(__name__)

# A message costs the broker and its client about as much as 500 events do.
_BATCH_EVENTS = 500
_BATCH_BYTES = 256 * 1024
_MESSAGES_IN_FLIGHT = 4
# How long the first event of a message waits for others, besides the journal's own tenth of a second.
_GATHER_S = 0.1
_PUBLISH_TIMEOUT_S = 5.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_FRESH_EVENTS = 20_000
_FRESH_BYTES = 32 << 20
_READ_EVENTS = 2_000
_READ_BYTES = 1 << 20


class Publishing(Protocol):
    """The broker, as far as it is needed here."""

    async def publish(self, exchange: str, routing_key: str, body: bytes, *, timeout_s: float) -> None:
        """Returns when the broker has confirmed. Raises PlatformError."""


class UsagePublisher:
    """The tasks that empty a journal. An event waits until the broker has confirmed it, so the broker may see it twice,
    and in any order; consumers count it once."""

    def __init__(self, broker: Publishing, journal: Journal, random: Random) -> None:
        self._broker = broker
        self._journal = journal
        self._random = random
        # Serialized, as the journal has them; they become a batch without being read.
        self._waiting: deque[tuple[bytes, bytes]] = deque()
        self._waiting_bytes = 0
        # How often each event that is in memory, waiting or in flight, was tried.
        self._attempts: dict[bytes, int] = {}
        # Whether the journal may have more than what is in memory.
        self._has_more = True
        self._is_reading = False
        self._gathering = asyncio.Lock()
        self._filled = asyncio.Event()
        self._filled.set()
        self._emptied = asyncio.Event()
        self._failure_reason = ""
        journal.on_ended = self._take
        journal.on_replayed = self._look_again

    @property
    def failure_reason(self) -> str:
        """The stable reason of the last failure; empty where the last try succeeded."""
        return self._failure_reason

    def attempts(self, key: bytes) -> int:
        """How often publishing an event that waits was tried, as far as this run knows."""
        return self._attempts.get(key, 0)

    async def run(self) -> None:
        """Publish what waits, in batches, several at a time, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(_MESSAGES_IN_FLIGHT):
                tasks.create_task(self._ship())

    async def flush(self, timeout_s: float) -> None:
        """Wait until `run` has published everything that ended, `timeout_s` at most."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._journal.sync()
                while not self._is_empty:
                    self._emptied.clear()
                    await self._emptied.wait()
        except TimeoutError:
            logger.warning("usage events could not be published before the end; they wait in the journal")

    def _take(self, ended: Sequence[tuple[bytes, bytes]]) -> None:
        if self._has_more or self._is_reading:
            # There are older ones on the disk; these are read after them.
            self._has_more = True
        else:
            self._add(ended)
        self._filled.set()

    def _add(self, found: Sequence[tuple[bytes, bytes]]) -> None:
        for key, event in found:
            if key in self._attempts:
                continue
            if len(self._attempts) >= _FRESH_EVENTS or self._waiting_bytes >= _FRESH_BYTES:
                self._has_more = True
                return
            self._waiting.append((key, event))
            self._waiting_bytes += len(event)
            self._attempts[key] = 0

    def _look_again(self) -> None:
        self._has_more = True
        self._filled.set()

    async def _ship(self) -> None:
        """Publish batch after batch; one that fails is tried again, with pauses, before the next is taken."""
        while True:
            async with self._gathering:
                batch = await self._gather()
            body = UsageEventBatch(events=[event for _, event in batch]).SerializeToString()
            pause_s = _FIRST_PAUSE_S
            traces = traceparents(event for _, event in batch)
            while not await self._publish([key for key, _ in batch], body, traces):
                await asyncio.sleep(pause_s * self._random.uniform(0.5, 1.0))
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)
            self._journal.mark_published({key: self._attempts.pop(key) for key, _ in batch})
            self._tell_if_empty()

    async def _gather(self) -> list[tuple[bytes, bytes]]:
        """The next batch, complete or `_GATHER_S` after its first event."""
        batch: list[tuple[bytes, bytes]] = []
        size_bytes = 0
        while not batch:
            if not self._waiting:
                await self._refill()
            if len(self._waiting) < _BATCH_EVENTS:
                await asyncio.sleep(_GATHER_S)
            while self._waiting and len(batch) < _BATCH_EVENTS and size_bytes < _BATCH_BYTES:
                batch.append(self._waiting.popleft())
                size_bytes += len(batch[-1][1])
        self._waiting_bytes -= size_bytes
        return batch

    async def _refill(self) -> None:
        """Wait until there is an event, and have some in memory."""
        while not self._waiting:
            if not self._has_more:
                self._tell_if_empty()
                self._filled.clear()
                await self._filled.wait()
                continue
            # What ends meanwhile says that there is more.
            self._has_more, self._is_reading = False, True
            try:
                found, more = await self._journal.read_unpublished(_READ_EVENTS, _READ_BYTES, self._attempts)
            except lmdb.Error as error:
                self._has_more = True
                self._failure_reason = Reason.INTERNAL.value
                logger.error("the journal cannot be read: %s", error)
                await asyncio.sleep(_LONGEST_PAUSE_S)
                continue
            finally:
                self._is_reading = False
            self._add(found)
            self._has_more |= more

    @property
    def _is_empty(self) -> bool:
        return not (self._attempts or self._has_more or self._is_reading)

    def _tell_if_empty(self) -> None:
        if self._is_empty:
            self._emptied.set()

    async def _publish(self, keys: Sequence[bytes], body: bytes, traces: Sequence[str]) -> bool:
        for key in keys:
            self._attempts[key] += 1
        spans = _begin_spans(traces, len(keys))
        try:
            await self._broker.publish(USAGE.exchange, USAGE.routing_key, body, timeout_s=_PUBLISH_TIMEOUT_S)
        except PlatformError as error:
            metrics.USAGE_PUBLISH_FAILURES.inc()
            self._failure_reason = error.reason.value
            logger.warning("usage events could not be published: %s", error.reason.value)
            for span in spans:
                span.fail(error.reason.value)
            return False
        finally:
            for span in spans:
                span.end()
        self._failure_reason = ""
        return True


def _begin_spans(traces: Sequence[str], message_count: int) -> list[Span]:
    """One try to publish, as a step of each sampled request whose event is in the batch."""
    spans = []
    for traceparent in traces:
        if (span := tracing.resume(f"publish {USAGE.name}", traceparent, kind=SpanKind.PRODUCER)) is not None:
            span.set(destination=USAGE.exchange, message_count=message_count)
            spans.append(span)
    return spans
