"""uvicorn's HTTP/1.1 protocol with the limits it lacks: bytes of headers, time to send them, time an answer may go
unread; it never sees what a request is about."""

import asyncio
import enum
import logging
from dataclasses import dataclass
from typing import Any

import msgspec
from prometheus_client import Counter
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

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
# How long, and for how much, a refused client is still read from, so that it gets to see why.
_LINGER_S = 2.0
_LINGER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bytes of a request's line and headers, seconds to send them, seconds that an answer may go unread."""

    header_bytes: int = 16 << 10
    header_timeout_s: float = 10.0
    write_timeout_s: float = 30.0


class _State(enum.Enum):
    IDLE = enum.auto()
    HEADERS = enum.auto()
    BODY = enum.auto()


class _HeadersTooLargeError(Exception):
    """Ends the parsing of a read."""


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
        self._header_bytes = 0
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
        """Drop the timers."""
        for timer in (self._header_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse a read, and count what does not get the request any further."""
        if self._refused:
            self._fruitless_bytes += len(data)
            if self._fruitless_bytes > _LINGER_BYTES:
                self.transport.close()
            return
        self._read_was_fruitful = False
        super().data_received(data)
        if self.transport.is_closing() or self._refused:
            return
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
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer after the body, which is counted and dropped: a request is judged by its headers."""
        self._count(len(name) + len(value) + _HEADER_SYNTAX_BYTES)
        if self._state is _State.HEADERS:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request goes to the application."""
        self._state = _State.BODY
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        super().on_headers_complete()

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
        if self.cycle is not None and not self.cycle.response_complete:
            # Its body broke; the application must not answer as well.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
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
