"""Asking engines over connections that are kept, and that may close at any moment."""

import asyncio
import contextlib
import gc
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from aiaas.router.v1.backend_service_pb2 import ENGINE_KIND_VLLM
from router import upstream as upstream_room
from router.backends import Backend
from router.http1 import (
    BrokenAnswerError,
    Connection,
    ConnectionLostError,
    ConnectionRefusedUpstreamError,
    UnansweredError,
    UpstreamAnswer,
    UpstreamError,
    UpstreamTimeoutError,
)
from router.upstream import HttpUpstream, MisconfiguredBackendError, Timeouts
from tests.doubles.raw_engine import Asked, RawEngine, answering
from tests.doubles.recorded_answers import GOOD, SURPLUS, Recorded, chunks, head
from tests.doubles.scripted_backend import Answer, Cut, ScriptedBackend
from tests.doubles.wire import Ear

OK = Answer([b"{}"])
TIMEOUTS = Timeouts(connect_s=2, first_byte_s=5, answer_s=5, idle_s=5)
CERTIFICATE = Path(__file__).parents[2] / "doubles" / "localhost.pem"
DOCUMENT = head("HTTP/1.1 200 OK", "Content-Type: application/json", "Content-Length: 2") + b"{}"
STREAM = head("HTTP/1.1 200 OK", "Content-Type: text/event-stream", "Transfer-Encoding: chunked")


@pytest_asyncio.fixture
async def upstream() -> AsyncIterator[HttpUpstream]:
    async with HttpUpstream({}) as upstream:
        yield upstream


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[ScriptedBackend]:
    async with ScriptedBackend(OK) as engine:
        yield engine


async def ask(upstream: HttpUpstream, base_url: str, body: bytes = b"{}") -> bytes:
    backend = Backend("engine", base_url, ENGINE_KIND_VLLM)
    answer = await upstream.open(backend, "/v1/completions", body, TIMEOUTS, streamed=False)
    try:
        return await answer.read(1 << 20)
    finally:
        answer.close()


@pytest.mark.parametrize("cut", Cut)
async def test_connection_that_breaks_when_it_is_reused_is_replaced(
    upstream: HttpUpstream, engine: ScriptedBackend, cut: Cut
) -> None:
    engine.script.extend([OK, Answer(before=[cut])])
    assert await ask(upstream, engine.base_url) == b"{}"
    assert await ask(upstream, engine.base_url) == b"{}"
    first, lost, repeated = (received.client_port for received in engine.received)
    assert first == lost != repeated


async def test_replacement_is_new_though_the_pool_holds_others(upstream: HttpUpstream, engine: ScriptedBackend) -> None:
    together = asyncio.Event()
    engine.script.extend([Answer([b"{}", together])] * 3)
    asked = [asyncio.create_task(ask(upstream, engine.base_url)) for _ in range(3)]
    async with asyncio.timeout(5):
        while len(engine.received) < 3:
            await asyncio.sleep(0.005)
    together.set()
    await asyncio.gather(*asked)
    engine.script.append(Answer(before=[Cut.CLOSE]))
    assert await ask(upstream, engine.base_url) == b"{}"
    pooled = {received.client_port for received in engine.received[:3]}
    assert len(pooled) == 3
    assert [received.client_port in pooled for received in engine.received[3:]] == [True, False]


@pytest.mark.parametrize("cut", Cut)
async def test_fresh_connection_that_breaks_is_not_tried_again(
    upstream: HttpUpstream, engine: ScriptedBackend, cut: Cut
) -> None:
    engine.default = Answer(before=[cut])
    with pytest.raises(ConnectionLostError):
        await ask(upstream, engine.base_url)
    assert len(engine.received) == 1


async def test_second_try_is_the_last(upstream: HttpUpstream, engine: ScriptedBackend) -> None:
    await ask(upstream, engine.base_url)
    engine.default = Answer(before=[Cut.RESET])
    with pytest.raises(ConnectionLostError):
        await ask(upstream, engine.base_url)
    assert len(engine.received) == 3


async def test_answer_that_breaks_after_its_head_is_not_asked_for_again(
    upstream: HttpUpstream, engine: ScriptedBackend
) -> None:
    await ask(upstream, engine.base_url)
    engine.default = Answer([Cut.CLOSE])
    with pytest.raises(ConnectionLostError):
        await ask(upstream, engine.base_url)
    assert len(engine.received) == 2


