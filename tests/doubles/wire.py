"""An engine's connection in memory: a transport that a test feeds byte by byte, and a clock that it turns; nothing is
ever sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from router.http1 import Connection, UpstreamAnswer, UpstreamError


class ManualLoop:
    """As much of an event loop as a connection uses. Timers go off in `advance`, the rest in `turn`."""

    def __init__(self) -> None:
        self._now_s = 1000.0
        self._timers: list[asyncio.TimerHandle] = []
        self._soon: list[Callable[[], object]] = []

    @property
    def as_loop(self) -> asyncio.AbstractEventLoop:
        """It is one to a connection."""
        return cast(asyncio.AbstractEventLoop, self)

    def time(self) -> float:
        return self._now_s

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(self._now_s + delay, callback, args, self.as_loop)
        self._timers.append(handle)
        return handle

    def call_soon(self, callback: Callable[..., object], *args: Any) -> asyncio.Handle:
        self._soon.append(lambda: callback(*args))
        return asyncio.Handle(callback, args, self.as_loop)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    def get_debug(self) -> bool:
        return False

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self._timers.remove(handle)

    @property
    def timers(self) -> int:
        """How many are set."""
        return len(self._timers)

    def turn(self) -> bool:
        """Run what was due at once; returns whether there was anything."""
        due, self._soon = self._soon, []
        for callback in due:
            callback()
        return bool(due)

    def advance(self, delay_s: float) -> None:
        """Let time pass."""
        end_s = self._now_s + delay_s
        while due := [timer for timer in self._timers if timer.when() <= end_s]:
            timer = min(due, key=asyncio.TimerHandle.when)
            self._timers.remove(timer)
            self._now_s = max(self._now_s, timer.when())
            timer._run()
        self._now_s = end_s


class Wire(asyncio.Transport):
    """A transport with one connection at its end. `kept` is what the connection gave back."""

    def __init__(self, loop: ManualLoop | None = None) -> None:
        super().__init__()
        self.loop = loop or ManualLoop()
        self.sent = b""
        self.unsent_bytes = 0
        self._is_reading = True
        self._is_closed = False
        self.kept: list[Connection] = []
        self.connection = Connection(self.loop.as_loop, self.kept.append)
        self.connection.connection_made(self)

    def ask(self, head: bytes = b"POST / HTTP/1.1\r\n", body: bytes = b"") -> UpstreamAnswer:
        """Send a request."""
        return self.connection.ask(head, body)

    def feed(self, data: bytes) -> None:
        """What a read brings; nothing any more once the connection was closed."""
        if not self._is_closed:
            assert self._is_reading, "it was read though reading is paused"
            self.connection.data_received(data)

    def end(self, error: OSError | None = None) -> None:
        """The engine ends the connection: in good order, or by an error."""
        if self._is_closed:
            return
        if error is None:
            self.connection.eof_received()
        self._is_closed = True
        self.connection.connection_lost(error)

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        assert not self._is_closed, "it was written to though it is closed"
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return self.unsent_bytes

    def is_closing(self) -> bool:
        return self._is_closed

    def is_reading(self) -> bool:
        return self._is_reading

    def pause_reading(self) -> None:
        assert not self._is_closed
        self._is_reading = False

    def resume_reading(self) -> None:
        assert not self._is_closed
        self._is_reading = True

    def abort(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self.loop.call_soon(self.connection.connection_lost, None)


class Ear:
    """A receiver that remembers. `on_data` is called with every piece."""

    def __init__(self, on_data: Callable[[bytes], object] | None = None) -> None:
        self.pieces: list[bytes] = []
        self.ends: list[UpstreamError | None] = []
        self._on_data = on_data

    @property
    def body(self) -> bytes:
        """All that came."""
        return b"".join(self.pieces)

    def received(self, data: bytes) -> None:
        """Take what one read brought."""
        assert data
        assert not self.ends
        self.pieces.append(data)
        if self._on_data is not None:
            self._on_data(data)

    def ended(self, error: UpstreamError | None) -> None:
        """Take the end."""
        self.ends.append(error)
