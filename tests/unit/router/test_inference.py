"""One inference from body to last byte, against engines whose every answer is scripted."""

import asyncio
import json
import logging
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from aiaas.type.v1.usage_event_pb2 import (
    ENDPOINT_CHAT_COMPLETIONS,
    ENDPOINT_EMBEDDINGS,
    ENDPOINT_RESPONSES,
    OUTCOME_CANCELLED,
    OUTCOME_DEADLINE_EXCEEDED,
    OUTCOME_FAILED,
    OUTCOME_REFUSED,
    OUTCOME_SUCCEEDED,
    OUTCOME_TRUNCATED,
    USAGE_SOURCE_COUNTED,
    USAGE_SOURCE_ENGINE,
)
from mesh.clock import SystemClock
from mesh.errors import PlatformError, Reason
from router.rate_limits import Defaults
from router.upstream import Timeouts
from tests.doubles.scripted_backend import (
    Answer,
    Cut,
    Step,
    chat_document,
    chat_stream,
    chunk,
    failure,
    sse,
    usage,
    usage_chunk,
)
from tests.unit.router.world import CHAT, EVENTS, PRINCIPAL, STREAM, World, until


async def test_document_passes_unchanged_and_is_accounted(world: World) -> None:
    answer = chat_document("Hello", prompt_tokens=11, completion_tokens=3)
    world.first.script.append(answer)
    head, data, tail = await world.answer(CHAT)
    assert (head.request_id, head.content_type, head.model, head.backend_id) == (
        "req_1",
        "application/json",
        "m",
        "first",
    )
    assert data == answer.steps[0]
    assert (tail.usage.prompt_tokens, tail.usage.completion_tokens, tail.finish_reason) == (11, 3, "stop")
    assert tail.outcome == OUTCOME_SUCCEEDED
    event = world.event()
    assert (event.outcome, event.usage_source, event.usage) == (OUTCOME_SUCCEEDED, USAGE_SOURCE_ENGINE, tail.usage)
    assert (event.organization_id, event.api_key_id, event.user_id) == ("org_1", "key_1", "user_1")
    assert (event.model, event.backend_id, event.router_id, event.streamed) == ("m", "first", "router-1", False)
    assert (event.request_id, event.schema_version, event.endpoint) == ("req_1", 1, ENDPOINT_CHAT_COMPLETIONS)
    assert 0 < event.ttft_micros <= event.duration_micros
    assert event.admit_time.ToDatetime() < event.end_time.ToDatetime()
    assert [attempt.failure_reason for attempt in event.attempts] == [""]
    assert world.first.received[0].body == CHAT | {"model": "up"}
    assert "Authorization" not in world.first.received[0].headers


async def test_stream_is_byte_identical_when_the_client_asked_for_usage(world: World) -> None:
    answer = chat_stream("Hel", "lo", "!", prompt_tokens=9)
    world.first.script.append(answer)
    head, data, tail = await world.answer(STREAM | {"stream_options": {"include_usage": True}})
    assert head.content_type == EVENTS
    assert data == b"".join(step for step in answer.steps if isinstance(step, bytes))
    assert (tail.usage.prompt_tokens, tail.usage.completion_tokens, tail.finish_reason) == (9, 3, "stop")
    assert world.event().streamed


async def test_usage_event_is_stripped_when_the_client_did_not_ask(world: World) -> None:
    world.first.script.append(chat_stream("Hel", "lo", prompt_tokens=9))
    _, data, tail = await world.answer(STREAM)
    events = sse(chunk(""), chunk("Hel"), chunk("lo"), chunk(finish_reason="stop"))
    assert data == b"".join(events)
    assert tail.usage.prompt_tokens == 9
    assert world.first.received[0].body["stream_options"] == {
        "include_usage": True,
        "continuous_usage_stats": True,
    }
    assert world.event().usage_source == USAGE_SOURCE_ENGINE


async def test_engine_without_usage_is_counted(world: World) -> None:
    world.first.script.append(chat_stream("a", "b", "c", with_usage=False))
    await world.answer(STREAM)
    event = world.event()
    assert (event.usage.completion_tokens, event.usage_source) == (3, USAGE_SOURCE_COUNTED)


