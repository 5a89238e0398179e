"""Announces what has become invalid to every cache of principals, over Redis; it never makes anything invalid itself.

The announcement is the fast way. One that is lost is in the log all the same, which `identity.revocation_feed` tells.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from aiaas.identity.v1 import auth_service_pb2
from mesh import revocations
from mesh.cache import Cache
from mesh.clock import Clock
from mesh.errors import PlatformError

logger = logging.getLogger(__name__)

Subject = Literal["api_key_id", "user_id", "service_account_id", "organization_id", "role_id"]


@dataclass(frozen=True, slots=True)
class Revocation:
    """Something became invalid, or may mean something else than before. Revisions follow one another without gaps."""

    revision: int
    subject: Subject
    id: str

    def to_proto(self) -> auth_service_pb2.WatchRevocationsResponse:
        """The revocation as it travels."""
        message = auth_service_pb2.WatchRevocationsResponse(revision=self.revision)
        setattr(message, self.subject, self.id)
        return message


class Announcer:
    """Publishes revocations. Without Redis, and while it is away, nothing is published and nobody waits for it."""

    def __init__(self, cache: Cache | None) -> None:
        self._cache = cache

    async def announce(self, revocation: Revocation) -> None:
        """Publish a revocation that is committed; a failure is logged and nothing else."""
        if self._cache is None:
            return
        try:
            await revocations.publish(self._cache, revocation.to_proto())
        except PlatformError as error:
            logger.warning(
                "a revocation was not announced: %s",
                error.reason.value,
                extra={"subject": revocation.subject, "subject_id": revocation.id},
            )


@asynccontextmanager
async def announcer(redis_url: str, clock: Clock) -> AsyncIterator[Announcer]:
    """An announcer over the Redis at `redis_url`, which may be empty; its connections end with the block."""
    if not redis_url:
        yield Announcer(None)
        return
    cache = Cache(redis_url, clock)
    try:
        yield Announcer(cache)
    finally:
        await cache.close()
