"""What every RPC passes on its way in, on a real server: errors, deadlines, credentials, metrics, ids and spans."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY

from aiaas.identity.v1.api_key_service_pb2 import GetApiKeyRequest
from aiaas.router.v1.inference_service_pb2 import InferRequest, InferResponse, RelayBatch, RelayFrame
from aiaas.router.v1.model_service_pb2 import DeleteModelRequest, GetModelRequest, GetModelResponse, UpdateModelRequest
from mesh import context
from mesh.auth import Principal
from mesh.errors import PlatformError, Reason
from tests.integration.mesh.harness import DEVELOPER, EOF, Client, bearer, error_of, serving, until

INFER = "/aiaas.router.v1.InferenceService/Infer"
RELAY = "/aiaas.router.v1.InferenceService/Relay"
GET_MODEL = "/aiaas.router.v1.ModelService/GetModel"


@pytest.fixture
def address(tmp_path: Path) -> str:
    """A free address."""
    return f"unix:{tmp_path}/s"


@pytest.fixture(params=[False, True], ids=["untraced", "traced"])
def traced(request: pytest.FixtureRequest) -> bool:
    """Both chains: with OpenTelemetry's interceptor and without."""
    return bool(request.param)


def data(*parts: bytes) -> list[InferResponse]:
    return [InferResponse(data=part) for part in parts]


async def test_error_arrives_as_it_was_raised(address: str, traced: bool) -> None:
    async def refuse(*_: Any) -> Message:
        raise PlatformError(Reason.MODEL_NOT_FOUND, field="model", retry_after_s=1.5, model="gpt-9")

    async with serving(address, {"GetModel": refuse}, traced=traced) as client:
        error = await error_of(client.get_model())
    assert (error.reason, error.field, error.retry_after_s) == (Reason.MODEL_NOT_FOUND, "model", 1.5)
    assert error.details == {"model": "gpt-9"}
    assert "gpt-9" in error.message


async def test_error_in_the_middle_of_a_stream_arrives_after_what_was_sent(address: str, traced: bool) -> None:
    async def stream(*_: Any) -> AsyncIterator[InferResponse]:
        for part in data(b"1", b"2"):
            yield part
        raise PlatformError(Reason.BACKEND_ERROR, backend="b1")

    async with serving(address, {"Infer": stream}, traced=traced) as client:
        call = client.infer(timeout=5)
        received = [(await call.read()).data, (await call.read()).data]
        error = await error_of(call)
    assert received == [b"1", b"2"]
    assert (error.reason, error.details) == (Reason.BACKEND_ERROR, {"backend": "b1"})


