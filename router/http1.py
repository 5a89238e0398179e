"""One HTTP/1.1 connection to an engine: a request out, its answer in, again and again; it never chooses an engine and
never looks into a body.

It is the router's own because it is called for every chunk of every stream: from the read to whoever wants the bytes it
is plain calls on httptools' parser (llhttp), where general clients wake tasks and copy (RFC 9112 is the rule).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import httptools

HEADER_BYTES = 64 << 10
"""So many bytes may come without bringing an answer any further: headers, chunk extensions, trailers."""

HELD_BYTES = 256 << 10
"""So much of a body is held for a reader who has not said yet how he wants it; then the engine waits."""

_PIECE_BYTES = 256 << 10


class UpstreamError(Exception):
    """A backend gave no answer, or broke it off. `reason` is a stable word for metrics and usage events."""

    reason = "backend_error"


class ConnectionRefusedUpstreamError(UpstreamError):
    """Nobody took the connection: the request did not leave."""

    reason = "connection_refused"


class ConnectionLostError(UpstreamError):
    """The connection broke, or ended before its answer."""

    reason = "connection_lost"


class UnansweredError(ConnectionLostError):
    """The connection ended without a single byte of an answer."""


class BrokenAnswerError(UpstreamError):
    """What came is not HTTP, or more of it than there may be."""

    reason = "backend_garbage"


class AnswerTooLongError(BrokenAnswerError):
    """The body is longer than its reader would have it."""


class UpstreamTimeoutError(UpstreamError):
    """The backend was silent for too long."""

    reason = "backend_timeout"


class Receiver(Protocol):
    """Who gets a body as it comes. Both are called from the read itself, and must not take long."""

    def received(self, data: bytes) -> None:
        """Take what one read brought."""

    def ended(self, error: UpstreamError | None) -> None:
        """The body is complete, or broke off; called once, and not after `UpstreamAnswer.close`."""


class UpstreamAnswer:
    """One answer. `status` and `content_type` (in lower case, without parameters) are there once `arrival` returns."""

    __slots__ = (
        "_arrival",
        "_connection",
        "_error",
        "_held",
        "_held_bytes",
        "_idle_s",
        "_is_paused",
        "_limit_bytes",
        "_loop",
        "_receiver",
        "_timer",
        "_touched_at",
        "content_type",
        "has_ended",
        "status",
    )

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop, idle_s: float) -> None:
        self.status = 0
        self.content_type = ""
        self.has_ended = False
        self._connection: Connection | None = connection
        self._loop = loop
        self._idle_s = idle_s
        self._error: UpstreamError | None = None
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._limit_bytes = HELD_BYTES
        self._receiver: Receiver | None = None
        self._arrival: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._touched_at = 0.0
        self._is_paused = False

    async def arrival(self, timeout_s: float) -> None:
        """Return with the first byte of the body, or its end. Raises UpstreamError."""
        self._touched_at = self._loop.time()
        self._timer = self._loop.call_later(timeout_s, self._on_silence, timeout_s)
        while not self._held and not self.has_ended:
            await self._wait()
        if self._error is not None:
            raise self._error
        if not self.has_ended:
            self._timer.cancel()
            self._timer = self._loop.call_later(self._idle_s, self._on_silence, self._idle_s)

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body. Raises UpstreamError, AnswerTooLongError if it has more than `limit_bytes`."""
        self._limit_bytes = limit_bytes + 1
        self.resume()
        while self._held_bytes <= limit_bytes and not self.has_ended:
            await self._wait()
        if self._error is not None:
            raise self._error
        if self._held_bytes > limit_bytes:
            raise AnswerTooLongError("its answer is too long")
        return b"".join(self._held)

    def forward(self, receiver: Receiver) -> None:
        """Have `receiver` get what has come, at once, and what comes."""
        self._receiver = receiver
        if self._held:
            held = b"".join(self._held)
            self._held.clear()
            receiver.received(held)
        if self.has_ended:
            if self._receiver is not None:
                receiver.ended(self._error)
        else:
            self.resume()

    def pause(self) -> None:
        """Let the engine wait; its silence does not count until `resume`."""
        if not self._is_paused and self._connection is not None and not self.has_ended:
            self._is_paused = True
            self._connection.pause()

    def resume(self) -> None:
        """Read on."""
        if self._is_paused and self._connection is not None:
            self._is_paused = False
            self._touched_at = self._loop.time()
            self._connection.resume()

    def close(self) -> None:
        """Give the connection back if the answer has come to its end, else close it, so that the engine stops."""
        self._receiver = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._is_paused:
                connection.resume()
            connection.release()

    def begin(self, status: int, content_type: str) -> None:
        """Take the head."""
        self.status = status
        self.content_type = content_type

    def add(self, data: bytes) -> None:
        """Take a piece of the body."""
        self._touched_at = self._loop.time()
        if self._receiver is not None:
            self._receiver.received(data)
            return
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes >= self._limit_bytes:
            self.pause()
        self._wake()

    def end(self, error: UpstreamError | None) -> None:
        """Take the end of the body."""
        if self.has_ended:
            return
        self.has_ended = True
        self._error = error
        if self._timer is not None:
            self._timer.cancel()
        self._wake()
        if self._receiver is not None:
            self._receiver.ended(error)

    async def _wait(self) -> None:
        self._arrival = self._loop.create_future()
        try:
            await self._arrival
        finally:
            self._arrival = None

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def _on_silence(self, limit_s: float) -> None:
        """One timer for all reads: when it goes off, it goes on for what is left since the last of them."""
        left_s = limit_s if self._is_paused else self._touched_at + limit_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._on_silence, limit_s)
        elif self._connection is not None:
            self._connection.fail(UpstreamTimeoutError("it was silent for too long"))