async def test_request_over_the_limit_is_refused_before_any_engine(world: World) -> None:
    world.limit(Defaults(requests_per_second=0.001, burst_requests=1, concurrent_requests=10))
    head, _, _ = await world.answer(CHAT)
    assert dict(head.headers)["x-ratelimit-remaining-requests"] == "0"
    error = await world.refusal(CHAT)
    assert error.reason is Reason.RATE_LIMIT_EXCEEDED
    assert error.retry_after_s is not None
    assert world.events[-1].outcome == OUTCOME_REFUSED
    assert len(world.first.received) == 1


@pytest.mark.parametrize("way", ["succeeds", "fails", "is abandoned", "is refused by its engine"])
async def test_room_of_a_request_is_free_again_however_it_ends(world: World, way: str) -> None:
    world.limit(Defaults(requests_per_second=1000, burst_requests=1000, concurrent_requests=1))
    if way == "succeeds":
        await world.answer(CHAT)
    elif way == "fails":
        world.first.script.append(failure(500))
        await world.refusal(CHAT)
    elif way == "is refused by its engine":
        world.first.script.append(failure(400))
        await world.refusal(CHAT)
    else:
        world.first.script.append(Answer([*sse(chunk("a"), done=False), asyncio.Event()], content_type=EVENTS))
        async with aclosing(world.parts(STREAM)) as parts:
            await anext(parts)
            assert (await world.refusal(CHAT)).reason is Reason.RATE_LIMIT_EXCEEDED
    assert (await world.answer(CHAT))[2].outcome == OUTCOME_SUCCEEDED


async def test_tokens_that_were_not_used_are_given_back(world: World) -> None:
    world.limit(Defaults(requests_per_second=1000, burst_requests=1000, concurrent_requests=9, tokens_per_minute=1000))
    world.first.default = chat_document("Hello", prompt_tokens=11, completion_tokens=3)
    for _ in range(5):
        await world.answer(CHAT | {"max_tokens": 900})


async def test_alias_is_answered_and_accounted_as_the_model(world: World) -> None:
    head, _, _ = await world.answer(CHAT | {"model": "alias"})
    assert head.model == "m"
    assert world.event().model == "m"


async def test_engine_gets_its_own_key(world: World) -> None:
    await world.use(replace(world.backends["first"], credential_variable="AIAAS_ENGINE_KEY"))
    await world.answer(CHAT)
    assert world.first.received[0].headers["Authorization"] == "Bearer engine-secret"


async def test_backend_whose_key_the_router_lacks_is_unhealthy(world: World) -> None:
    await world.use(replace(world.backends["second"], credential_variable="AIAAS_ENGINE_OTHER"))
    state = world.registry.state("second")
    assert state is not None
    assert not state.healthy
    assert "AIAAS_ENGINE_OTHER" in state.health_reason
    assert (await world.refusal(CHAT)).reason is Reason.NO_BACKEND_AVAILABLE


@pytest.mark.parametrize(
    ("body", "changes", "reason", "field"),
    [
        (CHAT | {"model": "none"}, {}, Reason.MODEL_NOT_FOUND, "model"),
        (CHAT | {"extra": 1}, {}, Reason.UNKNOWN_FIELD, "extra"),
        (CHAT | {"messages": [{"role": 1}]}, {}, Reason.INVALID_ARGUMENT, "messages.0.role"),
        (CHAT, {"body": b"{"}, Reason.INVALID_JSON, None),
        (CHAT, {"principal": replace(PRINCIPAL, allowed_models=("other",))}, Reason.MODEL_NOT_FOUND, "model"),
        (CHAT, {"principal": replace(PRINCIPAL, allowed_networks=("10.0.0.0/8",))}, Reason.PERMISSION_DENIED, None),
        ({"model": "m", "prompt": "x"}, {"endpoint": 2}, Reason.INVALID_ARGUMENT, "model"),
        ({}, {"endpoint": 5}, Reason.UNIMPLEMENTED, None),
        ({}, {"endpoint": 99}, Reason.UNIMPLEMENTED, None),
    ],
)
async def test_refused_request_is_recorded_with_no_tokens(
    world: World, body: dict[str, Any], changes: dict[str, Any], reason: Reason, field: str | None
) -> None:
    error = await world.refusal(body, **changes)
    assert (error.reason, error.field) == (reason, field)
    event = world.event()
    assert (event.outcome, event.reason) == (OUTCOME_REFUSED, reason.value)
    assert (event.usage.prompt_tokens, event.usage.completion_tokens, len(event.attempts)) == (0, 0, 0)
    assert event.model in ("", "m")
    assert not world.first.received


