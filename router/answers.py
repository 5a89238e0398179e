"""What an inference is asked and what it answers, whoever carries it; it never says how an answer comes about."""

from __future__ import annotations

from typing import Protocol

import msgspec

from aiaas.type.v1 import usage_event_pb2
from aiaas.type.v1.usage_event_pb2 import TokenUsage
from mesh.auth import Principal
from mesh.tracing import Span

EVENT_STREAM = "text/event-stream"
"""The content type of streams."""


class InferenceRequest(msgspec.Struct):
    """A request of an authenticated principal. `deadline` is in monotonic seconds; None means none. `span` is that of a
    request which is traced; it is ended by whoever began it. The body is forgotten once an engine has it."""

    request_id: str
    endpoint: usage_event_pb2.Endpoint.ValueType
    body: bytes
    principal: Principal
    client_address: str = ""
    idempotency_key: str = ""
    deadline: float | None = None
    span: Span | None = None


class Head(msgspec.Struct, frozen=True):
    """What is known before the first byte. `headers` are for the client."""

    request_id: str
    content_type: str
    model: str
    backend_id: str
    headers: tuple[tuple[str, str], ...] = ()


class Tail(msgspec.Struct, frozen=True):
    """What is known after the last byte."""

    usage: TokenUsage
    finish_reason: str
    outcome: usage_event_pb2.Outcome.ValueType


class Reader(Protocol):
    """Who gets an answer: one head, then data, then one tail. It takes each at once and waits for nothing; one that
    cannot keep up says so by `Inference.pause`."""

    def head(self, head: Head) -> None:
        """Take what is known before the first byte."""

    def data(self, data: bytes) -> None:
        """Take bytes of the answer, 1 MiB at most of a document, and of a stream what one read brought."""

    def tail(self, tail: Tail) -> None:
        """Take what is known after the last byte."""
