"""The table of events that wait to be published; it never knows what one says."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from identity.stores.rows import Connection


class UnpublishedEventRows:
    """Events that wait, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def take(self, limit: int) -> list[tuple[str, bytes]]:
        """Id and event of the oldest that no other transaction has taken."""
        rows = await self._connection.fetch(
            "SELECT event_id, event FROM unpublished_events ORDER BY create_time, event_id"
            f" LIMIT {limit:d} FOR UPDATE SKIP LOCKED"
        )
        return [(row["event_id"], row["event"]) for row in rows]

    async def remove(self, event_ids: list[str]) -> None:
        """Forget events that were published."""
        await self._connection.execute("DELETE FROM unpublished_events WHERE event_id = ANY ($1::text[])", event_ids)
