"""Carries from identity to every cache of principals what has become invalid, over Redis and over gRPC; it judges no
credential.

Redis is the fast path, and may lose a message. The watch of identity misses nothing, however long ago it broke off.
While both are away, a cache forgets a principal when its time is over.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError

from aiaas.identity.v1.auth_service_pb2 import WatchRevocationsRequest, WatchRevocationsResponse
from mesh.auth import CachedAuthenticator
from mesh.cache import Cache
from mesh.errors import PlatformError, from_rpc_error

if TYPE_CHECKING:
    from aiaas.identity.v1.auth_service_pb2_grpc import AuthServiceStub

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


async def watch(stub: AuthServiceStub, authenticator: CachedAuthenticator) -> None:
    """Have `authenticator` forget what identity's log names, until cancelled; goes on where it broke off, and first at
    the authenticator's own revision.

    Where the log does not reach back so far, or leaves one out, all that is known is asked for again.
    """
    pause = 0
    while True:
        try:
            async for told in stub.WatchRevocations(WatchRevocationsRequest(after_revision=authenticator.revision)):
                if pause:
                    logger.info("revocations are watched again")
                    pause = 0
                named = told.WhichOneof("subject") is not None
                if told.revision != authenticator.revision + named:
                    authenticator.expire_all()
                if named:
                    authenticator.invalidate(told)
                authenticator.revision = told.revision
        except grpc.aio.AioRpcError as error:
            if not pause:
                logger.warning("revocations are not watched: %s", from_rpc_error(error).reason.value)
        await asyncio.sleep(_PAUSES_S[min(pause, len(_PAUSES_S) - 1)])
        pause += 1


def _read(message: bytes) -> WatchRevocationsResponse:
    try:
        return WatchRevocationsResponse.FromString(message)
    except DecodeError:
        logger.error("a revocation could not be read; it may concern every principal")
        return WatchRevocationsResponse()
