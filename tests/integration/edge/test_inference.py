"""POST /v1/...: bytes in, bytes out, errors before and after the first byte, clients and routers that go away."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from google.protobuf.message import Message

from aiaas.router.v1 import inference_service_pb2 as pb
from aiaas.type.v1 import usage_event_pb2
from edge.exchange import Limits
from edge.openai.inference import ENDPOINTS
from mesh.errors import PlatformError, Reason
from tests.doubles.peer import PeerDouble, Stream
from tests.integration.edge.harness import CHAT, HEADERS, KEY, Edge, running_edge, until

BODY = b'{"model": "m",  "messages": []}'
CHUNKS = [b'data: {"id": 1}\n\n', b'data: {"id": 2}\n\ndata: {"id": 3}\n\n', b"data: [DONE]\n\n"]


def head(content_type: str = "text/event-stream", **headers: str) -> pb.InferResponse:
    return pb.InferResponse(
        head=pb.InferHead(request_id="req_x", content_type=content_type, model="m", backend_id="b", headers=headers)
    )


def data(chunk: bytes) -> pb.InferResponse:
    return pb.InferResponse(data=chunk)


TAIL = pb.InferResponse(tail=pb.InferTail(finish_reason="stop"))


def script(*steps: pb.InferResponse | PlatformError | asyncio.Event) -> Stream:
    """A router that sends, fails, or waits for an event, in this order."""

    async def run(request: pb.InferRequest) -> AsyncIterator[pb.InferResponse]:
        for step in steps:
            if isinstance(step, PlatformError):
                raise step
            if isinstance(step, asyncio.Event):
                await step.wait()
            else:
                yield step

    return run


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["openai-version"] == "2020-10-01"
    assert int(response.headers["openai-processing-ms"]) >= 1
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(("path", "endpoint"), ENDPOINTS.items())
async def test_body_and_answer_pass_through_untouched(edge: Edge, router: PeerDouble, path: str, endpoint: Any) -> None:
    answer = b'{"object": "x",   "n": 1.0}'
    router.streams["Infer"] = script(
        head("application/json", **{"x-ratelimit-limit-requests": "7"}), data(answer), TAIL
    )
    response = await edge.client.post(path, content=BODY, headers={"idempotency-key": "again"})
    assert (response.status_code, response.content) == (200, answer)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-ratelimit-limit-requests"] == "7"
    assert "server" not in response.headers
    (call,) = router.received
    assert call.request == pb.InferRequest(
        endpoint=endpoint, body=BODY, idempotency_key="again", client_address="127.0.0.1"
    )
    assert call.metadata["authorization"] == f"Bearer {KEY}"
    assert call.metadata["x-request-id"] == response.headers["x-request-id"]
    assert call.timeout_s is not None
    assert 50 < call.timeout_s < 61


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\tbed", "schl\u00fcssel"])
async def test_idempotency_key_that_cannot_be_one_is_refused_by_name(edge: Edge, router: PeerDouble, key: str) -> None:
    response = await edge.client.post(CHAT, content=BODY, headers={b"idempotency-key": key.encode("latin-1")})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == ("Idempotency-Key", "invalid_value")
    assert error["message"] == "'Idempotency-Key' has to be 1 to 255 printable ASCII characters."
    assert router.received == []


async def test_longest_idempotency_key_passes_and_a_refusal_is_told_as_it_is(edge: Edge, router: PeerDouble) -> None:
    router.streams["Infer"] = script(PlatformError(Reason.IDEMPOTENCY_KEY_IN_USE, retry_after_s=1.0))
    key = '"' + "~ " * 127
    response = await edge.client.post(CHAT, content=BODY, headers={"idempotency-key": f"{key[:-1]}!"})
    assert (response.status_code, response.headers["retry-after"]) == (409, "1")
    assert error_of(response)["code"] == "idempotency_key_in_use"
    assert router.received[0].request.idempotency_key == f"{key[:-1]}!"


async def test_stream_arrives_chunk_by_chunk(edge: Edge, router: PeerDouble) -> None:
    gates = [asyncio.Event() for _ in CHUNKS]
    steps = [step for gate, chunk in zip(gates, CHUNKS, strict=True) for step in (gate, data(chunk))]
    router.streams["Infer"] = script(head(), *steps, TAIL)
    async with edge.client.stream("POST", CHAT, content=BODY) as response:
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache"
        arriving = response.aiter_raw()
        for gate, chunk in zip(gates, CHUNKS, strict=True):
            gate.set()
            assert await anext(arriving) == chunk
        assert [rest async for rest in arriving] == []


async def test_error_before_the_head_is_an_http_status_with_openais_json(edge: Edge, router: PeerDouble) -> None:
    router.streams["Infer"] = script(PlatformError(Reason.MODEL_NOT_FOUND, field="model", model="gpt-none"))
    response = await edge.client.post(CHAT, content=BODY)
    assert response.status_code == 404
    assert error_of(response) == {
        "message": "The model 'gpt-none' does not exist or you do not have access to it.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (PlatformError(Reason.RATE_LIMIT_EXCEEDED, retry_after_s=2.2), 429, {"retry-after": "3"}),
        (PlatformError(Reason.INSUFFICIENT_QUOTA), 429, {"x-should-retry": "false"}),
        (PlatformError(Reason.AUTH_UNAVAILABLE), 503, {"retry-after": "1"}),
        (PlatformError(Reason.API_KEY_INVALID), 401, {"www-authenticate": "Bearer"}),
        (PlatformError(Reason.BACKEND_TIMEOUT), 504, {}),
        (PlatformError(Reason.CANCELLED), 503, {}),
    ],
)
async def test_refusal_carries_its_headers(
    edge: Edge, router: PeerDouble, error: PlatformError, status: int, headers: dict[str, str]
) -> None:
    router.streams["Infer"] = script(error)
    response = await edge.client.post(CHAT, content=BODY)
    assert response.status_code == status
    assert error_of(response)["code"] == (error.entry.openai_code if status != 503 or headers else "unavailable")
    assert headers.items() <= dict(response.headers).items()


@pytest.mark.parametrize(
    ("path", "event"), [(CHAT, "data: {"), ("/v1/responses", 'event: error\ndata: {"type":"error",')]
)
async def test_error_in_mid_stream_is_an_event_and_there_is_no_done(
    edge: Edge, router: PeerDouble, path: str, event: str
) -> None:
    router.streams["Infer"] = script(head(), data(CHUNKS[0]), PlatformError(Reason.BACKEND_ERROR))
    response = await edge.client.post(path, content=BODY)
    assert response.status_code == 200
    assert response.content.startswith(CHUNKS[0])
    told = response.content.removeprefix(CHUNKS[0]).decode()
    assert told.startswith(event)
    assert told.endswith("\n\n")
    assert json.loads(told.partition("data: ")[2])["error"]["code"] == "backend_error"
    assert b"[DONE]" not in response.content


async def test_official_client_sees_an_error_in_mid_stream(edge: Edge, router: PeerDouble) -> None:
    router.streams["Infer"] = script(head(), data(CHUNKS[0]), PlatformError(Reason.BACKEND_ERROR))
    async with openai.DefaultAsyncHttpxClient(trust_env=False) as http:
        base_url = f"http://127.0.0.1:{edge.port}/v1"
        client = openai.AsyncOpenAI(base_url=base_url, api_key=KEY, http_client=http, max_retries=0)
        stream = await client.chat.completions.create(model="m", messages=[], stream=True)
        await anext(stream)
        with pytest.raises(openai.APIError, match="The model failed to answer") as error:
            await anext(stream)
    assert error.value.code == "backend_error"


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (PlatformError(Reason.RATE_LIMIT_EXCEEDED, retry_after_s=1), 2),
        (PlatformError(Reason.INSUFFICIENT_QUOTA), 1),
    ],
)
async def test_official_client_tries_again_after_a_rate_limit_and_not_after_a_spent_budget(
    edge: Edge, router: PeerDouble, error: PlatformError, attempts: int
) -> None:
    made = 0

    def refuse(request: pb.InferRequest) -> AsyncIterator[Message]:
        nonlocal made
        made += 1
        return script(error)(request)

    router.streams["Infer"] = refuse
    async with openai.DefaultAsyncHttpxClient(trust_env=False) as http:
        base_url = f"http://127.0.0.1:{edge.port}/v1"
        client = openai.AsyncOpenAI(base_url=base_url, api_key=KEY, http_client=http, max_retries=1)
        with pytest.raises(openai.RateLimitError) as told:
            await client.chat.completions.create(model="m", messages=[])
    assert told.value.type == error.entry.openai_type
    assert made == attempts


async def test_event_that_broke_off_is_ended_before_the_error(edge: Edge, router: PeerDouble) -> None:
    router.streams["Infer"] = script(head(), data(b'data: {"id"'), PlatformError(Reason.BACKEND_ERROR))
    response = await edge.client.post(CHAT, content=BODY)
    assert response.content.startswith(b'data: {"id"\n\ndata: {"error"')


async def test_document_that_broke_off_never_looks_complete(edge: Edge, router: PeerDouble) -> None:
    router.streams["Infer"] = script(head("application/json"), data(b'{"a":'), PlatformError(Reason.BACKEND_ERROR))
    with pytest.raises(httpx.RemoteProtocolError):
        await edge.client.post(CHAT, content=BODY)


@pytest.mark.parametrize("steps", [(data(b"x"),), (TAIL,)])
async def test_answer_without_a_head_is_an_internal_error(edge: Edge, router: PeerDouble, steps: Any) -> None:
    router.streams["Infer"] = script(*steps)
    response = await edge.client.post(CHAT, content=BODY)
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"


@pytest.mark.parametrize("sent_before", [(), (head(),), (head(), data(CHUNKS[0]))])
async def test_client_that_goes_away_cancels_the_call_within_a_second(
    edge: Edge, router: PeerDouble, sent_before: tuple[pb.InferResponse, ...]
) -> None:
    router.streams["Infer"] = script(*sent_before, asyncio.Event())
    _, writer = await edge.open()
    writer.write(
        b"POST %s HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\ncontent-length: 2\r\n\r\n{}" % CHAT.encode()
    )
    await until(lambda: router.received)
    writer.close()
    await until(lambda: router.cancelled == ["Infer"], within_s=2)


async def test_client_that_resets_in_a_stream_cancels_the_call(edge: Edge, router: PeerDouble) -> None:
    router.streams["Infer"] = script(head(), data(CHUNKS[0]), asyncio.Event())
    async with edge.client.stream("POST", CHAT, content=BODY) as response:
        await anext(response.aiter_raw())
    await until(lambda: router.cancelled == ["Infer"], within_s=2)


async def test_whole_answer_does_not_count_as_cancelled(edge: Edge, router: PeerDouble) -> None:
    for _ in range(20):
        router.streams["Infer"] = script(head(), data(CHUNKS[0]), TAIL)
        await edge.client.post(CHAT, content=BODY)
    assert len(router.received) == 20
    assert router.cancelled == []


async def test_deadline_ends_a_request(peers: dict[str, PeerDouble], router: PeerDouble) -> None:
    router.streams["Infer"] = script(asyncio.Event())
    async with running_edge(peers, limits=Limits(4 << 20, 30.0, 0.3)) as edge:
        response = await edge.client.post(CHAT, content=BODY)
    assert response.status_code == 504
    assert error_of(response)["code"] == "deadline_exceeded"
    await until(lambda: router.cancelled)


async def test_missing_credential_is_told_without_a_call(edge: Edge, router: PeerDouble) -> None:
    for authorization in (None, "", "Bearer", "Basic dTpw"):
        headers = {} if authorization is None else {"authorization": authorization}
        async with httpx.AsyncClient(base_url=edge.client.base_url, trust_env=False) as client:
            response = await client.post(CHAT, json={}, headers=headers)
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
    assert router.received == []


@pytest.mark.parametrize("credential", ["ключ".encode(), b"a b", b"k" * 5000, b"a\x80"])
async def test_credential_that_cannot_be_passed_on_is_invalid(edge: Edge, credential: bytes) -> None:
    response = await edge.client.post(CHAT, content=b"{}", headers={b"authorization": b"Bearer " + credential})
    assert response.status_code == 401
    assert error_of(response)["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("offered", "is_taken"),
    [("my-id_1.0", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("a/b", False), ("", False)],
)
async def test_request_id_of_the_client_is_taken_when_it_is_sane(
    edge: Edge, router: PeerDouble, offered: str, is_taken: bool
) -> None:
    response = await edge.client.post(CHAT, content=BODY, headers={"x-request-id": offered})
    assert (response.headers["x-request-id"] == offered) is is_taken
    assert router.received[0].metadata["x-request-id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json; charset=utf-8", 500),
        ("APPLICATION/JSON", 500),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain", 415),
        ("", 415),
    ],
)
async def test_only_json_is_taken(edge: Edge, content_type: str, status: int) -> None:
    # The silent double makes it a 500 once the body was accepted.
    response = await edge.client.post(CHAT, content=BODY, headers={"content-type": content_type})
    assert response.status_code == status
    assert error_of(response)["code"] == ("unsupported_media_type" if status == 415 else "internal_error")


async def test_wrong_verb_and_unknown_path_have_openais_shape(edge: Edge) -> None:
    wrong_verb = await edge.client.get(CHAT)
    assert (wrong_verb.status_code, wrong_verb.headers["allow"]) == (405, "POST")
    assert error_of(wrong_verb)["code"] == "method_not_allowed"
    for path in ("/v1", "/v1/", "/v1/no/such", "/v1/chat/completions/"):
        response = await edge.client.post(path, content=BODY)
        assert response.status_code == 404
        assert error_of(response)["code"] == "unknown_url"


async def test_body_of_the_largest_size_arrives_and_one_byte_more_is_too_large(edge: Edge, router: PeerDouble) -> None:
    router.streams["Infer"] = script(head("application/json"), data(b"{}"), TAIL)
    largest = b'"' + b"x" * ((4 << 20) - 2) + b'"'
    response = await edge.client.post(CHAT, content=largest)
    assert response.status_code == 200
    assert router.received[0].request.body == largest
    response = await edge.client.post(CHAT, content=largest + b" ")
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert len(router.received) == 1


async def test_chunked_body_that_grows_too_large_is_refused(edge: Edge, router: PeerDouble) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 20 << 20:
            sent += 1 << 20
            yield b"x" * (1 << 20)

    response = await edge.client.post(CHAT, content=endless())
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert router.received == []


async def test_declared_giant_is_refused_before_it_is_sent(edge: Edge) -> None:
    reader, writer = await edge.open()
    writer.write(
        b"POST %s HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\ncontent-length: 300000000\r\n\r\n" % CHAT.encode()
    )
    async with asyncio.timeout(2):
        answer = await reader.readuntil(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
    writer.close()


async def test_body_that_stalls_is_a_408_and_the_connection_closes(peers: dict[str, PeerDouble]) -> None:
    async with running_edge(peers, limits=Limits(4 << 20, 0.2, 60.0)) as edge:
        answer = await edge.exchange(
            b"POST %s HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\ncontent-length: 9\r\n\r\n{" % CHAT.encode(),
            within_s=8,
        )
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer
    assert b"connection: close" in answer


async def test_router_that_is_away_is_unavailable_within_three_seconds(edge: Edge, router: PeerDouble) -> None:
    await router.stop()
    async with asyncio.timeout(3):
        response = await edge.client.post(CHAT, content=BODY)
    assert response.status_code == 503
    assert error_of(response)["code"] == "unavailable"
    assert response.headers["retry-after"] == "1"


async def test_router_that_restarts_fails_no_request(edge: Edge, router: PeerDouble) -> None:
    router.streams["Infer"] = script(head("application/json"), data(b"{}"), TAIL)
    assert (await edge.client.post(CHAT, content=BODY)).status_code == 200
    await router.stop()
    await until_not_ready(edge)
    asking = asyncio.create_task(edge.client.post(CHAT, content=BODY))
    await asyncio.wait([asking], timeout=0.3)
    assert not asking.done()
    await router.start()
    assert (await asking).status_code == 200


async def until_not_ready(edge: Edge) -> None:
    """Return when the edge has noticed that its router is away."""
    async with asyncio.timeout(5):
        while (await edge.client.get("/ready")).status_code == 200:
            await asyncio.sleep(0.01)


async def test_router_that_dies_in_mid_stream_is_told_in_the_stream(edge: Edge, router: PeerDouble) -> None:
    router.streams["Infer"] = script(head(), data(CHUNKS[0]), asyncio.Event())
    async with edge.client.stream("POST", CHAT, content=BODY) as response:
        arriving = response.aiter_raw()
        assert await anext(arriving) == CHUNKS[0]
        await router.stop()
        rest = b"".join([chunk async for chunk in arriving])
    assert b'"code":"unavailable"' in rest
    assert b"[DONE]" not in rest


async def test_drain_lets_a_running_stream_end(peers: dict[str, PeerDouble], router: PeerDouble) -> None:
    gate = asyncio.Event()
    router.streams["Infer"] = script(head(), data(CHUNKS[0]), gate, data(CHUNKS[2]), TAIL)
    async with running_edge(peers, drain_s=5) as edge, edge.client.stream("POST", CHAT, content=BODY) as response:
        arriving = response.aiter_raw()
        assert await anext(arriving) == CHUNKS[0]
        edge.server.should_exit = True
        await until(lambda: not edge.server.servers[0].is_serving())
        gate.set()
        assert [chunk async for chunk in arriving] == [CHUNKS[2]]


async def test_stream_that_outlasts_the_drain_is_told_so(peers: dict[str, PeerDouble], router: PeerDouble) -> None:
    router.streams["Infer"] = script(head(), data(CHUNKS[0]), asyncio.Event())
    async with running_edge(peers, drain_s=0) as edge, edge.client.stream("POST", CHAT, content=BODY) as response:
        arriving = response.aiter_raw()
        assert await anext(arriving) == CHUNKS[0]
        edge.server.should_exit = True
        rest = b"".join([chunk async for chunk in arriving])
        assert b'"code":"unavailable"' in rest
        await until(lambda: router.cancelled)


async def test_keep_alive_connection_serves_one_request_after_another(edge: Edge, router: PeerDouble) -> None:
    router.streams["Infer"] = script(head("application/json"), data(b"{}"), TAIL)
    reader, writer = await edge.open()
    headers = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    for _ in range(3):
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{headers}content-length: 2\r\n\r\n{{}}".encode())
        assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.close()


def test_every_endpoint_is_one_the_router_knows() -> None:
    assert set(ENDPOINTS.values()) <= set(usage_event_pb2.Endpoint.values())
