"""uvicorn's HTTP/1.1 protocol with the limits it lacks: bytes of headers, time to send them, time an answer may go
unread; it never sees what a request is about."""

import asyncio
import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from prometheus_client import Counter
from uvicorn._types import ASGI3Application, ASGISendEvent, HTTPResponseBodyEvent
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from edge.exchange import CONNECTION
from edge.openai.errors import error_body
from mesh.errors import PlatformError, Reason, to_aip193

logger = logging.getLogger(__name__)

_REFUSED = Counter(
    "aiaas_edge_connections_refused", "Connections that the edge ended for how their bytes came or went.", ["cause"]
)
_HEADERS_TOO_LARGE = _REFUSED.labels("headers_too_large")
_HEADERS_TOO_SLOW = _REFUSED.labels("headers_too_slow")
_NOT_HTTP = _REFUSED.labels("not_http")
_ANSWER_UNREAD = _REFUSED.labels("answer_unread")

# ": " and the line's end.
_HEADER_SYNTAX_BYTES = 4
# What may stand in no header; a tab may.
_CONTROLS = bytes(byte for byte in (*range(32), 127) if byte != ord("\t"))
# How long, and for how much, a refused client is still read from, so that it gets to see why.
_LINGER_S = 2.0
_LINGER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bytes of a request's line and headers, seconds to send them, seconds that an answer may go unread, and how many
    connections there may be until requests are shed."""

    header_bytes: int = 16 << 10
    header_timeout_s: float = 10.0
    write_timeout_s: float = 30.0
    max_connections: int = 20_000


class _State(enum.Enum):
    IDLE = enum.auto()
    HEADERS = enum.auto()
    BODY = enum.auto()


class _HeadersTooLargeError(Exception):
    """Ends the parsing of a read."""


class _Cycle(RequestResponseCycle):
    """One request and its answer, as an `edge.exchange.Connection` too."""

    on_gone: Callable[[], None] | None = None
    is_overloaded = False
    _held_back = b""

    def take_body(self) -> bytes | None:
        """The whole body, once; None while some of it has not come, or when the client is gone."""
        if self.more_body or self.disconnected:
            return None
        body = bytes(self.body)
        self.body = bytearray()
        # As `receive` has it. A connection that is not read would not tell of a client that leaves.
        self.message_event.clear()
        self.flow.resume_reading()
        return body

    def lose(self) -> None:
        """The client can no longer be answered."""
        if self.response_complete:
            return
        self.disconnected = True
        self.message_event.set()
        callback, self.on_gone = self.on_gone, None
        if callback is not None:
            callback()

    def write_chunk(self, chunk: bytes) -> bool:
        """Write a piece of a chunked answer right now; False, and nothing is written, when that cannot be."""
        if self.flow.write_paused or self.disconnected or not self.chunked_encoding or self.response_complete:
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        return True

    async def send(self, message: ASGISendEvent) -> None:
        """Write a part of the answer, as uvicorn does, with two things that it does not do: an answer whose length is
        known leaves in one write with its head, as a write costs as much as a third of all else; and headers are
        checked all at once, as a regular expression for each name and each value took a tenth."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if not self.response_started:
            head = self._head_of(message)
            if self.chunked_encoding is False:
                self._held_back = head
            else:
                self.transport.write(head)
            return
        if self.response_complete:
            raise RuntimeError("an answer goes on after its end")
        message = cast(HTTPResponseBodyEvent, message)
        body = message.get("body", b"")
        is_last = not message.get("more_body", False)
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
            body = b""
        elif self.chunked_encoding:
            end = b"0\r\n\r\n" if is_last else b""
            body = b"%x\r\n%b\r\n%b" % (len(body), body, end) if body else end
        else:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0 or (is_last and self.expected_content_length):
                raise RuntimeError("an answer is not as long as it said")
        if self._held_back:
            body = self._held_back + body
            self._held_back = b""
        self.transport.write(body)
        if is_last:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()

    def _head_of(self, message: ASGISendEvent) -> bytes:
        if message["type"] != "http.response.start":
            raise RuntimeError("an answer begins without its head")
        status = message["status"]
        headers = [*self.default_headers, *message.get("headers", ())]
        parts = [STATUS_LINE[status]]
        closes = False
        for name, value in headers:
            if name == b"content-length":
                self.expected_content_length = int(value)
                self.chunked_encoding = False
            elif name == b"connection":
                # Its one value here is "close".
                closes = True
                self.keep_alive = False
            parts += (name, b": ", value, b"\r\n")
        lines = len(headers) + 2
        if not self.keep_alive and not closes:
            parts.append(b"connection: close\r\n")
            lines += 1
        if self.chunked_encoding is None and self.scope["method"] != "HEAD" and status not in (204, 304):
            self.chunked_encoding = True
            parts.append(b"transfer-encoding: chunked\r\n")
            lines += 1
        parts.append(b"\r\n")
        head = b"".join(parts)
        if len(head.translate(None, _CONTROLS)) != len(head) - 2 * lines:
            raise RuntimeError("a header of an answer has a control character")
        self.response_started = True
        self.waiting_for_100_continue = False
        return head