class Connection(asyncio.Protocol):
    """One connection. `on_idle` gets it when it can be used again."""

    __slots__ = (
        "_answer",
        "_body",
        "_drained",
        "_fruitless_bytes",
        "_is_complete",
        "_is_framed",
        "_is_interim",
        "_loop",
        "_media_type",
        "_on_idle",
        "_parser",
        "_transport",
        "_will_close",
        "_writing",
        "has_heard",
        "idle_since",
        "is_closed",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, on_idle: Callable[[Connection], None]) -> None:
        self._loop = loop
        self._on_idle = on_idle
        self._transport: asyncio.Transport | None = None
        self._answer: UpstreamAnswer | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._body: list[bytes] = []
        self._drained: asyncio.Future[None] | None = None
        self._writing: asyncio.Task[None] | None = None
        self.idle_since = 0.0
        self.is_closed = False
        self.has_heard = False
        self._reset()

    def _reset(self) -> None:
        self._fruitless_bytes = 0
        self._is_complete = False
        self._is_framed = False
        self._is_interim = False
        self._will_close = False
        self._media_type = ""
        self.has_heard = False

    def ask(self, head: bytes, body: bytes, idle_s: float) -> UpstreamAnswer:
        """Send a request; the answer is to come."""
        self._reset()
        self._parser = httptools.HttpResponseParser(self)
        answer = self._answer = UpstreamAnswer(self, self._loop, idle_s)
        if len(body) <= _PIECE_BYTES:
            self._write(head + body)
        else:
            # In one write, megabytes would be copied at once and hold up everything else.
            self._writing = self._loop.create_task(self._write_pieces(head, body))
        return answer

    async def _write_pieces(self, head: bytes, body: bytes) -> None:
        self._write(head)
        for start in range(0, len(body), _PIECE_BYTES):
            self._write(body[start : start + _PIECE_BYTES])
            if self._drained is not None:
                await self._drained

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self.is_closed:
            self._transport.write(data)

    def pause(self) -> None:
        """Read no further."""
        if self._transport is not None and not self.is_closed:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and not self.is_closed:
            self._transport.resume_reading()

    def release(self) -> None:
        """The answer's reader has done with it."""
        self._answer = None
        is_written = self._writing is None or self._writing.done()
        if self._is_complete and not self._will_close and not self.is_closed and is_written:
            self.idle_since = self._loop.time()
            self._on_idle(self)
        else:
            self.abort()

    def abort(self) -> None:
        """End the connection at once."""
        self.is_closed = True
        if self._writing is not None:
            self._writing.cancel()
        if self._transport is not None:
            self._transport.abort()

    def fail(self, error: UpstreamError) -> None:
        """End the answer with an error, and the connection with it."""
        answer = self._answer
        self._will_close = True
        self.abort()
        if answer is not None:
            answer.end(error)

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = transport  # type: ignore[assignment]  # what a stream socket gets

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        parser = self._parser
        if parser is None or not self._is_awaited():
            # Nothing was asked, so whatever this is, no answer would be safe after it.
            self.abort()
            return
        self.has_heard = True
        self._fruitless_bytes += len(data)
        broken: UpstreamError | None = None
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            broken = BrokenAnswerError("it switched protocols")
        except httptools.HttpParserError:
            broken = BrokenAnswerError("its answer is not HTTP")
        self._deliver()
        if self._is_complete:
            # What follows a whole answer is nothing that was asked for.
            self._will_close = self._will_close or broken is not None
            self._end(None)
        elif broken is not None:
            self.fail(broken)
        elif self._fruitless_bytes > HEADER_BYTES:
            self.fail(BrokenAnswerError("its headers are too long"))

    def eof_received(self) -> None:
        """See asyncio.Protocol; the transport closes."""
        self._will_close = True

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.is_closed = True
        self.resume_writing()
        answer = self._answer
        if answer is None or self._is_complete:
            return
        if exc is None and answer.status and not self._is_framed:
            # Neither counted nor chunked: the connection's end is the body's (RFC 9112, 6.3).
            self._is_complete = True
            self._end(None)
        elif self.has_heard:
            self._end(ConnectionLostError("it broke the connection off"))
        else:
            self._end(UnansweredError("it closed the connection without an answer"))

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._drained = self._loop.create_future()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    def _is_awaited(self) -> bool:
        return self._answer is not None and not self._is_complete

    def _deliver(self) -> None:
        body = self._body
        if body and self._answer is not None:
            self._fruitless_bytes = 0
            data = body[0] if len(body) == 1 else b"".join(body)
            body.clear()
            self._answer.add(data)

    def _end(self, error: UpstreamError | None) -> None:
        answer = self._answer
        if answer is not None:
            answer.end(error)

    # httptools' side

    def on_message_begin(self) -> None:
        """A message begins; after the answer, that is one nobody asked for."""
        if self._is_complete:
            self._will_close = True
        self._is_interim = False
        self._is_framed = False
        self._media_type = ""

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header or a trailer."""
        lower = name.lower()
        if lower == b"content-type":
            self._media_type = value.partition(b";")[0].strip().lower().decode("latin-1")
        elif lower == b"content-length" or (lower == b"transfer-encoding" and b"chunked" in value.lower()):
            self._is_framed = True

    def on_headers_complete(self) -> None:
        """The head is whole."""
        parser, answer = self._parser, self._answer
        if self._is_complete or parser is None or answer is None:
            return
        status = parser.get_status_code()
        if status < 200:
            self._is_interim = True
            return
        self._fruitless_bytes = 0
        self._will_close = not parser.should_keep_alive()
        answer.begin(status, self._media_type)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if not self._is_complete:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """The message is whole."""
        if not self._is_interim:
            self._is_complete = True
