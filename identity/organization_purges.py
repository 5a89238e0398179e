"""Removes the data of deleted organizations once their delay is over; it never shortens a delay."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from identity.audit import Audit
from mesh.clock import Clock
from mesh.errors import PlatformError

if TYPE_CHECKING:
    from identity.stores import Store

logger = logging.getLogger(__name__)

_INTERVAL_S = 60.0


class OrganizationPurges:
    """The end of organizations; any number of processes may run it side by side.

    What goes is what identity holds. People stay, as members of others or of none; usage that was billed stays where it
    is counted.
    """

    def __init__(self, store: Store, clock: Clock, audit: Audit) -> None:
        self._store = store
        self._clock = clock
        self._audit = audit

    async def run(self, stop: asyncio.Event) -> None:
        """Purge what is due, once a minute, until `stop` is set."""
        while not stop.is_set():
            try:
                await self.purge_due()
            except PlatformError as error:
                logger.warning("deleted organizations were not removed: %s", error.reason.value)
            try:
                async with asyncio.timeout(_INTERVAL_S):
                    await stop.wait()
            except TimeoutError:
                pass

    async def purge_due(self) -> list[str]:
        """Remove each organization whose time has come, in a transaction of its own; gives their ids."""
        now = self._clock.now()
        purged = []
        async with self._store.transaction() as stored:
            due = await stored.organizations.list_due(now)
        for organization_id in due:
            async with self._audit.own("OrganizationPurges", organization_id), self._store.transaction() as stored:
                if not await stored.organizations.purge(organization_id, now):
                    continue
                await stored.revoke("organization_id", organization_id)
            logger.info("a deleted organization was removed", extra={"organization_id": organization_id})
            purged.append(organization_id)
        return purged