@pytest.mark.parametrize("address", ["10.1.2.3", "::ffff:10.1.2.3", "2001:db8::1"])
async def test_client_within_its_networks_is_served(world: World, address: str) -> None:
    principal = replace(PRINCIPAL, allowed_networks=("10.0.0.0/8", "2001:db8::/32"))
    await world.answer(CHAT, principal=principal, client_address=address)
    assert world.event().outcome == OUTCOME_SUCCEEDED


async def test_allowed_model_is_served_by_its_alias_too(world: World) -> None:
    await world.answer(CHAT | {"model": "alias"}, principal=replace(PRINCIPAL, allowed_models=("m",)))
    assert world.event().outcome == OUTCOME_SUCCEEDED


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_engines_refusal_is_told_in_its_words(world: World, status: int) -> None:
    await world.use(*world.backends.values())
    world.first.default = world.second.default = failure(status, "The prompt is too long.", "messages")
    error = await world.refusal(CHAT)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "messages")
    assert error.message == "The prompt is too long."
    event = world.event()
    assert (event.outcome, len(event.attempts)) == (OUTCOME_REFUSED, 1)


async def test_engines_refusal_as_first_event_is_told_too(world: World) -> None:
    error_event = {"error": {"message": "The prompt is too long.", "param": None, "code": 400}}
    world.first.script.append(Answer(sse(error_event), content_type=EVENTS))
    error = await world.refusal(STREAM)
    assert (error.reason, error.message) == (Reason.INVALID_ARGUMENT, "The prompt is too long.")
    assert world.event().outcome == OUTCOME_REFUSED