@contextlib.asynccontextmanager
async def engine_of_one_answer(
    second: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """The address of an engine that answers once on each connection, then does `second`, and closes it."""

    handlers: list[asyncio.Task[object] | None] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        try:
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
            await second(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for handler in handlers:
        if handler is not None and not handler.done():
            handler.cancel()
            await asyncio.wait([handler])


async def read_request(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))


async def test_connection_that_closes_while_a_large_request_is_sent_is_replaced(upstream: HttpUpstream) -> None:
    async def close(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async with engine_of_one_answer(close) as base_url:
        assert await ask(upstream, base_url) == b"{}"
        assert await ask(upstream, base_url, b"x" * 8_000_000) == b"{}"


async def test_answer_whose_head_has_begun_is_not_asked_for_again(upstream: HttpUpstream) -> None:
    asked = 0

    async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        with contextlib.suppress(asyncio.IncompleteReadError):
            await read_request(reader)
            asked += 1
            writer.write(b"HTTP/1.1 200 OK\r\n")

    async with engine_of_one_answer(begin) as base_url:
        await ask(upstream, base_url)
        with pytest.raises(ConnectionLostError):
            await ask(upstream, base_url)
    assert asked == 1


def backend_at(base_url: str, **fields: str) -> Backend:
    return Backend("engine", base_url, ENGINE_KIND_VLLM, **fields)  # type: ignore[arg-type]


async def open_answer(
    upstream: HttpUpstream,
    base_url: str,
    body: bytes = b"{}",
    *,
    streamed: bool = True,
    connect_s: float = 2,
    first_byte_s: float = 5,
    answer_s: float = 5,
    idle_s: float = 5,
) -> UpstreamAnswer:
    timeouts = Timeouts(connect_s, first_byte_s, answer_s, idle_s)
    return await upstream.open(backend_at(base_url), "/v1/x", body, timeouts, streamed=streamed)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def silence(asked: Asked) -> bool:
    """Reads whatever comes, and says nothing, until the client is gone."""
    while await asked.reader.read(65_536):
        pass
    raise ConnectionError


async def stalling(asked: Asked) -> bool:
    """Begins a stream, and does not go on."""
    asked.writer.write(STREAM + chunks(b"a", end=b""))
    return await silence(asked)


# Requests


async def test_request_says_what_an_engine_needs_and_nothing_else() -> None:
    async with (
        RawEngine(answering(DOCUMENT)) as engine,
        HttpUpstream({"AIAAS_ENGINE_KEY": "canary"}) as upstream,
    ):
        backend = backend_at(f"{engine.base_url}/some/prefix", credential_variable="AIAAS_ENGINE_KEY")
        for _ in range(2):
            answer = await upstream.open(backend, "/v1/completions", b"12345", TIMEOUTS, streamed=False)
            answer.close()
        (await upstream.open(backend_at(engine.base_url), "/v1/embeddings", b"", TIMEOUTS, streamed=False)).close()
    host = engine.base_url.removeprefix("http://")
    with_key = (
        f"POST /some/prefix/v1/completions HTTP/1.1\r\nHost: {host}\r\nAccept-Encoding: identity\r\n"
        "Content-Type: application/json\r\nAuthorization: Bearer canary\r\nContent-Length: 5\r\n\r\n"
    )
    without = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}\r\nAccept-Encoding: identity\r\n"
        "Content-Type: application/json\r\nContent-Length: 0\r\n\r\n"
    )
    assert [asked.head.decode() for asked in engine.asked] == [with_key, with_key, without]


@pytest.mark.parametrize("credential", ["", "canary\r\nX-Other: 1", "canary\n", "canary\u2014", "\x00canary"])
async def test_key_that_is_missing_or_would_break_the_head_is_never_sent(credential: str) -> None:
    async with (
        RawEngine(answering(DOCUMENT)) as engine,
        HttpUpstream({"AIAAS_ENGINE_KEY": credential}) as upstream,
    ):
        backend = backend_at(engine.base_url, credential_variable="AIAAS_ENGINE_KEY")
        with pytest.raises(MisconfiguredBackendError) as refusal:
            await upstream.open(backend, "/v1/x", b"", TIMEOUTS, streamed=False)
        assert engine.connections == 0
    assert "canary" not in str(refusal.value)


async def test_large_request_arrives_whole(upstream: HttpUpstream) -> None:
    came: list[bytes] = []

    async def answer(asked: Asked) -> bool:
        came.append(await asked.body())
        asked.writer.write(DOCUMENT)
        return True

    body = bytes(range(256)) * 40_000
    async with RawEngine(answer) as engine:
        for _ in range(2):
            assert await ask(upstream, engine.base_url, body) == b"{}"
        assert engine.connections == 1
    assert came == [body, body]


