"""One line for each request that was served, in the form of all other logs; it never holds what a user wrote.

These lines do not go through `logging`: redaction alone would cost more than everything else that the edge does for a
request. They need none, since every field is one that the edge makes or has checked: no path, query, header or body.
"""

import asyncio
import os
import select
import stat
import time

import msgspec

from edge.exchange import Exchange

_FLUSH_S = 0.1
_FLUSH_BYTES = 64 << 10
# What is kept for a reader that does not keep up.
_BACKLOG_BYTES = 1 << 20
_LAST_FLUSH_S = 1.0


class _Line(msgspec.Struct, omit_defaults=True):
    """The fields in the order in which `mesh.telemetry.JsonFormatter` has them."""

    timestamp: str
    level: str
    service: str
    logger: str
    message: str
    request_id: str | None = None
    trace_id: str | None = None
    duration_ms: float | None = None
    lines: int | None = None
    method: str | None = None
    reason: str | None = None
    route: str | None = None
    status: int | None = None


class AccessLog:
    """Collects lines and writes them to a file descriptor, a tenth of a second late at most.

    The event loop does not wait for who reads them: a descriptor that takes nothing now is tried again later, and a
    pipe gets pieces that it takes whole (PIPE_BUF), which also keeps the lines of other processes out of ours. A thread
    would need as many lines to be kept, and O_NONBLOCK would hold for everybody who shares the descriptor. Lines keep
    their order; once the backlog is full new ones are dropped, and a line says how many as soon as there is room.
    """

    def __init__(self, service: str, descriptor: int = 2) -> None:
        """Standard error, unless another descriptor is given; it stays open."""
        self._service = service
        self._descriptor = descriptor
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._piece_bytes = _BACKLOG_BYTES if is_file else select.PIPE_BUF
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._encode_into = msgspec.json.Encoder().encode_into
        self._buffer = bytearray()
        self._is_blocked = False
        self._lost_lines = 0
        self._timer: asyncio.TimerHandle | None = None
        self._second = 0
        self._second_text = ""

    def write(self, exchange: Exchange, elapsed_s: float) -> None:
        """Note a request that has ended."""
        if len(self._buffer) > _BACKLOG_BYTES:
            self._lost_lines += 1
            return
        timestamp = self._timestamp()
        if self._lost_lines:
            lines, self._lost_lines = self._lost_lines, 0
            self._append(_Line(timestamp, "warning", self._service, __name__, "lines were lost", lines=lines))
        reason = exchange.reason
        self._append(
            _Line(
                timestamp,
                "info",
                self._service,
                "edge.access",
                "request",
                exchange.request_id,
                exchange.trace_id or None,
                int(elapsed_s * 10_000) / 10,
                None,
                exchange.method,
                None if reason is None else reason.value,
                exchange.route,
                exchange.status,
            )
        )

    def close(self) -> None:
        """Write what is left, waiting for its reader, but not for long."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        give_up_s = time.monotonic() + _LAST_FLUSH_S
        while self._buffer and (left_s := give_up_s - time.monotonic()) > 0:
            self._flush(wait_ms=round(left_s * 1000))

    def _append(self, line: _Line) -> None:
        buffer = self._buffer
        self._encode_into(line, buffer, -1)
        buffer += b"\n"
        if len(buffer) >= _FLUSH_BYTES and not self._is_blocked:
            self._flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._flush()
        if self._buffer:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_S, self._on_timer)

    def _flush(self, wait_ms: int = 0) -> None:
        buffer = self._buffer
        written = 0
        try:
            with memoryview(buffer) as view:
                while written < len(view) and self._poll.poll(wait_ms):
                    end = len(view)
                    if end - written > self._piece_bytes:
                        end = buffer.rfind(b"\n", written, written + self._piece_bytes) + 1
                    written += os.write(self._descriptor, view[written:end])
        except BlockingIOError:
            # Somebody else made the descriptor non-blocking.
            pass
        except OSError:
            # There is nobody to tell it: the other end is gone, or the disk is full.
            self._lost_lines += buffer.count(b"\n", written)
            written = len(buffer)
        del buffer[:written]
        self._is_blocked = bool(buffer)

    def _timestamp(self) -> str:
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            self._second_text = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
        return f"{self._second_text}{int((now - second) * 1000):03d}Z"
