"""Passes an engine's stream on as it comes: bytes in from a connection, whole events out to whoever reads the answer;
it never decides what becomes of a request that fails.

It is called for every chunk, so it is plain calls from the connection's read to the reader's buffer: no task wakes up,
nothing is awaited, and no object is made but the bytes themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mesh.errors import PlatformError
from router import sse
from router.http1 import ConnectionLostError, UpstreamAnswer, UpstreamError

# After the closing marker an engine has nothing more to say but the end of its answer.
_LAST_WORD_S = 0.25


class EngineFaultError(Exception):
    """The engine sent an error as an event."""

    def __init__(self, fault: sse.EngineFault) -> None:
        super().__init__("the engine sent an error")
        self.fault = fault


class AnswerStream:
    """One stream of one engine. `begin` is called before the first bytes are passed to `write`; if it raises
    PlatformError, nothing is passed on."""

    __slots__ = ("_answer", "_begin", "_done", "_has_begun", "_timer", "_watch", "_write")

    def __init__(
        self, answer: UpstreamAnswer, watch: sse.EventWatch, begin: Callable[[], None], write: Callable[[bytes], None]
    ) -> None:
        self._answer = answer
        self._watch = watch
        self._begin = begin
        self._write = write
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._has_begun = False

    async def run(self) -> None:
        """Return when the whole stream has been passed on.

        Raises UpstreamError for a stream that breaks off or falls silent, sse.EventTooLongError for one that never
        ends an event, EngineFaultError for an error that came as an event, and what `begin` raises.
        """
        try:
            self._answer.forward(self)
            await self._done
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def received(self, data: bytes) -> None:
        """Take what has arrived."""
        if self._done.done() or self._timer is not None:
            return
        watch = self._watch
        try:
            events = watch.feed(data)
        except sse.EventTooLongError as error:
            self._done.set_exception(error)
            return
        if events:
            if not self._has_begun and not self._start():
                return
            self._write(events)
        if watch.fault is not None:
            self._done.set_exception(EngineFaultError(watch.fault))
        elif watch.complete:
            self._timer = asyncio.get_running_loop().call_later(_LAST_WORD_S, self._end)

    def ended(self, error: UpstreamError | None) -> None:
        """Take the end of the engine's answer."""
        if self._done.done():
            return
        if self._watch.complete:
            self._end()
        elif error is not None:
            self._done.set_exception(error)
        elif rest := self._watch.end():
            if self._has_begun or self._start():
                self._write(rest)
                self._end()
        else:
            self._done.set_exception(ConnectionLostError("it ended its answer too early"))

    def _start(self) -> bool:
        """Begin; returns whether that was possible."""
        self._has_begun = True
        try:
            self._begin()
        except PlatformError as error:
            self._done.set_exception(error)
            return False
        return True

    def _end(self) -> None:
        if not self._done.done():
            self._done.set_result(None)