FAILURES: dict[str, tuple[Answer, str]] = {
    "500": (failure(500), "backend_error"),
    "503": (failure(503), "backend_error"),
    "404": (failure(404, "The model `up` does not exist."), "backend_misconfigured"),
    "401": (failure(401), "backend_misconfigured"),
    "429": (failure(429), "backend_overloaded"),
    "redirect": (Answer([b"x"], status=302), "backend_misconfigured"),
    "reset before the head": (Answer(before=[Cut.RESET]), "connection_lost"),
    "reset after the head": (Answer([Cut.RESET], content_type=EVENTS), "connection_lost"),
    "closed before the head": (Answer(before=[Cut.CLOSE]), "connection_lost"),
    "empty stream": (Answer([], content_type=EVENTS), "connection_lost"),
    "wrong content type": (Answer([b"<html>"], content_type="text/html"), "backend_misconfigured"),
    "error event": (Answer(sse({"error": {"message": "x", "code": 500}}), content_type=EVENTS), "backend_error"),
    "endless event": (Answer([b"data: " + b"x" * (2 << 20)], content_type=EVENTS), "backend_garbage"),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_failure_before_the_first_byte_goes_to_another_backend(world: World, name: str) -> None:
    answer, reason = FAILURES[name]
    await world.use(*world.backends.values())
    served = []
    for failing, good in ((world.first, world.second), (world.second, world.first)):
        failing.default, good.default = answer, chat_stream("ok")
        # Either may be asked first; both of these directions are a failover in one of two cases.
        for _ in range(4):
            _, data, _ = await world.answer(STREAM)
            assert data.endswith(b"data: [DONE]\n\n")
            served.append(world.events[-1])
    retried = [event for event in served if len(event.attempts) == 2]
    assert retried
    for event in served:
        assert event.outcome == OUTCOME_SUCCEEDED
        assert event.attempts[-1].failure_reason == ""
    for event in retried:
        assert event.attempts[0].failure_reason == reason
        assert event.attempts[0].backend_id != event.attempts[1].backend_id == event.backend_id
    assert len(world.events) == 8


@pytest.mark.parametrize(
    ("name", "reason", "asked"),
    [
        ("500", Reason.BACKEND_ERROR, 1),
        ("404", Reason.BACKEND_ERROR, 1),
        ("429", Reason.NO_BACKEND_AVAILABLE, 1),
        # On the connection that the probe left, and on a fresh one.
        ("reset before the head", Reason.BACKEND_ERROR, 2),
        ("empty stream", Reason.BACKEND_ERROR, 1),
    ],
)
async def test_last_failure_is_told_when_no_backend_is_left(
    world: World, name: str, reason: Reason, asked: int
) -> None:
    await world.use(*world.backends.values())
    world.first.default = world.second.default = FAILURES[name][0]
    assert (await world.refusal(STREAM)).reason is reason
    event = world.event()
    assert (event.outcome, event.reason, len(event.attempts)) == (OUTCOME_FAILED, reason.value, 2)
    assert len(world.first.received) == len(world.second.received) == asked
    assert (event.usage.prompt_tokens, event.usage.completion_tokens) == (0, 0)


async def test_refused_connection_goes_elsewhere_and_counts_against_health(world: World) -> None:
    await world.use(*world.backends.values())
    await world.first.stop()
    await world.prober.probe_all()
    state = world.registry.state("first")
    assert state is not None
    assert state.healthy
    for _ in range(20):
        await world.answer(CHAT)
    assert state.health_reason == "it refused the connection"
    retried = [event for event in world.events if len(event.attempts) == 2]
    assert [event.attempts[0].failure_reason for event in retried] == ["connection_refused"]
    await world.second.stop()
    await world.prober.probe_all()
    error = await world.refusal(CHAT)
    assert (error.reason, error.retry_after_s) == (Reason.NO_BACKEND_AVAILABLE, 1.0)
    event = world.events[-1]
    assert (event.outcome, event.attempts[0].failure_reason) == (OUTCOME_FAILED, "connection_refused")


async def test_document_that_breaks_off_is_asked_for_elsewhere(world: World) -> None:
    await world.use(*world.backends.values())
    broken = Answer([b'{"id": "c-1", "choices": [', Cut.CLOSE])
    world.first.default = broken
    world.second.default = chat_document("ok")
    for _ in range(6):
        _, data, _ = await world.answer(CHAT)
        assert json.loads(data)["choices"][0]["message"]["content"] == "ok"
    assert world.first.received


async def test_document_that_is_no_json_is_a_backend_error(world: World) -> None:
    world.first.default = Answer([b"<html>"])
    assert (await world.refusal(CHAT)).reason is Reason.BACKEND_ERROR


async def test_large_documents_pass_in_pieces(world: World) -> None:
    vector = "A" * 5_000_000
    document = json.dumps({"data": [{"embedding": vector}], "usage": usage(8, 0)}).encode()
    world.first.script.append(Answer([document]))
    body = {"model": "m", "input": "x" * 2_000_000, "encoding_format": "base64"}
    parts = [part async for part in world.parts(body, endpoint=ENDPOINT_EMBEDDINGS)]
    data = [part for part in parts if isinstance(part, bytes)]
    assert b"".join(data) == document
    assert max(map(len, data)) <= 1 << 20
    assert world.event().usage.prompt_tokens == 8


async def test_first_byte_timeout_goes_elsewhere_then_is_a_timeout(world: World) -> None:
    world.timeouts = Timeouts(connect_s=2, first_byte_s=0.1, answer_s=5, idle_s=5)
    await world.use(*world.backends.values())
    silent: list[Step] = [asyncio.Event()]
    world.first.default = Answer(before=silent)
    world.second.default = Answer(silent, content_type=EVENTS)
    assert (await world.refusal(STREAM)).reason is Reason.BACKEND_TIMEOUT
    event = world.event()
    assert [attempt.failure_reason for attempt in event.attempts] == ["backend_timeout"] * 2
    assert event.outcome == OUTCOME_FAILED
    await until(lambda: world.first.received[0].abandoned.is_set() and world.second.received[0].abandoned.is_set())


async def test_backends_own_first_byte_timeout_wins(world: World) -> None:
    await world.use(replace(world.backends["first"], first_byte_timeout_millis=100))
    world.first.default = Answer(before=[asyncio.Event()])
    assert (await world.refusal(STREAM)).reason is Reason.BACKEND_TIMEOUT


async def test_whole_answer_may_take_longer_than_the_first_byte_of_a_stream(world: World) -> None:
    world.timeouts = Timeouts(connect_s=2, first_byte_s=0.01, answer_s=5, idle_s=5)
    await world.use(world.backends["first"])
    release = asyncio.Event()
    world.first.default = Answer([json.dumps({"choices": [], "usage": usage(3, 4)}).encode()], before=[release])
    asyncio.get_running_loop().call_later(0.1, release.set)
    assert [part async for part in world.parts(CHAT)]
    assert world.event().outcome == OUTCOME_SUCCEEDED


async def test_whole_answer_that_never_comes_is_a_timeout(world: World) -> None:
    world.timeouts = Timeouts(connect_s=2, first_byte_s=5, answer_s=0.1, idle_s=5)
    await world.use(world.backends["first"])
    world.first.default = Answer(before=[asyncio.Event()])
    assert (await world.refusal(CHAT)).reason is Reason.BACKEND_TIMEOUT


BROKEN_STREAMS: dict[str, list[Step]] = {
    "reset": [Cut.RESET],
    "closed": [Cut.CLOSE],
    "ended without its marker": [],
    "half an event": [b'data: {"choices"'],
    "endless event": [b"x" * (2 << 20)],
    "error event": list(sse({"error": {"message": "died", "code": 500}})),
}


@pytest.mark.parametrize("name", BROKEN_STREAMS)
async def test_nothing_is_retried_after_the_first_byte(world: World, name: str) -> None:
    await world.use(*world.backends.values())
    first = sse(chunk("a"), chunk("b"), done=False)
    delivered = asyncio.Event()
    # A reset may overtake bytes that were not read yet, so it waits until they were.
    answer = Answer([*first, delivered, *BROKEN_STREAMS[name]], content_type=EVENTS)
    world.first.default = world.second.default = answer

    async def read() -> bytes:
        data = b""
        async with aclosing(world.parts(STREAM)) as parts:
            with pytest.raises(PlatformError) as caught:
                async for part in parts:
                    data += part if isinstance(part, bytes) else b""
                    if data == b"".join(first):
                        delivered.set()
        assert caught.value.reason is Reason.BACKEND_ERROR
        return data

    assert await read() == b"".join(first)
    event = world.event()
    assert (event.outcome, event.reason, len(event.attempts)) == (OUTCOME_TRUNCATED, "backend_error", 1)
    assert (event.usage.completion_tokens, event.usage_source) == (2, USAGE_SOURCE_COUNTED)
    assert len(world.first.received) + len(world.second.received) == 1


async def test_silence_in_the_middle_is_a_timeout(world: World) -> None:
    world.timeouts = Timeouts(connect_s=2, first_byte_s=5, answer_s=5, idle_s=0.1)
    world.first.default = Answer([*sse(chunk("a"), done=False), asyncio.Event()], content_type=EVENTS)
    data, error = await world.broken(STREAM)
    assert data == b"".join(sse(chunk("a"), done=False))
    assert error.reason is Reason.BACKEND_TIMEOUT
    assert world.event().outcome == OUTCOME_TRUNCATED
    await until(world.first.received[0].abandoned.is_set)


async def test_cancelled_while_the_engine_thinks(world: World) -> None:
    world.first.default = Answer(before=[asyncio.Event()])
    task = asyncio.create_task(world.answer(CHAT))
    await until(lambda: bool(world.first.received))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(world.first.received[0].abandoned.is_set, within_s=1)
    event = world.event()
    assert (event.outcome, event.reason) == (OUTCOME_CANCELLED, "cancelled")


@pytest.mark.parametrize("way", ["task cancelled", "generator closed", "abandoned"])
async def test_cancelled_in_the_middle_is_billed_what_was_produced(world: World, way: str) -> None:
    world.first.default = Answer([*sse(chunk("a"), chunk("b"), done=False), asyncio.Event()], content_type=EVENTS)
    inference, parts = world.begin(STREAM)
    produced = b""
    async for part in parts:
        produced += part if isinstance(part, bytes) else b""
        if produced == b"".join(sse(chunk("a"), chunk("b"), done=False)):
            break
    if way == "task cancelled":
        task = asyncio.ensure_future(anext(parts))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif way == "generator closed":
        await parts.aclose()
    else:
        inference.abandon()
    event = world.event()
    assert (event.outcome, event.usage.completion_tokens) == (OUTCOME_CANCELLED, 2)
    assert event.usage_source == USAGE_SOURCE_COUNTED
    await until(world.first.received[0].abandoned.is_set, within_s=1)
    await parts.aclose()
    inference.abandon()
    assert len(world.events) == 1


async def test_abandoned_inference_does_not_go_on(world: World) -> None:
    go_on = asyncio.Event()
    world.first.default = Answer([*sse(chunk("a"), done=False), asyncio.Event()], content_type=EVENTS, before=[go_on])
    inference, parts = world.begin(STREAM)
    task = asyncio.ensure_future(anext(parts))
    await until(lambda: bool(world.first.received))
    inference.abandon()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(world.first.received[0].abandoned.is_set, within_s=1)
    assert world.event().outcome == OUTCOME_CANCELLED


async def test_client_that_hangs_up_at_the_closing_marker_was_served(world: World) -> None:
    answer = chat_stream("a")
    world.first.default = Answer([*answer.steps, asyncio.Event()], content_type=EVENTS)
    parts = world.parts(STREAM)
    async for part in parts:
        if isinstance(part, bytes) and part.endswith(b"data: [DONE]\n\n"):
            break
    await parts.aclose()
    event = world.event()
    assert (event.outcome, event.usage_source) == (OUTCOME_SUCCEEDED, USAGE_SOURCE_ENGINE)


async def test_engine_that_lingers_after_its_marker_does_not_hold_the_client(world: World) -> None:
    world.first.default = Answer([*chat_stream("a").steps, asyncio.Event()], content_type=EVENTS)
    async with asyncio.timeout(2):
        _, data, tail = await world.answer(STREAM)
    assert data.endswith(b"data: [DONE]\n\n")
    assert tail.outcome == OUTCOME_SUCCEEDED


@pytest.mark.parametrize(
    "answer",
    [
        Answer(before=[asyncio.Event()]),
        Answer([asyncio.Event()], content_type=EVENTS),
    ],
)
async def test_deadline_ends_a_request_before_its_first_byte(world: World, answer: Answer) -> None:
    await world.use(*world.backends.values())
    world.first.default = world.second.default = answer
    error = await world.refusal(STREAM, deadline=SystemClock().monotonic() + 0.2)
    assert error.reason is Reason.DEADLINE_EXCEEDED
    event = world.event()
    assert (event.outcome, len(event.attempts)) == (OUTCOME_DEADLINE_EXCEEDED, 1)
    await until((world.first.received + world.second.received)[0].abandoned.is_set)


async def test_deadline_ends_a_stream(world: World) -> None:
    world.first.default = Answer([*sse(chunk("a"), done=False), asyncio.Event()], content_type=EVENTS)
    _, error = await world.broken(STREAM, deadline=SystemClock().monotonic() + 0.2)
    assert error.reason is Reason.DEADLINE_EXCEEDED
    event = world.event()
    assert (event.outcome, event.usage.completion_tokens) == (OUTCOME_DEADLINE_EXCEEDED, 1)
    await until(world.first.received[0].abandoned.is_set)


async def test_connections_are_kept_and_reused(world: World) -> None:
    transports = set()
    world.first.default = chat_stream("a")
    for _ in range(5):
        await world.answer(STREAM)
        transports.add(world.first.received[-1].client_port)
    assert len(transports) == 1


async def test_responses_stream_ends_with_its_typed_event(world: World) -> None:
    delta = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"Hi"}\n\n'
    completed = {"response": {"status": "completed", "usage": {"input_tokens": 4, "output_tokens": 1}}}
    last = b"event: response.completed\ndata: " + json.dumps(completed).encode() + b"\n\n"
    world.first.script.append(Answer([delta, last], content_type=EVENTS))
    body = {"model": "m", "input": "Hi", "stream": True}
    _, data, tail = await world.answer(body, endpoint=ENDPOINT_RESPONSES)
    assert data == delta + last
    assert (tail.usage.prompt_tokens, tail.usage.completion_tokens, tail.finish_reason) == (4, 1, "stop")
    assert world.event().usage_source == USAGE_SOURCE_ENGINE


async def test_prompts_and_answers_reach_no_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "router")
    world.first.default = failure(500, "CANARY-ANSWER")
    await world.refusal(CHAT | {"messages": [{"role": "user", "content": "CANARY-PROMPT"}]})
    assert caplog.records
    assert "CANARY" not in caplog.text


async def test_usage_of_one_stream_is_that_of_its_own_engine(world: World) -> None:
    """A failed attempt leaves nothing behind in what the next one is billed."""
    await world.use(*world.backends.values())
    half = Answer([*sse(usage_chunk(99, 99) | {"x": "y" * 100}, done=False)], content_type=EVENTS)
    world.first.default = half
    world.second.default = chat_stream("a", with_usage=False)
    for _ in range(6):
        await world.answer(STREAM)
        assert world.events[-1].usage.prompt_tokens == 0
    assert world.first.received
