"""Rate limits on a real Valkey: exact over several routers, the same in Lua as in Python, and nobody's failure."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from mesh.auth import ModelRateLimits, Principal, RateLimits
from mesh.clock import SystemClock
from mesh.errors import PlatformError, Reason
from mesh.scripts import Script, Scripts
from router import rate_limits
from router.rate_limits import RATE_LIMITS, ROUTERS, Defaults, Permit, RateLimiter
from tests.conftest import Servers
from tests.doubles.clock import ManualClock
from tests.doubles.tcp_gate import TcpGate

# A burst that no test uses up by accident, and a rate so slow that nothing comes back while a test runs.
SLOW = 1e-4
WIDE = RateLimits(requests_per_second=1000, burst_requests=100_000, concurrent_requests=100_000)


def principal(organization: RateLimits = WIDE, key: RateLimits = WIDE, *, name: str = "key_1") -> Principal:
    return Principal("api_key", name, "org_1", api_key_id=name, organization_limits=organization, principal_limits=key)


@asynccontextmanager
async def router(url: str, name: str, *, round_s: float = 0.05) -> AsyncIterator[RateLimiter]:
    """A router's limiter and its connection. What it has admitted stays as it is when it ends, as if it was killed."""
    scripts = Scripts(url, SystemClock(), RATE_LIMITS, ROUTERS, timeout_s=1.0)
    limiter = RateLimiter(scripts, SystemClock(), name, Defaults(), round_s=round_s)
    # As a router ends them: in this order, so that the limiter can still say goodbye.
    tasks = [asyncio.create_task(limiter.run()), asyncio.create_task(scripts.run_connection())]
    try:
        yield limiter
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def routers(url: str, count: int = 2, *, round_s: float = 0.05) -> AsyncIterator[list[RateLimiter]]:
    """So many routers that know of each other."""
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(router(url, f"router_{at}", round_s=round_s)) for at in range(count)]
        await until(lambda: all(limiter._scripts.connections and limiter._routers == count for limiter in found))
        yield found


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def admitted(limiters: Sequence[RateLimiter], who: Principal, tokens: int = 1, *, of: int) -> list[Permit]:
    """The permits of `of` concurrent tries, spread over the routers."""
    tries = (limiters[at % len(limiters)].admit(who, "m", tokens) for at in range(of))
    outcomes = await asyncio.gather(*tries, return_exceptions=True)
    refused = [outcome for outcome in outcomes if not isinstance(outcome, Permit)]
    assert all(isinstance(error, PlatformError) and error.reason is Reason.RATE_LIMIT_EXCEEDED for error in refused)
    return [outcome for outcome in outcomes if isinstance(outcome, Permit)]


def sources(limiter: RateLimiter) -> Counter[bool]:
    """How many of the running requests were judged by the router alone."""
    return Counter(permit._local for permit in limiter._running)


async def refused_by(limiter: RateLimiter, who: Principal, tokens: int = 1) -> str:
    with pytest.raises(PlatformError) as error:
        await limiter.admit(who, "m", tokens)
    return error.value.details["limit"]


@pytest.mark.parametrize(
    "limits",
    [
        RateLimits(requests_per_second=SLOW, burst_requests=37),
        RateLimits(tokens_per_minute=379, burst_requests=1000, concurrent_requests=1000),
        RateLimits(concurrent_requests=37, burst_requests=1000),
    ],
)
async def test_limits_hold_exactly_over_concurrent_routers(redis_url: str, limits: RateLimits) -> None:
    async with routers(redis_url) as limiters:
        assert len(await admitted(limiters, principal(organization=limits), 10, of=300)) == 37
        assert all(sources(limiter)[True] == 0 for limiter in limiters)


async def test_each_key_has_its_limits_within_those_of_its_organization(redis_url: str) -> None:
    organization = RateLimits(requests_per_second=SLOW, burst_requests=50)
    keys = [principal(organization, RateLimits(concurrent_requests=20), name=f"key_{at}") for at in range(3)]
    async with routers(redis_url) as limiters:
        assert [len(await admitted(limiters, key, of=40)) for key in keys] == [20, 20, 10]


