"""Sums all events anew, day by day, for rows from before sums knew all that they know; it never changes an event."""

from __future__ import annotations

import logging

from analytics.rollups import day_of
from analytics.store import UsageStore
from analytics.usage_range import DAY
from analytics.usage_retention import Kept
from mesh.clock import Clock

logger = logging.getLogger(__name__)


async def rebuild(store: UsageStore, clock: Clock, kept: Kept) -> int:
    """Sum every day anew of which all events are kept, the running one too; returns how many events there were.

    Nothing is counted while a day is summed; it waits in the queue. Raises PlatformError(UNAVAILABLE) when PostgreSQL
    is away; days that were done by then are done.
    """
    now, events = clock.now(), 0
    day = day_of(now - kept.events) + DAY
    while day <= now + DAY:
        if found := await store.rebuild_day(day):
            logger.info("%s is summed anew: %d events", day.date(), found)
            events += found
        day += DAY
    return events
