"""Inference through a real router, before scripted engines, on every way there is to it."""

import asyncio
import contextlib
import errno
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from aiaas.identity.v1.auth_service_pb2 import WatchRevocationsResponse
from aiaas.router.v1.backend_service_pb2 import BACKEND_HEALTH_HEALTHY, BACKEND_HEALTH_UNHEALTHY
from aiaas.router.v1.inference_service_pb2 import ListServedModelsRequest
from aiaas.type.v1.usage_event_pb2 import (
    OUTCOME_CANCELLED,
    OUTCOME_REFUSED,
    OUTCOME_SUCCEEDED,
    UsageEvent,
    UsageEventBatch,
)
from mesh.broker import Broker
from mesh.errors import PlatformError, Reason
from mesh.revocations import CHANNEL
from mesh.topology import USAGE
from router.config import RouterConfig
from tests.doubles.peer import PeerDouble
from tests.doubles.scripted_backend import (
    Answer,
    Cut,
    ScriptedBackend,
    chat_document,
    chat_stream,
    chunk,
    failure,
    sse,
)
from tests.integration.router.conftest import PRINCIPAL, Router, running, until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
STREAM = CHAT | {"stream": True}
EVENTS = "text/event-stream"


@pytest.fixture(params=["Infer", "Relay", "within the process"])
def way(request: pytest.FixtureRequest) -> str:
    """How inferences reach the router; it answers the same on each."""
    name: str = request.param
    return name


@pytest.fixture
async def router(
    config: RouterConfig, identity: PeerDouble, way: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Router]:
    """A router without Redis and RabbitMQ."""
    # Nobody is there to take the events, so none are waited for.
    monkeypatch.setattr("router.server._FLUSH_S", 0.0)
    async with running(config, identity, way=way) as router:
        yield router


@pytest.fixture
async def engines(router: Router) -> AsyncIterator[tuple[ScriptedBackend, ScriptedBackend]]:
    """Two engines, registered as backends "first" and "second" of the model "m"."""
    async with ScriptedBackend() as first, ScriptedBackend() as second:
        await router.add_model("m", aliases=["alias"], owner="us")
        await asyncio.gather(
            router.add_backend("first", first.base_url, "m"), router.add_backend("second", second.base_url, "m")
        )
        yield first, second


Engines = tuple[ScriptedBackend, ScriptedBackend]


async def test_stream_is_byte_identical_with_include_usage(router: Router, engines: Engines) -> None:
    script = chat_stream("Hel", "lo", "ö")
    engines[0].default = engines[1].default = script
    answer = await router.answer(STREAM | {"stream_options": {"include_usage": True}})
    assert answer.error is None
    assert answer.data == b"".join(step for step in script.steps if isinstance(step, bytes))
    assert answer.head is not None
    assert (answer.head.request_id, answer.head.content_type, answer.head.model) == ("req_test", EVENTS, "m")
    assert answer.head.backend_id in ("first", "second")
    assert answer.tail is not None
    assert (answer.tail.usage.completion_tokens, answer.tail.outcome) == (3, OUTCOME_SUCCEEDED)


async def test_usage_is_stripped_when_not_asked_for(router: Router, engines: Engines) -> None:
    engines[0].default = engines[1].default = chat_stream("a")
    answer = await router.answer(STREAM)
    assert b"usage" not in answer.data
    assert answer.data.endswith(b"data: [DONE]\n\n")
    assert answer.tail is not None
    assert answer.tail.usage.prompt_tokens == 5


async def test_failover_before_the_first_byte_and_none_after(router: Router, engines: Engines) -> None:
    engines[0].default = failure(500)
    engines[1].default = chat_document("ok")
    async with asyncio.timeout(10):
        while not engines[0].received:
            assert (await router.answer(CHAT)).error is None
    calls = len(engines[0].received) + len(engines[1].received)
    events = sse(chunk("a"), done=False)
    engines[0].default = engines[1].default = Answer([*events, 0.05, Cut.RESET], content_type=EVENTS)
    broken = await router.answer(STREAM)
    assert broken.data == b"".join(events)
    assert broken.tail is None
    assert broken.error is not None
    assert broken.error.reason is Reason.BACKEND_ERROR
    assert len(engines[0].received) + len(engines[1].received) == calls + 1


