"""Carries from identity to every cache of principals what has become invalid, over Redis; it judges no credential.

This is the fast path. While Redis is away, a cache forgets a principal when its time is over.
"""

from __future__ import annotations

import asyncio
import logging

from google.protobuf.message import DecodeError

from aiaas.identity.v1.auth_service_pb2 import WatchRevocationsResponse
from mesh.auth import CachedAuthenticator
from mesh.cache import Cache
from mesh.errors import PlatformError

logger = logging.getLogger(__name__)

CHANNEL = "aiaas.revocations"
"""The Redis channel; each message is an aiaas.identity.v1.WatchRevocationsResponse."""

_PAUSES_S = (0.1, 0.2, 0.5, 1.0)


async def publish(cache: Cache, revocation: WatchRevocationsResponse) -> None:
    """Tell every process that listens now. Raises PlatformError(UNAVAILABLE) while Redis is away."""
    await cache.publish(CHANNEL, revocation.SerializeToString())


async def listen(cache: Cache, authenticator: CachedAuthenticator) -> None:
    """Have `authenticator` forget what is published, until cancelled; comes back whenever Redis does."""
    pause = 0
    while True:
        try:
            async with cache.subscribed(CHANNEL) as messages:
                # What was published until now may not have been heard.
                authenticator.expire_all()
                if pause:
                    logger.info("revocations are heard again")
                pause = 0
                async for message in messages:
                    authenticator.invalidate(_read(message))
        except PlatformError as error:
            if not pause:
                logger.warning("revocations are not heard: %s", error.reason.value)
        await asyncio.sleep(_PAUSES_S[min(pause, len(_PAUSES_S) - 1)])
        pause += 1


def _read(message: bytes) -> WatchRevocationsResponse:
    try:
        return WatchRevocationsResponse.FromString(message)
    except DecodeError:
        logger.error("a revocation could not be read; it may concern every principal")
        return WatchRevocationsResponse()
