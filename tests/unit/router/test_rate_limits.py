"""Rate limits while Redis is away, and what they tell clients: the arithmetic, plans, headers and errors."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.auth import ModelRateLimits, Principal, RateLimits
from mesh.errors import PlatformError, Reason, response_headers, to_openai
from mesh.scripts import Scripts
from router.rate_limits import RATE_LIMITS, Defaults, Permit, RateLimiter, _duration
from tests.doubles.clock import ManualClock

NONE_SET = RateLimits()
PLATFORM = Defaults()


def principal(
    organization: RateLimits = NONE_SET, key: RateLimits = NONE_SET, *, name: str = "key_1", org: str = "org_1"
) -> Principal:
    return Principal("api_key", name, org, api_key_id=name, organization_limits=organization, principal_limits=key)


def limiter(clock: ManualClock, defaults: Defaults = PLATFORM, *, routers: int = 1) -> RateLimiter:
    """A limiter that has never seen Redis."""
    alone = RateLimiter(Scripts("redis://127.0.0.1:1", clock, RATE_LIMITS), clock, "router", defaults)
    alone._routers = routers
    return alone


async def refusal(limits: RateLimiter, who: Principal, tokens: int = 1, model: str = "m") -> PlatformError:
    with pytest.raises(PlatformError) as error:
        await limits.admit(who, model, tokens)
    assert error.value.reason is Reason.RATE_LIMIT_EXCEEDED
    return error.value


async def admitted(limits: RateLimiter, who: Principal, tokens: int = 1, model: str = "m", *, of: int) -> list[Permit]:
    """The permits that `of` tries get."""
    permits = []
    for _ in range(of):
        with suppress(PlatformError):
            permits.append(await limits.admit(who, model, tokens))
    return permits


async def test_a_burst_is_admitted_at_once_and_then_the_rate() -> None:
    clock = ManualClock()
    limits, who = limiter(clock), principal(RateLimits(requests_per_second=10, burst_requests=5))
    assert len(await admitted(limits, who, of=8)) == 5
    clock.advance(0.1)
    assert len(await admitted(limits, who, of=8)) == 1
    clock.advance(60)
    assert len(await admitted(limits, who, of=8)) == 5


async def test_fractions_are_kept() -> None:
    """101 requests per second offered to a limit of 100 pass at 100, not at 50."""
    clock = ManualClock()
    defaults = Defaults(concurrent_requests=10_000)
    limits, who = limiter(clock, defaults), principal(RateLimits(requests_per_second=100, burst_requests=2))
    passed = 0
    for _ in range(1010):
        passed += len(await admitted(limits, who, of=1))
        clock.advance(1 / 101)
    assert passed == pytest.approx(1000, abs=10)


async def test_retry_after_is_when_it_is_really_admitted() -> None:
    clock = ManualClock()
    limits, who = limiter(clock), principal(RateLimits(requests_per_second=0.3, burst_requests=2))
    await admitted(limits, who, of=2)
    clock.advance(1)
    error = await refusal(limits, who)
    assert error.retry_after_s is not None
    clock.advance(error.retry_after_s - 0.01)
    await refusal(limits, who)
    clock.advance(0.01)
    assert await limits.admit(who, "m", 1)


async def test_the_limit_that_refuses_longest_is_named() -> None:
    clock = ManualClock()
    who = principal(
        RateLimits(requests_per_second=1, burst_requests=1), RateLimits(tokens_per_minute=600, concurrent_requests=1)
    )
    limits = limiter(clock)
    await limits.admit(who, "m", 600)
    error = await refusal(limits, who, 300)
    assert (error.details["limit"], error.retry_after_s) == ("tokens", 30.0)
    assert error.message == (
        "Rate limit reached for m in API key key_1 on tokens per minute: Limit 600. Please try again in 30s."
    )
    clock.advance(29.9)
    assert (await refusal(limits, who, 300)).details["limit"] == "tokens"
    clock.advance(0.1)
    error = await refusal(limits, who, 300)
    assert (error.details["limit"], error.retry_after_s) == ("concurrency", None)
    assert to_openai(error)["error"]["message"].endswith("Please try again when a running request has ended.")


async def test_a_refusal_takes_nothing_from_any_scope() -> None:
    clock = ManualClock()
    limits = limiter(clock)
    small, other = principal(key=RateLimits(tokens_per_minute=10)), principal(name="key_2")
    await limits.admit(small, "m", 10)
    for _ in range(500):
        await refusal(limits, small, 10)
    permit = await limits.admit(other, "m", 10)
    assert dict(permit.headers)["x-ratelimit-remaining-requests"] == "198"


async def test_an_organizations_keys_share_its_limits_and_no_others() -> None:
    limits = limiter(ManualClock())
    organization = RateLimits(requests_per_second=1, burst_requests=3)
    keys = [principal(organization, name=name) for name in ("key_1", "key_2")]
    assert [len(await admitted(limits, key, of=2)) for key in keys] == [2, 1]
    assert len(await admitted(limits, principal(organization, org="org_2"), of=4)) == 3


async def test_limits_of_a_model_bind_that_model_only_and_come_on_top() -> None:
    limits = limiter(ManualClock())
    narrow = ModelRateLimits("large", requests_per_second=1, concurrent_requests=1)
    who = principal(RateLimits(burst_requests=4, requests_per_second=1, models=(narrow,)))
    assert len(await admitted(limits, who, model="large", of=3)) == 1
    assert len(await admitted(limits, who, model="small", of=9)) == 3


async def test_absent_limits_are_the_defaults() -> None:
    limits = limiter(ManualClock(), Defaults(10, 20, concurrent_requests=30, tokens_per_minute=1000))
    assert len(await admitted(limits, principal(), of=50)) == 20
    limits = limiter(ManualClock(), Defaults(10, 20, concurrent_requests=7))
    assert len(await admitted(limits, principal(), of=50)) == 7
    limits = limiter(ManualClock(), Defaults(tokens_per_minute=1000))
    assert len(await admitted(limits, principal(), 100, of=50)) == 10
    assert len(await admitted(limits, principal(RateLimits(tokens_per_minute=300)), 100, of=50)) == 0


async def test_a_slow_rate_has_a_burst_in_proportion() -> None:
    limits = limiter(ManualClock(), Defaults(100, 200))
    assert len(await admitted(limits, principal(RateLimits(requests_per_second=3)), of=50)) == 6
    assert len(await admitted(limits, principal(RateLimits(requests_per_second=0.1), org="org_2"), of=50)) == 1


async def test_settling_corrects_tokens_and_frees_slots_once() -> None:
    limits = limiter(ManualClock())
    who = principal(RateLimits(tokens_per_minute=1000, concurrent_requests=2))
    first, _ = await admitted(limits, who, 500, of=3)
    assert (await refusal(limits, who, 100)).details["limit"] == "tokens"
    first.settle(100)
    first.settle(0)
    first.settle(0)
    assert len(await admitted(limits, who, 100, of=3)) == 1
    assert (await refusal(limits, who, 100)).details["limit"] == "concurrency"


async def test_tokens_beyond_the_reservation_are_charged() -> None:
    clock = ManualClock()
    limits, who = limiter(clock), principal(RateLimits(tokens_per_minute=600))
    (await limits.admit(who, "m", 100)).settle(1200)
    error = await refusal(limits, who, 300)
    assert error.retry_after_s == 90.0


async def test_a_request_that_no_wait_would_admit_is_told_so() -> None:
    limits = limiter(ManualClock())
    who = principal(RateLimits(tokens_per_minute=600), RateLimits(models=(ModelRateLimits("m", tokens_per_minute=99),)))
    error = await refusal(limits, who, 100)
    assert error.message == (
        "Request too large for m in API key key_1 on tokens per minute: Limit 99, Requested 100. "
        "The input or output tokens must be reduced in order to run successfully."
    )
    assert response_headers(error) == {"x-should-retry": "false", "x-ratelimit-limit-tokens": "99"}
    assert await limits.admit(who, "other", 100)


async def test_headers_are_those_of_the_tightest_scope() -> None:
    limits = limiter(ManualClock())
    who = principal(
        RateLimits(requests_per_second=10, burst_requests=20, tokens_per_minute=600), RateLimits(tokens_per_minute=6000)
    )
    permit = await limits.admit(who, "m", 60)
    expected = {
        "x-ratelimit-limit-requests": "20",
        "x-ratelimit-remaining-requests": "19",
        "x-ratelimit-reset-requests": "100ms",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "540",
        "x-ratelimit-reset-tokens": "6s",
    }
    assert dict(permit.headers) == expected
    error = await refusal(limits, who, 600)
    assert response_headers(error) == expected | {
        "x-ratelimit-remaining-requests": "19",
        "Retry-After": "6",
    }


async def test_headers_name_tokens_only_where_they_are_limited() -> None:
    permit = await limiter(ManualClock()).admit(principal(), "m", 1)
    assert not [name for name, _ in permit.headers if "tokens" in name]


@pytest.mark.parametrize(
    ("millis", "text"),
    [
        (0, "0s"),
        (20, "20ms"),
        (1000, "1s"),
        (8640, "8.64s"),
        (60_000, "1m0s"),
        (90_005, "1m30.005s"),
        (360_000, "6m0s"),
        (86_400_000, "24h0m0s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(millis: int, text: str) -> None:
    assert _duration(millis) == text


async def test_alone_a_router_has_its_share_and_no_more() -> None:
    organization = RateLimits(requests_per_second=9, burst_requests=30, tokens_per_minute=600, concurrent_requests=60)
    shares = [limiter(ManualClock(), routers=3) for _ in range(3)]
    who = principal(organization)
    assert [len(await admitted(share, who, of=50)) for share in shares] == [10, 10, 10]
    organization = RateLimits(concurrent_requests=7)
    assert len(await admitted(limiter(ManualClock(), routers=3), principal(organization), of=50)) == 2
    organization = RateLimits(concurrent_requests=2)
    assert len(await admitted(limiter(ManualClock(), routers=3), principal(organization), of=50)) == 1


async def test_a_share_admits_what_the_whole_limit_allows_and_lets_it_pay_later() -> None:
    clock = ManualClock()
    limits, who = limiter(clock, routers=4), principal(RateLimits(tokens_per_minute=600))
    await limits.admit(who, "m", 600)
    error = await refusal(limits, who, 600)
    assert error.retry_after_s == 240.0
    clock.advance(240)
    assert await limits.admit(who, "m", 600)


async def test_new_limits_of_a_principal_hold_from_its_next_request() -> None:
    limits = limiter(ManualClock())
    assert len(await admitted(limits, principal(RateLimits(requests_per_second=1, burst_requests=2)), of=9)) == 2
    assert len(await admitted(limits, principal(RateLimits(requests_per_second=1, burst_requests=5)), of=9)) == 3


async def test_what_is_remembered_of_principals_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.rate_limits._PLANS", 10)
    limits = limiter(ManualClock())
    for number in range(100):
        (await limits.admit(principal(name=f"key_{number}", org=f"org_{number}"), "m", 1)).settle(1)
    assert len(limits._plans) == 10
    assert len(limits._in_use) == 20


async def test_a_cancelled_admission_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis has not answered yet when the client goes away."""
    told: list[tuple[bytes, ...]] = []
    limits = limiter(ManualClock())

    def run(*call: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    def tell(*call: Any) -> None:
        told.append(call[1:])

    monkeypatch.setattr(limits._scripts, "run", run)
    monkeypatch.setattr(limits._scripts, "tell", tell)
    task = asyncio.create_task(limits.admit(principal(), "m", 70))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == [(b"router:1", b"-70")]


async def test_settling_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = limiter(ManualClock())
    permit = await limits.admit(principal(), "m", 70)

    def tell(*call: Any) -> None:
        raise RuntimeError("Event loop is closed")

    monkeypatch.setattr(limits._scripts, "tell", tell)
    permit.settle(1)


_steps = st.lists(
    st.tuples(st.floats(0, 30), st.integers(1, 400), st.booleans(), st.integers(0, 400)), min_size=1, max_size=60
)


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(0.05, 50), burst=st.integers(1, 20), per_minute=st.integers(400, 4000), slots=st.integers(1, 8),
    steps=_steps,
)  # fmt: skip
async def test_no_window_admits_more_than_the_definition(
    rate: float, burst: int, per_minute: int, slots: int, steps: list[tuple[float, int, bool, int]]
) -> None:
    """In any time t: at most burst + rate * t requests, per_minute * (1 + t / 60) tokens, and `slots` at once."""
    clock = ManualClock()
    limits = limiter(clock)
    who = principal(RateLimits(rate, burst, per_minute, slots))
    history: list[tuple[float, int]] = []
    running: list[Permit] = []
    for pause_s, tokens, ends, used in steps:
        clock.advance(pause_s)
        if ends and running:
            running.pop().settle(max(used, 400))  # nothing is given back, so that the sums are those of admission
        try:
            running.append(await limits.admit(who, "m", tokens))
            history.append((clock.monotonic(), tokens))
        except PlatformError:
            pass
        assert len(running) <= slots
    for start, (begin, _) in enumerate(history):
        total = 0
        for count, (moment, tokens) in enumerate(history[start:], 1):
            total += tokens
            assert count <= burst + rate * (moment - begin) + 1e-3
            assert total <= per_minute * (1 + (moment - begin) / 60) + 1e-3
