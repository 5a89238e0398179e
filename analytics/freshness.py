"""How far the counts are behind, and the one moment from which that follows; it never guesses.

The moment is `complete_until`: every event that was in the queue by then is counted. To know it, each process puts a
mark with the time into the queue every two seconds. The queue is first in, first out, so when a mark arrives and all
that came before it is committed, its time is the moment. With an empty queue that is now, less the two seconds; with
a backlog it tells how old the backlog is; while the broker or PostgreSQL is away no mark gets through, the moment
stands still and the lag grows by itself. Before the first mark it is unknown, and unknown is never taken for fresh.

What a router has not published yet is not known here, nor is the batch that another replica has in hand: both are
seconds, unless that router or replica is in trouble itself.
"""

from __future__ import annotations

import asyncio
import logging
import math
import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from aiaas.analytics.v1 import usage_service_pb2
from aiaas.analytics.v1.usage_service_pb2 import FreshnessState
from mesh.clock import Clock
from mesh.errors import PlatformError

if TYPE_CHECKING:
    from analytics.store import UsageStore

logger = logging.getLogger(__name__)

STALE = timedelta(seconds=300)
"""From this lag on an answer is stale."""

DELAYED = timedelta(seconds=600)
"""From this lag on an answer is delayed."""

_INTERVAL_S = 2.0
_PUBLISH_TIMEOUT_S = 5.0
# No protobuf message begins with a zero byte, so a mark is never taken for an event, nor an event for a mark.
_MARK = struct.Struct(">12sq")
_MARK_NAME = b"\0complete_v1"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Freshness:
    """How fresh an answer is that was given at `now`; without a `complete_until` nobody knows."""

    complete_until: datetime | None
    now: datetime

    @property
    def lag(self) -> timedelta | None:
        """How far behind."""
        return None if self.complete_until is None else max(self.now - self.complete_until, timedelta())

    @property
    def state(self) -> FreshnessState.ValueType:
        """In one word."""
        if self.lag is None:
            return FreshnessState.FRESHNESS_STATE_UNSPECIFIED
        if self.lag < STALE:
            return FreshnessState.FRESHNESS_STATE_FRESH
        return FreshnessState.FRESHNESS_STATE_STALE if self.lag < DELAYED else FreshnessState.FRESHNESS_STATE_DELAYED


async def freshness_message(store: UsageStore, clock: Clock) -> usage_service_pb2.Freshness:
    """How fresh sums are that are read after this, so that it never promises more than they hold."""
    freshness = Freshness(await store.complete_until(), clock.now())
    message = usage_service_pb2.Freshness(state=freshness.state)
    if freshness.complete_until is not None and freshness.lag is not None:
        message.complete_until.FromDatetime(freshness.complete_until)
        message.lag.FromTimedelta(freshness.lag)
    return message


def write_mark(moment: datetime) -> bytes:
    """The body of a mark made at `moment`."""
    return _MARK.pack(_MARK_NAME, (moment - _EPOCH) // _MICROSECOND)


def read_mark(body: bytes) -> datetime | None:
    """When a mark was made; None for a body that is no mark."""
    if len(body) != _MARK.size or not body.startswith(_MARK_NAME):
        return None
    _, micros = _MARK.unpack(body)
    try:
        return _EPOCH + timedelta(microseconds=micros)
    except OverflowError:
        return None


class Publishing(Protocol):
    """The broker, as far as it is needed here."""

    async def publish(self, exchange: str, routing_key: str, body: bytes, *, timeout_s: float) -> None:
        """Returns when the broker has confirmed. Raises PlatformError."""


class Marks:
    """Puts marks into the queue `queue_name`, and knows what came of those that arrived."""

    def __init__(self, broker: Publishing, queue_name: str, store: UsageStore, clock: Clock) -> None:
        self._broker = broker
        self._queue_name = queue_name
        self._store = store
        self._clock = clock
        self._complete_until: datetime | None = None

    def lag_s(self) -> float:
        """Seconds since usage was last known to be complete; NaN while that is unknown."""
        lag = Freshness(self._complete_until, self._clock.now()).lag
        return math.nan if lag is None else lag.total_seconds()

    async def run(self) -> None:
        """Put a mark into the queue every two seconds, until cancelled. Outages show in the lag and nowhere else."""
        while True:
            try:
                await self.put()
                self._complete_until = await self._store.complete_until()
            except PlatformError as error:
                logger.debug("no mark got through: %s", error.reason.value)
            await asyncio.sleep(_INTERVAL_S)

    async def put(self) -> None:
        """Put one mark into the queue. Raises PlatformError(UNAVAILABLE)."""
        # The nameless exchange leads to this queue alone: whoever else listens to usage never meets a mark.
        body = write_mark(self._clock.now())
        await self._broker.publish("", self._queue_name, body, timeout_s=_PUBLISH_TIMEOUT_S)