async def test_a_refusal_takes_nothing_anywhere(redis_url: str) -> None:
    narrow = (ModelRateLimits("m", tokens_per_minute=50),)
    who = principal(RateLimits(tokens_per_minute=1000), RateLimits(models=narrow))
    async with routers(redis_url, 1) as (limiter,), Redis.from_url(redis_url) as redis:
        permit = await limiter.admit(who, "m", 50)
        before = {key: await redis.dump(key) for key in await redis.keys("limits:{*")}
        for _ in range(20):
            assert await refused_by(limiter, who, 50) == "tokens"
        assert {key: await redis.dump(key) for key in await redis.keys("limits:{*")} == before
        permit.settle(50)
        await until(lambda: not limiter._running)
        assert len(await admitted([limiter], principal(RateLimits(tokens_per_minute=1000)), 50, of=30)) == 19


async def test_settlement_corrects_every_scope_once(redis_url: str) -> None:
    who = principal(RateLimits(tokens_per_minute=100), RateLimits(tokens_per_minute=100, concurrent_requests=1))
    async with routers(redis_url) as limiters:
        permit = await limiters[0].admit(who, "m", 100)
        assert await refused_by(limiters[1], who, 60) == "tokens"
        for _ in range(3):
            permit.settle(40)
        # It is behind the settlement on the same connection.
        assert await refused_by(limiters[0], who, 70) == "tokens"
        (last,) = await admitted(limiters, who, 60, of=2)
        last.settle(60)


async def test_a_cancelled_admission_gives_back_what_it_took(redis_url: str) -> None:
    who = principal(RateLimits(tokens_per_minute=100, concurrent_requests=1))
    async with routers(redis_url, 1) as (limiter,):
        task = asyncio.create_task(limiter.admit(who, "m", 100))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert await limiter.admit(who, "m", 99)


async def test_slots_of_a_killed_router_are_free_after_its_lease_and_no_others(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_limits, "_LEASE_S", 0.5)
    who = principal(RateLimits(concurrent_requests=3))
    async with router(redis_url, "survivor") as survivor:
        async with router(redis_url, "killed") as killed:
            await until(lambda: killed._routers == survivor._routers == 2)
            await survivor.admit(who, "m", 1)
            assert len(await admitted([killed], who, of=5)) == 2
            assert await refused_by(survivor, who) == "concurrency"
        async with asyncio.timeout(0.5 + 10):
            while not await admitted([survivor], who, of=1):
                await asyncio.sleep(0.02)
        assert len(await admitted([survivor], who, of=5)) == 1


async def test_long_streams_keep_their_slots(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limits, "_LEASE_S", 0.6)
    who = principal(RateLimits(concurrent_requests=3))
    async with routers(redis_url) as limiters, Redis.from_url(redis_url) as redis:
        permits = await admitted(limiters, who, of=3)
        assert len(permits) == 3
        loop = asyncio.get_running_loop()
        end = loop.time() + 1.5
        while loop.time() < end:
            assert await refused_by(limiters[0], who) == "concurrency"
            await asyncio.sleep(0.02)
        for permit in permits:
            permit.settle(1)
        await until(lambda: not any(limiter._running for limiter in limiters))
        async with asyncio.timeout(5):
            while await redis.keys("*leases"):
                await asyncio.sleep(0.01)


async def test_a_clients_own_request_id_cannot_share_a_slot(redis_url: str) -> None:
    async with routers(redis_url) as limiters:
        permits = await admitted(limiters, principal(), of=50)
        assert len({permit.name for permit in permits}) == 50


async def test_every_key_has_an_end_and_its_organizations_tag(redis_url: str) -> None:
    who = principal(RateLimits(tokens_per_minute=600, models=(ModelRateLimits("m", tokens_per_minute=600),)))
    async with routers(redis_url) as limiters, Redis.from_url(redis_url) as redis:
        await admitted(limiters, who, 100, of=4)
        keys = {key: await redis.pttl(key) for key in await redis.keys("*")}
    assert all(0 < left_ms < 3_600_001 for left_ms in keys.values())
    assert {key for key in keys if b"{org_1}" not in key} == {b"limits:routers"}
    assert len(keys) == 1 + 3 + 2  # the routers, a state for each scope, leases for each but the model's


async def test_a_flush_and_a_lost_script_fail_nobody_and_running_requests_are_counted_again(redis_url: str) -> None:
    who = principal(RateLimits(concurrent_requests=4))
    async with routers(redis_url) as limiters, Redis.from_url(redis_url) as redis:
        assert len(await admitted(limiters, who, of=3)) == 3
        await redis.flushall()
        await redis.script_flush()
        async with asyncio.timeout(10):
            while await redis.zcard("limits:{org_1}:organization:leases") < 3:
                await asyncio.sleep(0.01)
        assert len(await admitted(limiters, who, of=3)) == 1


