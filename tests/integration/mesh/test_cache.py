"""Redis through the mesh: quick to give up, quick to come back."""

import asyncio
import os
import signal

import pytest

from mesh.cache import Cache
from mesh.errors import PlatformError, Reason
from tests.conftest import Servers
from tests.doubles.clock import ManualClock


async def test_commands_are_answered(redis_url: str) -> None:
    cache = Cache(redis_url, ManualClock())
    await cache.call(lambda redis: redis.set("name", b"value"))
    assert await cache.call(lambda redis: redis.get("name")) == b"value"
    await cache.check()
    await cache.close()


async def test_breaker_opens_after_three_failures_and_tries_once_a_second(redis_url: str) -> None:
    clock = ManualClock()
    cache = Cache("redis://127.0.0.1:1/", clock)
    tried = 0

    async def ping(redis: object) -> None:
        nonlocal tried
        tried += 1
        raise ConnectionRefusedError

    async def fail() -> None:
        with pytest.raises(PlatformError) as error:
            await cache.call(ping)
        assert error.value.reason is Reason.UNAVAILABLE

    for _ in range(10):
        await fail()
    assert tried == 3
    clock.advance(1.1)
    await fail()
    await fail()
    assert tried == 4
    await cache.close()


async def test_stopped_server_costs_no_more_than_the_timeout_and_is_found_again(
    servers: Servers, redis_url: str
) -> None:
    clock = ManualClock()
    cache = Cache(redis_url, clock)
    await cache.check()
    pid = servers.pid(servers.valkey)
    os.killpg(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(1):
            with pytest.raises(PlatformError):
                await cache.check()
    finally:
        os.killpg(pid, signal.SIGCONT)
    async with asyncio.timeout(5):
        while True:
            clock.advance(1.1)
            try:
                await cache.check()
                break
            except PlatformError:
                await asyncio.sleep(0.02)
    await cache.close()


async def test_subscriber_hears_what_is_published_and_of_the_end(servers: Servers, redis_url: str) -> None:
    cache = Cache(redis_url, ManualClock())
    async with cache.subscribed("channel") as messages:
        await cache.publish("channel", b"one")
        assert await anext(messages) == b"one"
        os.killpg(servers.pid(servers.valkey), signal.SIGKILL)
        with pytest.raises(PlatformError) as error:
            await asyncio.wait_for(anext(messages), 5)
    assert error.value.reason is Reason.UNAVAILABLE
    await cache.close()
