"""Closes days, and removes events and sums that are older than they are kept; it never adds an event to a sum.

A day in UTC is summed from its hours once, an hour after its end. From then on long ranges read it instead of its
hours, and what comes late is added to both. Hours go after 90 days, days after 13 months. Events go by whole
partitions, when the last of a day is older than 400 days, which is as old as an event may be when it comes: none is
counted again because it was forgotten.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from analytics.rollups import day_of
from mesh.clock import Clock
from mesh.errors import PlatformError

if TYPE_CHECKING:
    from analytics.store import UsageStore

logger = logging.getLogger(__name__)

SETTLED = timedelta(hours=1)
"""How long after its end a day is closed: almost all events have come by then."""

_BATCH = 10_000
_INTERVAL_S = 600.0
_RETRY_S = 60.0


@dataclass(frozen=True, slots=True)
class Kept:
    """How long events and their sums are kept."""

    events: timedelta = timedelta(days=400)
    hourly: timedelta = timedelta(days=90)
    daily_months: int = 13

    def hourly_since(self, now: datetime) -> datetime:
        """Since when there are sums of hours: a midnight in UTC."""
        return day_of(now - self.hourly)

    def daily_since(self, now: datetime) -> datetime:
        """Since when there are sums of days."""
        years, month = divmod(now.year * 12 + now.month - 1 - self.daily_months, 12)
        # Not every month has a 29th.
        return day_of(now).replace(year=years, month=month + 1, day=min(now.day, 28))


async def keep_sums(store: UsageStore, clock: Clock, kept: Kept) -> None:
    """Close days and remove what is too old now and then every ten minutes, until it is cancelled. Tries again while
    PostgreSQL is away."""
    while True:
        try:
            await close_days(store, clock)
            await remove_old(store, clock, kept)
        except PlatformError as error:
            logger.warning("sums could not be kept: %s", error.reason.value)
            await asyncio.sleep(_RETRY_S)
        else:
            await asyncio.sleep(_INTERVAL_S)


async def close_days(store: UsageStore, clock: Clock) -> int:
    """Close every day that is over; returns how many of them had usage."""
    until, closed = day_of(clock.now() - SETTLED), 0
    while day := await store.close_day(until):
        closed += 1
        logger.info("usage of %s is closed", day.date())
    return closed


async def remove_old(store: UsageStore, clock: Clock, kept: Kept, batch: int = _BATCH) -> None:
    """Remove what is too old."""
    now = clock.now()
    hourly_since = await store.forget_hours(kept.hourly_since(now))
    await _all(lambda: store.remove_hours(hourly_since, batch), batch)
    await _all(lambda: store.remove_days(kept.daily_since(now), batch), batch)
    events_since = day_of(now - kept.events)
    if dropped := await store.drop_partitions(events_since.date()):
        logger.info("events of %d days are dropped", dropped)
    await _all(lambda: store.remove_events(events_since, batch), batch)


async def _all(remove: Callable[[], Awaitable[int]], batch: int) -> None:
    while await remove() == batch:
        pass