async def test_two_routers_share_a_limit_when_redis_is_away_and_rejoin(redis_url: str) -> None:
    address = urlsplit(redis_url)
    who = principal(RateLimits(requests_per_second=SLOW, burst_requests=40))
    async with TcpGate(str(address.hostname), int(address.port or 0)) as gate:
        url = address._replace(netloc=f":{address.password}@127.0.0.1:{gate.port}").geturl()
        async with routers(url) as limiters:
            await gate.shut()
            assert [len(await admitted([limiter], who, of=100)) for limiter in limiters] == [20, 20]
            assert all(sources(limiter) == {True: 20} for limiter in limiters)
            await gate.open()
            # By themselves: Redis judges again, knows the running requests again, and nobody was failed.
            await until(lambda: all(limiter._scripts._link is not None for limiter in limiters))
            async with Redis.from_url(redis_url) as redis, asyncio.timeout(10):
                while await redis.zcard("limits:{org_1}:organization:leases") < 40:
                    await asyncio.sleep(0.01)
            (permit,) = await admitted([limiters[0]], principal(), of=1)
            assert not permit._local


async def test_redis_that_is_absent_at_the_start_is_used_as_soon_as_it_is_there(redis_url: str) -> None:
    address = urlsplit(redis_url)
    who = principal(RateLimits(requests_per_second=SLOW, burst_requests=40))
    gate = TcpGate(str(address.hostname), int(address.port or 0))
    await gate.open()
    await gate.shut()
    url = address._replace(netloc=f":{address.password}@127.0.0.1:{gate.port}").geturl()
    async with router(url, "router_0") as limiter:
        assert len(await admitted([limiter], who, of=100)) == 40
        assert sources(limiter) == {True: 40}
        async with gate, router(redis_url, "router_1"):
            await until(lambda: limiter._routers == 2)
            (permit,) = await admitted([limiter], principal(), of=1)
            assert not permit._local


async def test_a_stopped_redis_fails_nobody(servers: Servers, redis_url: str) -> None:
    async with routers(redis_url, 1) as (limiter,):
        limiter._scripts._timeout_s = 0.05
        pid = servers.pid(servers.valkey)
        os.killpg(pid, signal.SIGSTOP)
        try:
            permits = await admitted([limiter], principal(), 5, of=50)
            assert len(permits) == 50
            assert sources(limiter) == {True: 50}
            for permit in permits:
                permit.settle(5)
        finally:
            os.killpg(pid, signal.SIGCONT)
        await until(lambda: limiter._scripts._link is not None)
        async with asyncio.timeout(10):
            while (await limiter.admit(principal(), "m", 1))._local:
                await asyncio.sleep(0.01)


async def test_a_killed_redis_fails_nobody_and_limits_return_with_it(servers: Servers, redis_url: str) -> None:
    who = principal(RateLimits(concurrent_requests=10))
    async with routers(redis_url) as limiters:
        permits = await admitted(limiters, who, of=6)
        os.killpg(servers.pid(servers.valkey), signal.SIGKILL)
        await until(lambda: all(limiter._scripts._link is None for limiter in limiters))
        # Each has 3 of its share of 5.
        assert len(await admitted(limiters, who, of=50)) == 4
        await until(lambda: all(limiter._scripts._link is not None for limiter in limiters), 60)
        async with Redis.from_url(redis_url) as redis, asyncio.timeout(20):
            while await redis.zcard("limits:{org_1}:organization:leases") < 10:
                await asyncio.sleep(0.02)
        assert await admitted(limiters, who, of=5) == []
        permits[0].settle(1)
        assert len(await admitted(limiters[:1], who, of=5)) == 1


async def test_a_router_that_leaves_is_not_counted_any_more(redis_url: str) -> None:
    async with router(redis_url, "router_0", round_s=0.05) as stays:
        # One with such long rounds would be counted for 90 seconds if it was killed.
        async with router(redis_url, "router_1", round_s=30):
            await until(lambda: stays._routers == 2)
        await until(lambda: stays._routers == 1)


