"""Asking engines over kept-alive connections that they may close at any moment."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from aiaas.router.v1.backend_service_pb2 import ENGINE_KIND_VLLM
from router.backends import Backend
from router.http1 import ConnectionLostError
from router.upstream import HttpUpstream, Timeouts
from tests.doubles.scripted_backend import Answer, Cut, ScriptedBackend

OK = Answer([b"{}"])
TIMEOUTS = Timeouts(connect_s=2, first_byte_s=5, answer_s=5, idle_s=5)


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
