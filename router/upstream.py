"""Speaks HTTP to the engines: one narrow interface over a keep-alive pool; it never decides whom to ask.

It asks again only where a kept connection was closed in the very moment of its reuse; any other retry is its caller's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol, Self

import aiohttp

from router.backends import Backend

HEALTH_PATH = "/health"
"""Where vLLM and llama.cpp both tell whether they can serve."""

_HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
_PIECE_BYTES = 256 << 10
# Engines close an idle connection after 5 s; one that is taken in that very moment loses its request.
_KEEP_ALIVE_S = 4.0


class UpstreamError(Exception):
    """A backend gave no answer, or broke it off. `reason` is a stable word for metrics and usage events."""

    reason = "backend_error"


class ConnectionRefusedUpstreamError(UpstreamError):
    """Nobody took the connection: the request did not leave."""

    reason = "connection_refused"


class ConnectionLostError(UpstreamError):
    """The connection broke, or ended before its answer."""

    reason = "connection_lost"


class MisconfiguredBackendError(UpstreamError):
    """The backend's key is not in the router's environment."""

    reason = "backend_misconfigured"


class UpstreamTimeoutError(UpstreamError):
    """The backend was silent for too long."""

    reason = "backend_timeout"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to connect, to the first byte of a stream, to that of an answer that comes whole, and between two
    chunks."""

    connect_s: float
    first_byte_s: float
    answer_s: float
    idle_s: float


@dataclass(frozen=True, slots=True)
class UpstreamAnswer:
    """An answer whose first byte has come. `chunks` yields the body as it arrives, and raises UpstreamError."""

    status: int
    headers: Mapping[str, str]
    content_type: str
    chunks: AsyncIterator[bytes]
    _response: aiohttp.ClientResponse = field(repr=False)

    def close(self) -> None:
        """Give the connection back if the answer was read to its end, else close it, so that the engine stops."""
        self._response.close()


class Upstream(Protocol):
    """How an engine is asked."""

    async def open(
        self, backend: Backend, path: str, body: bytes, timeouts: Timeouts, *, streamed: bool
    ) -> UpstreamAnswer:
        """Send a request and wait for the first byte of the answer's body. Raises UpstreamError.

        Cancelled, it closes the connection, so that the engine stops.
        """


class HttpUpstream:
    """The engines over HTTP/1.1. Use as an async context manager; `credentials` are the engines' keys by variable."""

    def __init__(self, credentials: Mapping[str, str]) -> None:
        self._credentials = credentials

    async def __aenter__(self) -> Self:
        """Open the pool."""
        self._session = _session(aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S))
        self._fresh = _session(aiohttp.TCPConnector(limit=0, force_close=True))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the pool and every connection in it."""
        await self._session.close()
        await self._fresh.close()

    async def open(
        self, backend: Backend, path: str, body: bytes, timeouts: Timeouts, *, streamed: bool
    ) -> UpstreamAnswer:
        """See `Upstream.open`."""
        headers = self._authorize(backend, _HEADERS) | {"Content-Length": str(len(body))}
        with _as_upstream_errors():
            async with asyncio.timeout(timeouts.first_byte_s if streamed else timeouts.answer_s):
                response = await self._post(
                    backend.base_url + path,
                    body,
                    headers=headers,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=None, connect=timeouts.connect_s),
                )
                try:
                    first = await response.content.readany()
                except BaseException:
                    response.close()
                    raise
        return UpstreamAnswer(
            status=response.status,
            headers=response.headers,
            content_type=response.content_type,
            chunks=_read(response, first, timeouts.idle_s),
            _response=response,
        )

    async def _post(self, url: str, body: bytes, **options: Any) -> aiohttp.ClientResponse:
        connection = SimpleNamespace(reused=False)
        try:
            return await self._session.post(url, data=_pieces(body), trace_request_ctx=connection, **options)
        except aiohttp.ClientConnectionError as error:
            # Where a head had begun to come, a ServerDisconnectedError holds that instead of a text.
            if not (connection.reused and isinstance(getattr(error, "message", ""), str)):
                raise
        # Others in the pool have been idle for as long, so this one is new.
        return await self._fresh.post(url, data=_pieces(body), **options)

    async def probe(self, backend: Backend, timeout_s: float) -> None:
        """Ask the engine for its health. Raises UpstreamError if it does not answer with 200 within `timeout_s`."""
        headers = self._authorize(backend, {})
        with _as_upstream_errors():
            async with (
                asyncio.timeout(timeout_s),
                self._session.get(backend.base_url + HEALTH_PATH, headers=headers, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise UpstreamError(f"it answered {HEALTH_PATH} with {response.status}")
                await response.content.read(1024)

    def _authorize(self, backend: Backend, headers: dict[str, str]) -> dict[str, str]:
        variable = backend.credential_variable
        if not variable:
            return headers
        credential = self._credentials.get(variable)
        if not credential:
            raise MisconfiguredBackendError(f"the router's environment has no {variable}")
        return headers | {"Authorization": f"Bearer {credential}"}


def _session(connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
    tracing = aiohttp.TraceConfig()
    tracing.on_connection_reuseconn.append(_note_reuse)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
        auto_decompress=False,
        skip_auto_headers=("User-Agent",),
        trace_configs=[tracing],
    )


async def _note_reuse(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.reused = True


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    # A body of megabytes in one write would be copied at once, and hold up everything else.
    for start in range(0, len(body), _PIECE_BYTES):
        yield body[start : start + _PIECE_BYTES]


async def _read(response: aiohttp.ClientResponse, first: bytes, idle_s: float) -> AsyncIterator[bytes]:
    chunk = first
    while chunk:
        yield chunk
        with _as_upstream_errors():
            async with asyncio.timeout(idle_s):
                chunk = await response.content.readany()


@contextlib.contextmanager
def _as_upstream_errors() -> Iterator[None]:
    try:
        yield
    except aiohttp.ClientConnectorError as error:
        raise ConnectionRefusedUpstreamError("it refused the connection") from error
    except TimeoutError as error:
        # aiohttp's own timeouts, of which only the one for connecting is used, are TimeoutErrors too.
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            raise ConnectionRefusedUpstreamError("it did not take the connection in time") from error
        raise UpstreamTimeoutError("it was silent for too long") from error
    except (aiohttp.ClientError, OSError) as error:
        raise ConnectionLostError("it broke the connection off") from error
