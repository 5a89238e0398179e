"""Our client for engines beside httpx, on the same answers over real sockets."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest
import pytest_asyncio

from aiaas.router.v1.backend_service_pb2 import ENGINE_KIND_VLLM
from router.backends import Backend
from router.http1 import UpstreamError
from router.upstream import HttpUpstream, Timeouts
from tests.doubles.raw_engine import RawEngine, answering
from tests.doubles.recorded_answers import ALL, Recorded, Verdict

TIMEOUTS = Timeouts(connect_s=2, first_byte_s=5, answer_s=5, idle_s=5)
DIFFERENCES = {
    "empty line before": "we skip it, as RFC 9112, 2.2 has servers do",
    "HTTP of no version": "there is none that we could hold it to",
    "status above any": "RFC 9110, 15: a status has one of five classes",
    "length and chunks": "RFC 9112, 6.1: a proxy in between may go by the other one",
    "chunks and length": "the same",
    "the same length twice": "RFC 9112, 6.3 lets us refuse it, and nothing that is sound writes it",
    "list of lengths": "the same",
    "coding after a tab": "parsers disagree about whether that is chunked",
    "folded header": "RFC 9112, 5.2: nothing may write it but in message/http",
    "folded coding": "the same",
    "control in a value": "RFC 9110, 5.5: not a field's content",
    "line ends of LF": "RFC 9112, 2.2 permits it, and parsers disagree about where it holds",
    "line end of LF": "the same",
    "chunk size before a space": "RFC 9112, 7.1.1 has none there",
    "length in a trailer": "RFC 9110, 6.5.1: no trailer may frame a message",
    "coding in a trailer": "the same",
    "head too long": "64 KiB are ours; httpx takes 100 KiB, if they come at once",
}
"""What httpx judges otherwise, and why we do not follow it. Of what both take, every byte is the same."""


@dataclass(frozen=True)
class Taken:
    """What a client makes of an answer; None for one that it refuses, or that breaks off."""

    status: int
    body: bytes


async def take(upstream: HttpUpstream, base_url: str) -> Taken | None:
    try:
        answer = await upstream.open(
            Backend("engine", base_url, ENGINE_KIND_VLLM), "/v1/x", b"{}", TIMEOUTS, streamed=False
        )
        try:
            return Taken(answer.status, await answer.read(1 << 20))
        finally:
            answer.close()
    except UpstreamError:
        return None


async def take_with_httpx(client: httpx.AsyncClient, base_url: str) -> Taken | None:
    try:
        async with client.stream("POST", f"{base_url}/v1/x", content=b"{}") as answer:
            return Taken(answer.status_code, b"".join([piece async for piece in answer.aiter_raw()]))
    except httpx.HTTPError:
        return None


@pytest_asyncio.fixture
async def upstream() -> AsyncIterator[HttpUpstream]:
    async with HttpUpstream({}) as upstream:
        yield upstream


@pytest_asyncio.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=5) as client:
        yield client


@pytest.mark.parametrize("recorded", ALL, ids=str)
async def test_both_take_an_answer_for_the_same(
    upstream: HttpUpstream, client: httpx.AsyncClient, recorded: Recorded
) -> None:
    async with RawEngine(answering(recorded.raw, keeps=False)) as engine:
        ours = await take(upstream, engine.base_url)
        theirs = await take_with_httpx(client, engine.base_url)
    assert ours == (Taken(recorded.status, recorded.body) if recorded.verdict is Verdict.COMPLETE else None)
    if recorded.name in DIFFERENCES:
        assert (ours is None) is not (theirs is None)
    else:
        assert ours == theirs
