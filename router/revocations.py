"""Hears from identity what has become invalid, and has the cache of principals forget it; it judges no credential.

This is the fast path, through Redis: while that is away, principals are forgotten when their time in the cache is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from google.protobuf.message import DecodeError

from aiaas.identity.v1.auth_service_pb2 import WatchRevocationsResponse
from mesh.auth import CachedAuthenticator, Principal
from mesh.errors import PlatformError

logger = logging.getLogger(__name__)

CHANNEL = "aiaas.revocations"
"""The Redis channel on which identity announces, in protobuf, what has become invalid."""

_PAUSE_S = 0.5


class Subscribing(Protocol):
    """Redis, as far as it is needed here."""

    def subscribed(self, channel: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The messages of a channel. Raises PlatformError(UNAVAILABLE) when Redis is, or goes, away."""


class RevocableAuthenticator:
    """A cache of principals that can forget one API key, or everything at once."""

    def __init__(self, make_cache: Callable[[], CachedAuthenticator]) -> None:
        self._make_cache = make_cache
        self._cache = make_cache()

    async def authenticate(self, credential: str) -> Principal:
        """The principal behind a credential. Raises PlatformError as CachedAuthenticator does."""
        return await self._cache.authenticate(credential)

    def revoke(self, revocation: WatchRevocationsResponse) -> None:
        """Forget every principal that a revocation may concern."""
        if revocation.WhichOneof("subject") == "api_key_id":
            self._cache.invalidate(revocation.api_key_id)
        else:
            # Whom a user, an organization or a role is behind is not looked up: all are asked for again. Look-ups
            # that are under way answer their callers, and are not remembered.
            self._cache = self._make_cache()

    async def close(self) -> None:
        """End the look-ups that are still under way."""
        await self._cache.close()


class RevocationListener:
    """The task that listens, and comes back whenever Redis does."""

    def __init__(self, cache: Subscribing, authenticator: RevocableAuthenticator) -> None:
        self._cache = cache
        self._authenticator = authenticator

    async def run(self) -> None:
        """Listen until cancelled."""
        away = False
        while True:
            try:
                async with self._cache.subscribed(CHANNEL) as messages:
                    if away:
                        logger.info("revocations are heard again")
                    away = False
                    async for message in messages:
                        self._hear(message)
            except PlatformError as error:
                if not away:
                    logger.warning("revocations are not heard: %s", error.reason.value)
                away = True
            await asyncio.sleep(_PAUSE_S)

    def _hear(self, message: bytes) -> None:
        try:
            revocation = WatchRevocationsResponse.FromString(message)
        except DecodeError:
            logger.error("a revocation could not be read; every cached principal is forgotten")
            revocation = WatchRevocationsResponse()
        self._authenticator.revoke(revocation)
