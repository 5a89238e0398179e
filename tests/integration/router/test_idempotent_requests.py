"""Requests that are repeated with their Idempotency-Key: one runs, one is billed, all get its answer."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from aiaas.type.v1.usage_event_pb2 import (
    ENDPOINT_CHAT_COMPLETIONS,
    OUTCOME_CANCELLED,
    OUTCOME_FAILED,
    OUTCOME_REFUSED,
    OUTCOME_SUCCEEDED,
    OUTCOME_TRUNCATED,
)
from mesh.clock import SystemClock
from mesh.errors import PlatformError, Reason
from mesh.scripts import Scripts
from router import idempotency
from router.answers import Head, Tail
from router.config import RouterConfig
from router.idempotency import IDEMPOTENCY, Idempotency
from router.rate_limits import Defaults
from router.upstream import HttpUpstream
from tests.doubles.peer import PeerDouble
from tests.doubles.scripted_backend import Answer, Cut, ScriptedBackend, chat_document, chat_stream, chunk, failure, sse
from tests.integration.router.conftest import running
from tests.unit.router.world import CHAT, EVENTS, PRINCIPAL, STREAM, WatchedJournal, World, until

KEY = "once"


@pytest.fixture
async def world(tmp_path: Path, redis_url: str) -> AsyncIterator[World]:
    """A router's domain whose keys are in Redis."""
    scripts = Scripts(redis_url, SystemClock(), IDEMPOTENCY, timeout_s=5.0)
    connection = asyncio.create_task(scripts.run_connection())
    journal = WatchedJournal(tmp_path / "journal")
    async with HttpUpstream({}) as upstream, ScriptedBackend() as first, ScriptedBackend() as second:
        made = World(upstream, (first, second), journal)
        await made.use(made.backends["first"])
        made.idempotency = Idempotency(scripts, "router_1")
        await asyncio.wait_for(scripts.connected(), 20)
        yield made
    await journal.close()
    connection.cancel()
    await asyncio.wait([connection])


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["document", "stream"])
async def test_repetition_is_no_request_at_all_and_gets_the_same_bytes(world: World, body: dict[str, Any]) -> None:
    world.first.default = chat_stream("Hel", "lo") if body is STREAM else chat_document("Hello")
    world.limit(Defaults(1e-4, 1, 1))
    head, data, tail = await world.answer(body, idempotency_key=KEY)
    assert tail.usage.completion_tokens
    for _ in range(3):
        again = await world.answer(body, idempotency_key=KEY, request_id="req_2")
        assert (again[0].request_id, again[0].content_type, again[0].model) == ("req_2", head.content_type, "m")
        assert dict(again[0].headers) == {"idempotency-replayed": "true", "original-request-id": "req_1"}
        assert again[1] == data
        assert not again[2].usage.ByteSize()
    assert len(world.first.received) == 1
    event = world.event()
    assert (event.outcome, event.request_id) == (OUTCOME_SUCCEEDED, "req_1")
    assert event.idempotency_digest == hashlib.sha256(KEY.encode()).hexdigest()
    assert world.journal.open_entries == 0
    # Another request is one, and there is no room for it.
    assert (await world.refusal(body)).reason is Reason.RATE_LIMIT_EXCEEDED


async def test_repetition_while_the_first_runs_is_refused_and_recorded_as_that(world: World) -> None:
    go_on = asyncio.Event()
    world.first.default = Answer([*sse(chunk("a"), done=False), go_on, *chat_stream("b").steps], content_type=EVENTS)
    async with aclosing(world.parts(STREAM, idempotency_key=KEY)) as parts:
        assert isinstance(await anext(parts), Head)
        assert (await world.refusal(STREAM, idempotency_key=KEY)).reason is Reason.IDEMPOTENCY_KEY_IN_USE
        assert (await world.refusal(CHAT, idempotency_key=KEY)).reason is Reason.IDEMPOTENCY_KEY_REUSED
        go_on.set()
        data = b"".join([part async for part in parts if isinstance(part, bytes)])
    assert (await world.answer(STREAM, idempotency_key=KEY))[1] == data
    assert [event.outcome for event in world.events] == [OUTCOME_REFUSED, OUTCOME_REFUSED, OUTCOME_SUCCEEDED]
    assert not world.events[0].usage.ByteSize()


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["document", "stream"])
async def test_whoever_has_seen_the_end_finds_the_answer_kept(world: World, body: dict[str, Any]) -> None:
    world.first.default = chat_stream("a") if body is STREAM else chat_document("a")
    end = b"[DONE]" if body is STREAM else b"}"
    async with aclosing(world.parts(body, idempotency_key=KEY)) as parts:
        async for part in parts:
            if isinstance(part, bytes) and end in part.strip()[-6:]:
                break
        assert (await world.answer(body, idempotency_key=KEY))[0].headers[0] == ("idempotency-replayed", "true")


