"""One HTTP request and its answer, as every endpoint handles them: the body read with a cap, the answer sent with the
headers that all answers carry; it never knows what a request is about."""

import asyncio
import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.types import Message, Receive, Scope, Send

from mesh import context, request_signatures
from mesh.auth import credential_of
from mesh.errors import PlatformError, Reason
from mesh.ids import new_request_id
from mesh.networks import client_of
from mesh.telemetry import CREDENTIAL

Headers = Sequence[tuple[bytes, bytes]]

CONNECTION = "aiaas.connection"
"""Where a scope's extensions have the `Connection` of its request, if the server offers one."""

_is_request_id = re.compile(r"[A-Za-z0-9_.-]{1,128}").fullmatch
# What no credential of any kind looks like, and gRPC metadata could not carry.
_is_sane_credential = re.compile(r"[\x21-\x7e]{1,4096}").fullmatch
# How long, and for how much, a body that was refused is still read, so that its sender gets to see the answer.
_LINGER_S = 5.0
_LINGER_BYTES = 64 << 20
_IDEMPOTENCY_KEY_LENGTH = 255
_FORWARDED_FOR = b"x-forwarded-for"


class ClientGoneError(Exception):
    """The client closed the connection before its request was answered."""


class Connection(Protocol):
    """What a server tells of a request beyond ASGI, so that nobody has to wait for it in a task.

    `disconnected` is set once the client can no longer be answered; then `on_gone` is called, once, if it is set.
    `is_overloaded` is set from the beginning where the server has more connections than it wants.
    """

    disconnected: bool
    is_overloaded: bool
    on_gone: Callable[[], None] | None

    def write_chunk(self, chunk: bytes) -> bool:
        """Write a piece of an answer that has begun; False, and nothing is written, when it would have to wait."""

    def take_body(self) -> bytes | None:
        """The whole body, once; None while some of it has not come, or when the client is gone."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may cost: bytes of its body, seconds of a pause within it, seconds altogether; and which proxies
    (CIDR) may say whose it is."""

    max_body_bytes: int
    idle_timeout_s: float
    request_timeout_s: float
    trusted_proxies: tuple[str, ...] = ()


