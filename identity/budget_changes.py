"""Tells watchers whose budgets have changed; it never looks while nobody watches, nor oftener for many than for one.

One task asks for the newest revision twice a second; a watcher reads the changes only when there are some.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from mesh.errors import PlatformError, Reason

if TYPE_CHECKING:
    from identity.stores import Store

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.5
_PAGE = 500


class BudgetChanges:
    """The changes of all organizations' budgets. They are written one after another, so whoever has seen one of them
    has missed none before it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._watchers = 0
        self._newest = 0
        self._closed = False
        self._news = asyncio.Condition()

    async def watch(self, after_revision: int) -> AsyncIterator[tuple[int, str]]:
        """Revisions after this one and whose they are, as they are made, until `close`; 0 is from now on. Of an
        organization that changes again before it is told, only the latest. The first one is of nobody: it says from
        which revision on nothing is missed.

        Raises PlatformError(UNAVAILABLE).
        """
        if self._closed:
            raise PlatformError(Reason.UNAVAILABLE)
        seen = after_revision or await self._read_newest()
        self._watchers += 1
        try:
            yield seen, ""
            while not self._closed:
                # Asked before the changes are, so that all up to it are among them.
                newest = self._newest
                async with self._store.transaction() as stored:
                    changes = await stored.budgets.list_changes(seen, _PAGE)
                for revision, organization_id in changes:
                    yield revision, organization_id
                    seen = revision
                if len(changes) < _PAGE:
                    seen = max(seen, newest)
                    await self._wait_beyond(seen)
        finally:
            self._watchers -= 1

    async def run(self, stop: asyncio.Event) -> None:
        """Look for changes while anybody watches, until `stop` is set."""
        while not stop.is_set():
            if self._watchers:
                await self._look()
            try:
                async with asyncio.timeout(_INTERVAL_S):
                    await stop.wait()
            except TimeoutError:
                pass

    async def close(self) -> None:
        """End every watch; nobody can begin one any more."""
        async with self._news:
            self._closed = True
            self._news.notify_all()

    async def _look(self) -> None:
        try:
            newest = await self._read_newest()
        except PlatformError as error:
            logger.warning("changes of budgets were not looked for: %s", error.reason.value)
            return
        async with self._news:
            self._newest = newest
            self._news.notify_all()

    async def _read_newest(self) -> int:
        async with self._store.transaction() as stored:
            return await stored.budgets.newest_revision()

    async def _wait_beyond(self, revision: int) -> None:
        async with self._news:
            await self._news.wait_for(lambda: self._closed or self._newest > revision)
