"""All SQL of platform events: kept once, fanned out to webhooks, read and cleaned up; it never judges an event."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import asyncpg

from analytics.platform_events import Event, EventQuery
from mesh.database import Connection, Database
from mesh.ids import new_id

# In the order of their keys: replicas that meet the same events wait for each other and never both ways.
_ADD = """
INSERT INTO platform_events (event_id, organization_id, type, event_time, event)
SELECT * FROM unnest($1::text[], $2::text[], $3::smallint[], $4::timestamptz[], $5::bytea[]) ORDER BY 1
ON CONFLICT DO NOTHING
RETURNING event_id
"""

# Locked, so that none of them is removed before its deliveries are there.
_WANTED = """
SELECT webhook_id, event_id
FROM platform_events JOIN webhooks USING (organization_id)
WHERE event_id = ANY ($1) AND NOT disabled AND (types = '{}' OR type = ANY (types))
ORDER BY webhook_id, event_id
FOR KEY SHARE OF webhooks
"""

_ADD_DELIVERIES = """
INSERT INTO webhook_deliveries (webhook_delivery_id, webhook_id, event_id, create_time, start_time, due_time)
SELECT *, $4::timestamptz, $5::timestamptz, $6::timestamptz FROM unnest($1::text[], $2::text[], $3::text[])
"""


class EventStore:
    """The table of events. Every method raises PlatformError(UNAVAILABLE) when PostgreSQL is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, events: Sequence[Event], now: datetime) -> tuple[int, int]:
        """Keep events and make their deliveries to the webhooks that want them, in one transaction.

        Returns how many events were not there before, and how many deliveries these make.
        """
        async with self._database.transaction() as connection:
            return await add_events(connection, events, now)

    async def add_for(
        self, event: Event, webhook_id: str, now: datetime, *, start_time: datetime, due_time: datetime
    ) -> str | None:
        """Keep a new event and make its delivery to one webhook alone; returns its id, None if there is no webhook."""
        async with self._database.transaction() as connection:
            found = await connection.fetch(
                "SELECT webhook_id, $2::text AS event_id FROM webhooks WHERE webhook_id = $1 FOR KEY SHARE",
                webhook_id,
                event.event_id,
            )
            if not found:
                return None
            await connection.execute(_ADD, *([value] for value in event))
            (delivery_id,) = await _add_deliveries(connection, found, now, start_time, due_time)
        return delivery_id

    async def get(self, organization_id: str, event_id: str) -> bytes | None:
        """One event, serialized."""
        event: bytes | None = await self._database.fetchval(
            "SELECT event FROM platform_events WHERE organization_id = $1 AND event_id = $2", organization_id, event_id
        )
        return event

    async def page(self, query: EventQuery) -> list[Event]:
        """Events, newest first, at most one more than the page holds."""
        before = (query.end_time, "") if query.before is None else (query.before.event_time, query.before.event_id)
        rows = await self._database.fetch(
            "SELECT event_id, organization_id, type, event_time, event FROM platform_events"
            " WHERE organization_id = $1 AND event_time >= $2 AND event_time < $3"
            " AND (cardinality($4::smallint[]) = 0 OR type = ANY ($4::smallint[]))"
            " AND (event_time, event_id) < ($5, $6)"
            " ORDER BY event_time DESC, event_id DESC LIMIT $7",
            query.organization_id,
            query.start_time,
            query.end_time,
            query.types,
            *before,
            query.page_size + 1,
        )
        return [Event(*row) for row in rows]

    async def remove_before(self, moment: datetime, limit: int) -> int:
        """Remove up to `limit` events that happened before and have no delivery; returns how many that were."""
        removed: int = await self._database.fetchval(
            "WITH removed AS (DELETE FROM platform_events WHERE event_id IN"
            " (SELECT event_id FROM platform_events AS old WHERE event_time < $1"
            " AND NOT EXISTS (SELECT FROM webhook_deliveries WHERE webhook_deliveries.event_id = old.event_id)"
            " ORDER BY event_time LIMIT $2 FOR UPDATE SKIP LOCKED) RETURNING 1) SELECT count(*) FROM removed",
            moment,
            limit,
        )
        return removed


async def add_events(connection: Connection, events: Sequence[Event], now: datetime) -> tuple[int, int]:
    """The same as EventStore.add within a transaction of the caller's."""
    if not events:
        return 0, 0
    kept = [row["event_id"] for row in await connection.fetch(_ADD, *zip(*events, strict=True))]
    wanted = await connection.fetch(_WANTED, kept)
    if wanted:
        await _add_deliveries(connection, wanted, now, now, now)
    return len(kept), len(wanted)


async def _add_deliveries(
    connection: Connection, pairs: Sequence[asyncpg.Record], now: datetime, start_time: datetime, due_time: datetime
) -> list[str]:
    """Make a delivery for each row of a webhook_id and an event_id; returns their ids."""
    delivery_ids = [new_id("delivery") for _ in pairs]
    await connection.execute(
        _ADD_DELIVERIES,
        delivery_ids,
        [pair["webhook_id"] for pair in pairs],
        [pair["event_id"] for pair in pairs],
        now,
        start_time,
        due_time,
    )
    return delivery_ids
