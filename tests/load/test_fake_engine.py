"""The fake engine answers as vLLM does, at the pace that a request asks for, with the time in every token."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

import aiohttp

from tests.load.native import FakeEngine, chat_body

TOKEN = re.compile(r"^T(\d{16}) $")


async def stream(engine: FakeEngine, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream that ends with [DONE]."""
    async with (
        aiohttp.ClientSession(engine.base_url) as session,
        session.post("/v1/chat/completions", json=body) as response,
    ):
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        events = (await response.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def clocks(chunks: list[dict[str, Any]]) -> list[int]:
    """The times that tokens hold, in nanoseconds."""
    contents = [choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"]]
    return [int(found[1]) for content in contents if (found := TOKEN.match(content))]


async def test_a_whole_answer_has_usage(engine: FakeEngine) -> None:
    async with (
        aiohttp.ClientSession(engine.base_url) as session,
        session.post("/v1/chat/completions", json=chat_body(tokens=7, stream=False)) as response,
    ):
        answer = await response.json()
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == 7


async def test_a_stream_has_a_role_its_tokens_a_reason_to_end_and_usage(engine: FakeEngine) -> None:
    chunks = await stream(engine, chat_body(tokens=7, pace_ms=0))
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len(clocks(chunks)) == 7
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"] == {"prompt_tokens": 12, "total_tokens": 19, "completion_tokens": 7}


async def test_usage_comes_only_when_it_is_asked_for(engine: FakeEngine) -> None:
    chunks = await stream(engine, chat_body(tokens=2, pace_ms=0) | {"stream_options": {}})
    assert not any("usage" in chunk for chunk in chunks)


async def test_usage_comes_with_every_token_when_it_is_asked_for(engine: FakeEngine) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(engine, chat_body(tokens=3, pace_ms=0) | {"stream_options": options})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3, 3, 3]
    assert {chunk["usage"]["total_tokens"] - chunk["usage"]["completion_tokens"] for chunk in chunks} == {12}


async def test_each_token_holds_the_time_it_was_made_at(engine: FakeEngine) -> None:
    began = time.monotonic_ns()
    made = clocks(await stream(engine, chat_body(tokens=20, pace_ms=10)))
    assert began < made[0]
    assert made == sorted(made)
    assert made[-1] < time.monotonic_ns()
    # The first may have been late, which the others do not follow.
    assert made[-1] - made[0] >= 18 * 10_000_000


async def test_in_steps_the_tokens_of_all_streams_come_in_the_same_ticks(engine: FakeEngine) -> None:
    body = chat_body(tokens=10, pace_ms=50, step=True)
    first, second = await asyncio.gather(stream(engine, body), stream(engine, body))
    ticks = [[clock // 50_000_000 for clock in clocks(chunks)] for chunks in (first, second)]
    # A stream may have been asked for one tick later than the other.
    assert len(set(ticks[0]) & set(ticks[1])) >= 8
    assert sorted(clock % 50_000_000 for clock in clocks(first))[5] < 10_000_000


async def test_requests_may_come_in_pieces_in_chunks_and_before_the_last_one_is_answered(engine: FakeEngine) -> None:
    body = json.dumps(chat_body(tokens=3, stream=False)).encode()
    plain = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    chunked = b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b"%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (10, body[:10], len(body) - 10, body[10:])
    streamed = json.dumps(chat_body(tokens=2, pace_ms=1)).encode()
    before = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(streamed), streamed)
    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    sent = before + chunked + plain
    for at in range(0, len(sent), 7):
        writer.write(sent[at : at + 7])
        await writer.drain()
        await asyncio.sleep(0.0005)
    assert (await reader.readuntil(b"\r\n0\r\n\r\n")).count(b'"content":"T') == 2
    for _ in range(2):
        head = await reader.readuntil(b"\r\n\r\n")
        answer = json.loads(await reader.readexactly(int(head.partition(b"Content-Length: ")[2])))
        assert answer["usage"]["completion_tokens"] == 3
    writer.close()
    await writer.wait_closed()


async def test_a_stream_ends_with_its_client(engine: FakeEngine) -> None:
    async with aiohttp.ClientSession(engine.base_url) as session:
        response = await session.post("/v1/chat/completions", json=chat_body(tokens=100_000, pace_ms=1))
        await response.content.readline()
        assert (await asyncio.to_thread(engine.stats))["streams"] >= 1
        response.close()
        async with asyncio.timeout(10):
            while (await asyncio.to_thread(engine.stats))["streams"]:
                await asyncio.sleep(0.01)
