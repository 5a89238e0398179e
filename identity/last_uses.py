"""When keys and sessions were last used, to the minute, written down in bundles; it never holds up a call for that."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime
from typing import TYPE_CHECKING

from mesh.errors import PlatformError

if TYPE_CHECKING:
    from identity.stores import Store

logger = logging.getLogger(__name__)

_INTERVAL_S = 5.0
_MAX_NOTED = 100_000


class LastUses:
    """Notes uses in memory, and writes them every few seconds. What a crash loses is a minute of `last_use_time`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._noted: dict[tuple[str, str], datetime] = {}
        self._sessions: dict[str, datetime] = {}

    def note(self, organization_id: str, api_key_id: str, now: datetime) -> None:
        """Remember that a key was used."""
        if len(self._noted) < _MAX_NOTED:
            self._noted[organization_id, api_key_id] = now.replace(second=0, microsecond=0)

    def note_session(self, session_id: str, now: datetime) -> None:
        """Remember that a session was used."""
        if len(self._sessions) < _MAX_NOTED:
            self._sessions[session_id] = now.replace(second=0, microsecond=0)

    async def run(self, stop: asyncio.Event) -> None:
        """Write what was noted every few seconds, and a last time when `stop` is set."""
        while not stop.is_set():
            try:
                async with asyncio.timeout(_INTERVAL_S):
                    await stop.wait()
            except TimeoutError:
                pass
            await self.write()

    async def write(self) -> None:
        """Write what was noted; while the database is away it stays noted."""
        noted, self._noted = self._noted, {}
        sessions, self._sessions = self._sessions, {}
        if not noted and not sessions:
            return
        try:
            async with self._store.transaction() as stored:
                await stored.api_keys.set_last_uses(noted)
                await stored.sessions.set_last_uses(sessions)
        except PlatformError as error:
            self._noted = noted | self._noted
            self._sessions = sessions | self._sessions
            logger.warning("last uses were not written: %s", error.reason.value)
