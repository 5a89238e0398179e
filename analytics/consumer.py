"""Takes usage events from the queue exactly once into effect; it never acknowledges what is not committed.

A batch is inserted and summed in one transaction, and acknowledged after it. Whatever dies between the two, the events
come again and are known by their keys. While PostgreSQL is away nothing is acknowledged and the batch is tried again.
An event that cannot be counted goes back alone, and after five deliveries to the dead-letter queue.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime

from analytics import metrics
from analytics.events import Event, UnacceptableEvent, read_event
from analytics.freshness import read_mark
from analytics.store import UsageStore
from mesh.broker import Broker, Queue
from mesh.clock import Clock

logger = logging.getLogger(__name__)

_WAIT_S = 0.1


class Consumer:
    """Counts what arrives in a queue."""

    def __init__(self, store: UsageStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def run(self, broker: Broker, queue: Queue, batch_size: int) -> None:
        """Take batches of up to `batch_size` until cancelled."""
        await broker.consume(queue, self.take, batch_size=batch_size, wait_s=_WAIT_S)

    async def take(self, bodies: Sequence[bytes]) -> set[int]:
        """Count a batch; returns, once it is committed, the positions of what cannot be counted.

        Raises PlatformError(UNAVAILABLE) while PostgreSQL is away, and UnstorableEventsError for a batch of which
        something cannot be stored.
        """
        with metrics.BATCH_SECONDS.time():
            events, marks, refused = self._sort(bodies)
            inserted = await self._store.insert_events(events)
            if marks:
                await self._store.set_complete_until(min(max(marks), self._clock.now()))
        metrics.INSERTED.inc(inserted)
        metrics.DUPLICATE.inc(len(events) - inserted)
        metrics.REJECTED.inc(len(refused))
        return refused

    def _sort(self, bodies: Sequence[bytes]) -> tuple[list[Event], list[datetime], set[int]]:
        """What can be counted, the times of the marks, and the positions of what cannot be counted."""
        now = self._clock.now()
        events: list[Event] = []
        marks: list[datetime] = []
        refused: set[int] = set()
        for position, body in enumerate(bodies):
            if (mark := read_mark(body)) is not None:
                marks.append(mark)
                continue
            try:
                events.append(read_event(body, now))
            except UnacceptableEvent as error:
                logger.warning("an event cannot be counted: %s", error)
                refused.add(position)
        return events, marks, refused
