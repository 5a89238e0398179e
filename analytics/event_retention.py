"""Removes what is older than it is kept: events and deliveries, a bounded number at a time; it never touches usage."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from analytics.event_store import EventStore
from analytics.platform_events import KEPT
from analytics.webhook_store import WebhookStore
from analytics.webhooks import DELIVERIES_KEPT, TRIED
from mesh.clock import Clock
from mesh.errors import PlatformError

logger = logging.getLogger(__name__)

_BATCH = 1000
_INTERVAL_S = 3600.0
_RETRY_S = 60.0


async def keep_clean(events: EventStore, webhooks: WebhookStore, clock: Clock) -> None:
    """Clean up now and then hourly, until it is cancelled. Tries again while PostgreSQL is away."""
    while True:
        try:
            await clean(events, webhooks, clock)
        except PlatformError as error:
            logger.warning("events could not be cleaned up: %s", error.reason.value)
            await asyncio.sleep(_RETRY_S)
        else:
            await asyncio.sleep(_INTERVAL_S)


async def clean(events: EventStore, webhooks: WebhookStore, clock: Clock, batch: int = _BATCH) -> None:
    """Remove what is too old, and give up what waited for a disabled webhook for too long."""
    now = clock.now()
    reason = "The webhook was disabled for too long."
    await _all(lambda: webhooks.give_up_disabled(now - TRIED, reason, batch), batch)
    await _all(lambda: webhooks.remove_deliveries_before(now - DELIVERIES_KEPT, batch), batch)
    await _all(lambda: events.remove_before(now - KEPT, batch), batch)


async def _all(remove: Callable[[], Awaitable[int]], batch: int) -> None:
    while await remove() == batch:
        pass