async def test_cancelled_call_frees_the_engine_within_a_second(router: Router, engines: Engines) -> None:
    hang = Answer([*sse(chunk("a"), done=False), asyncio.Event()], content_type=EVENTS)
    engines[0].default = engines[1].default = hang
    call = router.infer(STREAM)
    await call.read()
    await call.read()
    call.cancel()
    received = (engines[0].received + engines[1].received)[0]
    await until(received.abandoned.is_set, within_s=2)


async def test_client_that_stops_reading_and_leaves_frees_the_engine(router: Router, engines: Engines) -> None:
    """The router is then waiting for the client, not for the engine."""
    big = sse(*(chunk("x" * 60_000) for _ in range(2000)), done=False)
    engines[0].default = engines[1].default = Answer(big, content_type=EVENTS)
    call = router.infer(STREAM)
    await call.read()
    received = (engines[0].received + engines[1].received)[0]
    sent: list[int] = []

    def is_held_up() -> bool:
        # Sixteen looks in a row, 10 ms apart, at an engine that cannot get rid of its bytes.
        sent.append(received.sent_bytes)
        return len(sent) > 16 and sent[-1] == sent[-16] > 0

    await until(is_held_up, within_s=10)
    assert received.sent_bytes < sum(map(len, big))
    call.cancel()
    await until(received.abandoned.is_set, within_s=2)


async def test_deadline_frees_the_engine(router: Router, engines: Engines) -> None:
    engines[0].default = engines[1].default = Answer(before=[asyncio.Event()])
    answer = await router.answer(CHAT, timeout_s=0.3)
    assert answer.error is not None
    assert answer.error.reason is Reason.DEADLINE_EXCEEDED
    received = (engines[0].received + engines[1].received)[0]
    await until(received.abandoned.is_set, within_s=2)


@pytest.mark.parametrize(
    ("body", "reason", "field"),
    [
        (CHAT | {"no_such_field": 1}, Reason.UNKNOWN_FIELD, "no_such_field"),
        (CHAT | {"messages": [{"role": 7}]}, Reason.INVALID_ARGUMENT, "messages.0.role"),
        (CHAT | {"model": "none"}, Reason.MODEL_NOT_FOUND, "model"),
        (b"{", Reason.INVALID_JSON, None),
    ],
)
async def test_refusals_name_the_field(
    router: Router, engines: Engines, body: object, reason: Reason, field: str | None
) -> None:
    answer = await router.answer(body)
    assert answer.head is None
    assert answer.error is not None
    assert (answer.error.reason, answer.error.field) == (reason, field)


async def test_engines_refusal_is_passed_on(router: Router, engines: Engines) -> None:
    engines[0].default = engines[1].default = failure(400, "Too many tokens.", "max_tokens")
    error = (await router.answer(CHAT)).error
    assert error is not None
    assert (error.reason, error.field, error.message) == (Reason.INVALID_ARGUMENT, "max_tokens", "Too many tokens.")


async def test_four_megabytes_pass(router: Router, engines: Engines) -> None:
    body = CHAT | {"messages": [{"role": "user", "content": "x" * (4 << 20)}]}
    assert (await router.answer(body)).error is None


async def test_requests_spread_over_equal_backends(router: Router, engines: Engines) -> None:
    answers = await asyncio.gather(*(router.answer(CHAT) for _ in range(40)))
    served = Counter(answer.head.backend_id for answer in answers if answer.head is not None)
    assert sum(served.values()) == 40
    assert min(served["first"], served["second"]) >= 10


