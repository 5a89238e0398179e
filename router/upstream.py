"""Asks engines over HTTP/1.1: a pool of connections for each of them, the keys they want; it never decides whom to ask.

It asks again only where a kept connection was closed in the very moment of its reuse; any other retry is its caller's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, Self
from urllib.parse import urlsplit

from router.backends import Backend
from router.http1 import (
    AnswerTooLongError,
    Connection,
    ConnectionRefusedUpstreamError,
    UnansweredError,
    UpstreamAnswer,
    UpstreamError,
    UpstreamTimeoutError,
)

HEALTH_PATH = "/health"
"""Where vLLM and llama.cpp both tell whether they can serve."""

# Engines close an idle connection after 5 s; one that is taken in that very moment loses its request.
_KEEP_ALIVE_S = 4.0
_EVICTION_S = 1.0
_HEALTH_BYTES = 64 << 10
_TARGETS = 4096


class MisconfiguredBackendError(UpstreamError):
    """The backend's key is not in the router's environment."""

    reason = "backend_misconfigured"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to connect, to the first byte of a stream, to that of an answer that comes whole, and between two
    chunks."""

    connect_s: float
    first_byte_s: float
    answer_s: float
    idle_s: float


class Upstream(Protocol):
    """How an engine is asked."""

    async def open(
        self, backend: Backend, path: str, body: bytes, timeouts: Timeouts, *, streamed: bool, traceparent: str = ""
    ) -> UpstreamAnswer:
        """Send a request and wait for the first byte of the answer's body. `traceparent` is what the engine's own spans
        belong to; empty where the request is not sampled. Raises UpstreamError.

        Cancelled, it closes the connection, so that the engine stops.
        """


class _Address(NamedTuple):
    scheme: str
    host: str
    port: int


class _Target(NamedTuple):
    """Where a request goes, and all of its head but the length of its body."""

    address: _Address
    head: bytes


