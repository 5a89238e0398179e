"""The table of first answers to creations with a request_id (AIP-155); it never compares what was asked."""

from __future__ import annotations

from datetime import datetime

from identity.stores.rows import Connection


class CreationRows:
    """What client-chosen request ids have made, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def claim(
        self, organization_id: str, rpc: str, request_id: str, created_id: str, now: datetime
    ) -> str | None:
        """Note that `request_id` makes `created_id`; gives what it made before, None if it is new or empty.

        While another transaction makes something with the same `request_id`, it waits for that one's end.
        """
        if not request_id:
            return None
        claimed = await self._connection.fetchrow(
            "INSERT INTO creations (organization_id, rpc, request_id, created_id, create_time)"
            " VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING RETURNING created_id",
            organization_id,
            rpc,
            request_id,
            created_id,
            now,
        )
        if claimed is not None:
            return None
        first: str = await self._connection.fetchval(
            "SELECT created_id FROM creations WHERE organization_id = $1 AND rpc = $2 AND request_id = $3",
            organization_id,
            rpc,
            request_id,
        )
        return first
