"""One HTTP/1.1 connection to an engine: a request out, its answer in, again and again; it never chooses an engine and
never looks into a body.

It is the router's own because it runs for every chunk of every stream: from the read to whoever wants the bytes it is
plain calls around httptools' parser (llhttp), where general clients wake a task and copy. The rules are RFC 9112's;
llhttp holds a message's syntax and framing, and what it would let pass though two readers might disagree about where
the body ends is refused here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import httptools

HEADER_BYTES = 64 << 10
"""So many bytes may come without bringing an answer any further: its head, a chunk's extensions, trailers."""

HELD_BYTES = 256 << 10
"""So much of a body is held for a reader who has not said yet how he wants it; then the engine waits. What one read
brings, 256 KiB at most, may come on top."""

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
        "_connection",
        "_due_at",
        "_error",
        "_has_ended",
        "_held",
        "_held_bytes",
        "_limit_bytes",
        "_loop",
        "_patience_s",
        "_receiver",
        "_timer",
        "_touched_at",
        "_waiter",
        "_wanted_bytes",
        "content_type",
        "status",
    )

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.content_type = ""
        self._connection: Connection | None = connection
        self._loop = loop
        self._has_ended = False
        self._error: UpstreamError | None = None
        self._receiver: Receiver | None = None
        # Until a receiver is there: the pieces, how many bytes wake `_waiter`, and how many stop the reading.
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._wanted_bytes = 1
        self._limit_bytes = HELD_BYTES
        self._waiter: asyncio.Future[None] | None = None
        # How long a silence may be, since when there is one, and when it is looked at next.
        self._patience_s = 0.0
        self._touched_at = 0.0
        self._due_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def arrival(self, first_byte_s: float, idle_s: float) -> None:
        """Return with the first byte of the body, or its end, due in `first_byte_s`; from then on the engine may be
        silent for `idle_s`. Raises UpstreamError."""
        self._be_patient(first_byte_s)
        await self._wait_for(1)
        self._be_patient(idle_s)

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body. Raises UpstreamError, AnswerTooLongError if it has more than `limit_bytes`."""
        self._limit_bytes = limit_bytes + 1
        self.resume()
        await self._wait_for(limit_bytes + 1)
        if self._held_bytes > limit_bytes:
            raise AnswerTooLongError("its answer is too long")
        return b"".join(self._held)

    def forward(self, receiver: Receiver) -> None:
        """Have `receiver` get what has come, at once, and then what comes."""
        self._receiver = receiver
        # Before the receiver has his say, as he may pause at the first piece.
        self.resume()
        if self._held:
            data = b"".join(self._held)
            self._held.clear()
            receiver.received(data)
        if self._has_ended:
            self._tell_end()

    def pause(self) -> None:
        """Let the engine wait; its silence does not count until `resume`."""
        if self._connection is not None and not self._has_ended:
            self._connection.pause()

    def resume(self) -> None:
        """Read on."""
        if self._connection is not None and self._connection.is_paused:
            self._touched_at = self._loop.time()
            self._connection.resume()

    def close(self) -> None:
        """Give the connection back if the answer has come to its end, else close it, so that the engine stops."""
        self._receiver = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()
            self.end(ConnectionLostError("its reader closed it"))

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
        if self._held_bytes >= self._wanted_bytes:
            self._wake()

    def end(self, error: UpstreamError | None) -> None:
        """Take the end of the body; the first is the one that counts."""
        if self._has_ended:
            return
        self._has_ended = True
        self._error = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()
        self._tell_end()

    def _tell_end(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.ended(self._error)

    async def _wait_for(self, size_bytes: int) -> None:
        """Return with so many bytes held, or the end. Raises what broke the answer off."""
        if self._held_bytes < size_bytes and not self._has_ended:
            self._wanted_bytes = size_bytes
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._error is not None:
            # A copy: the traceback leads back to here, so the one that is kept would be held by itself.
            raise type(self._error)(*self._error.args)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _be_patient(self, limit_s: float) -> None:
        """From now on a silence may last for `limit_s`.

        One timer serves all reads: they note the time, and the timer, when it goes off, goes on for what is left. A new
        one for each would cost as much as the read.
        """
        if self._has_ended:
            return
        self._patience_s = limit_s
        self._touched_at = self._loop.time()
        if self._timer is None or self._touched_at + limit_s < self._due_at:
            self._arm(limit_s)

    def _arm(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due_at = self._loop.time() + delay_s
        self._timer = self._loop.call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        connection = self._connection
        if connection is None:
            return
        silent_s = 0.0 if connection.is_paused else self._loop.time() - self._touched_at
        if silent_s < self._patience_s:
            self._arm(self._patience_s - silent_s)
        else:
            connection.fail(UpstreamTimeoutError("it was silent for too long"))


class Connection(asyncio.Protocol):
    """One connection. `on_idle` gets it when it can be used again."""

    __slots__ = (
        "_answer",
        "_body",
        "_fruitless_bytes",
        "_has_head",
        "_is_complete",
        "_is_framed",
        "_is_write_paused",
        "_loop",
        "_media_type",
        "_on_idle",
        "_parser",
        "_transport",
        "_unsent",
        "_was_heard",
        "_will_close",
        "idle_since",
        "is_closed",
        "is_paused",
        "on_body",
    )

    _transport: asyncio.Transport
    _parser: httptools.HttpResponseParser | None

    def __init__(self, loop: asyncio.AbstractEventLoop, on_idle: Callable[[Connection], None]) -> None:
        self._loop = loop
        self._on_idle = on_idle
        self._answer: UpstreamAnswer | None = None
        self._body: list[bytes] = []
        # httptools' callback for a piece of a body: the list's own method, as a Python function would double its cost.
        self.on_body = self._body.append
        self._unsent: memoryview | None = None
        self._is_write_paused = False
        self._will_close = False
        self.idle_since = 0.0
        self.is_closed = False
        self.is_paused = False
        self._reset()

    def _reset(self) -> None:
        self._fruitless_bytes = 0
        self._was_heard = False
        self._has_head = False
        self._is_complete = False

    @property
    def is_usable(self) -> bool:
        """Whether it can be asked. A transport that is breaking tells of it a turn of the loop late."""
        return not self.is_closed and not self._transport.is_closing()

    def ask(self, head: bytes, body: bytes) -> UpstreamAnswer:
        """Send a request, `head` being all of its head but the length of its body; the answer is to come."""
        self._reset()
        answer = self._answer = UpstreamAnswer(self, self._loop)
        if not self.is_usable:
            # It was closed between its making, or its taking, and now; its transport has told of that already.
            answer.end(UnansweredError("it closed the connection without an answer"))
        elif len(body) <= _PIECE_BYTES:
            self._transport.write(b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body))
        else:
            # In one write, megabytes would be copied at once and hold up everything else.
            self._transport.write(b"%bContent-Length: %d\r\n\r\n" % (head, len(body)))
            self._unsent = memoryview(body)
            self._write_on()
        return answer

    def _write_on(self) -> None:
        """Write the next piece of a large body: in every turn of the loop one, while the engine keeps up."""
        unsent = self._unsent
        if unsent is None or self._is_write_paused or not self.is_usable:
            return
        self._unsent = unsent[_PIECE_BYTES:] if len(unsent) > _PIECE_BYTES else None
        self._transport.write(unsent[:_PIECE_BYTES])
        if not self._is_write_paused:
            self._loop.call_soon(self._write_on)

    def pause(self) -> None:
        """Read no further."""
        if not self.is_paused and self.is_usable:
            self.is_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        self.is_paused = False
        if self.is_usable:
            self._transport.resume_reading()

    def release(self) -> None:
        """The answer's reader has done with it."""
        self._answer = None
        is_written = self._unsent is None and self.is_usable and not self._transport.get_write_buffer_size()
        if self._is_complete and not self._will_close and is_written:
            if self.is_paused:
                self.resume()
            self.idle_since = self._loop.time()
            self._on_idle(self)
        else:
            self.abort()

    def abort(self) -> None:
        """End the connection at once."""
        self.is_closed = True
        self._unsent = None
        self._transport.abort()

    def fail(self, error: UpstreamError) -> None:
        """End the answer with an error, and the connection with it."""
        answer = self._answer
        self.abort()
        if answer is not None:
            answer.end(error)

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = transport  # type: ignore[assignment]  # what a stream socket gets
        # One for all answers: llhttp starts afresh after each, and one that broke is not asked again.
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        answer, parser = self._answer, self._parser
        if answer is None or parser is None:
            # Nothing was asked, so whatever this is, no answer would be safe after it.
            self.abort()
            return
        self._was_heard = True
        broken: UpstreamError | None = None
        try:
            if self._fruitless_bytes + len(data) <= HEADER_BYTES:
                self._fruitless_bytes += len(data)
                parser.feed_data(data)
            else:
                self._feed_in_pieces(parser, data)
        except BrokenAnswerError as error:
            broken = error
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._is_complete:
                # What follows a whole answer is nothing that was asked for.
                self._will_close = True
            else:
                broken = BrokenAnswerError("its answer is not HTTP")
        body = self._body
        if body:
            # What came at once goes on at once: a stream's engine writes many small chunks together.
            piece = body[0] if len(body) == 1 else b"".join(body)
            body.clear()
            self._fruitless_bytes = 0
            answer.add(piece)
        if broken is not None:
            self.abort()
            answer.end(broken)
        elif self._is_complete:
            answer.end(None)

    def _feed_in_pieces(self, parser: httptools.HttpResponseParser, data: bytes) -> None:
        """Parse a read that could hold more than may come without progress. A piece ends where that would be too much,
        so what is refused does not depend on how the bytes were split. Raises BrokenAnswerError."""
        view = memoryview(data)
        while view:
            room_bytes = HEADER_BYTES - self._fruitless_bytes
            if room_bytes == 0:
                raise BrokenAnswerError("its headers are too long")
            piece, view = view[:room_bytes], view[room_bytes:]
            pieces = len(self._body)
            self._fruitless_bytes += len(piece)
            parser.feed_data(piece)
            if len(self._body) > pieces:
                self._fruitless_bytes = 0

    def eof_received(self) -> None:
        """See asyncio.Protocol; the transport closes."""
        if self._has_head and not self._is_framed and not self._is_complete and self._answer is not None:
            # Neither counted nor chunked: the connection's end is the body's (RFC 9112, 6.3). Over TLS uvloop calls
            # this only for an end that the engine has signed.
            self._is_complete = self._will_close = True
            self._answer.end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.is_closed = True
        self._unsent = None
        # It holds this object, and nothing else would undo that soon.
        self._parser = None
        if self._answer is None or self._is_complete:
            return
        if self._was_heard:
            self._answer.end(ConnectionLostError("it broke the connection off"))
        else:
            self._answer.end(UnansweredError("it closed the connection without an answer"))

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._is_write_paused = True

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._is_write_paused = False
        self._write_on()

    # httptools' side. What these raise ends the parsing, as an HttpParserError.

    def on_message_begin(self) -> None:
        """A message begins: an interim answer, the answer, or one that nobody asked for."""
        if self._is_complete:
            raise BrokenAnswerError
        self._is_framed = False
        self._media_type = ""

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which is dropped unless it would frame the body anew."""
        # By length first, as most headers are of no interest here.
        size = len(name)
        if size not in (12, 14, 17):
            return
        name = name.lower()
        if name == b"content-type":
            self._media_type = _media_type(value)
        elif name == b"content-length":
            self._is_framed = True
        elif name == b"transfer-encoding":
            # Other codings would have to be undone, and where a body ends with them readers disagree.
            if self._is_framed or value.rstrip(b" ").lower() != b"chunked":
                raise BrokenAnswerError
            self._is_framed = True

    def on_headers_complete(self) -> None:
        """A head is whole; an interim answer's brings nothing."""
        if self._parser is None or self._answer is None:
            return
        status = self._parser.get_status_code()
        if not 100 <= status <= 599:
            raise BrokenAnswerError
        if status < 200:
            return
        self._fruitless_bytes = 0
        self._has_head = True
        self._answer.begin(status, self._media_type)
        if status >= 300 and self._unsent is not None:
            # It does not want the rest of the request (RFC 9112, 9.5). Writing on into a connection that it closes
            # would lose the answer.
            self._unsent = None
            self._will_close = True

    def on_message_complete(self) -> None:
        """A message is whole."""
        if self._has_head and self._parser is not None:
            self._is_complete = True
            # Asked here and not with the head: a trailer can say that the connection closes.
            if not self._parser.should_keep_alive():
                self._will_close = True


@lru_cache(maxsize=64)
def _media_type(value: bytes) -> str:
    return value.partition(b";")[0].strip().lower().decode("latin-1")