class HttpUpstream:
    """The engines over HTTP/1.1. Use as an async context manager; `credentials` are the engines' keys by variable."""

    def __init__(self, credentials: Mapping[str, str]) -> None:
        self._credentials = credentials
        # Of each engine, the connection that has been idle for the longest is first.
        self._idle: dict[_Address, deque[Connection]] = {}
        self._eviction: asyncio.TimerHandle | None = None
        self._targets: dict[tuple[str, str, str, str], _Target] = {}
        self._tls: ssl.SSLContext | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        """Nothing is connected before it is needed."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every idle connection; those that answer are their readers' to close."""
        self._is_closed = True
        if self._eviction is not None:
            self._eviction.cancel()
        for idle in self._idle.values():
            while idle:
                idle.pop().abort()

    async def open(
        self, backend: Backend, path: str, body: bytes, timeouts: Timeouts, *, streamed: bool, traceparent: str = ""
    ) -> UpstreamAnswer:
        """See `Upstream.open`."""
        timeout_s = timeouts.first_byte_s if streamed else timeouts.answer_s
        target = self._target("POST", backend, path)
        if traceparent:
            target = _Target(target.address, b"%btraceparent: %b\r\n" % (target.head, traceparent.encode()))
        return await self._ask(target, body, timeouts.connect_s, timeout_s, timeouts.idle_s)

    async def probe(self, backend: Backend, timeout_s: float) -> None:
        """Ask the engine for its health. Raises UpstreamError if it does not answer with 200 within `timeout_s`."""
        with contextlib.suppress(AnswerTooLongError):
            await self.get(backend, HEALTH_PATH, timeout_s, _HEALTH_BYTES)

    async def get(self, backend: Backend, path: str, timeout_s: float, limit_bytes: int) -> bytes:
        """What the engine tells at `path`. Raises UpstreamError if it does not answer with 200 within `timeout_s`, or
        with more than `limit_bytes`."""
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._ask(self._target("GET", backend, path), b"", timeout_s, timeout_s, timeout_s)
                try:
                    if answer.status != 200:
                        raise UpstreamError(f"it answered {path} with {answer.status}")
                    return await answer.read(limit_bytes)
                finally:
                    answer.close()
        except TimeoutError:
            raise UpstreamTimeoutError("it was silent for too long") from None

    async def _ask(
        self, target: _Target, body: bytes, connect_s: float, first_byte_s: float, idle_s: float
    ) -> UpstreamAnswer:
        connection = self._take(target.address)
        if connection is not None:
            loop = asyncio.get_running_loop()
            asked_at = loop.time()
            try:
                return await _arrived(connection.ask(target.head, body), first_byte_s, idle_s)
            except UnansweredError:
                # It was closed as it was taken. Others here have been idle for as long, so the next one is new.
                first_byte_s = max(0.0, first_byte_s - (loop.time() - asked_at))
        connection = await self._connect(target.address, connect_s)
        return await _arrived(connection.ask(target.head, body), first_byte_s, idle_s)

    def _take(self, address: _Address) -> Connection | None:
        """The connection that was used last, as it is the least likely to be closed by now."""
        idle = self._idle.get(address)
        if idle:
            oldest = asyncio.get_running_loop().time() - _KEEP_ALIVE_S
            while idle:
                connection = idle.pop()
                if connection.is_usable and connection.idle_since >= oldest:
                    return connection
                connection.abort()
        return None

    def _keep(self, address: _Address, connection: Connection) -> None:
        if self._is_closed:
            connection.abort()
            return
        self._idle.setdefault(address, deque()).append(connection)
        if self._eviction is None:
            self._eviction = asyncio.get_running_loop().call_later(_KEEP_ALIVE_S, self._evict)

    def _evict(self) -> None:
        """Close what has been idle for too long, and look again while there is anything left."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - _KEEP_ALIVE_S
        for address, idle in list(self._idle.items()):
            while idle and (not idle[0].is_usable or idle[0].idle_since <= oldest):
                idle.popleft().abort()
            if not idle:
                del self._idle[address]
        self._eviction = loop.call_later(_EVICTION_S, self._evict) if self._idle else None

    async def _connect(self, address: _Address, connect_s: float) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(connect_s):
                if address.scheme == "https" and self._tls is None:
                    # Reading the system's authorities takes tens of milliseconds.
                    self._tls = await asyncio.to_thread(ssl.create_default_context)
                _, connection = await loop.create_connection(
                    lambda: Connection(loop, partial(self._keep, address)),
                    address.host,
                    address.port,
                    ssl=self._tls if address.scheme == "https" else None,
                )
        except TimeoutError as error:
            raise ConnectionRefusedUpstreamError("it did not take the connection in time") from error
        except ssl.SSLError as error:
            raise ConnectionRefusedUpstreamError("there is no trusted TLS with it") from error
        except (OSError, UnicodeError) as error:
            # The latter is for what cannot be the name of a host.
            raise ConnectionRefusedUpstreamError("it refused the connection") from error
        return connection

    def _target(self, verb: str, backend: Backend, path: str) -> _Target:
        key = (verb, backend.base_url, path, backend.credential_variable)
        target = self._targets.get(key)
        if target is None:
            if len(self._targets) >= _TARGETS:
                self._targets.clear()
            target = self._targets[key] = self._make_target(verb, backend, path)
        return target

    def _make_target(self, verb: str, backend: Backend, path: str) -> _Target:
        url = urlsplit(backend.base_url)
        lines = [f"{verb} {url.path.rstrip('/')}{path} HTTP/1.1", f"Host: {url.netloc}", "Accept-Encoding: identity"]
        if verb == "POST":
            lines.append("Content-Type: application/json")
        if variable := backend.credential_variable:
            credential = self._credentials.get(variable)
            if not credential:
                raise MisconfiguredBackendError(f"the router's environment has no {variable}")
            if not (credential.isascii() and credential.isprintable()):
                raise MisconfiguredBackendError(f"{variable} has a character that no header takes")
            lines.append(f"Authorization: Bearer {credential}")
        address = _Address(url.scheme, url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
        return _Target(address, "".join(f"{line}\r\n" for line in lines).encode())


async def _arrived(answer: UpstreamAnswer, first_byte_s: float, idle_s: float) -> UpstreamAnswer:
    try:
        await answer.arrival(first_byte_s, idle_s)
    except BaseException:
        answer.close()
        raise
    return answer