class Exchange:
    """One request and its answer.

    `route` is the template that matched, for metrics and logs; `reason` is why it failed, if it did; `status` is 0
    until the answer begins; `headers` has the first of each name, in lower case; `trace_id` is that of a request that
    is traced.
    """

    __slots__ = (
        "_body_has_stalled",
        "_body_is_read",
        "_client_is_gone",
        "_common_headers",
        "_connection",
        "_receive",
        "_send",
        "finished",
        "headers",
        "limits",
        "method",
        "reason",
        "request_id",
        "route",
        "scope",
        "started_s",
        "status",
        "trace_id",
    )

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        limits: Limits,
        common_headers: Callable[[float], Headers],
    ) -> None:
        self.scope = scope
        self.limits = limits
        self.started_s = time.monotonic()
        self.method: str = scope["method"]
        self.route = "unmatched"
        self.reason: Reason | None = None
        self.status = 0
        self.finished = False
        self.trace_id = ""
        # One pass from the last to the first: of headers with one name, the first is what stays.
        self.headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        self._receive = receive
        self._send = send
        self._common_headers = common_headers
        self._client_is_gone = False
        self._body_has_stalled = False
        # Taken out: the connection has the scope, and a cycle of references is left to the garbage collector.
        self._connection: Connection | None = scope.get("extensions", {}).pop(CONNECTION, None)
        self._body_is_read = self.headers.get(b"content-length", b"0").strip() in (b"0", b"") and (
            b"transfer-encoding" not in self.headers
        )
        offered = self.header(b"x-request-id")
        self.request_id = offered if offered and _is_sane_request_id(offered) else new_request_id()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the headers of the request were complete."""
        return time.monotonic() - self.started_s

    @property
    def remaining_s(self) -> float:
        """Seconds until the request's deadline, never below 0."""
        return max(0.0, self.limits.request_timeout_s - self.elapsed_s)

    @property
    def client_is_gone(self) -> bool:
        """Whether the client is known to have closed the connection before it was answered."""
        return self._client_is_gone or (
            self._connection is not None and self._connection.disconnected and not self.finished
        )

    @property
    def client_address(self) -> str:
        """The client's network address, beyond the proxies that are trusted; empty on a unix socket."""
        client = self.scope.get("client")
        if client is None or not self.limits.trusted_proxies or _FORWARDED_FOR not in self.headers:
            return client[0] if client else ""
        # All of them: some proxies add a header of their own below the client's.
        told = b",".join(value for name, value in self.scope["headers"] if name == _FORWARDED_FOR)
        return client_of(client[0], told.decode("latin-1"), self.limits.trusted_proxies)

    @property
    def is_shed(self) -> bool:
        """Whether the server has more connections than it wants, and this is one of those above."""
        return self._connection is not None and self._connection.is_overloaded

    def on_gone(self, callback: Callable[[], None] | None) -> None:
        """Have `callback` called, once and right where it is noticed, when the client goes away before its request is
        answered; at once if it is gone already. None takes it off.

        It is not called by a server that offers no `Connection`: there, `gone` has to be awaited.
        """
        connection = self._connection
        if connection is None:
            return
        if callback is not None and self.client_is_gone:
            callback()
        else:
            connection.on_gone = callback

    def header(self, name: bytes) -> str | None:
        """The first header of that lower-case name, None without one."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1").strip()

    def idempotency_key(self) -> str:
        """The Idempotency-Key, empty without one. Raises PlatformError(INVALID_ARGUMENT) for what cannot be one."""
        key = self.header(b"idempotency-key")
        if key is None:
            return ""
        if not (1 <= len(key) <= _IDEMPOTENCY_KEY_LENGTH and key.isascii() and key.isprintable()):
            raise PlatformError(
                Reason.INVALID_ARGUMENT,
                field="Idempotency-Key",
                description=f"'Idempotency-Key' has to be 1 to {_IDEMPOTENCY_KEY_LENGTH} printable ASCII characters.",
            )
        return key

    def allow(self, *verbs: str) -> None:
        """Raises PlatformError(METHOD_NOT_ALLOWED) unless the verb is one of these. HEAD is served as GET."""
        if self.method not in verbs and not (self.method == "HEAD" and "GET" in verbs):
            raise PlatformError(Reason.METHOD_NOT_ALLOWED, allow=", ".join(verbs))

    def take_credential(self, *, required: bool = True) -> None:
        """Hand the bearer credential on to every call of this request, unjudged, and with it the signature of a request
        that is signed.

        Raises PlatformError(MISSING_CREDENTIALS) if one is required and there is none, and API_KEY_INVALID for what
        could not even be passed on.
        """
        authorization = self.header(b"authorization")
        if authorization is None and not required:
            return
        self.use_credential(credential_of(authorization or ""))
        if request_signatures.HEADER in self.headers:
            self._take_signature(b"")

    def use_credential(self, credential: str) -> None:
        """Hand a credential on to every call from here on.

        Raises PlatformError(API_KEY_INVALID) for what could not even be passed on.
        """
        if not _is_sane_credential(credential):
            raise PlatformError(Reason.API_KEY_INVALID)
        context.credential.set(credential)

    def expect_json(self) -> None:
        """Raises PlatformError(UNSUPPORTED_MEDIA_TYPE) if the body is declared to be anything but JSON."""
        declared = self.headers.get(b"content-type")
        # What nearly every client sends, word for word.
        if declared is None or declared == b"application/json":
            return
        media_type = declared.partition(b";")[0].strip().lower()
        if media_type != b"application/json" and not media_type.endswith(b"+json"):
            raise PlatformError(Reason.UNSUPPORTED_MEDIA_TYPE)

    async def read_body(self) -> bytes:
        """The whole body.

        Raises PlatformError(REQUEST_TOO_LARGE) as soon as it is known to be too large, REQUEST_TIMEOUT when it stalls,
        and ClientGoneError.
        """
        limit = self.limits.max_body_bytes
        declared = self.headers.get(b"content-length")
        if declared is not None and int(declared) > limit:
            raise PlatformError(Reason.REQUEST_TOO_LARGE)
        # A body that came in one piece with its headers needs no timer, and that is what most do.
        body = self._connection.take_body() if self._connection is not None else None
        if body is None:
            body = await self._collect_body(limit)
        elif len(body) > limit:
            raise PlatformError(Reason.REQUEST_TOO_LARGE)
        self._body_is_read = True
        if request_signatures.HEADER in self.headers:
            self._take_signature(body)
        return body

    def _take_signature(self, body: bytes) -> None:
        query: bytes = self.scope["query_string"]
        raw_path = self.scope["raw_path"] + (b"?" + query if query else b"")
        signature = request_signatures.from_headers(self.headers, self.method, raw_path)
        if signature is not None:
            signature.body_sha256 = hashlib.sha256(body).digest()
        context.signature.set(signature)

    async def _collect_body(self, limit: int) -> bytes:
        chunks: list[bytes] = []
        size = 0
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.remaining_s
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + self.limits.idle_timeout_s)) as timeout:
                while True:
                    message = await self._next()
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > limit:
                        raise PlatformError(Reason.REQUEST_TOO_LARGE)
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        break
                    timeout.reschedule(min(deadline, loop.time() + self.limits.idle_timeout_s))
        except TimeoutError:
            self._body_has_stalled = True
            raise PlatformError(Reason.REQUEST_TIMEOUT) from None
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def gone(self) -> None:
        """Return when the client has closed the connection; only after the body is read."""
        while True:
            try:
                await self._next()
            except ClientGoneError:
                return

    async def start(self, status: int, headers: Headers) -> None:
        """Send the status and the headers, with those that all answers carry."""
        request_id = (b"x-request-id", self.request_id.encode("ascii"))
        all_headers = [*headers, *self._common_headers(self.elapsed_s), request_id]
        await self._send({"type": "http.response.start", "status": status, "headers": all_headers})
        self.status = status

    async def write(self, chunk: bytes) -> None:
        """Send a piece of the body, waiting as long as the client does not keep up."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    def write_now(self, chunk: bytes) -> bool:
        """Send a piece of the body without a task; False where that cannot be, as the client does not keep up."""
        return self._connection is not None and self._connection.write_chunk(chunk)

    async def finish(self, chunk: bytes = b"") -> None:
        """Send the last piece of the body."""
        self.finished = True
        await self._send({"type": "http.response.body", "body": chunk, "more_body": False})

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer.

        If the request's body was not read, the connection ends with the answer, but the client gets the time to see
        it: a socket closed over unread bytes is reset, and a reset takes the answer with it.
        """
        length = (b"content-length", b"%d" % len(body))
        if self._body_is_read:
            await self.start(status, [*headers, length])
            await self.finish(body)
            return
        await self.start(status, [*headers, length, (b"connection", b"close")])
        await self.write(body)
        # A client that waits for "100 Continue" would take the question for the body as that.
        if not self._body_has_stalled and b"expect" not in self.headers:
            await self._discard_body()
        await self.finish()

    async def _discard_body(self) -> None:
        discarded = 0
        try:
            async with asyncio.timeout(_LINGER_S):
                while discarded < _LINGER_BYTES:
                    message = await self._next()
                    discarded += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except (TimeoutError, ClientGoneError):
            return

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            # uvicorn says the same of an answer that is complete.
            self._client_is_gone = not self.finished
            raise ClientGoneError
        return message


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that the application made for this request."""
    exchange: Exchange = scope["exchange"]
    return exchange


def _is_sane_request_id(offered: str) -> bool:
    """Whether a client's own id may be told in logs, spans and events: it must not be a credential in its place."""
    return _is_request_id(offered) is not None and CREDENTIAL.search(offered) is None