async def test_small_packets_are_not_held_back(upstream: HttpUpstream) -> None:
    async with RawEngine(stalling) as engine:
        answer = await open_answer(upstream, engine.base_url)
        assert answer._connection is not None
        peer = answer._connection._transport.get_extra_info("socket")
        assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        answer.close()


# The pool


@pytest.mark.parametrize("recorded", [*GOOD, *SURPLUS], ids=str)
async def test_connection_is_used_again_when_its_answer_lets_it(upstream: HttpUpstream, recorded: Recorded) -> None:
    async def answer(asked: Asked) -> bool:
        await asked.body()
        asked.writer.write(recorded.raw)
        return b"ends" not in recorded.name.encode() and recorded.name != "HTTP/1.0"

    async with RawEngine(answer) as engine:
        for _ in range(2):
            assert await ask(upstream, engine.base_url) == recorded.body
    assert engine.connections == (1 if recorded.keeps else 2)


async def test_idle_connections_are_closed_after_a_while(
    upstream: HttpUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_room, "_KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr(upstream_room, "_EVICTION_S", 0.01)
    async with RawEngine(answering(DOCUMENT)) as engine:
        for _ in range(2):
            await ask(upstream, engine.base_url)
            gone = engine.gone + 1
            await until(lambda gone=gone: engine.gone == gone)  # type: ignore[misc]
        assert engine.connections == 2
        assert not upstream._idle


async def test_connection_that_has_been_idle_for_too_long_is_not_used(
    upstream: HttpUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with RawEngine(answering(DOCUMENT)) as engine:
        await ask(upstream, engine.base_url)
        monkeypatch.setattr(upstream_room, "_KEEP_ALIVE_S", -1.0)
        await ask(upstream, engine.base_url)
    assert engine.connections == 2


async def test_engines_do_not_share_connections(upstream: HttpUpstream) -> None:
    async with RawEngine(answering(DOCUMENT)) as one, RawEngine(answering(DOCUMENT)) as other:
        for engine in (one, other, one, other):
            await ask(upstream, engine.base_url)
    assert (one.connections, other.connections) == (1, 1)


async def test_leaving_closes_idle_connections_and_those_that_come_back() -> None:
    async with RawEngine(answering(DOCUMENT)) as engine:
        async with HttpUpstream({}) as upstream:
            late = await open_answer(upstream, engine.base_url)
            (await open_answer(upstream, engine.base_url)).close()
        await until(lambda: engine.gone == 1)
        assert await late.read(2) == b"{}"
        late.close()
        await until(lambda: engine.gone == 2)


async def test_repetition_has_only_the_time_that_is_left(upstream: HttpUpstream) -> None:
    async def answer(asked: Asked) -> bool:
        if len(served.asked) == 1:
            asked.writer.write(DOCUMENT)
            await asked.body()
            return True
        if len(served.asked) == 2:
            await asyncio.sleep(0.3)
            return False
        return await silence(asked)

    async with RawEngine(answer) as served:
        await ask(upstream, served.base_url)
        began = asyncio.get_running_loop().time()
        with pytest.raises(UpstreamTimeoutError):
            await open_answer(upstream, served.base_url, first_byte_s=0.5)
        assert len(served.asked) == 3
        assert asyncio.get_running_loop().time() - began < 0.75


# Connecting


async def test_engine_that_does_not_listen_refuses(upstream: HttpUpstream) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedUpstreamError):
            await open_answer(upstream, f"http://127.0.0.1:{unused.getsockname()[1]}")


@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b", "x" * 70])
async def test_host_that_cannot_be_found_refuses(upstream: HttpUpstream, host: str) -> None:
    with pytest.raises(ConnectionRefusedUpstreamError):
        await open_answer(upstream, f"http://{host}:1")


async def test_time_to_connect_includes_tls(upstream: HttpUpstream) -> None:
    # What is read once, and would take most of the time.
    upstream._tls = ssl.create_default_context()
    async with RawEngine(silence) as engine:
        with pytest.raises(ConnectionRefusedUpstreamError):
            await open_answer(upstream, engine.base_url.replace("http:", "https:"), connect_s=0.5)
        await until(lambda: engine.gone == 1)


async def test_connection_that_is_reset_at_once_is_an_error_and_no_hang(upstream: HttpUpstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]

        async def reset() -> None:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()

        for _ in range(20):
            resetting = asyncio.create_task(reset())
            with pytest.raises(UpstreamError) as lost:
                await open_answer(upstream, f"http://127.0.0.1:{port}")
            assert isinstance(lost.value, UnansweredError | ConnectionRefusedUpstreamError)
            await resetting


@pytest.fixture
def tls(monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """The server's side. Whoever uses the system's authorities trusts it."""
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    return context


async def test_engines_speak_tls(upstream: HttpUpstream, tls: ssl.SSLContext) -> None:
    body = b"x" * 3_000_000
    async with RawEngine(answering(head("HTTP/1.1 200 OK", "Content-Length: 900000") + b"y" * 900_000), tls) as engine:
        for _ in range(2):
            assert await ask(upstream, engine.base_url, body) == b"y" * 900_000
    assert engine.connections == 1


@pytest.mark.parametrize("wrong", ["authority", "name"])
async def test_certificate_that_nobody_vouches_for_is_refused(
    upstream: HttpUpstream, tls: ssl.SSLContext, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong == "authority":
        monkeypatch.delenv("SSL_CERT_FILE")
    async with RawEngine(answering(DOCUMENT), tls) as engine:
        base_url = engine.base_url if wrong == "authority" else engine.base_url.replace("127.0.0.1", "127.0.0.2")
        with pytest.raises(ConnectionRefusedUpstreamError):
            await open_answer(upstream, base_url)
        assert engine.asked == []


async def half(asked: Asked) -> bool:
    """Says that its body goes on to the end, and ends."""
    asked.writer.write(head("HTTP/1.1 200 OK") + b"half of i")
    await asked.body()
    return False


async def test_body_that_the_end_ends_is_whole_over_tls(upstream: HttpUpstream, tls: ssl.SSLContext) -> None:
    async with RawEngine(half, tls) as engine:
        assert await ask(upstream, engine.base_url) == b"half of i"


# asyncio's own loop does not tell the two apart.
@pytest.mark.asyncio(loop_factories=["uvloop"])
async def test_end_over_tls_that_is_not_signed_ends_no_body(upstream: HttpUpstream, tls: ssl.SSLContext) -> None:
    async def abort(asked: Asked) -> bool:
        await half(asked)
        asked.writer.transport.abort()
        return False

    async with RawEngine(abort, tls) as engine:
        with pytest.raises(ConnectionLostError):
            await ask(upstream, engine.base_url)


# Silence, and whoever does not wait for its end


@pytest.mark.parametrize("streamed", [True, False])
async def test_first_byte_of_a_stream_and_of_a_whole_answer_have_limits_of_their_own(
    upstream: HttpUpstream, streamed: bool
) -> None:
    async with RawEngine(silence) as engine:
        with pytest.raises(UpstreamTimeoutError):
            await open_answer(
                upstream,
                engine.base_url,
                streamed=streamed,
                first_byte_s=0.05 if streamed else 60,
                answer_s=60 if streamed else 0.05,
            )
        await until(lambda: engine.gone == 1)


async def test_stream_that_falls_silent_is_given_up(upstream: HttpUpstream) -> None:
    async with RawEngine(stalling) as engine:
        answer = await open_answer(upstream, engine.base_url, idle_s=0.05)
        ear = Ear()
        answer.forward(ear)
        await until(lambda: bool(ear.ends))
        assert [type(error) for error in ear.ends] == [UpstreamTimeoutError]
        await until(lambda: engine.gone == 1)
        answer.close()


async def test_cancelling_closes_the_connection(upstream: HttpUpstream) -> None:
    async with RawEngine(silence) as engine:
        opening = asyncio.create_task(open_answer(upstream, engine.base_url))
        await until(lambda: len(engine.asked) == 1)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await until(lambda: engine.gone == 1)


async def test_closing_an_answer_stops_the_engine(upstream: HttpUpstream) -> None:
    async with RawEngine(stalling) as engine:
        (await open_answer(upstream, engine.base_url)).close()
        await until(lambda: engine.gone == 1)


# Answers


async def test_engine_waits_for_a_receiver_that_does_not_keep_up(upstream: HttpUpstream) -> None:
    size_bytes = 64 << 20
    written_bytes = 0

    async def answer(asked: Asked) -> bool:
        nonlocal written_bytes
        await asked.body()
        asked.writer.write(head("HTTP/1.1 200 OK", f"Content-Length: {size_bytes}"))
        while written_bytes < size_bytes:
            asked.writer.write(b"x" * 65_536)
            await asked.writer.drain()
            written_bytes += 65_536
        return True

    async with RawEngine(answer) as engine:
        answer_of_it = await open_answer(upstream, engine.base_url, idle_s=0.5)
        ear = Ear(lambda _: answer_of_it.pause() if len(ear.pieces) == 3 else None)
        answer_of_it.forward(ear)
        # Longer than silence may last: it does not count while the engine has to wait.
        await asyncio.sleep(1)
        assert len(ear.pieces) == 3
        assert written_bytes < size_bytes / 2
        answer_of_it.resume()
        await until(lambda: bool(ear.ends))
        assert ear.ends == [None]
        assert len(ear.body) == size_bytes
        answer_of_it.close()


@pytest.mark.parametrize("size_bytes", [100, 20_000_000])
async def test_answer_that_comes_before_the_request_is_out_is_taken(upstream: HttpUpstream, size_bytes: int) -> None:
    async def refuse(asked: Asked) -> bool:
        asked.writer.write(head("HTTP/1.1 413 Too Large", "Content-Length: 2", "Connection: close") + b"{}")
        asked.writer.write_eof()
        return await silence(asked)

    async with RawEngine(refuse) as engine:
        answer = await open_answer(upstream, engine.base_url, b"x" * size_bytes)
        assert (answer.status, await answer.read(2)) == (413, b"{}")
        answer.close()
        await until(lambda: engine.gone == 1)


async def test_engine_that_closes_its_side_has_said_all(upstream: HttpUpstream) -> None:
    async def answer(asked: Asked) -> bool:
        asked.writer.write(head("HTTP/1.1 200 OK") + b"all of it")
        asked.writer.write_eof()
        return await silence(asked)

    async with RawEngine(answer) as engine:
        assert await ask(upstream, engine.base_url) == b"all of it"
        await until(lambda: engine.gone == 1)


async def test_answer_that_is_not_http_is_refused(upstream: HttpUpstream) -> None:
    async with RawEngine(answering(b"SSH-2.0-OpenSSH_9.6\r\n")) as engine:
        with pytest.raises(BrokenAnswerError):
            await open_answer(upstream, engine.base_url)
        await until(lambda: engine.gone == 1)


# Health


@pytest.mark.parametrize(
    "health",
    [
        head("HTTP/1.1 200 OK", "Content-Length: 0"),
        DOCUMENT,
        head("HTTP/1.1 200 OK", "Content-Length: 100000") + b"x" * 100_000,
    ],
    ids=["empty", "short", "long"],
)
async def test_engine_that_answers_with_200_is_well(upstream: HttpUpstream, health: bytes) -> None:
    async with RawEngine(answering(health)) as engine:
        await upstream.probe(backend_at(engine.base_url), 5)
    assert engine.asked[0].head.startswith(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:")


async def test_engine_that_answers_with_anything_else_is_not_well(upstream: HttpUpstream) -> None:
    async with RawEngine(answering(head("HTTP/1.1 503 Loading", "Content-Length: 0"))) as engine:
        with pytest.raises(UpstreamError, match="503"):
            await upstream.probe(backend_at(engine.base_url), 5)


async def test_probe_has_one_limit_for_everything(upstream: HttpUpstream) -> None:
    async def drip(asked: Asked) -> bool:
        asked.writer.write(STREAM)
        while not asked.writer.is_closing():
            asked.writer.write(chunks(b"a", end=b""))
            await asyncio.sleep(0.02)
        raise ConnectionError

    async with RawEngine(drip) as engine:
        with pytest.raises(UpstreamTimeoutError):
            await upstream.probe(backend_at(engine.base_url), 0.2)
        await until(lambda: engine.gone == 1)


@pytest.mark.parametrize("ends", [b"", DOCUMENT, b"garbage"], ids=["closed", "lost", "broken"])
async def test_connection_that_has_ended_needs_no_garbage_collector(
    upstream: HttpUpstream, ends: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_room, "_KEEP_ALIVE_S", 0.05)

    def count() -> int:
        return sum(type(each) is Connection for each in gc.get_objects())

    async with RawEngine(answering(ends, keeps=False) if ends else stalling) as engine:
        gc.collect()
        gc.disable()
        try:
            before = count()
            with contextlib.suppress(UpstreamError):
                (await open_answer(upstream, engine.base_url)).close()
            await until(lambda: count() == before)
        finally:
            gc.enable()
