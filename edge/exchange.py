"""One HTTP request and its answer, as every endpoint handles them: the body read with a cap, the answer sent with the
headers that all answers carry; it never knows what a request is about."""

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from starlette.types import Message, Receive, Scope, Send

from mesh import context
from mesh.auth import credential_of
from mesh.errors import PlatformError, Reason
from mesh.ids import new_request_id

Headers = Sequence[tuple[bytes, bytes]]

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
# What no credential of any kind looks like, and gRPC metadata could not carry.
_SANE_CREDENTIAL = re.compile(r"[\x21-\x7e]{1,4096}")
# How long, and for how much, a body that was refused is still read, so that its sender gets to see the answer.
_LINGER_S = 5.0
_LINGER_BYTES = 64 << 20


class ClientGoneError(Exception):
    """The client closed the connection before its request was answered."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may cost: bytes of its body, seconds of a pause within it, seconds altogether."""

    max_body_bytes: int
    idle_timeout_s: float
    request_timeout_s: float


class Exchange:
    """One request and its answer.

    `route` is the template that matched, for metrics and logs; `reason` is why it failed, if it did; `status` is 0
    until the answer begins.
    """

    __slots__ = (
        "_body_is_read",
        "_body_is_worth_waiting_for",
        "_client_is_gone",
        "_common_headers",
        "_receive",
        "_send",
        "finished",
        "limits",
        "reason",
        "request_id",
        "route",
        "scope",
        "started_s",
        "status",
    )

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        limits: Limits,
        common_headers: Callable[[float], Iterable[tuple[bytes, bytes]]],
    ) -> None:
        self.scope = scope
        self.limits = limits
        self.started_s = time.monotonic()
        self.route = "unmatched"
        self.reason: Reason | None = None
        self.status = 0
        self.finished = False
        self._receive = receive
        self._send = send
        self._common_headers = common_headers
        self._client_is_gone = False
        self._body_is_read = (self.header(b"content-length") or "0") == "0" and (
            self.header(b"transfer-encoding") is None
        )
        # A client that waits for "100 Continue" would take the question for the body as that.
        self._body_is_worth_waiting_for = self.header(b"expect") is None
        offered = self.header(b"x-request-id") or ""
        self.request_id = offered if _SANE_REQUEST_ID.fullmatch(offered) else new_request_id()

    @property
    def method(self) -> str:
        """The HTTP verb."""
        verb: str = self.scope["method"]
        return verb

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
        """Whether the client is known to have closed the connection."""
        return self._client_is_gone

    @property
    def client_address(self) -> str:
        """The client's network address; empty on a unix socket."""
        client = self.scope.get("client")
        return client[0] if client else ""

    def header(self, name: bytes) -> str | None:
        """The first header of that lower-case name, None without one."""
        for key, value in self.scope["headers"]:
            if key == name:
                text: str = value.decode("latin-1").strip()
                return text
        return None

    def allow(self, *verbs: str) -> None:
        """Raises PlatformError(METHOD_NOT_ALLOWED) unless the verb is one of these. HEAD is served as GET."""
        if self.method not in verbs and not (self.method == "HEAD" and "GET" in verbs):
            raise PlatformError(Reason.METHOD_NOT_ALLOWED, allow=", ".join(verbs))

    def take_credential(self, *, required: bool = True) -> None:
        """Hand the bearer credential on to every call of this request, unjudged.

        Raises PlatformError(MISSING_CREDENTIALS) if one is required and there is none, and API_KEY_INVALID for what
        could not even be passed on.
        """
        authorization = self.header(b"authorization")
        if authorization is None and not required:
            return
        credential = credential_of(authorization or "")
        if not _SANE_CREDENTIAL.fullmatch(credential):
            raise PlatformError(Reason.API_KEY_INVALID)
        context.credential.set(credential)

    def expect_json(self) -> None:
        """Raises PlatformError(UNSUPPORTED_MEDIA_TYPE) if the body is declared to be anything but JSON."""
        declared = self.header(b"content-type")
        if declared is None:
            return
        media_type = declared.partition(";")[0].strip().lower()
        if media_type != "application/json" and not media_type.endswith("+json"):
            raise PlatformError(Reason.UNSUPPORTED_MEDIA_TYPE)

    async def read_body(self) -> bytes:
        """The whole body.

        Raises PlatformError(REQUEST_TOO_LARGE) as soon as it is known to be too large, REQUEST_TIMEOUT when it stalls,
        and ClientGoneError.
        """
        limit = self.limits.max_body_bytes
        declared = self.header(b"content-length")
        if declared is not None and int(declared) > limit:
            raise PlatformError(Reason.REQUEST_TOO_LARGE)
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
            self._body_is_worth_waiting_for = False
            raise PlatformError(Reason.REQUEST_TIMEOUT) from None
        self._body_is_read = True
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
        self.status = status
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    *headers,
                    *self._common_headers(self.elapsed_s),
                    (b"x-request-id", self.request_id.encode("ascii")),
                ],
            }
        )

    async def write(self, chunk: bytes) -> None:
        """Send a piece of the body, waiting as long as the client does not keep up."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def finish(self, chunk: bytes = b"") -> None:
        """Send the last piece of the body."""
        self.finished = True
        await self._send({"type": "http.response.body", "body": chunk, "more_body": False})

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer.

        If the request's body was not read, the connection ends with the answer, but the client gets the time to see
        it: a socket closed over unread bytes is reset, and a reset takes the answer with it.
        """
        length = (b"content-length", str(len(body)).encode("ascii"))
        if self._body_is_read:
            await self.start(status, [*headers, length])
            await self.finish(body)
            return
        await self.start(status, [*headers, length, (b"connection", b"close")])
        await self.write(body)
        if self._body_is_worth_waiting_for:
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
