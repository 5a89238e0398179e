"""What a relay has beyond an Infer: signs of life, credit, many answers side by side, and an end in good order."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from aiaas.router.v1 import inference_service_pb2 as pb
from aiaas.type.v1.usage_event_pb2 import ENDPOINT_CHAT_COMPLETIONS
from mesh.errors import PlatformError, Reason
from router import inference_service
from router.config import RouterConfig
from tests.doubles.peer import PeerDouble
from tests.doubles.relay_client import CREDIT_BYTES, RelayedCall
from tests.doubles.scripted_backend import Answer, ScriptedBackend, chat_stream, chunk, sse
from tests.integration.router.conftest import Router, running, until

STREAM = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
EVENTS = "text/event-stream"


@pytest.fixture
async def engine() -> AsyncIterator[ScriptedBackend]:
    async with ScriptedBackend() as engine:
        yield engine


@pytest.fixture
async def relayed(
    config: RouterConfig, identity: PeerDouble, engine: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Router]:
    monkeypatch.setattr("router.server._FLUSH_S", 0.0)
    async with running(config, identity, way="Relay") as router:
        await router.add_model("m")
        await router.add_backend("only", engine.base_url, "m")
        yield router


async def read(call: RelayedCall) -> bytes:
    return b"".join([part.data async for part in call])


async def test_ping_is_answered(relayed: Router) -> None:
    await until(lambda: relayed.relay.pongs > 1)


async def test_answers_run_side_by_side_and_none_holds_up_another(relayed: Router, engine: ScriptedBackend) -> None:
    held = asyncio.Event()
    engine.script.append(Answer([*sse(chunk("slow"), done=False), held, *chat_stream("!").steps], content_type=EVENTS))
    slow = asyncio.create_task(read(relayed.infer(STREAM)))
    await until(lambda: bool(engine.received))
    engine.default = chat_stream("a", "b")
    answers = await asyncio.gather(*(read(relayed.infer(STREAM)) for _ in range(20)))
    assert all(answer.endswith(b"data: [DONE]\n\n") for answer in answers)
    assert not slow.done()
    held.set()
    assert b"slow" in await slow


async def test_reader_without_credit_stops_its_engine_and_no_other(relayed: Router, engine: ScriptedBackend) -> None:
    big = sse(*(chunk("x" * 60_000) for _ in range(400)), done=False)
    engine.script.append(Answer(big, content_type=EVENTS))
    unread = relayed.infer(STREAM)
    assert (await unread.read()) is not None
    sent: list[int] = []

    def is_held_up() -> bool:
        sent.append(engine.received[0].sent_bytes)
        return len(sent) > 16 and sent[-1] == sent[-16] > 0

    await until(is_held_up, within_s=10)
    # Nothing gave it credit beyond the first: what has come to this side is bounded.
    arrived = sum(len(frame.data) for frame in list(unread.frames._queue))
    assert CREDIT_BYTES <= arrived < CREDIT_BYTES + (1 << 20)
    engine.default = chat_stream("a")
    assert (await read(relayed.infer(STREAM))).endswith(b"data: [DONE]\n\n")
    # Credit sets it going again, to its end.
    data = b"".join([part.data async for part in _rest(unread)])
    assert data == b"".join(big)


async def _rest(call: RelayedCall) -> AsyncIterator[pb.InferResponse]:
    with contextlib.suppress(PlatformError):
        while (part := await call.read()) is not None:
            yield part


async def test_router_that_stops_drains_its_relays(
    config: RouterConfig, identity: PeerDouble, engine: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.server._FLUSH_S", 0.0)
    async with running(config, identity, way="Relay") as router:
        await router.add_model("m")
        await router.add_backend("only", engine.base_url, "m")
        go_on = asyncio.Event()
        engine.default = Answer([*sse(chunk("a"), done=False), go_on, *chat_stream("b").steps], content_type=EVENTS)
        running_call = asyncio.create_task(read(router.infer(STREAM)))
        await until(lambda: len(engine.received) == 1)
        router.stop.set()
        async with asyncio.timeout(5):
            await router.relay.drained.wait()
        # The edge may have opened one more before it heard of that.
        late = asyncio.create_task(read(router.infer(STREAM)))
        await until(lambda: len(engine.received) == 2)
        router.relay.say(pb.RelayFrame(drain=pb.RelayDrain()))
        go_on.set()
        for answer in (await running_call, await late):
            assert answer.endswith(b"data: [DONE]\n\n")
        await until(lambda: router.relay.has_ended)


async def test_relay_whose_last_inference_is_cancelled_while_it_drains_ends_too(
    relayed: Router, engine: ScriptedBackend
) -> None:
    engine.default = Answer([*sse(chunk("a"), done=False), asyncio.Event()], content_type=EVENTS)
    call = relayed.infer(STREAM)
    await call.read()
    relayed.relay.say(pb.RelayFrame(drain=pb.RelayDrain()))
    call.cancel()
    await until(lambda: relayed.relay.has_ended)


async def test_inference_that_is_cancelled_as_it_is_opened_leaves_nothing_behind(relayed: Router) -> None:
    assert relayed.relays is not None
    relay = relayed.relays.open()
    opened = pb.RelayFrame(inference_id=1, open=pb.RelayOpen(request_id="req_1", credential=relayed.credential))
    relay.receive(pb.RelayBatch(frames=[opened, pb.RelayFrame(inference_id=1, cancel=pb.RelayCancel())]))
    await until(lambda: not relay._tasks and not relay._running)
    await relayed.relays.close(relay)


async def test_edge_that_falls_silent_has_its_inferences_ended(
    relayed: Router, engine: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_service, "SILENCE_S", 0.2)
    engine.default = Answer([*sse(chunk("a"), done=False), asyncio.Event()], content_type=EVENTS)
    relayed.relay.is_silent = True
    call = relayed.infer(STREAM)
    await call.read()
    await until(engine.received[0].abandoned.is_set, within_s=2)
    await until(lambda: relayed.relay.has_ended)


async def test_edge_that_goes_has_its_inferences_ended_within_a_second(
    relayed: Router, engine: ScriptedBackend
) -> None:
    engine.default = Answer([*sse(chunk("a"), done=False), asyncio.Event()], content_type=EVENTS)
    calls = [relayed.infer(STREAM) for _ in range(10)]
    for call in calls:
        await call.read()
    await relayed.channel.close(None)
    for received in engine.received:
        await until(received.abandoned.is_set, within_s=1)
    assert len(engine.received) == 10


async def test_each_open_is_judged_by_its_own_credential(relayed: Router) -> None:
    request = pb.InferRequest(endpoint=ENDPOINT_CHAT_COMPLETIONS, body=b"{}")
    for credential, reason in (("", Reason.MISSING_CREDENTIALS), ("aias_wrong", Reason.API_KEY_INVALID)):
        call = relayed.relay.infer(
            pb.RelayOpen(request=request, credential=credential, request_id="req_1", timeout_millis=1000)
        )
        with pytest.raises(PlatformError) as caught:
            await call.read()
        assert caught.value.reason is reason
