"""Asks engines over HTTP/1.1: a pool of connections for each of them, the keys they want; it never decides whom to ask.

It asks again only where a kept connection was closed in the very moment of its reuse; any other retry is its caller's.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self
from urllib.parse import urlsplit

from router.backends import Backend
from router.http1 import (
    Connection,
    ConnectionRefusedUpstreamError,
    UnansweredError,
    UpstreamAnswer,
    UpstreamError,
)

HEALTH_PATH = "/health"
"""Where vLLM and llama.cpp both tell whether they can serve."""

# Engines close an idle connection after 5 s; one that is taken in that very moment loses its request.
_KEEP_ALIVE_S = 4.0
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
        self, backend: Backend, path: str, body: bytes, timeouts: Timeouts, *, streamed: bool
    ) -> UpstreamAnswer:
        """Send a request and wait for the first byte of the answer's body. Raises UpstreamError.

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
        self._idle: dict[_Address, deque[Connection]] = {}
        self._targets: dict[tuple[str, str, str, str], _Target] = {}
        self._tls: ssl.SSLContext | None = None

    async def __aenter__(self) -> Self:
        """Nothing is connected before it is needed."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every idle connection; those that answer are their readers' to close."""
        for connections in self._idle.values():
            while connections:
                connections.pop().abort()
        # Sockets are closed when the loop turns.
        await asyncio.sleep(0)

    async def open(
        self, backend: Backend, path: str, body: bytes, timeouts: Timeouts, *, streamed: bool
    ) -> UpstreamAnswer:
        """See `Upstream.open`."""
        target = self._target("POST", backend, path)
        head = b"%bContent-Length: %d\r\n\r\n" % (target.head, len(body))
        timeout_s = timeouts.first_byte_s if streamed else timeouts.answer_s
        return await self._ask(target.address, head, body, timeouts.connect_s, timeout_s, timeouts.idle_s)

    async def probe(self, backend: Backend, timeout_s: float) -> None:
        """Ask the engine for its health. Raises UpstreamError if it does not answer with 200 within `timeout_s`."""
        target = self._target("GET", backend, HEALTH_PATH)
        answer = await self._ask(target.address, target.head + b"\r\n", b"", timeout_s, timeout_s, timeout_s)
        try:
            if answer.status != 200:
                raise UpstreamError(f"it answered {HEALTH_PATH} with {answer.status}")
            await answer.read(_HEALTH_BYTES)
        finally:
            answer.close()

    async def _ask(
        self, address: _Address, head: bytes, body: bytes, connect_s: float, timeout_s: float, idle_s: float
    ) -> UpstreamAnswer:
        connection = self._take(address)
        if connection is not None:
            try:
                return await _first_byte(connection.ask(head, body, idle_s), timeout_s)
            except UnansweredError:
                # It was closed as it was taken. Others here have been idle for as long, so the next one is new.
                pass
        connection = await self._connect(address, connect_s)
        return await _first_byte(connection.ask(head, body, idle_s), timeout_s)

    def _take(self, address: _Address) -> Connection | None:
        """The connection that was used last; those that have been idle for too long are closed."""
        idle = self._idle.get(address)
        if not idle:
            return None
        oldest = asyncio.get_running_loop().time() - _KEEP_ALIVE_S
        while idle and (idle[0].is_closed or idle[0].idle_since < oldest):
            idle.popleft().abort()
        while idle:
            connection = idle.pop()
            if not connection.is_closed:
                return connection
        return None

    async def _connect(self, address: _Address, connect_s: float) -> Connection:
        loop = asyncio.get_running_loop()
        idle = self._idle.setdefault(address, deque())
        tls = None
        if address.scheme == "https":
            tls = self._tls = self._tls or ssl.create_default_context()
        try:
            async with asyncio.timeout(connect_s):
                transport, connection = await loop.create_connection(
                    lambda: Connection(loop, idle.append), address.host, address.port, ssl=tls
                )
        except TimeoutError as error:
            raise ConnectionRefusedUpstreamError("it did not take the connection in time") from error
        except OSError as error:
            raise ConnectionRefusedUpstreamError("it refused the connection") from error
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
        port = url.port or (443 if url.scheme == "https" else 80)
        lines = [
            f"{verb} {url.path.rstrip('/')}{path} HTTP/1.1",
            f"Host: {url.netloc}",
            "Accept-Encoding: identity",
        ]
        if verb == "POST":
            lines.append("Content-Type: application/json")
        if variable := backend.credential_variable:
            credential = self._credentials.get(variable)
            if not credential:
                raise MisconfiguredBackendError(f"the router's environment has no {variable}")
            lines.append(f"Authorization: Bearer {credential}")
        head = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
        return _Target(_Address(url.scheme, url.hostname or "", port), head)


async def _first_byte(answer: UpstreamAnswer, timeout_s: float) -> UpstreamAnswer:
    try:
        await answer.arrival(timeout_s)
    except BaseException:
        answer.close()
        raise
    return answer
