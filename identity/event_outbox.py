"""Publishes the events that transactions left behind, each at least once and none lost; it never makes an event.

An event is removed in the transaction that took it, and only once the broker has confirmed it, so whatever is killed
in between sends it again. Its event_id makes it count once.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from mesh.errors import PlatformError
from mesh.topology import EVENTS

if TYPE_CHECKING:
    from identity.stores import Store

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.5
_LONGEST_PAUSE_S = 5.0
_PUBLISH_TIMEOUT_S = 5.0
_BATCH_EVENTS = 100


class Publishing(Protocol):
    """The broker, as far as it is needed here."""

    async def publish(self, exchange: str, routing_key: str, body: bytes, *, timeout_s: float) -> None:
        """Returns when the broker has confirmed. Raises PlatformError."""


class EventOutbox:
    """What waits to be published. Any number of processes may empty it at the same time."""

    def __init__(self, store: Store, broker: Publishing) -> None:
        self._store = store
        self._broker = broker

    async def run(self, stop: asyncio.Event) -> None:
        """Publish what there is, twice a second or after a failure less often, and a last time when `stop` is set."""
        pause_s = _INTERVAL_S
        while not stop.is_set():
            try:
                async with asyncio.timeout(pause_s):
                    await stop.wait()
            except TimeoutError:
                pass
            pause_s = _INTERVAL_S if await self._publish_all() else min(_LONGEST_PAUSE_S, pause_s * 2)

    async def publish(self) -> int:
        """Publish the oldest events that nobody else is publishing; gives how many were confirmed.

        Raises PlatformError(UNAVAILABLE) when the database is away, or the broker before it confirmed any.
        """
        confirmed: list[str] = []
        async with self._store.transaction() as stored:
            for event_id, event in await stored.unpublished_events.take(_BATCH_EVENTS):
                try:
                    await self._broker.publish(EVENTS.exchange, EVENTS.routing_key, event, timeout_s=_PUBLISH_TIMEOUT_S)
                except PlatformError:
                    if not confirmed:
                        raise
                    break
                confirmed.append(event_id)
            await stored.unpublished_events.remove(confirmed)
        return len(confirmed)

    async def _publish_all(self) -> bool:
        """Whether nothing failed."""
        try:
            while await self.publish() == _BATCH_EVENTS:
                pass
        except PlatformError as error:
            logger.warning("events were not published: %s", error.reason.value)
            return False
        except Exception:
            logger.exception("events were not published")
            return False
        return True
