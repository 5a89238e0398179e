"""Idempotency keys on a real Valkey: one request of a key at a time, its answer once more and to the byte."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from redis.asyncio import Redis

from aiaas.type.v1.usage_event_pb2 import (
    ENDPOINT_CHAT_COMPLETIONS,
    ENDPOINT_COMPLETIONS,
    OUTCOME_SUCCEEDED,
    TokenUsage,
)
from mesh.auth import Principal
from mesh.clock import SystemClock
from mesh.errors import PlatformError, Reason, response_headers
from mesh.scripts import Scripts
from router import idempotency
from router.answers import Head, InferenceRequest, Tail
from router.idempotency import IDEMPOTENCY, Claim, Idempotency
from tests.doubles.scripted_backend import chunk, sse
from tests.doubles.tcp_gate import TcpGate

DAY_MS = 24 * 3600 * 1000
JSON, EVENTS = "application/json", "text/event-stream"
PROMPT = b'{"model": "m", "prompt": "a secret thought"}'
PRINCIPAL = Principal("api_key", "key_1", "org_1", api_key_id="key_1")
REQUEST = InferenceRequest(
    "req_first", ENDPOINT_CHAT_COMPLETIONS, PROMPT, PRINCIPAL, idempotency_key="the client's key"
)
TAIL = Tail(TokenUsage(prompt_tokens=3, completion_tokens=2), "stop", OUTCOME_SUCCEEDED)


class Parts:
    """A reader that keeps what it gets."""

    def __init__(self) -> None:
        self.heads: list[Head] = []
        self.pieces: list[bytes] = []
        self.tails: list[Tail] = []

    def head(self, head: Head) -> None:
        self.heads.append(head)

    def data(self, data: bytes) -> None:
        self.pieces.append(data)

    def tail(self, tail: Tail) -> None:
        self.tails.append(tail)


@asynccontextmanager
async def router(url: str, name: str = "router_1", *, round_s: float = 10) -> AsyncIterator[Idempotency]:
    """A router's keys and its connection. What it has claimed stays as it is when it ends, as if it was killed."""
    scripts = Scripts(url, SystemClock(), IDEMPOTENCY, timeout_s=1.0)
    keys = Idempotency(scripts, name, round_s=round_s)
    tasks = [asyncio.create_task(keys.run()), asyncio.create_task(scripts.run_connection())]
    try:
        async with asyncio.timeout(20):
            await scripts.connected()
        yield keys
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def keys(redis_url: str) -> AsyncIterator[Idempotency]:
    async with router(redis_url) as keys:
        yield keys


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as redis:
        yield redis


def another(**changes: Any) -> InferenceRequest:
    return msgspec.structs.replace(REQUEST, **changes)


async def claimed(keys: Idempotency, request: InferenceRequest = REQUEST) -> Claim:
    """The key, for a request that has to run."""
    claim = await keys.claim(request, "m", Parts())
    assert claim is not None
    return claim


async def replayed(keys: Idempotency, request: InferenceRequest = REQUEST) -> Parts:
    """What a repetition gets."""
    reader = Parts()
    assert await keys.claim(request, "m", reader) is None
    return reader


async def refused(keys: Idempotency, request: InferenceRequest = REQUEST) -> PlatformError:
    reader = Parts()
    with pytest.raises(PlatformError) as caught:
        await keys.claim(request, "m", reader)
    assert not reader.heads
    return caught.value


async def succeed(claim: Claim, *pieces: bytes, content_type: str = JSON) -> None:
    """Answer, as an inference does."""
    claim.head(Head(claim.request_id, content_type, "m", "backend_1", (("x-ratelimit-limit-requests", "7"),)))
    for piece in pieces or (b"{}",):
        claim.data(piece)
    claim.end(succeeded=True)
    await claim.kept()
    claim.tail(TAIL)