@pytest.mark.parametrize("is_patient", [True, False])
async def test_end_waits_until_the_answer_is_kept_but_not_for_long(
    world: World, redis_url: str, monkeypatch: pytest.MonkeyPatch, is_patient: bool
) -> None:
    if is_patient:
        monkeypatch.setattr(idempotency, "_KEEP_LIMIT_S", 30)
    go_on = asyncio.Event()
    first, *rest = chat_stream("a").steps
    world.first.default = Answer([first, go_on, *rest], content_type=EVENTS)
    reading = asyncio.create_task(world.answer(STREAM, idempotency_key=KEY))
    await until(lambda: bool(world.first.received and world.first.received[0].sent_bytes))
    async with Redis.from_url(redis_url) as redis:
        # Scripts are held up, and no connection is lost by it.
        await redis.client_pause(10_000, all=False)
        try:
            go_on.set()
            await until(lambda: bool(world.events))
            done, _ = await asyncio.wait([reading], timeout=0.3 if is_patient else 3)
            assert bool(done) is not is_patient
        finally:
            await redis.client_unpause()
        assert (await reading)[1].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (failure(400), OUTCOME_REFUSED),
        (failure(500), OUTCOME_FAILED),
        (Answer([*sse(chunk("a"), chunk("b"), done=False), Cut.RESET], content_type=EVENTS), OUTCOME_TRUNCATED),
    ],
    ids=["refused", "failed", "truncated"],
)
async def test_after_a_request_without_success_its_repetition_runs(world: World, answer: Answer, outcome: int) -> None:
    world.first.script.append(answer)
    with pytest.raises(PlatformError):
        await world.answer(STREAM, idempotency_key=KEY)
    world.first.default = chat_stream("a")
    head, _, _ = await world.answer(STREAM, idempotency_key=KEY)
    assert head.backend_id == "first"
    assert [event.outcome for event in world.events] == [outcome, OUTCOME_SUCCEEDED]


async def test_after_a_cancelled_request_its_repetition_runs(world: World) -> None:
    world.first.script.append(Answer([*sse(chunk("a"), done=False), asyncio.Event()], content_type=EVENTS))
    world.first.default = chat_stream("a")
    async with aclosing(world.parts(STREAM, idempotency_key=KEY)) as parts:
        await anext(parts)
        await anext(parts)
    await world.answer(STREAM, idempotency_key=KEY)
    assert [event.outcome for event in world.events] == [OUTCOME_CANCELLED, OUTCOME_SUCCEEDED]


async def test_client_that_goes_when_the_answer_is_complete_can_have_it_again(world: World) -> None:
    steps = [*chat_stream("a").steps, asyncio.Event()]
    world.first.script.append(Answer(steps, content_type=EVENTS))
    inference, parts = world.begin(STREAM, idempotency_key=KEY)
    async with aclosing(parts):
        await anext(parts)
        await until(lambda: inference._watch is not None and inference._watch.complete)
    data = (await world.answer(STREAM, idempotency_key=KEY))[1]
    assert data.endswith(b"data: [DONE]\n\n")
    assert world.event().outcome == OUTCOME_SUCCEEDED


async def test_kept_answer_is_for_those_only_who_may_use_its_model(world: World) -> None:
    await world.answer(CHAT, idempotency_key=KEY)
    other = replace(PRINCIPAL, id="key_2", api_key_id="key_2", allowed_models=("another",))
    assert (await world.refusal(CHAT, idempotency_key=KEY, principal=other)).reason is Reason.MODEL_NOT_FOUND
    far = replace(PRINCIPAL, allowed_networks=("10.0.0.0/8",))
    error = await world.refusal(CHAT, idempotency_key=KEY, principal=far, client_address="192.0.2.1")
    assert error.reason is Reason.PERMISSION_DENIED


async def test_answer_that_the_journal_does_not_have_is_not_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise PlatformError(Reason.USAGE_UNRECORDABLE)

    with monkeypatch.context() as broken:
        broken.setattr(world.journal, "commit", fail)
        await world.answer(CHAT, idempotency_key=KEY)
    await world.answer(CHAT, idempotency_key=KEY)
    assert len(world.first.received) == 2


async def test_without_redis_a_key_is_refused_and_a_request_without_one_is_not(world: World) -> None:
    world.idempotency = Idempotency(Scripts("redis://127.0.0.1:1", SystemClock(), IDEMPOTENCY), "router_2")
    error = await world.refusal(CHAT, idempotency_key=KEY)
    assert (error.reason, error.retry_after_s) == (Reason.UNAVAILABLE, 1.0)
    assert world.first.received == []
    _, _, tail = await world.answer(CHAT)
    assert isinstance(tail, Tail)
    assert [event.outcome for event in world.events] == [OUTCOME_FAILED, OUTCOME_SUCCEEDED]


@pytest.mark.parametrize("way", ["Infer", "Relay", "within the process"])
@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["document", "stream"])
async def test_key_is_honored_on_every_way(
    config: RouterConfig,
    identity: PeerDouble,
    redis_url: str,
    way: str,
    body: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router.server._FLUSH_S", 0.0)
    async with ScriptedBackend() as engine, running(replace(config, redis_url=redis_url), identity, way=way) as router:
        engine.default = chat_stream("a", "b") if body is STREAM else chat_document("a")
        await router.add_model("m")
        await router.add_backend("only", engine.base_url, "m")
        first = await router.answer(body, ENDPOINT_CHAT_COMPLETIONS, idempotency_key=KEY)
        again = await router.answer(body, ENDPOINT_CHAT_COMPLETIONS, idempotency_key=KEY)
        assert first.error is None
        assert again.error is None
        assert again.data == first.data
        assert first.head is not None
        assert again.head is not None
        assert "idempotency-replayed" not in first.head.headers
        assert again.head.headers["idempotency-replayed"] == "true"
        other = await router.answer(body | {"temperature": 0.5}, ENDPOINT_CHAT_COMPLETIONS, idempotency_key=KEY)
        assert other.error is not None
        assert other.error.reason is Reason.IDEMPOTENCY_KEY_REUSED
        assert len(engine.received) == 1
