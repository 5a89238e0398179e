"""Makes the partitions of usage_events before events need them; it never drops one.

A partition is a day. At the rate that is planned for (3,000 events a second) a day is 260 million rows: small enough
to index, compress and drop as a whole, and what is kept for 400 days is then kept for 400 days and not for up to 430.
Events of days without a partition go to the default one, and move when theirs is made, so nothing waits for this.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import TYPE_CHECKING

from mesh.clock import Clock
from mesh.errors import PlatformError

if TYPE_CHECKING:
    from analytics.store import UsageStore

logger = logging.getLogger(__name__)

DAYS_BEHIND = 2
"""Days before today that get a partition: events are up to 48 h late when a router was cut off."""

DAYS_AHEAD = 7
"""Days after today that get a partition: so long this may fail before the default partition grows."""

_INTERVAL_S = 3600.0
_RETRY_S = 10.0


async def keep_partitions(store: UsageStore, clock: Clock) -> None:
    """Make what is missing now and then hourly, until it is cancelled. Tries again while PostgreSQL is away."""
    while True:
        try:
            await make_partitions(store, clock)
        except PlatformError as error:
            logger.warning("partitions could not be made: %s", error.reason.value)
            await asyncio.sleep(_RETRY_S)
        else:
            await asyncio.sleep(_INTERVAL_S)


async def make_partitions(store: UsageStore, clock: Clock) -> int:
    """Make the partitions around today that are missing; returns how many that were."""
    today = clock.now().date()
    days = (today + timedelta(days=offset) for offset in range(-DAYS_BEHIND, DAYS_AHEAD + 1))
    return sum([await store.ensure_partition(day) for day in days])