class EdgeProtocol(HttpToolsProtocol):
    """One connection. What breaks a limit while an answer is under way is closed without a word, as that word would end
    up in the middle of the answer."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: ConnectionLimits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # uvicorn's own line has the query, and asks for handlers rather than for its configuration.
        self.access_log = False
        self._limits = limits
        self._state = _State.IDLE
        # The request that is being answered; with pipelining that is not the one that came last.
        self._running: _Cycle | None = None
        # Bytes of the request's line and headers, counted one by one only when a read is large enough to break the
        # limit: `_head_read_bytes` are those of the reads before, in which the same request's headers came.
        self._header_bytes = 0
        self._head_read_bytes = 0
        self._is_counting = False
        # Bytes of whole reads that brought neither a new request nor a piece of a body: one long header or trailer,
        # of which the parser tells only when it has all of it.
        self._fruitless_bytes = 0
        self._read_was_fruitful = False
        self._refused = False
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first request its time."""
        super().connection_made(transport)
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the timers, and tell the request that waits for its answer."""
        for timer in (self._header_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        if self._running is not None:
            self._running.lose()

    def data_received(self, data: bytes) -> None:
        """Parse a read, and count what does not get the request any further."""
        if self._refused:
            self._fruitless_bytes += len(data)
            if self._fruitless_bytes > _LINGER_BYTES:
                self.transport.close()
            return
        self._read_was_fruitful = False
        self._is_counting = self._head_read_bytes + len(data) > self._limits.header_bytes
        if self._is_counting and self._state is _State.HEADERS:
            self._header_bytes = len(self.url) + sum(
                len(name) + len(value) + _HEADER_SYNTAX_BYTES for name, value in self.headers
            )
        super().data_received(data)
        if self.transport.is_closing() or self._refused:
            return
        if self._state is _State.HEADERS:
            self._head_read_bytes += len(data)
        else:
            self._head_read_bytes = 0
        if not self._read_was_fruitful:
            self._fruitless_bytes += len(data)
            if self._fruitless_bytes > self._limits.header_bytes:
                self._refuse(PlatformError(Reason.HEADER_TOO_LARGE), _HEADERS_TOO_LARGE)
                return
        if self._header_timer is None and (
            self._state is _State.HEADERS or (self._state is _State.IDLE and not self._read_was_fruitful)
        ):
            # Stray bytes between requests end uvicorn's keep-alive time, so they start this one.
            self._start_header_timer()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._state = _State.HEADERS
        self._header_bytes = 0
        self._progress()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        self.url += url
        if self._is_counting:
            self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer after the body, which is dropped: a request is judged by its headers."""
        if self._is_counting:
            self._count(len(name) + len(value) + _HEADER_SYNTAX_BYTES)
        # What uvicorn does; calling it would be a third of the time.
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The request goes to the application."""
        self._state = _State.BODY
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        super().on_headers_complete()
        # uvicorn makes it, and asks nobody of which class. It runs from the next turn of the loop on.
        self.cycle.__class__ = _Cycle
        cycle = cast(_Cycle, self.cycle)
        cast(dict[str, Any], self.scope)["extensions"] = {CONNECTION: cycle}
        if len(self.connections) > self._limits.max_connections:
            cycle.is_overloaded = True
            cycle.keep_alive = False
        # Where trailers go.
        self.headers = []

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cast(_Cycle, cycle)
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._progress()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._state = _State.IDLE
        self._progress()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what could not be parsed."""
        if self._header_bytes > self._limits.header_bytes:
            self._refuse(PlatformError(Reason.HEADER_TOO_LARGE), _HEADERS_TOO_LARGE)
        else:
            error = PlatformError(Reason.INVALID_ARGUMENT, description="The request is not valid HTTP.")
            self._refuse(error, _NOT_HTTP)

    def pause_writing(self) -> None:
        """The client does not keep up."""
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _progress(self) -> None:
        self._read_was_fruitful = True
        self._fruitless_bytes = 0

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > self._limits.header_bytes:
            raise _HeadersTooLargeError

    @property
    def _answer_is_under_way(self) -> bool:
        if self.pipeline:
            return True
        return self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete

    def _refuse(self, error: PlatformError, counter: Counter) -> None:
        """Answer with an error in the shape of the area that the target names, as far as it is known, and close."""
        counter.inc()
        self._refused = True
        self._fruitless_bytes = 0
        if self._answer_is_under_way or self.transport.is_closing():
            self.transport.close()
            return
        if self._running is not None:
            # Its body broke; the application must not answer as well.
            self._running.lose()
        url: bytes = getattr(self, "url", b"")
        is_rest = url.startswith((b"/admin/", b"/analytics/"))
        body = msgspec.json.encode(to_aip193(error)) if is_rest else error_body(error)
        self.transport.write(
            STATUS_LINE[error.entry.http]
            + b"content-type: application/json\r\nconnection: close\r\n"
            + b"content-length: %d\r\n\r\n" % len(body)
            + body
        )
        if self.transport.can_write_eof():
            # A socket closed over unread bytes is reset, and a reset takes the answer with it.
            self.transport.write_eof()
            self._linger_timer = self.loop.call_later(_LINGER_S, self.transport.close)
        else:
            self.transport.close()

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(self._limits.header_timeout_s, self._on_header_timeout)

    def _on_header_timeout(self) -> None:
        self._header_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            # The client waits for its answer; until then its next request has time.
            self._start_header_timer()
        else:
            _HEADERS_TOO_SLOW.inc()
            self.transport.close()

    def _start_write_timer(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self._on_write_timeout, unsent)

    def _on_write_timeout(self, unsent_before: int) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size() < unsent_before:
            self._start_write_timer()
        else:
            _ANSWER_UNREAD.inc()
            logger.info("an answer went unread for too long")
            self.transport.abort()