@pytest.mark.parametrize("rpc", ["GetModel", "Infer"])
async def test_unknown_exception_tells_nothing_and_is_logged_with_the_request_id(
    address: str, rpc: str, traced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ids = []

    class Noting(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            ids.append(context.request_id.get())
            return True

    async def fail(*_: Any) -> Message:
        raise ValueError("postgresql://app:hunter2@db/prompt")

    async def fail_in_stream(*_: Any) -> AsyncIterator[InferResponse]:
        yield InferResponse()
        raise ValueError("postgresql://app:hunter2@db/prompt")

    noting = Noting()
    caplog.handler.addFilter(noting)
    metadata = (*bearer("developer"), ("x-request-id", "req_mine"))
    try:
        async with serving(address, {"GetModel": fail, "Infer": fail_in_stream}, traced=traced) as client:
            if rpc == "GetModel":
                error = await error_of(client.models.GetModel(GetModelRequest(), metadata=metadata, timeout=5))
            else:
                error = await error_of(client.inference.Infer(InferRequest(), metadata=metadata, timeout=5))
    finally:
        caplog.handler.removeFilter(noting)
    assert error.reason is Reason.INTERNAL
    assert "hunter2" not in str(error)
    assert [record.levelname for record in caplog.records if record.name == "mesh.interceptors.errors"] == ["ERROR"]
    assert "req_mine" in ids


async def test_method_that_a_servicer_lacks_is_unimplemented(address: str) -> None:
    async with serving(address) as client:
        lacking = client.models.UpdateModel(UpdateModelRequest(), metadata=bearer("developer"), timeout=5)
        assert (await error_of(lacking)).reason is Reason.UNIMPLEMENTED
        unknown: Any = client.channel.unary_unary("/aiaas.router.v1.ModelService/Nothing")  # type: ignore[call-arg]
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await unknown(b"", timeout=5)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_call_without_credential_is_refused_before_the_handler(address: str) -> None:
    async def handler(*_: Any) -> Message:
        raise AssertionError("the handler was reached")

    async with serving(address, {"GetModel": handler}) as client:
        bare = await error_of(client.models.GetModel(GetModelRequest(), timeout=5))
        basic = client.models.GetModel(GetModelRequest(), metadata=(("authorization", "Basic eDp5"),), timeout=5)
        assert (await error_of(basic)).reason is Reason.MISSING_CREDENTIALS
        unknown = await error_of(client.get_model("nobody"))
        lacking = await error_of(client.get_model("visitor"))
        stream = client.inference.Infer(InferRequest(), metadata=bearer("visitor"), timeout=5)
        assert (await error_of(stream)).reason is Reason.PERMISSION_DENIED
    assert bare.reason is Reason.MISSING_CREDENTIALS
    assert unknown.reason is Reason.API_KEY_INVALID
    assert (lacking.reason, lacking.details) == (Reason.PERMISSION_DENIED, {"permission": "models.get"})


async def test_other_organization_is_not_found(address: str) -> None:
    async with serving(address) as client:
        own = GetApiKeyRequest(organization_id="org_1", api_key_id="key_1")
        await client.keys.GetApiKey(own, metadata=bearer("developer"), timeout=5)
        other = GetApiKeyRequest(organization_id="org_2", api_key_id="key_1")
        error = await error_of(client.keys.GetApiKey(other, metadata=bearer("developer"), timeout=5))
    assert error.reason is Reason.NOT_FOUND


async def test_handlers_see_principal_credential_request_id_and_deadline(address: str, traced: bool) -> None:
    seen: list[tuple[Principal | None, str, str, bool]] = []

    def see() -> None:
        deadline = context.deadline.get()
        in_time = deadline is not None and 0 < deadline - asyncio.get_running_loop().time() < 5.1
        seen.append((context.principal.get(), context.credential.get(), context.request_id.get(), in_time))

    async def handler(*_: Any) -> Message:
        see()
        return GetModelResponse()

    async def stream(*_: Any) -> AsyncIterator[InferResponse]:
        see()
        yield InferResponse()
        see()

    metadata = (*bearer("developer"), ("x-request-id", "req_mine"))
    async with serving(address, {"GetModel": handler, "Infer": stream}, traced=traced) as client:
        await client.models.GetModel(GetModelRequest(), metadata=metadata, timeout=5)
        async for _ in client.inference.Infer(InferRequest(), metadata=metadata, timeout=5):
            pass
    assert seen == [(DEVELOPER, "developer", "req_mine", True)] * 3


@pytest.mark.parametrize("given", ["", "x" * 129, "two words", 'quote"', "new%0aline{}"])
async def test_request_id_of_odd_shape_is_replaced(address: str, given: str) -> None:
    seen = []

    async def handler(*_: Any) -> Message:
        seen.append(context.request_id.get())
        return GetModelResponse()

    metadata = (*bearer("developer"), ("x-request-id", given))
    async with serving(address, {"GetModel": handler}) as client:
        await client.models.GetModel(GetModelRequest(), metadata=metadata, timeout=5)
    assert seen[0].startswith("req_")


async def test_internal_streams_pass_both_ways_without_credential(address: str, traced: bool) -> None:
    async with serving(address, {"Relay": echo}, traced=traced) as client:
        call: Any = client.inference.Relay(timeout=5)  # type: ignore[call-arg]
        for number in range(3):
            await call.write(RelayBatch(frames=[RelayFrame(inference_id=number)]))
            assert (await call.read()).frames[0].inference_id == number
        await call.done_writing()
        assert await call.read() is EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_messages_pass_the_chain_uncopied(address: str) -> None:
    big = InferResponse(data=b"x" * (7 << 20))

    async def stream(*_: Any) -> AsyncIterator[InferResponse]:
        yield big

    async with serving(address, {"Infer": stream}) as client:
        received = [message async for message in client.infer(timeout=10)]
    assert received == [big]


async def test_deadline_ends_unary_calls_and_streams_and_is_told(address: str) -> None:
    cleaned = []

    async def sleep(*_: Any) -> Message:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append("unary")
        raise AssertionError

    async def stream(*_: Any) -> AsyncIterator[InferResponse]:
        try:
            yield InferResponse()
            await asyncio.Event().wait()
        finally:
            cleaned.append("stream")

    async with serving(address, {"GetModel": sleep, "Infer": stream}) as client:
        assert (await error_of(client.get_model(timeout=0.2))).reason is Reason.DEADLINE_EXCEEDED
        assert (await error_of(client.infer(timeout=0.2))).reason is Reason.DEADLINE_EXCEEDED
        await until(lambda: sorted(cleaned) == ["stream", "unary"], 2)


async def test_calls_without_deadline_get_one(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mesh.interceptors import deadline

    monkeypatch.setattr(deadline, "UNARY_TIMEOUT_S", 0.1)

    async def sleep(*_: Any) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def stream(*_: Any) -> AsyncIterator[InferResponse]:
        yield InferResponse()
        await asyncio.Event().wait()

    answers = {"GetModel": sleep, "Infer": stream}
    async with serving(address, answers, stream_timeout_s=0.1), grpc.aio.insecure_channel(address) as channel:
        client = Client(channel)  # a plain channel sets no deadline
        unary = client.models.GetModel(GetModelRequest(), metadata=bearer("developer"))
        assert (await error_of(unary)).reason is Reason.DEADLINE_EXCEEDED
        assert (await error_of(client.infer())).reason is Reason.DEADLINE_EXCEEDED


async def echo(requests: AsyncIterator[RelayBatch], _: Any) -> AsyncIterator[RelayBatch]:
    async for request in requests:
        yield request


async def test_two_way_stream_outlives_the_deadlines_of_other_calls(address: str, traced: bool) -> None:
    deadlines = []

    async def noting(batches: AsyncIterator[RelayBatch], _: Any) -> AsyncIterator[RelayBatch]:
        deadlines.append(context.deadline.get())
        async for batch in batches:
            yield batch

    async def hang(*_: Any) -> AsyncIterator[InferResponse]:
        yield InferResponse()
        await asyncio.Event().wait()

    options = {"traced": traced, "stream_timeout_s": 0.1}
    answers: dict[str, Any] = {"Relay": noting, "Infer": hang}
    async with serving(address, answers, **options), grpc.aio.insecure_channel(address) as channel:
        client = Client(channel)  # a plain channel sets no deadline
        relay: Any = client.inference.Relay()  # type: ignore[call-arg]
        for number in range(3):
            await relay.write(RelayBatch(frames=[RelayFrame(inference_id=number)]))
            assert (await relay.read()).frames[0].inference_id == number
            assert (await error_of(client.infer())).reason is Reason.DEADLINE_EXCEEDED
        relay.cancel()
    assert deadlines == [None]


async def test_two_way_stream_ends_by_the_deadline_of_its_caller(address: str) -> None:
    async with serving(address, {"Relay": echo}) as client:
        relay: Any = client.inference.Relay(timeout=0.2)  # type: ignore[call-arg]
        await relay.write(RelayBatch())
        await relay.read()
        assert (await error_of(relay)).reason is Reason.DEADLINE_EXCEEDED


async def test_stream_that_nobody_reads_ends_with_its_time(address: str, traced: bool) -> None:
    cleaned = asyncio.Event()

    async def stream(*_: Any) -> AsyncIterator[InferResponse]:
        try:
            while True:
                yield InferResponse(data=b"x" * (1 << 20))
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    options = {"traced": traced, "stream_timeout_s": 0.3}
    async with serving(address, {"Infer": stream}, **options), grpc.aio.insecure_channel(address) as channel:
        call = Client(channel).infer()
        await call.read()
        await asyncio.wait_for(cleaned.wait(), 2)
        error = await error_of(call)
    assert error.reason in (Reason.DEADLINE_EXCEEDED, Reason.CANCELLED)


@pytest.mark.parametrize("busy", ["waiting", "writing"])
async def test_cancelled_stream_cleans_up_at_once(address: str, traced: bool, busy: str) -> None:
    cleaned = asyncio.Event()

    async def stream(*_: Any) -> AsyncIterator[InferResponse]:
        try:
            yield InferResponse()
            while busy == "writing":
                yield InferResponse(data=b"x" * (1 << 20))
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    async with serving(address, {"Infer": stream}, traced=traced) as client:
        call = client.infer(timeout=60)
        await call.read()
        await asyncio.sleep(0.1)
        call.cancel()
        await asyncio.wait_for(cleaned.wait(), 1)


def requests(method: str, code: str) -> float:
    return REGISTRY.get_sample_value("aiaas_grpc_server_requests_total", {"method": method, "code": code}) or 0


def durations(method: str) -> float:
    return REGISTRY.get_sample_value("aiaas_grpc_server_request_duration_seconds_count", {"method": method}) or 0


async def test_metrics_count_each_end_once_by_its_code(address: str, traced: bool) -> None:
    mode = "fine"

    async def handler(*_: Any) -> Message:
        if mode == "refuse":
            raise PlatformError(Reason.MODEL_NOT_FOUND, model="m")
        if mode == "fail":
            raise ValueError
        if mode == "hang":
            await asyncio.Event().wait()
        return GetModelResponse()

    async def stream(*_: Any) -> AsyncIterator[InferResponse]:
        yield InferResponse()
        await handler()

    ends = (("fine", "OK"), ("refuse", "NOT_FOUND"), ("fail", "INTERNAL"), ("hang", "DEADLINE_EXCEEDED"))
    async with serving(address, {"GetModel": handler, "Infer": stream}, traced=traced) as client:
        for mode, code in ends:
            for method in (GET_MODEL, INFER):
                before, all_before = requests(method, code), durations(method)
                timeout_s = 0.5 if mode == "hang" else 10
                call: Any = (
                    client.get_model(timeout=timeout_s) if method == GET_MODEL else client.infer(timeout=timeout_s)
                )
                if mode == "fine" and method == GET_MODEL:
                    await call
                elif mode == "fine":
                    assert len([message async for message in call]) == 1
                else:
                    await error_of(call)
                await until(lambda: requests(method, code) == before + 1)  # noqa: B023
                assert durations(method) == all_before + 1
        mode, before = "hang", requests(INFER, "CANCELLED")
        call = client.infer(timeout=5)
        await call.read()
        call.cancel()
        await until(lambda: requests(INFER, "CANCELLED") == before + 1)


@pytest.mark.parametrize("end", ["orderly", "cut"])
async def test_two_way_stream_is_counted_once_when_it_ends(address: str, traced: bool, end: str) -> None:
    orderly, all_ends = requests(RELAY, "OK"), durations(RELAY)
    async with serving(address, {"Relay": echo}, traced=traced) as client:
        relay: Any = client.inference.Relay()  # type: ignore[call-arg]
        await relay.write(RelayBatch())
        await relay.read()
        assert durations(RELAY) == all_ends
        if end == "orderly":
            await relay.done_writing()
            assert await relay.read() is EOF
            await until(lambda: requests(RELAY, "OK") == orderly + 1)
        else:
            # What the server sees first of it is that the requests end, so it may well be counted as OK.
            relay.cancel()
        await until(lambda: durations(RELAY) == all_ends + 1)


async def test_refused_call_is_counted_by_its_refusal(address: str) -> None:
    before = requests(GET_MODEL, "UNAUTHENTICATED")
    async with serving(address) as client:
        await error_of(client.get_model("nobody"))
    assert requests(GET_MODEL, "UNAUTHENTICATED") == before + 1


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """The spans that ended."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


async def test_trace_goes_on_in_the_next_service(tmp_path: Path, spans: InMemorySpanExporter) -> None:
    async with serving(f"unix:{tmp_path}/back", traced=True) as onward:

        async def front(*_: Any) -> Message:
            return await onward.models.GetModel(GetModelRequest())

        async with serving(f"unix:{tmp_path}/front", {"GetModel": front}, traced=True) as client:
            await client.get_model(timeout=5)
            await until(lambda: len(spans.get_finished_spans()) == 2)
    inner, outer = spans.get_finished_spans()
    assert inner.parent is not None
    assert outer.context is not None
    assert (inner.parent.span_id, inner.parent.trace_id) == (outer.context.span_id, outer.context.trace_id)


async def test_each_call_is_one_span_with_its_status(address: str, spans: InMemorySpanExporter) -> None:
    async def delete(request: DeleteModelRequest, _: Any) -> Message:
        raise ValueError("a secret")

    async def stream(*_: Any) -> AsyncIterator[InferResponse]:
        yield InferResponse()
        yield InferResponse()

    async with serving(address, {"DeleteModel": delete, "Infer": stream}, traced=True) as client:
        assert len([message async for message in client.infer(timeout=5)]) == 2
        deleting = client.models.DeleteModel(DeleteModelRequest(), metadata=bearer("developer"), timeout=5)
        await error_of(deleting)
        await until(lambda: len(spans.get_finished_spans()) == 2)
    finished = spans.get_finished_spans()
    assert [(span.name, span.status.is_ok) for span in finished] == [(INFER, True), (finished[1].name, False)]
    assert "a secret" not in "".join(span.to_json() for span in finished)
    assert "developer" not in "".join(span.to_json() for span in finished)


async def test_span_of_a_stream_ends_with_the_stream(address: str, spans: InMemorySpanExporter) -> None:
    last = asyncio.Event()
    ended_ns: list[int] = []

    async def stream(*_: Any) -> AsyncIterator[InferResponse]:
        yield InferResponse()
        await last.wait()
        yield InferResponse()
        ended_ns.append(time.time_ns())

    async with serving(address, {"Infer": stream}, traced=True) as client:
        call = client.infer(timeout=5)
        await call.read()
        await client.get_model()
        await until(lambda: len(spans.get_finished_spans()) == 1)
        last.set()
        assert len([message async for message in call]) == 1
        await until(lambda: len(spans.get_finished_spans()) == 2)
    streamed = spans.get_finished_spans()[1]
    assert streamed.name == INFER
    assert streamed.end_time is not None
    assert streamed.end_time >= ended_ns[0]


async def test_two_way_stream_has_no_span(address: str, spans: InMemorySpanExporter) -> None:
    async with serving(address, {"Relay": echo}, traced=True) as client:
        relay: Any = client.inference.Relay(timeout=5)  # type: ignore[call-arg]
        await relay.write(RelayBatch())
        await relay.read()
        await relay.done_writing()
        assert await relay.read() is EOF
        await client.get_model()
        await until(lambda: len(spans.get_finished_spans()) == 1)
    assert [span.name for span in spans.get_finished_spans()] == [GET_MODEL]
