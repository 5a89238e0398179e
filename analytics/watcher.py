"""Tells people what analytics finds by itself: hours unlike those before, late usage, messages put aside; it never
changes usage, nor stops anybody.

What was found and the event that tells of it are one transaction: whatever dies, nothing is told twice or forgotten.
Events are not sent through the broker, since it may be what they tell of.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Protocol

from aiaas.type.v1.platform_event_pb2 import (
    EVENT_TYPE_DEAD_LETTERED,
    EVENT_TYPE_ERROR_RATE_ANOMALY,
    EVENT_TYPE_INGESTION_DELAYED,
    EVENT_TYPE_SPEND_ANOMALY,
    EventType,
    PlatformEvent,
)
from analytics import metrics
from analytics.anomalies import Anomaly, error_rate_anomaly, spend_anomaly
from analytics.freshness import DELAYED, STALE, Freshness
from analytics.platform_events import SCHEMA_VERSION, Event, UnacceptableEvent, read_event
from analytics.reconciliations import HOUR, hours_due
from analytics.store import UsageStore
from analytics.watch_store import Finding, IngestionWatch, Usage, WatchStore
from mesh.broker import Depth, Queue
from mesh.clock import Clock
from mesh.errors import PlatformError

logger = logging.getLogger(__name__)

DEAD_LETTERS_INTERVAL = timedelta(hours=1)
"""While more and more messages are put aside, people are told this often."""

_INTERVAL_S = 60.0
_DEPTH_TIMEOUT_S = 5.0
# Nothing else puts a message of this queue aside.
_DEAD_LETTER_REASON = "delivery_limit"
_KINDS: dict[int, str] = {EVENT_TYPE_SPEND_ANOMALY: "spend", EVENT_TYPE_ERROR_RATE_ANOMALY: "error_rate"}


class Depths(Protocol):
    """The broker, as far as it is needed here."""

    async def depth(self, queue: Queue, *, timeout_s: float) -> Depth:
        """What is in a queue. Raises PlatformError."""


class Watcher:
    """Judges hours once their usage is in, and ingestion each minute. `on_deliveries` is told when there is something
    to send. Any number of processes may; each thing is told by one of them."""

    def __init__(
        self,
        store: WatchStore,
        usage: UsageStore,
        broker: Depths,
        queue: Queue,
        clock: Clock,
        on_deliveries: Callable[[], None],
    ) -> None:
        self._store = store
        self._usage = usage
        self._broker = broker
        self._queue = queue
        self._clock = clock
        self._on_deliveries = on_deliveries

    async def run(self) -> None:
        """Watch until cancelled; what is away is tried again a minute later."""
        while True:
            for watch in (self.watch_hours, self.watch_ingestion):
                try:
                    await watch()
                except PlatformError as error:
                    logger.warning("%s waits: %s", watch.__name__, error.reason.value)
            await asyncio.sleep(_INTERVAL_S)

    async def watch_hours(self) -> None:
        """Judge every hour that is due. Raises PlatformError(UNAVAILABLE) while PostgreSQL is away."""
        complete_until = await self._usage.complete_until()
        if complete_until is None:
            return
        for hour in hours_due(await self._store.last_watched(), min(complete_until, self._clock.now())):
            now = self._clock.now()
            found, deliveries = await self._store.watch_hour(hour, now, partial(_judge_hour, hour, now))
            for finding in found:
                metrics.ANOMALIES.labels(_KINDS[finding.event.type]).inc()
            if deliveries:
                self._on_deliveries()

    async def watch_ingestion(self) -> None:
        """Tell of late usage and of messages put aside. Raises PlatformError(UNAVAILABLE) while PostgreSQL is away."""
        now = self._clock.now()
        freshness = Freshness(await self._usage.complete_until(), now)
        dead_letters = None
        try:
            dead_letters = (await self._broker.depth(self._queue, timeout_s=_DEPTH_TIMEOUT_S)).dead_messages
        except PlatformError as error:
            # Usage is late then, which is told all the same.
            logger.warning("messages put aside cannot be counted: %s", error.reason.value)
        if await self._store.watch_ingestion(now, partial(_judge_ingestion, freshness, dead_letters)):
            self._on_deliveries()


def _judge_hour(hour: datetime, now: datetime, organization_id: str, usage: Usage) -> Iterator[Finding]:
    found = (
        (EVENT_TYPE_SPEND_ANOMALY, spend_anomaly(hour, usage.since, usage.hours)),
        (EVENT_TYPE_ERROR_RATE_ANOMALY, error_rate_anomaly(hour, usage.hours)),
    )
    for event_type, anomaly in found:
        if anomaly is None:
            continue
        try:
            yield Finding(anomaly, _anomaly_event(hour, now, organization_id, event_type, anomaly))
        except UnacceptableEvent as error:
            logger.warning("an anomaly cannot be told: %s", error)


def _anomaly_event(
    hour: datetime, now: datetime, organization_id: str, event_type: EventType.ValueType, anomaly: Anomaly
) -> Event:
    if event_type == EVENT_TYPE_SPEND_ANOMALY:
        seen = f"${anomaly.observed / 1e6:,.2f} were spent"
        usual = f"${anomaly.expected / 1e6:,.2f}"
    else:
        seen, usual = f"{anomaly.observed:.1%} of requests failed", f"{anomaly.expected:.1%}"
    event = PlatformEvent(
        event_id=f"anomaly:{organization_id}:{hour:%Y%m%dT%H}:{_KINDS[event_type]}",
        type=event_type,
        organization_id=organization_id,
        summary=f"{seen} from {hour:%Y-%m-%d %H:%M} until {hour + HOUR:%H:%M} UTC, where {usual} is usual.",
    )
    detected = event.anomaly_detected
    detected.hour_start.FromDatetime(hour)
    detected.observed, detected.expected, detected.deviations = anomaly
    return _event(event, now)


def _judge_ingestion(
    freshness: Freshness, dead_letters: int | None, told: IngestionWatch
) -> tuple[IngestionWatch, Sequence[Event]]:
    events, now, lag = [], freshness.now, freshness.lag
    if lag is not None and lag >= DELAYED and not told.delayed:
        told = told._replace(delayed=True)
        events.append(_delayed_event(lag, now))
    elif lag is not None and lag < STALE:
        told = told._replace(delayed=False)
    if dead_letters is None:
        return told, events
    if dead_letters < told.dead_letters:
        # They were taken out again; those that come now are new.
        told = told._replace(dead_letters=dead_letters)
    elif dead_letters > told.dead_letters and now >= told.dead_letters_time + DEAD_LETTERS_INTERVAL:
        told = told._replace(dead_letters=dead_letters, dead_letters_time=now)
        events.append(_dead_lettered_event(dead_letters, now))
    return told, events


def _delayed_event(lag: timedelta, now: datetime) -> Event:
    event = PlatformEvent(
        event_id=f"ingestion_delayed:{now:%Y%m%dT%H%M%S}",
        type=EVENT_TYPE_INGESTION_DELAYED,
        summary=f"Usage is counted until {now - lag:%Y-%m-%d %H:%M} UTC and not further.",
    )
    event.ingestion_delayed.lag.FromTimedelta(lag)
    return _event(event, now)


def _dead_lettered_event(count: int, now: datetime) -> Event:
    event = PlatformEvent(
        event_id=f"dead_lettered:{now:%Y%m%dT%H%M%S}",
        type=EVENT_TYPE_DEAD_LETTERED,
        summary=f"{count:,} messages with usage cannot be read and were put aside.",
    )
    event.dead_lettered.count, event.dead_lettered.reason = count, _DEAD_LETTER_REASON
    return _event(event, now)


def _event(message: PlatformEvent, now: datetime) -> Event:
    message.schema_version = SCHEMA_VERSION
    message.event_time.FromDatetime(now)
    return read_event(message.SerializeToString(), now)