async def test_draining_backend_ends_what_it_has_and_gets_nothing_new(router: Router, engines: Engines) -> None:
    go_on = asyncio.Event()
    slow = Answer([*sse(chunk("a"), done=False), go_on, *chat_stream("b").steps], content_type=EVENTS)
    engines[0].default = slow
    await router.update_backend("second", "draining", draining=True)
    running_call = asyncio.create_task(router.answer(STREAM))
    await until(lambda: len(engines[0].received) == 1)
    await router.update_backend("first", "draining", draining=True)
    refused = (await router.answer(STREAM)).error
    assert refused is not None
    assert (refused.reason, refused.retry_after_s) == (Reason.NO_BACKEND_AVAILABLE, 1.0)
    await router.update_backend("second", "draining")
    assert (await router.answer(CHAT)).error is None
    go_on.set()
    answer = await running_call
    assert answer.error is None
    assert answer.data.endswith(b"data: [DONE]\n\n")


async def test_full_backend_gets_nothing_more(router: Router, engines: Engines) -> None:
    await router.update_backend("second", "draining", draining=True)
    await router.update_backend("first", "limit_concurrent_requests", limit_concurrent_requests=1)
    go_on = asyncio.Event()
    engines[0].script.append(Answer([go_on, *chat_document().steps]))
    busy = asyncio.create_task(router.answer(CHAT))
    await until(lambda: bool(engines[0].received))
    refused = (await router.answer(CHAT)).error
    assert refused is not None
    assert refused.reason is Reason.NO_BACKEND_AVAILABLE
    go_on.set()
    assert (await busy).error is None
    assert (await router.answer(CHAT)).error is None


async def test_unhealthy_backend_leaves_and_returns(router: Router, engines: Engines) -> None:
    engines[0].healthy = False
    await until(lambda: router.has_health("first", BACKEND_HEALTH_UNHEALTHY), within_s=10)
    assert "503" in (await router.get_backend("first")).health_reason
    for _ in range(10):
        assert (await router.answer(CHAT)).error is None
    assert not engines[0].received
    engines[0].healthy = True
    await until(lambda: router.has_health("first", BACKEND_HEALTH_HEALTHY), within_s=5)
    await asyncio.gather(*(router.answer(CHAT) for _ in range(20)))
    assert engines[0].received


