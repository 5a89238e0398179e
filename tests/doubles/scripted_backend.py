"""An engine whose every answer a test writes down: statuses, delays, chunks, resets and garbage."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Self

from aiohttp import web

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


class Cut(Enum):
    """Ways to break an answer off."""

    RESET = auto()
    """Reset the connection (RST)."""
    CLOSE = auto()
    """Close the connection without ending the chunked answer (FIN)."""


Step = bytes | float | asyncio.Event | Cut
"""Bytes to send as one chunk, seconds to wait, an event to wait for (one that is never set hangs), or a cut."""


@dataclass(frozen=True)
class Answer:
    """One scripted answer. `before` runs before the status line is sent, `steps` after it."""

    steps: Sequence[Step] = ()
    status: int = 200
    content_type: str = "application/json"
    before: Sequence[Step] = ()


def sse(*events: dict[str, Any], done: bool = True) -> list[bytes]:
    """Each event as the bytes of one server-sent event, then "[DONE]"."""
    chunks = [b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n" for event in events]
    return [*chunks, b"data: [DONE]\n\n"] if done else chunks


def chunk(content: str | None = None, finish_reason: str | None = None, index: int = 0) -> dict[str, Any]:
    """One chat.completion.chunk."""
    delta = {} if content is None else {"content": content}
    choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
    return {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "up", "choices": [choice]}


def told_chunk(
    content: str, prompt_tokens: int, completion_tokens: int, finish_reason: str | None = None, index: int = 0
) -> dict[str, Any]:
    """One chat.completion.chunk that tells usage beside its choice, as vLLM does where it is asked to."""
    told = {"usage": vllm_usage(prompt_tokens, completion_tokens)}
    return chunk(content, finish_reason, index) | told


def vllm_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """A usage object with its fields in vLLM's order."""
    total_tokens = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "total_tokens": total_tokens, "completion_tokens": completion_tokens}


def usage_chunk(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The chunk that holds nothing but usage."""
    return chunk() | {"choices": [], "usage": usage(prompt_tokens, completion_tokens)}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """A usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def chat_stream(*words: str, prompt_tokens: int = 5, with_usage: bool = True) -> Answer:
    """A whole streamed chat completion of one event a word."""
    events = [chunk("")] + [chunk(word) for word in words] + [chunk(finish_reason="stop")]
    if with_usage:
        events.append(usage_chunk(prompt_tokens, len(words)))
    return Answer(sse(*events), content_type="text/event-stream")


def chat_document(content: str = "Hello", *, prompt_tokens: int = 5, completion_tokens: int = 1) -> Answer:
    """A whole chat completion in one document."""
    document = {
        "id": "c-1",
        "object": "chat.completion",
        "created": 1,
        "model": "up",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"},
        ],
        "usage": usage(prompt_tokens, completion_tokens),
    }
    return Answer([json.dumps(document).encode()])


def failure(status: int, message: str = "it failed", param: str | None = None) -> Answer:
    """An error as vLLM writes it."""
    error = {"message": message, "type": "BadRequestError", "param": param, "code": status}
    return Answer([json.dumps({"error": error}).encode()], status=status)


@dataclass
class Received:
    """One request that came in, and whether its client was gone before the answer was whole."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    client_port: int
    sent_bytes: int = 0
    abandoned: asyncio.Event = field(default_factory=asyncio.Event)
    answered: asyncio.Event = field(default_factory=asyncio.Event)


class ScriptedBackend:
    """Use as an async context manager. Answers come from `script`, in turn, and then from `default`, for ever."""

    def __init__(self, default: Answer | None = None) -> None:
        self.default = default or chat_document()
        self.script: deque[Answer] = deque()
        self.healthy = True
        self.received: list[Received] = []
        self.port = 0

    @property
    def base_url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen: on a free port, or on the same one again."""
        application = web.Application(client_max_size=64 << 20)
        application.router.add_get("/health", self._health)
        for path in PATHS:
            application.router.add_post(path, self._answer)
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening, so that connections are refused, and end what is open."""
        await self._runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        received = Received(request.path, json.loads(await request.read()), dict(request.headers), _port_of(request))
        self.received.append(received)
        answer = self.script.popleft() if self.script else self.default
        response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
        try:
            await _walk(answer.before, request, response, received)
            await response.prepare(request)
            await _walk(answer.steps, request, response, received)
            await response.write_eof()
        except (asyncio.CancelledError, ConnectionError):
            received.abandoned.set()
            raise
        received.answered.set()
        return response


def _port_of(request: web.Request) -> int:
    transport = request.transport
    port: int = transport.get_extra_info("peername")[1] if transport is not None else 0
    return port


async def _walk(steps: Sequence[Step], request: web.Request, response: web.StreamResponse, received: Received) -> None:
    for step in steps:
        if isinstance(step, bytes):
            await response.write(step)
            received.sent_bytes += len(step)
        elif isinstance(step, asyncio.Event):
            await step.wait()
        elif isinstance(step, Cut):
            _cut(step, request)
            await asyncio.Event().wait()
        else:
            await asyncio.sleep(step)


def _cut(cut: Cut, request: web.Request) -> None:
    transport = request.transport
    if transport is None:
        return
    if cut is Cut.RESET:
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()
