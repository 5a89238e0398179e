"""Clients that do to streams what clients do, hang up, politely or not, or stop reading; they remember what they saw
and never judge it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any

from mesh.ids import new_request_id
from tests.load.native import chat_body

PROMPT_TOKENS = 12
"""What the fake engine says that every prompt has."""

_TOKEN = b'"content":"T'
_RST = struct.pack("ii", 1, 0)


@dataclass
class Seen:
    """One request, as its client saw it. `status` is 0 where no head came, `ended` how it ended: done, error (told
    within the stream), cut (told by nothing), left (by the client), or answered, for one that is no stream."""

    request_id: str
    organization_id: str
    tokens_per_s: float = 0.0
    status: int = 0
    tokens: int = 0
    ended: str = ""
    retry_after: str = ""
    body: bytes = b""
    asked_at: float = 0.0
    head_at: float = 0.0
    first_token_at: float = 0.0
    ended_at: float = 0.0
    is_read: bool = True

    @property
    def is_admitted(self) -> bool:
        """Whether the platform began to answer it."""
        return self.status == 200

    @property
    def reason(self) -> str:
        """The code of the error that it got; empty without one."""
        try:
            return str(json.loads(self.body.removeprefix(b"data: "))["error"]["code"])
        except (ValueError, KeyError, TypeError):
            return ""

    @property
    def head_s(self) -> float:
        """How long the head took."""
        return self.head_at - self.asked_at


class Request(asyncio.Protocol):
    """One request on a connection of its own."""

    def __init__(self, seen: Seen, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.seen = seen
        self.began: asyncio.Future[None] = loop.create_future()
        """Done with the first token, or with the end."""
        self.over: asyncio.Future[Seen] = loop.create_future()
        self._request = request
        self._rest = b""
        self._is_stream = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.seen.asked_at = time.monotonic()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        seen = self.seen
        if not seen.status:
            head, found, data = (self._rest + data).partition(b"\r\n\r\n")
            if not found:
                self._rest = head
                return
            self._rest = b""
            self._read_head(head)
        if not self._is_stream:
            seen.body += data
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: "):
                continue
            if _TOKEN in line:
                seen.tokens += 1
                if not self.began.done():
                    seen.first_token_at = time.monotonic()
                    self.began.set_result(None)
            elif line.startswith(b'data: {"error"'):
                seen.ended, seen.body = "error", line
            elif line.startswith(b"data: [DONE]"):
                seen.ended = "done"

    def connection_lost(self, error: Exception | None) -> None:
        self._end("answered" if not self._is_stream and self.seen.status else "cut")

    def hang_up(self, *, reset: bool) -> None:
        """Go away in the middle: with a FIN, or with an RST."""
        assert self._transport is not None
        if reset:
            connection = self._transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
            self._transport.abort()
        else:
            self._transport.close()
        self._end("left")

    def stop_reading(self) -> None:
        """Stay, and read nothing any more."""
        assert self._transport is not None
        self._transport.pause_reading()
        self.seen.is_read = False

    def _read_head(self, head: bytes) -> None:
        status, *lines = head.split(b"\r\n")
        self.seen.status = int(status.split()[1])
        self.seen.head_at = time.monotonic()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        self.seen.retry_after = headers.get(b"retry-after", b"").decode()
        self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        assert headers[b"x-request-id"].decode() == self.seen.request_id

    def _end(self, how: str) -> None:
        seen = self.seen
        if not self.over.done():
            seen.ended = seen.ended or how
            seen.ended_at = time.monotonic()
            if seen.status == 200 and seen.ended == "answered":
                with contextlib.suppress(ValueError, KeyError):
                    seen.tokens = json.loads(seen.body)["usage"]["completion_tokens"]
                    seen.body = b""
            self.over.set_result(seen)
        if not self.began.done():
            self.began.set_result(None)


@dataclass
class Client:
    """Whoever holds one key of an organization. `seen` are all its requests, in the order in which they began."""

    port: int
    organization_id: str
    api_key_id: str
    secret: str
    seen: list[Seen] = field(default_factory=list)

    async def open(self, *, tokens: int, pace_ms: int, buffer_bytes: int = 0) -> Request:
        """Begin a stream; returns before there is an answer. What arrives waits in a buffer of that size, if one is
        given, until it is read."""
        tokens_per_s = 1000 / pace_ms if pace_ms else float(tokens)
        return await self._send(chat_body(tokens=tokens, pace_ms=pace_ms), tokens_per_s, buffer_bytes)

    async def ask(self, *, tokens: int = 8, timeout_s: float = 30.0) -> Seen:
        """One request that is no stream, to its end."""
        request = await self._send(chat_body(tokens=tokens, stream=False), 0.0)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(request.over)
        except TimeoutError:
            request.hang_up(reset=False)
            request.seen.ended = "nothing came"
            return request.seen

    async def _send(self, body: dict[str, Any], tokens_per_s: float, buffer_bytes: int = 0) -> Request:
        content = json.dumps(body).encode()
        seen = Seen(new_request_id(), self.organization_id, tokens_per_s, asked_at=time.monotonic())
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Authorization: Bearer {self.secret}\r\nX-Request-Id: {seen.request_id}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        self.seen.append(seen)
        loop = asyncio.get_running_loop()
        connection = socket.socket()
        connection.setblocking(False)
        if buffer_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        try:
            await loop.sock_connect(connection, ("127.0.0.1", self.port))
            _, request = await loop.create_connection(lambda: Request(seen, head.encode() + content), sock=connection)
        except OSError:
            connection.close()
            request = Request(seen, b"")
            request.connection_lost(None)
            seen.ended = "no connection"
        return request


async def begin(client: Client, count: int, *, tokens: int, pace_ms: int, within_s: float = 30.0) -> list[Request]:
    """So many streams at once; returns when each has its first token, or has ended."""
    streams = [await client.open(tokens=tokens, pace_ms=pace_ms) for _ in range(count)]
    async with asyncio.timeout(within_s):
        await asyncio.gather(*(stream.began for stream in streams))
    return streams


async def over(streams: list[Request], within_s: float) -> list[Seen]:
    """What became of them, when all are over."""
    async with asyncio.timeout(within_s):
        return list(await asyncio.gather(*(stream.over for stream in streams)))
