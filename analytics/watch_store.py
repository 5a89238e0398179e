"""The SQL of watching: hours to be judged, and what is told of them, in one transaction each; it never judges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from analytics.anomalies import DAYS, LEAST_REQUESTS, SPEND_FLOOR_MICROS, Anomaly, Hour, compared_hours
from analytics.event_store import add_events
from analytics.platform_events import KEPT, Event
from mesh.database import Database

# Only organizations that could be found to have an anomaly. Outcomes by their number in the contract: 1 succeeded,
# 2 refused, 4 cancelled by the client, which is no failure.
_HOURS = """
WITH busy AS (
    SELECT organization_id FROM usage_hourly WHERE hour = $1
    GROUP BY 1 HAVING sum(cost_micros) >= $3 OR sum(requests) FILTER (WHERE outcome <> 2) >= $4
)
SELECT
    organization_id,
    hour,
    coalesce(sum(requests) FILTER (WHERE outcome <> 2), 0)::bigint AS requests,
    coalesce(sum(requests) FILTER (WHERE outcome NOT IN (1, 2, 4)), 0)::bigint AS failed_requests,
    sum(cost_micros)::bigint AS cost_micros
FROM busy JOIN usage_hourly USING (organization_id)
WHERE hour = ANY ($2)
GROUP BY 1, 2
"""

_SINCE = """
SELECT organization_id, (SELECT min(hour) FROM usage_hourly WHERE organization_id = busy.organization_id AND hour >= $2)
FROM unnest($1::text[]) AS busy (organization_id)
"""


@dataclass(frozen=True)
class Usage:
    """The hours of an organization that one of them is compared with, it among them, and when its usage began."""

    since: datetime
    hours: Mapping[datetime, Hour]


class Finding(NamedTuple):
    """An anomaly of an organization, and the event that tells of it."""

    anomaly: Anomaly
    event: Event


class IngestionWatch(NamedTuple):
    """What was told last: whether ingestion is delayed, how many messages were put aside, and when that was told."""

    delayed: bool
    dead_letters: int
    dead_letters_time: datetime


class WatchStore:
    """What was judged and told. Every method raises PlatformError(UNAVAILABLE) while PostgreSQL is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def last_watched(self) -> datetime | None:
        """The last hour that was judged; None before the first."""
        hour: datetime | None = await self._database.fetchval("SELECT max(hour) FROM watched_hours")
        return hour

    async def watch_hour(
        self, hour: datetime, now: datetime, judge: Callable[[str, Usage], Iterable[Finding]]
    ) -> tuple[Sequence[Finding], int]:
        """Judge an hour of every organization, keep what was found and its events, all in one transaction.

        Returns what was found and how many deliveries that makes; nothing if the hour was judged before.
        """
        async with self._database.transaction() as connection:
            claimed = await connection.fetchval(
                "INSERT INTO watched_hours VALUES ($1) ON CONFLICT DO NOTHING RETURNING true", hour
            )
            if not claimed:
                return (), 0
            await connection.execute("DELETE FROM watched_hours WHERE hour < $1", now - KEPT)
            await connection.execute("DELETE FROM anomalies WHERE hour < $1", now - KEPT)
            earlier = compared_hours(hour)
            rows = await connection.fetch(_HOURS, hour, [hour, *earlier], SPEND_FLOOR_MICROS, LEAST_REQUESTS)
            hours: defaultdict[str, dict[datetime, Hour]] = defaultdict(dict)
            for organization_id, each, *sums in rows:
                hours[organization_id][each] = Hour(*sums)
            since = await connection.fetch(_SINCE, list(hours), earlier[DAYS - 1])
            found = [
                finding
                for organization_id, began in since
                for finding in judge(organization_id, Usage(began, hours[organization_id]))
            ]
            await connection.executemany(
                "INSERT INTO anomalies VALUES ($1, $2, $3, $4, $5, $6)",
                [(event.organization_id, hour, event.type, *anomaly) for anomaly, event in found],
            )
            _, deliveries = await add_events(connection, [event for _, event in found], now)
        return found, deliveries

    async def watch_ingestion(
        self, now: datetime, judge: Callable[[IngestionWatch], tuple[IngestionWatch, Sequence[Event]]]
    ) -> int:
        """Judge how ingestion is by what was told of it last, and keep both, in one transaction and one at a time.

        Returns how many deliveries that makes.
        """
        async with self._database.transaction() as connection:
            (row,) = await connection.fetch(
                "SELECT delayed, dead_letters, dead_letters_time FROM ingestion_watch FOR UPDATE"
            )
            told = IngestionWatch(*row)
            to_tell, events = judge(told)
            if to_tell != told:
                await connection.execute(
                    "UPDATE ingestion_watch SET delayed = $1, dead_letters = $2, dead_letters_time = $3", *to_tell
                )
            _, deliveries = await add_events(connection, events, now)
        return deliveries