async def test_nothing_leaves_that_the_journal_would_not_remember(
    router: Router, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = asyncio.Event()
    engines[0].default = engines[1].default = replace(chat_stream("secret"), before=[go_on])
    answering = asyncio.create_task(router.answer(STREAM))
    await until(lambda: bool(engines[0].received or engines[1].received))

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("router.journal_log.Log.append", no_space)
        go_on.set()
        if router.way == "Infer":
            lost = await answering
            assert (lost.head, lost.data) == (None, b"")
            assert lost.error is not None
        else:
            # The whole relay ends, and an edge opens another.
            await until(lambda: router.relay.has_ended)
            answering.cancel()
            await router.new_relay()
        refused = await router.answer(STREAM)
        assert (refused.head, refused.data) == (None, b"")
        assert refused.error is not None
        assert refused.error.reason is Reason.USAGE_UNRECORDABLE
    assert (await router.answer(STREAM)).error is None


async def test_served_models_are_those_the_caller_may_use(router: Router, engines: Engines) -> None:
    await router.add_model("unserved")
    await router.add_model("other")
    await router.add_backend("third", engines[0].base_url, "other")

    async def served(**asked: str) -> list[str]:
        response = await router.call(router.inference.ListServedModels, ListServedModelsRequest(**asked))
        return [model.model for model in response.models]

    assert await served() == ["m", "other"]
    assert await served(model="alias") == ["m"]
    for hidden in ("unserved", "none"):
        with pytest.raises(PlatformError) as caught:
            await served(model=hidden)
        assert caught.value.reason is Reason.MODEL_NOT_FOUND
    router.act_as(replace(PRINCIPAL, allowed_models=("m",)))
    assert await served() == ["m"]
    with pytest.raises(PlatformError) as caught:
        await served(model="other")
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
    error = (await router.answer(CHAT | {"model": "other"})).error
    assert error is not None
    assert error.reason is Reason.MODEL_NOT_FOUND


async def test_permission_and_credential_are_required(router: Router, engines: Engines) -> None:
    router.act_as(replace(PRINCIPAL, permissions=frozenset({"models.get"})))
    error = (await router.answer(CHAT)).error
    assert error is not None
    assert error.reason is Reason.PERMISSION_DENIED
    router.credential = router.credential[:-1] + ("A" if router.credential[-1] != "A" else "B")
    error = (await router.answer(CHAT)).error
    assert error is not None
    assert error.reason is Reason.API_KEY_INVALID


async def test_cached_principals_are_served_while_identity_is_away(router: Router, engines: Engines) -> None:
    assert (await router.answer(CHAT)).error is None
    await router.identity.stop()
    assert (await router.answer(CHAT)).error is None
    known = router.credential
    router.act_as(PRINCIPAL)
    error = (await router.answer(CHAT)).error
    assert error is not None
    assert error.reason is Reason.AUTH_UNAVAILABLE
    router.credential = known
    assert (await router.answer(CHAT)).error is None


async def test_revoked_key_is_forgotten_within_a_second(
    config: RouterConfig, identity: PeerDouble, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.server._FLUSH_S", 0.0)
    async with (
        running(replace(config, redis_url=redis_url), identity) as router,
        Redis.from_url(redis_url) as redis,
    ):
        for revocation in (
            WatchRevocationsResponse(api_key_id="key_1"),
            WatchRevocationsResponse(organization_id="org_1"),
        ):
            router.act_as(PRINCIPAL)
            await router.call(router.inference.ListServedModels, ListServedModelsRequest())
            identity.answers["Authenticate"] = PlatformError(Reason.API_KEY_INVALID)
            await router.call(router.inference.ListServedModels, ListServedModelsRequest())

            async def heard(message: bytes = revocation.SerializeToString()) -> bool:
                return bool(await redis.publish(CHANNEL, message))

            await until(heard, within_s=5)

            async def refused(of: Router = router) -> bool:
                with contextlib.suppress(PlatformError):
                    await of.call(of.inference.ListServedModels, ListServedModelsRequest())
                    return False
                return True

            await until(refused, within_s=1)


async def test_each_request_is_one_event_in_the_queue(
    config: RouterConfig, identity: PeerDouble, amqp_url: str, way: str
) -> None:
    events: list[UsageEvent] = []

    async def take(bodies: Sequence[bytes]) -> tuple[int, ...]:
        for body in bodies:
            events.extend(map(UsageEvent.FromString, UsageEventBatch.FromString(body).events))
        return ()

    consumer = asyncio.create_task(Broker(amqp_url, USAGE).consume(USAGE, take, batch_size=10, wait_s=0.05))
    async with running(replace(config, amqp_url=amqp_url), identity, way=way) as router, ScriptedBackend() as engine:
        await router.add_model("m")
        await router.add_backend("only", engine.base_url, "m")
        await router.answer(CHAT)
        await router.answer(CHAT | {"bad": 1})
        engine.default = Answer([*sse(chunk("a"), done=False), asyncio.Event()], content_type=EVENTS)
        call = router.infer(STREAM)
        await call.read()
        await call.read()
        call.cancel()
        await until(engine.received[1].abandoned.is_set)
    # The router has stopped: it has published all it ever will.
    await until(lambda: len(events) >= 3, within_s=15)
    by_outcome = {(event.outcome, event.reason): event for event in events}
    assert len(events) == len(by_outcome) == 3
    assert by_outcome[OUTCOME_SUCCEEDED, ""].usage.completion_tokens == 1
    assert by_outcome[OUTCOME_REFUSED, "unknown_field"].organization_id == "org_1"
    cancelled = by_outcome[OUTCOME_CANCELLED, "cancelled"]
    assert (cancelled.usage.completion_tokens, cancelled.backend_id) == (1, "only")
    consumer.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await consumer
