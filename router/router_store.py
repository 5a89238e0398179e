"""The SQL of the table of replicas: heartbeats in, who is alive out; times are the database's own."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from mesh.database import Database
from router.routers import ALIVE_S, Condition, Heartbeat, Replica

_ALIVE = timedelta(seconds=ALIVE_S)
# Nobody asks for longer: no journal remembers what is older.
_REMEMBERED = timedelta(days=30)

_COLUMNS = (
    "router_id, router_instance_id, address, version, start_time, draining, requests_in_flight, unpublished_entries,"
    " heartbeat_time"
)


class RouterStore:
    """The replicas. Every method raises PlatformError(UNAVAILABLE) while PostgreSQL is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def beat(self, replica: Replica, condition: Condition) -> None:
        """The replica is alive now."""
        await self._database.execute(
            f"INSERT INTO routers ({_COLUMNS}, has_left) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, now(), false)"  # noqa: S608
            " ON CONFLICT (router_id) DO UPDATE SET router_instance_id = excluded.router_instance_id,"
            " address = excluded.address, version = excluded.version, start_time = excluded.start_time,"
            " draining = excluded.draining, requests_in_flight = excluded.requests_in_flight,"
            " unpublished_entries = excluded.unpublished_entries, heartbeat_time = excluded.heartbeat_time,"
            " has_left = false",
            replica.router_id,
            replica.router_instance_id,
            replica.address,
            replica.version,
            replica.start_time,
            condition.draining,
            condition.requests_in_flight,
            condition.unpublished_entries,
        )

    async def leave(self, replica: Replica) -> None:
        """The replica is no longer alive, unless a newer run of it is. Those that left long ago are forgotten."""
        await self._database.execute("DELETE FROM routers WHERE heartbeat_time < now() - $1::interval", _REMEMBERED)
        await self._database.execute(
            "UPDATE routers SET has_left = true WHERE router_id = $1 AND router_instance_id = $2",
            replica.router_id,
            replica.router_instance_id,
        )

    async def list_alive(self) -> Sequence[Heartbeat]:
        """The replicas that are alive, in the order of their ids."""
        rows = await self._database.fetch(
            f"SELECT {_COLUMNS} FROM routers WHERE NOT has_left AND heartbeat_time > now() - $1::interval"  # noqa: S608
            " ORDER BY router_id",
            _ALIVE,
        )
        return [_heartbeat(*row) for row in rows]

    async def list_since(self, since: datetime) -> Sequence[Heartbeat]:
        """The replicas that were alive then or later, in the order of their ids."""
        rows = await self._database.fetch(
            f"SELECT {_COLUMNS} FROM routers WHERE heartbeat_time >= $1 ORDER BY router_id",  # noqa: S608
            since,
        )
        return [_heartbeat(*row) for row in rows]


def _heartbeat(
    router_id: str,
    router_instance_id: str,
    address: str,
    version: str,
    start_time: datetime,
    draining: bool,
    requests_in_flight: int,
    unpublished_entries: int,
    heartbeat_time: datetime,
) -> Heartbeat:
    return Heartbeat(
        Replica(router_id, router_instance_id, address, version, start_time),
        Condition(draining, requests_in_flight, unpublished_entries),
        heartbeat_time,
    )
