"""Idempotency keys without Redis, and how an answer passes through the claim that keeps a copy of it."""

from __future__ import annotations

import asyncio
import random

import pytest

from aiaas.type.v1.usage_event_pb2 import ENDPOINT_CHAT_COMPLETIONS, OUTCOME_SUCCEEDED, TokenUsage
from mesh.clock import SystemClock
from mesh.errors import PlatformError, Reason, response_headers
from mesh.scripts import Scripts
from router import idempotency
from router.answers import Head, InferenceRequest, Tail
from router.idempotency import IDEMPOTENCY, Claim, Idempotency
from router.sse import EventWatch
from tests.doubles.scripted_backend import chunk, sse
from tests.unit.router.world import EVENTS, PRINCIPAL

Part = Head | bytes | Tail
TAIL = Tail(TokenUsage(), "stop", OUTCOME_SUCCEEDED)


class Parts:
    """A reader that keeps what it gets."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def head(self, head: Head) -> None:
        self.parts.append(head)

    def data(self, data: bytes) -> None:
        self.parts.append(data)

    def tail(self, tail: Tail) -> None:
        self.parts.append(tail)


def request(key: str = "key") -> InferenceRequest:
    return InferenceRequest("req_1", ENDPOINT_CHAT_COMPLETIONS, b"{}", PRINCIPAL, idempotency_key=key)


def without_redis() -> Idempotency:
    return Idempotency(Scripts("redis://127.0.0.1:1", SystemClock(), IDEMPOTENCY), "router_1")


def claim_of(reader: Parts) -> Claim:
    return Claim(without_redis(), request(), reader, b"token", 0)


async def test_request_with_a_key_is_unavailable_without_redis() -> None:
    reader = Parts()
    with pytest.raises(PlatformError) as caught:
        await without_redis().claim(request(), "m", reader)
    assert caught.value.reason is Reason.UNAVAILABLE
    assert response_headers(caught.value) == {"Retry-After": "1"}
    assert reader.parts == []


async def test_stream_passes_at_once_but_for_its_end_which_waits_for_the_tail() -> None:
    reader = Parts()
    claim = claim_of(reader)
    claim.watch = watch = EventWatch(responses=False, strip_usage=False)
    head = Head("req_1", EVENTS, "m", "b")
    first, second, done = sse(chunk("a"), chunk(finish_reason="stop"))
    claim.head(head)
    claim.data(watch.feed(first))
    assert reader.parts == [head, first]
    claim.data(watch.feed(second))
    claim.data(watch.feed(done))
    assert reader.parts == [head, first, second]
    claim.tail(TAIL)
    assert reader.parts == [head, first, second, done, TAIL]


async def test_document_waits_for_the_tail_as_a_whole() -> None:
    reader = Parts()
    claim = claim_of(reader)
    head = Head("req_1", "application/json", "m", "b")
    claim.head(head)
    claim.data(b"{")
    claim.data(b"}")
    assert reader.parts == []
    claim.tail(TAIL)
    assert reader.parts == [head, b"{", b"}", TAIL]


@pytest.mark.parametrize("succeeded", [True, False])
async def test_end_of_a_request_is_nobodys_failure_when_redis_went_away(succeeded: bool) -> None:
    claim = claim_of(Parts())
    claim.head(Head("req_1", "application/json", "m", "b"))
    claim.data(b"{}")
    claim.end(succeeded=succeeded)
    async with asyncio.timeout(1):
        await claim.kept()


@pytest.mark.parametrize("limit", ["_KEPT_BYTES", "_ANSWER_BYTES"])
async def test_answer_that_is_too_large_to_keep_is_forgotten_and_passed_on_whole(
    monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(idempotency, limit, 1000)
    reader = Parts()
    claim = claim_of(reader)
    claim.head(Head("req_1", "application/json", "m", "b"))
    pieces = [random.Random(number).randbytes(1000) for number in range(100)]
    for piece in pieces:
        claim.data(piece)
    assert claim._kept is None
    claim.end(succeeded=True)
    claim.tail(TAIL)
    assert reader.parts[1:-1] == pieces
