"""Lua scripts on Redis for the hot path: one connection, a loop turn's calls in one write; it never waits long.

redis-py spends 37 to 98 us of CPU on a call, this 5 to 10, because there is nothing here but scripts: no pool, no
retries, no types. What is not on the hot path belongs to `mesh.cache`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import ssl
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import hiredis
from redis.asyncio.connection import SSLConnection, parse_url

from mesh.clock import Clock
from mesh.errors import PlatformError, Reason

logger = logging.getLogger(__name__)

_TIMEOUT_S = 0.05
_CONNECT_TIMEOUT_S = 1.0
_CALLS = 10_000
# So many errors in a row end a connection: the server may have become a replica, or be out of memory.
_ERRORS = 3
_PAUSES_S = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)

# How redis-py writes "whatever the answer is", which only the script knows.
Answer: TypeAlias = Any


class Script:
    """A Lua script, which Redis knows by the SHA-1 of its source."""

    __slots__ = ("load", "sha")

    def __init__(self, source: str) -> None:
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest().encode()
        self.load = _encode((b"SCRIPT", b"LOAD", source.encode()))

    def call(self, keys: Sequence[bytes], arguments: Sequence[bytes], more: int = 0) -> Call:
        """A call that is encoded once; each run adds `more` arguments of its own at the end."""
        head = _encode((b"EVALSHA", self.sha, b"%d" % len(keys), *keys, *arguments), more)
        return Call(self, head, more)


class Call:
    """See `Script.call`."""

    __slots__ = ("_head", "_more", "script")

    def __init__(self, script: Script, head: bytes, more: int) -> None:
        self.script = script
        self._head = head
        self._more = more

    def command(self, more: Sequence[bytes]) -> bytes:
        """The call as it goes over the wire."""
        if len(more) != self._more:
            # One argument too few would make the next command part of this one.
            raise TypeError(f"this call takes {self._more} more arguments, not {len(more)}")
        command = self._head
        for argument in more:
            command += b"$%d\r\n%b\r\n" % (len(argument), argument)
        return command


class Scripts:
    """One Redis, connected as long as `run_connection()` runs. `url` is one of redis-py's: redis, rediss or unix.

    While Redis is away, or slower than `timeout_s`, calls fail at once; in the background a new connection is tried, at
    most once a second, and counts as one only when it has loaded `scripts` within `timeout_s`. So an outage costs the
    calls that were under way `timeout_s` and all others nothing.
    """

    def __init__(self, url: str, clock: Clock, *scripts: Script, timeout_s: float = _TIMEOUT_S) -> None:
        self._parameters: dict[str, Any] = dict(parse_url(url))
        self._tls: ssl.SSLContext | None = None
        if self._parameters.get("connection_class") is SSLConnection:
            options = {name: value for name, value in self._parameters.items() if name.startswith("ssl_")}
            self._tls = SSLConnection(**options).ssl_context.get()
        self._clock = clock
        self._scripts = scripts
        self._timeout_s = timeout_s
        self._link: _Link | None = None
        self._connected = asyncio.Event()
        self.connections = 0
        """How many connections there have been; whoever sees another number than before may have missed an outage."""

    def run(self, call: Call, *more: bytes) -> asyncio.Future[Answer]:
        """Call now; the future holds the script's answer. A caller that is cancelled leaves the call to its end.

        Raises PlatformError(UNAVAILABLE), here or from the future, when Redis is away, refuses or is too slow; the
        script may have run all the same.
        """
        link = self._link
        if link is None:
            raise PlatformError(Reason.UNAVAILABLE)
        future: asyncio.Future[Answer] = link.loop.create_future()
        link.send(call.command(more), future, call.script)
        return future

    def tell(self, call: Call, *more: bytes) -> None:
        """Call without an answer; all calls run in the order in which they were made. Raises as `run` does."""
        link = self._link
        if link is None:
            raise PlatformError(Reason.UNAVAILABLE)
        link.send(call.command(more), None, call.script)

    async def connected(self) -> None:
        """Returns when Redis is there."""
        await self._connected.wait()

    async def run_connection(self) -> None:
        """Connects, and connects again whenever the connection ends, until cancelled."""
        failures = 0
        while True:
            link = _Link(self._clock, self._timeout_s)
            try:
                await self._open(link)
                if failures > 1:
                    logger.info("Redis is connected again")
                self._link = link
                self.connections += 1
                self._connected.set()
                await link.ended
            except (PlatformError, OSError, TimeoutError) as error:
                if failures == 1:
                    logger.warning("Redis is away: %s", error)
            finally:
                self._link = None
                self._connected.clear()
                await link.close()
            # A server that takes connections but answers no call is not tried without a pause either.
            failures = 1 if link.proven else failures + 1
            await asyncio.sleep(_PAUSES_S[min(failures, len(_PAUSES_S)) - 1])

    async def _open(self, link: _Link) -> None:
        parameters = self._parameters
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            if path := parameters.get("path"):
                await link.loop.create_unix_connection(lambda: link, path)
            else:
                await link.loop.create_connection(
                    lambda: link,
                    parameters.get("host", "localhost"),
                    parameters.get("port", 6379),
                    ssl=self._tls,
                )
            commands = [script.load for script in self._scripts]
            if (database := parameters.get("db")) is not None:
                commands.insert(0, _encode((b"SELECT", b"%d" % database)))
            if password := parameters.get("password"):
                names = (parameters["username"], password) if "username" in parameters else (password,)
                commands.insert(0, _encode((b"AUTH", *(name.encode() for name in names))))
            answers: list[asyncio.Future[Answer]] = []
            for command in commands:
                answers.append(link.loop.create_future())
                link.send(command, answers[-1], None)
            for outcome in await asyncio.gather(*answers, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
        link.proven = False


class _Waiting(NamedTuple):
    """A command that has no answer yet. `script` is what a NOSCRIPT lacks, None where it would be no use to load it."""

    future: asyncio.Future[Answer] | None
    command: bytes
    script: Script | None
    batch: _Batch


class _Batch:
    """The commands of one turn of the loop, which leave together."""

    __slots__ = ("commands", "sent_at")

    def __init__(self) -> None:
        self.commands: list[bytes] = []
        self.sent_at = math.inf


class _Link(asyncio.Protocol):
    """One connection. Answers come in the order of the commands; when one is late the connection ends, so that an
    answer can never go to another call than its own."""

    def __init__(self, clock: Clock, timeout_s: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self.loop.create_future()
        self.proven = False
        """Whether a call has been answered."""
        self._clock = clock
        self._timeout_s = timeout_s
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader()
        self._waiting: deque[_Waiting] = deque()
        self._room = _CALLS
        self._batch = _Batch()
        self._timer: asyncio.TimerHandle | None = None
        self._errors = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # it is what create_connection makes

    def connection_lost(self, error: Exception | None) -> None:
        self._end()

    def send(self, command: bytes, future: asyncio.Future[Answer] | None, script: Script | None) -> None:
        """Raises PlatformError(UNAVAILABLE) if too many commands wait or the connection has ended."""
        if len(self._waiting) >= self._room:
            raise PlatformError(Reason.UNAVAILABLE)
        batch = self._batch
        if not batch.commands:
            self.loop.call_soon(self._flush)
        batch.commands.append(command)
        self._waiting.append(_Waiting(future, command, script, batch))
        if self._timer is None:
            # One timer for all: it looks at the oldest command, and moves on with it.
            self._timer = self.loop.call_later(self._timeout_s, self._look)

    def data_received(self, data: bytes) -> None:
        reader, waiting = self._reader, self._waiting
        reader.feed(data)
        loaded: set[Script] = set()
        try:
            while (answer := reader.gets()) is not False:
                asked = waiting.popleft()
                if answer.__class__ is hiredis.ReplyError:
                    self._refused(asked, str(answer), loaded)
                    continue
                self.proven = True
                self._errors = 0
                future = asked.future
                if future is not None and not future.done():
                    future.set_result(answer)
        except (hiredis.ProtocolError, IndexError):
            logger.error("Redis broke its protocol")
            self._end()
        if self._errors >= _ERRORS:
            self._end()

    async def close(self) -> None:
        """Sends what was still to be sent, then ends."""
        if self._transport is not None:
            self._flush()
            self._transport.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeout_s):
                    await asyncio.shield(self.ended)
        self._end()

    def _refused(self, asked: _Waiting, error: str, loaded: set[Script]) -> None:
        script = asked.script
        if error.startswith("NOSCRIPT") and script is not None:
            # The server was restarted or replaced behind its address, or its scripts were flushed.
            with contextlib.suppress(PlatformError):
                if script not in loaded:
                    loaded.add(script)
                    self.send(script.load, None, None)
                self.send(asked.command, asked.future, None)
                return
        self._errors += 1
        if self._errors == 1:
            logger.warning("Redis refused a command: %.200s", error)
        _fail(asked.future)

    def _flush(self) -> None:
        batch = self._batch
        if batch.commands and self._transport is not None:
            self._transport.write(b"".join(batch.commands))
            batch.sent_at = self._clock.monotonic()
            self._batch = _Batch()

    def _look(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        now = self._clock.monotonic()
        # What this process was too busy to send has all its time before it.
        due = min(self._waiting[0].batch.sent_at, now) + self._timeout_s
        if now < due:
            self._timer = self.loop.call_later(due - now, self._look)
        else:
            # Loops run timers when they have read what was there, so it is not this process that was too slow.
            self._end()

    def _end(self) -> None:
        if self.ended.done():
            return
        self.ended.set_result(None)
        self._room = 0
        self._batch = _Batch()
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        while self._waiting:
            _fail(self._waiting.popleft().future)


def _fail(future: asyncio.Future[Answer] | None) -> None:
    if future is not None and not future.done():
        future.set_exception(PlatformError(Reason.UNAVAILABLE))


def _encode(parts: Sequence[bytes], more: int = 0) -> bytes:
    """A command as RESP writes it, to which `more` parts can be appended."""
    return b"*%d\r\n" % (len(parts) + more) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