async def test_what_redis_has_forgotten_is_not_given_back(redis_url: str) -> None:
    who = principal(RateLimits(tokens_per_minute=100))
    async with routers(redis_url, 1, round_s=60) as (limiter,), Redis.from_url(redis_url) as redis:
        forgotten = await limiter.admit(who, "m", 100)
        await redis.flushall()
        await limiter.admit(who, "m", 100)
        forgotten.settle(0)
        assert await refused_by(limiter, who, 50) == "tokens"


async def test_a_request_that_ends_while_others_are_renewed_stays_ended(redis_url: str) -> None:
    async with routers(redis_url, 1, round_s=60) as (limiter,), Redis.from_url(redis_url) as redis:
        permits = [await limiter.admit(principal(name=f"key_{at}"), "m", 1) for at in range(200)]
        renewal = asyncio.create_task(limiter._renew(young=True))
        await asyncio.sleep(0)
        for permit in permits:
            permit.settle(1)
        assert not renewal.done()
        await renewal
        await limiter.admit(principal(name="last"), "m", 1)  # behind all of them on the same connection
        assert await redis.zcard("limits:{org_1}:organization:leases") == 1


# The script with a clock that the test moves, so that the same history can be judged by Lua and by Python.
MOVED = Script(
    "local now = tonumber(table.remove(ARGV)); local real = redis; local redis = setmetatable({call = function(...)"
    " if ... == 'TIME' then return {math.floor(now / 1000000), now % 1000000} end return real.call(...) end},"
    " {__index = real})\n" + resources.files("router").joinpath("rate_limits.lua").read_text()
)

_limits = st.builds(
    RateLimits,
    requests_per_second=st.floats(0.01, 200),
    burst_requests=st.integers(1, 12),
    tokens_per_minute=st.integers(500, 5000) | st.none(),
    concurrent_requests=st.integers(1, 6),
    models=st.just(())
    | st.tuples(
        st.builds(
            ModelRateLimits,
            st.just("m"),
            st.floats(0.01, 200) | st.none(),
            st.integers(500, 2000) | st.none(),
            st.integers(1, 4) | st.none(),
        )
    ),
)
_steps = st.lists(
    st.tuples(
        # 64ths of a second until then: whole microseconds, and exact. A server's clock may be set back.
        st.integers(0, 20 * 64) | st.integers(0, 3) | st.integers(-1000, -1),
        st.sampled_from(["admit", "admit", "settle"]),
        st.integers(0, 500),
    ),
    min_size=5,
    max_size=60,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(organization=_limits, key=_limits, steps=_steps)
async def test_lua_and_python_judge_alike(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, organization: RateLimits, key: RateLimits, steps: Any
) -> None:
    async with Redis.from_url(redis_url) as redis:
        await redis.flushall()
    monkeypatch.setattr(rate_limits, "_LEASE_S", 1e6)
    clock = ManualClock()
    scripts = Scripts(redis_url, SystemClock(), MOVED, timeout_s=1.0)
    connection = asyncio.create_task(scripts.run_connection())
    alone = RateLimiter(Scripts("redis://127.0.0.1:1", clock, RATE_LIMITS), clock, "router", Defaults())
    who = principal(organization, key)
    running: list[tuple[Permit, bytes, int]] = []
    await scripts.connected()
    plan = alone._make_plan(who, "m")

    async def ask(operation: bytes, name: bytes, tokens: int) -> Any:
        moment = b"%d" % (clock.monotonic() * 1e6)
        call = MOVED.call(plan.keys, [operation, *plan.arguments, name, b"%d" % tokens, moment])
        return await scripts.run(call)

    for step, (pause, what, tokens) in enumerate(steps):
        clock.advance(pause / 64)
        if what == "settle":
            if running:
                permit, name, reserved = running.pop(0)
                permit.settle(tokens)
                await ask(b"settle", name, tokens - reserved)
            continue
        name = b"%d" % step
        in_lua = await ask(b"admit", name, tokens)
        in_python = rate_limits._judge(plan, tokens, clock.monotonic() * 1e6, 1)
        assert in_lua == in_python
        if not in_lua[0]:
            for in_use in plan.in_use:
                in_use.running += 1
            permit = Permit(alone, plan, name, tokens, in_python, True, 0)
            running.append((permit, name, tokens))
    connection.cancel()
    with suppress(asyncio.CancelledError):
        await connection
