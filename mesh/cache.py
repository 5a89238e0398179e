"""Redis with a short timeout and a breaker, so that its absence costs little; it never holds the only copy."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from mesh.clock import Clock
from mesh.errors import PlatformError, Reason

T = TypeVar("T")

_TIMEOUT_S = 0.05
_SUBSCRIBE_TIMEOUT_S = 1.0
_FAILURES = 3
_OPEN_S = 1.0


class Cache:
    """One Redis. Calls raise PlatformError(UNAVAILABLE) while it is away; after three failures in a row they do so at
    once, and one call a second tries again."""

    def __init__(self, url: str, clock: Clock, *, timeout_s: float = _TIMEOUT_S) -> None:
        self._redis = Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=None)
        # A subscriber waits for messages, not for answers.
        self._listener = Redis.from_url(
            url,
            socket_connect_timeout=_SUBSCRIBE_TIMEOUT_S,
            socket_keepalive=True,
            health_check_interval=10,
            retry=None,
        )
        self._clock = clock
        self._failures = 0
        self._closed_at = float("-inf")

    async def call(self, command: Callable[["Redis"], Awaitable[T]]) -> T:
        """The answer to one command, for example `cache.call(lambda redis: redis.get(name))`."""
        now = self._clock.monotonic()
        if self._failures >= _FAILURES:
            if now < self._closed_at:
                raise PlatformError(Reason.UNAVAILABLE)
            self._closed_at = now + _OPEN_S
        try:
            answer = await command(self._redis)
        except (RedisConnectionError, RedisTimeoutError, OSError, TimeoutError) as error:
            self._failures += 1
            self._closed_at = now + _OPEN_S
            raise PlatformError(Reason.UNAVAILABLE) from error
        self._failures = 0
        return answer

    async def publish(self, channel: str, message: bytes) -> None:
        """Tell whoever listens now."""
        await self.call(lambda redis: redis.publish(channel, message))

    @asynccontextmanager
    async def subscribed(self, channel: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """The messages of a channel: all that are published within the block, as long as Redis is there.

        Raises PlatformError(UNAVAILABLE), also out of the messages, when Redis is or goes away or refuses.
        """
        subscription = self._listener.pubsub()
        try:
            try:
                await subscription.subscribe(channel)
                if await subscription.get_message(timeout=_SUBSCRIBE_TIMEOUT_S) is None:
                    raise PlatformError(Reason.UNAVAILABLE)
            except (RedisError, OSError) as error:
                raise PlatformError(Reason.UNAVAILABLE) from error
            yield _messages(subscription)
        finally:
            await subscription.aclose()  # type: ignore[no-untyped-call]

    async def check(self) -> None:
        """Returns if Redis answers."""
        await self.call(lambda redis: redis.ping())

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()
        await self._listener.aclose()


async def _messages(subscription: PubSub) -> AsyncIterator[bytes]:
    try:
        while True:
            message: dict[str, Any] | None = await subscription.get_message(timeout=None)
            if message is not None and message["type"] == "message":
                yield message["data"]
    except (RedisError, OSError) as error:
        raise PlatformError(Reason.UNAVAILABLE) from error
