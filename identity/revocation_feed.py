"""Tells watchers what has become invalid, out of the log of revocations; it never looks while nobody watches, nor
oftener for many than for one.

This is the second path beside Redis, and the one that misses nothing: a watcher that comes back goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import TYPE_CHECKING

from identity.revocations import Revocation
from mesh.errors import PlatformError, Reason

if TYPE_CHECKING:
    from identity.stores import Store

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.25
_FORGET_INTERVAL_S = 600.0
_PAGE = 500

KEPT = timedelta(hours=1)
"""A watcher that was away for longer forgets all it knows."""


class RevocationFeed:
    """The revocations of all organizations, each once and in their order."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._watchers = 0
        self._newest = 0
        self._closed = False
        self._news = asyncio.Condition()

    async def watch(self, after_revision: int) -> AsyncIterator[tuple[int, Revocation | None]]:
        """Revocations after this revision, as they are made, until `close`; 0 is from now on.

        The first one is of nobody: it says after which revision nothing is missed, which is a later one than was asked
        for where the log does not reach back so far. Raises PlatformError(UNAVAILABLE).
        """
        if self._closed:
            raise PlatformError(Reason.UNAVAILABLE)
        oldest, newest = await self._read_extent()
        seen = after_revision if oldest <= after_revision <= newest else newest
        self._watchers += 1
        try:
            yield seen, None
            while not self._closed:
                async with self._store.transaction() as stored:
                    revocations = await stored.revocations.list_after(seen, _PAGE)
                for revocation in revocations:
                    yield revocation.revision, revocation
                    seen = revocation.revision
                if len(revocations) < _PAGE:
                    await self._wait_beyond(seen)
        finally:
            self._watchers -= 1

    async def run(self, stop: asyncio.Event) -> None:
        """Look for revocations while anybody watches, and keep the log short, until `stop` is set."""
        loop = asyncio.get_running_loop()
        forget_at = loop.time()
        while not stop.is_set():
            if self._watchers:
                await self._look()
            if loop.time() >= forget_at:
                forget_at = loop.time() + _FORGET_INTERVAL_S
                await self._forget()
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
            _, newest = await self._read_extent()
        except PlatformError as error:
            logger.warning("revocations were not looked for: %s", error.reason.value)
            return
        async with self._news:
            self._newest = newest
            self._news.notify_all()

    async def _forget(self) -> None:
        try:
            async with self._store.transaction() as stored:
                await stored.revocations.forget_older_than(KEPT)
        except PlatformError as error:
            logger.warning("old revocations were not forgotten: %s", error.reason.value)

    async def _read_extent(self) -> tuple[int, int]:
        async with self._store.transaction() as stored:
            return await stored.revocations.extent()

    async def _wait_beyond(self, revision: int) -> None:
        async with self._news:
            await self._news.wait_for(lambda: self._closed or self._newest > revision)
