"""Says that this replica is alive, and how it stands, for others to see; it never routes anything by it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from mesh.errors import PlatformError

logger = logging.getLogger(__name__)

INTERVAL_S = 2.0
"""Between two heartbeats."""

ALIVE_S = 10.0
"""How old the last heartbeat of a replica that is alive may be: four in a row may be lost."""

_FAREWELL_S = 1.0


@dataclass(frozen=True, slots=True)
class Replica:
    """Who a replica is: `router_id` stays over restarts, `router_instance_id` is new at each start."""

    router_id: str
    router_instance_id: str
    address: str
    version: str
    start_time: datetime


@dataclass(frozen=True, slots=True)
class Condition:
    """How a replica stands at a moment."""

    draining: bool
    requests_in_flight: int
    unpublished_entries: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last that was heard of a replica."""

    replica: Replica
    condition: Condition
    heartbeat_time: datetime


class HeartbeatStore(Protocol):
    """Where heartbeats are kept."""

    async def beat(self, replica: Replica, condition: Condition) -> None:
        """The replica is alive. Raises PlatformError(UNAVAILABLE)."""

    async def leave(self, replica: Replica) -> None:
        """The replica is no longer alive, unless a newer run of it is. Raises PlatformError(UNAVAILABLE)."""


class Heartbeats:
    """The heartbeats of this replica; `condition` tells how it stands."""

    def __init__(self, store: HeartbeatStore, replica: Replica, condition: Callable[[], Condition]) -> None:
        self._store = store
        self._replica = replica
        self._condition = condition

    async def run(self) -> None:
        """Say so every `INTERVAL_S` until cancelled, and then that it leaves; while PostgreSQL is away nobody hears."""
        away = False
        try:
            while True:
                try:
                    await self._store.beat(self._replica, self._condition())
                    away = False
                except PlatformError as error:
                    if not away:
                        logger.warning("the heartbeat cannot be written: %s", error.reason.value)
                    away = True
                await asyncio.sleep(INTERVAL_S)
        finally:
            try:
                async with asyncio.timeout(_FAREWELL_S):
                    await self._store.leave(self._replica)
            except (PlatformError, TimeoutError):
                logger.info("the end could not be told; others notice it within %d s", ALIVE_S)