async def until(condition: Callable[[], Any], within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while not await condition():
            await asyncio.sleep(0.01)


async def key_of(redis: Redis) -> bytes:
    """The one entry of a key."""
    names: list[Any] = await redis.keys("*")
    (name,) = [name for name in names if not name.endswith(b":kept")]
    return bytes(name)


DOCUMENT = json.dumps({"content": "Grüße, " + "word " * 200_000}).encode()


@pytest.mark.parametrize(
    ("content_type", "pieces"),
    [(JSON, (b'{"n": 1.0,  "x": "\\u00f6"}',)), (JSON, (DOCUMENT,)), (EVENTS, tuple(sse(chunk("a"), chunk("ö"))))],
    ids=["document", "large document", "stream"],
)
async def test_repetition_gets_the_same_bytes_and_is_billed_nothing(
    keys: Idempotency, redis_url: str, content_type: str, pieces: tuple[bytes, ...]
) -> None:
    await succeed(await claimed(keys), *pieces, content_type=content_type)
    async with router(redis_url, "router_2") as other:
        for at in (keys, other, other):
            reader = await replayed(at, another(request_id="req_again"))
            assert b"".join(reader.pieces) == b"".join(pieces)
            assert max(map(len, reader.pieces)) <= 1 << 20
            headers = (("idempotency-replayed", "true"), ("original-request-id", "req_first"))
            assert reader.heads == [Head("req_again", content_type, "m", "", headers)]
            assert reader.tails == [Tail(TokenUsage(), "", OUTCOME_SUCCEEDED)]


async def test_of_many_at_once_on_two_routers_one_runs(keys: Idempotency, redis_url: str) -> None:
    async with router(redis_url, "router_2") as other:
        tries = ((keys, other)[at % 2].claim(REQUEST, "m", Parts()) for at in range(40))
        outcomes = await asyncio.gather(*tries, return_exceptions=True)
        (claim,) = [outcome for outcome in outcomes if isinstance(outcome, Claim)]
        # It may be the other one's, which can keep nothing any more when it is gone.
        await succeed(claim, b"{}")
    errors = [outcome for outcome in outcomes if isinstance(outcome, PlatformError)]
    assert {error.reason for error in errors} == {Reason.IDEMPOTENCY_KEY_IN_USE}
    assert len(errors) == 39
    assert response_headers(errors[0]) == {"Retry-After": "1"}
    assert (await replayed(keys)).pieces == [b"{}"]


@pytest.mark.parametrize("change", [{"body": PROMPT + b" "}, {"endpoint": ENDPOINT_COMPLETIONS}])
async def test_another_request_with_the_key_is_refused_while_the_first_runs_and_after_it(
    keys: Idempotency, change: dict[str, Any]
) -> None:
    claim = await claimed(keys)
    assert (await refused(keys, another(**change))).reason is Reason.IDEMPOTENCY_KEY_REUSED
    await succeed(claim)
    assert (await refused(keys, another(**change))).reason is Reason.IDEMPOTENCY_KEY_REUSED
    assert await replayed(keys)


async def test_the_same_key_of_another_organization_is_another_key(keys: Idempotency) -> None:
    await succeed(await claimed(keys), b'"ours"')
    theirs = another(principal=replace(PRINCIPAL, organization_id="org_2"))
    await succeed(await claimed(keys, theirs), b'"theirs"')
    assert (await replayed(keys, theirs)).pieces == [b'"theirs"']
    # Another API key of the organization is the same tenant.
    ours = another(principal=replace(PRINCIPAL, id="key_2", api_key_id="key_2"))
    assert (await replayed(keys, ours)).pieces == [b'"ours"']


async def test_request_without_success_gives_its_key_up_even_after_bytes(keys: Idempotency, redis: Redis) -> None:
    (await claimed(keys)).end(succeeded=False)
    claim = await claimed(keys, another(body=b'{"model": "n"}'))
    claim.head(Head("req_first", EVENTS, "m", "b"))
    claim.data(b"data: {}\n\n")
    claim.end(succeeded=False)
    # It is behind the release on the same connection.
    (await claimed(keys)).end(succeeded=False)
    await until(lambda: _is_empty(redis))


async def test_success_without_a_head_keeps_nothing(keys: Idempotency, redis: Redis) -> None:
    (await claimed(keys)).end(succeeded=True)
    await until(lambda: _is_empty(redis))


async def _is_empty(redis: Redis) -> bool:
    return not await redis.keys("*")


async def test_cancelled_claim_gives_the_key_up(keys: Idempotency) -> None:
    task = asyncio.create_task(keys.claim(REQUEST, "m", Parts()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert await claimed(keys)


async def test_claim_of_a_killed_router_ends_with_its_lease(redis_url: str, redis: Redis) -> None:
    async with router(redis_url, "survivor") as survivor:
        async with router(redis_url, "killed") as killed:
            await claimed(killed)
        assert (await refused(survivor)).reason is Reason.IDEMPOTENCY_KEY_IN_USE
        name = await key_of(redis)
        assert 20_000 < await redis.pttl(name) <= 30_000
        await redis.pexpireat(name, 1)
        await succeed(await claimed(survivor))
        assert await replayed(survivor)


async def test_request_that_outlived_its_claim_cannot_touch_the_next_ones(keys: Idempotency, redis: Redis) -> None:
    late, failing = await claimed(keys), None
    await redis.delete(await key_of(redis))
    failing = await claimed(keys)
    await redis.delete(await key_of(redis))
    current = await claimed(keys)
    failing.end(succeeded=False)
    await succeed(late, b'"late"')
    assert (await refused(keys)).reason is Reason.IDEMPOTENCY_KEY_IN_USE
    await succeed(current, b'"current"')
    await keys._renew(young=True)
    assert (await replayed(keys)).pieces == [b'"current"']


async def test_claims_of_long_requests_are_renewed_and_come_back_when_redis_has_lost_them(
    redis_url: str, redis: Redis
) -> None:
    async with router(redis_url, round_s=0.02) as keys:
        claim, ended = await claimed(keys), await claimed(keys, another(idempotency_key="ended"))
        ended.end(succeeded=False)
        name = await key_of(redis)

        async def is_renewed() -> bool:
            return await redis.pttl(name) > 20_000

        await redis.pexpire(name, 5_000)
        await until(is_renewed)
        await redis.delete(name)
        await until(is_renewed)
        assert (await refused(keys)).reason is Reason.IDEMPOTENCY_KEY_IN_USE
        assert (await refused(keys, another(body=b"{}"))).reason is Reason.IDEMPOTENCY_KEY_REUSED
        assert await key_of(redis) == name
        await succeed(claim)
        assert await replayed(keys)


async def test_claims_that_end_while_others_are_renewed_do_not_come_back(keys: Idempotency, redis: Redis) -> None:
    claims = [await claimed(keys, another(idempotency_key=f"{at}")) for at in range(idempotency._RENEWALS + 36)]
    renewing = asyncio.create_task(keys._renew(young=True))
    await asyncio.sleep(0)
    for claim in claims:
        claim.end(succeeded=False)
    await renewing
    # It is behind all of them on the same connection.
    (await claimed(keys)).end(succeeded=False)
    await until(lambda: _is_empty(redis), within_s=5)


async def test_what_is_kept_ends_after_a_day_is_compressed_and_names_neither_key_nor_prompt(
    keys: Idempotency, redis: Redis
) -> None:
    answer = b'{"content": "' + b"so much of the same " * 1000 + b'"}'
    await succeed(await claimed(keys), answer)
    name = await key_of(redis)
    assert DAY_MS - 60_000 < await redis.pttl(name) <= DAY_MS
    assert await redis.hkeys(name) == [b"digest", b"type", b"request", b"answer"]
    assert await redis.hstrlen(name, "answer") < len(answer) / 10
    names: list[Any] = await redis.keys("*")
    for name in names:
        assert name.startswith(b"idempotency:{org_1}:")
        assert 0 < await redis.pttl(name) <= DAY_MS + 3_600_000
        fields: dict[Any, Any] = await redis.hgetall(name)
        everything = name + b"".join(b"".join(field) for field in fields.items())
        assert b"secret thought" not in everything
        assert b"client's key" not in everything


@pytest.mark.parametrize("limit", ["_KEPT_BYTES", "_ANSWER_BYTES"])
async def test_repetition_of_an_answer_too_large_to_keep_is_refused_for_good(
    keys: Idempotency, redis: Redis, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(idempotency, limit, 10_000)
    await succeed(await claimed(keys), *(random.Random(at).randbytes(1000) for at in range(12)))
    error = await refused(keys)
    assert error.reason is Reason.IDEMPOTENCY_KEY_REUSED
    assert "too large to be kept" in error.message
    assert "Retry-After" not in response_headers(error)
    assert await redis.hget(await key_of(redis), "answer") is None
    assert (await refused(keys, another(body=b"{}"))).message == "This Idempotency-Key was used with another request."


async def test_an_organization_keeps_so_much_and_others_do_not_notice(
    keys: Idempotency, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "_ORGANIZATION_BYTES", 5_000)
    await succeed(await claimed(keys), random.Random(1).randbytes(5_000))
    new = another(idempotency_key="new")
    error = await refused(keys, new)
    assert (error.reason, error.details["limit"]) == (Reason.RATE_LIMIT_EXCEEDED, "idempotency")
    assert response_headers(error) == {"x-should-retry": "false"}
    assert await replayed(keys)
    await claimed(keys, another(principal=replace(PRINCIPAL, organization_id="org_2")))
    # What was kept more than a day ago has gone by itself.
    ledger = "idempotency:{org_1}:kept"
    ((hour, kept_bytes),) = (await redis.hgetall(ledger)).items()
    await redis.delete(ledger)
    await redis.hset(ledger, str(int(hour) - 25), kept_bytes)
    await claimed(keys, new)
    assert await redis.hgetall(ledger) == {}


async def test_requests_that_give_their_keys_up_use_nothing_up(
    keys: Idempotency, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "_ORGANIZATION_BYTES", 1)
    for _ in range(20):
        (await claimed(keys)).end(succeeded=False)
    await succeed(await claimed(keys))
    assert (await refused(keys, another(idempotency_key="new"))).reason is Reason.RATE_LIMIT_EXCEEDED


async def test_redis_going_away_refuses_new_keys_and_fails_nobody_who_runs(redis_url: str) -> None:
    address = urlsplit(redis_url)
    assert address.hostname
    assert address.port
    async with TcpGate(address.hostname, address.port) as gate:
        behind_the_gate = address._replace(netloc=f":{address.password}@127.0.0.1:{gate.port}").geturl()
        async with router(behind_the_gate, round_s=0.02) as keys:
            claim = await claimed(keys)
            await gate.shut()
            await succeed(claim, b"{}")

            async def is_away() -> bool:
                return (await refused(keys, another(idempotency_key="new"))).reason is Reason.UNAVAILABLE

            await until(is_away)
            await gate.open()
            await asyncio.wait_for(keys._scripts.connected(), 20)
            # Its answer was lost, so its claim waits for the end of its lease, and is not renewed.
            assert (await refused(keys)).reason is Reason.IDEMPOTENCY_KEY_IN_USE
            assert not keys._running
