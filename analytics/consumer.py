"""Takes usage events from the queue exactly once into effect; it never acknowledges what is not committed.

Events are inserted and summed in transactions, and their messages acknowledged after the last. Whatever dies in
between, the events come again and are known by their keys. While PostgreSQL is away nothing is acknowledged and
everything is tried again.

An event that cannot be counted holds up no other. A message of nothing else goes back to the queue, and after five
deliveries to the dead-letter queue. Of a message that holds good events too, the bad ones are put into the queue as a
message of their own before it is acknowledged; whoever dies in between leaves them there twice.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta

from aiaas.type.v1.usage_event_pb2 import UsageEventBatch
from analytics import metrics
from analytics.events import AGE, Event, UnacceptableEvent, read_batch, read_event
from analytics.freshness import read_mark
from analytics.store import UnstorableEventsError, UsageStore
from mesh.broker import Broker, Queue
from mesh.clock import Clock
from mesh.tracing import following
from mesh.usage_traces import traceparents

logger = logging.getLogger(__name__)

# Routers put up to 500 events and 256 KiB into one; the broker sends twice as many ahead. What waits is counted in few
# transactions, since most sums are then written once for several events.
_MESSAGES = 10
_MESSAGES_IN_MEAN = 100
_WAIT_S = 0.5
_PUBLISH_TIMEOUT_S = 5.0


class Consumer:
    """Counts what arrives in a queue and is at most `age` old; one transaction takes `batch_size` events at most.
    `events_per_message` is a mean over the last hundred messages or so."""

    def __init__(
        self, store: UsageStore, broker: Broker, queue: Queue, clock: Clock, batch_size: int, age: timedelta = AGE
    ) -> None:
        self._store = store
        self._broker = broker
        self._queue = queue
        self._clock = clock
        self._batch_size = batch_size
        self.events_per_message = 1.0
        self._age = age

    async def run(self) -> None:
        """Take what arrives until cancelled."""
        await self._broker.consume(self._queue, self.take, batch_size=_MESSAGES, wait_s=_WAIT_S)

    async def take(self, bodies: Sequence[bytes]) -> set[int]:
        """Count what can be counted; returns, once it is committed, the positions of messages of which nothing can.

        Raises PlatformError(UNAVAILABLE) while PostgreSQL is away, or the broker when something must be put back.
        """
        with metrics.BATCH_SECONDS.time():
            messages = _Messages(bodies, self._clock.now(), self._age)
            for size in messages.sizes.values():
                self.events_per_message += (size - self.events_per_message) / _MESSAGES_IN_MEAN
            traces = traceparents(event.body for _, event in messages.events)
            with following(f"process {self._queue.name}", traces) as span:
                if span is not None:
                    span.set(destination=self._queue.name, message_count=len(messages.events))
                await self._count(messages)
            if messages.marks:
                await self._store.set_complete_until(min(max(messages.marks), self._clock.now()))
        messages.report()
        for bad in messages.mixed():
            body = UsageEventBatch(events=bad).SerializeToString()
            # The nameless exchange leads to this queue alone.
            await self._broker.publish("", self._queue.name, body, timeout_s=_PUBLISH_TIMEOUT_S)
        return messages.refused()

    async def _count(self, messages: _Messages) -> None:
        for start in range(0, len(messages.events), self._batch_size):
            for position, event in await self._insert(messages.events[start : start + self._batch_size]):
                messages.refuse(position, event.body, "PostgreSQL refuses a value")

    async def _insert(self, events: Sequence[tuple[int, Event]]) -> Sequence[tuple[int, Event]]:
        """Count events; returns those that PostgreSQL refuses, found by halves."""
        try:
            inserted = await self._store.insert_events([event for _, event in events])
        except UnstorableEventsError:
            if len(events) == 1:
                return events
            middle = len(events) // 2
            return [*await self._insert(events[:middle]), *await self._insert(events[middle:])]
        metrics.INSERTED.inc(inserted)
        metrics.DUPLICATE.inc(len(events) - inserted)
        return ()


class _Messages:
    """What lies in some messages. `events` are what may be counted, each with the position of its message; `marks`
    the times of marks; `sizes` the numbers of events in all other messages, by position."""

    def __init__(self, bodies: Sequence[bytes], now: datetime, age: timedelta) -> None:
        self.events: list[tuple[int, Event]] = []
        self.marks: list[datetime] = []
        self.sizes: dict[int, int] = {}
        self._bad: defaultdict[int, list[bytes]] = defaultdict(list)
        self._wrongs = Counter[str]()
        for position, body in enumerate(bodies):
            if (mark := read_mark(body)) is not None:
                self.marks.append(mark)
            else:
                self._read(position, body, now, age)

    def _read(self, position: int, body: bytes, now: datetime, age: timedelta) -> None:
        try:
            events = read_batch(body)
        except UnacceptableEvent as error:
            self.sizes[position] = 1
            self.refuse(position, body, str(error))
            return
        self.sizes[position] = len(events)
        for event in events:
            try:
                self.events.append((position, read_event(event, now, age)))
            except UnacceptableEvent as error:
                self.refuse(position, event, str(error))

    def refuse(self, position: int, body: bytes, wrong: str) -> None:
        """An event of the message at `position` cannot be counted."""
        self._bad[position].append(body)
        self._wrongs[wrong] += 1

    def refused(self) -> set[int]:
        """The positions of messages of which nothing can be counted."""
        return {position for position, bad in self._bad.items() if len(bad) == self.sizes[position]}

    def mixed(self) -> list[list[bytes]]:
        """What cannot be counted of each message of which something can."""
        return [bad for position, bad in self._bad.items() if len(bad) < self.sizes[position]]

    def report(self) -> None:
        """Tell operators what cannot be counted, once for many."""
        if self._wrongs:
            metrics.REJECTED.inc(self._wrongs.total())
            logger.warning("%d events cannot be counted: %s", self._wrongs.total(), ", ".join(self._wrongs))
