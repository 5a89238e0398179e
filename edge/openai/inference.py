"""POST endpoints that run a model: the body goes to a router as it came, the answer comes back as the router sends it;
nothing in either is read, copied together or held back.

This is the edge's hot path: an ASGI endpoint without anything around it, and for each chunk of a stream one write.
"""

import asyncio
import functools

from starlette.types import Receive, Scope, Send

from aiaas.router.v1 import inference_service_pb2
from aiaas.type.v1 import usage_event_pb2
from edge.exchange import ClientGoneError, Exchange, exchange_of
from edge.openai.sse import error_event
from edge.relay import Answer
from edge.routers import Routers
from mesh import context, tracing
from mesh.errors import PlatformError, Reason

ENDPOINTS = {
    "/v1/chat/completions": usage_event_pb2.ENDPOINT_CHAT_COMPLETIONS,
    "/v1/completions": usage_event_pb2.ENDPOINT_COMPLETIONS,
    "/v1/embeddings": usage_event_pb2.ENDPOINT_EMBEDDINGS,
    "/v1/responses": usage_event_pb2.ENDPOINT_RESPONSES,
}
"""Paths, and what the router calls them."""

_EVENT_STREAM = "text/event-stream"
# Proxies hold back what they think they may.
_STREAM_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
# The edge's own to say.
_OWN_HEADERS = frozenset({"content-type", "content-length", "transfer-encoding", "connection", "x-request-id"})


class InferenceEndpoint:
    """An ASGI endpoint for one path of `ENDPOINTS`."""

    def __init__(self, path: str, routers: Routers) -> None:
        self._path = path
        self._endpoint = ENDPOINTS[path]
        self._routers = routers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request to its end.

        Raises PlatformError as long as nothing was sent, and ClientGoneError; a failure after that is told within the
        stream, or by an answer that ends too soon where there is no stream.
        """
        exchange = exchange_of(scope)
        exchange.route = self._path
        exchange.allow("POST")
        exchange.take_credential()
        exchange.expect_json()
        span = tracing.begin(self._path, exchange.header(b"traceparent") or "")
        if span is None:
            await self._infer(exchange, "")
            return
        exchange.trace_id = span.trace_id
        try:
            with span.as_current():
                await self._infer(exchange, span.traceparent)
        except PlatformError as error:
            # Nothing was sent; the answer that is due now is not this endpoint's.
            span.set(status=error.entry.http)
            span.fail(error.reason.value)
            raise
        except ClientGoneError:
            span.fail(Reason.CANCELLED.value)
            raise
        finally:
            span.set(route=self._path, method="POST", request_id=exchange.request_id)
            if exchange.status:
                span.set(status=exchange.status)
            if exchange.reason is not None:
                span.fail(exchange.reason.value)
            span.end()

    async def _infer(self, exchange: Exchange, traceparent: str) -> None:
        answer = await self._open(exchange, traceparent)
        exchange.on_gone(functools.partial(answer.abandon, ClientGoneError()))
        try:
            await self._pass_on(exchange, answer)
        finally:
            exchange.on_gone(None)
            answer.abandon(ClientGoneError())

    async def _open(self, exchange: Exchange, traceparent: str) -> Answer:
        """Begin the inference. The body and its message are forgotten with this call, long before a stream ends."""
        idempotency_key = exchange.idempotency_key()
        body = await exchange.read_body()
        answer, opened = await self._routers.open(body, exchange.remaining_s)
        opened.credential = context.credential.get()
        opened.request_id = exchange.request_id
        opened.traceparent = traceparent
        if (signature := context.signature.get()) is not None:
            opened.signature.CopyFrom(signature)
        request = opened.request
        request.endpoint = self._endpoint
        request.body = body
        request.idempotency_key = idempotency_key
        request.client_address = exchange.client_address
        return answer

    async def _pass_on(self, exchange: Exchange, answer: Answer) -> None:
        head = await answer.head()
        headers = _headers(head)
        if answer.is_whole:
            await exchange.respond(200, headers, await answer.data() or b"")
            return
        try:
            await exchange.start(200, headers)
            answer.write_through(exchange.write_now)
            while (data := await answer.data()) is not None:
                await exchange.write(data)
            await exchange.finish()
        except asyncio.CancelledError:
            # The drain time is over; whoever still reads is told so before the connection goes.
            await self._break_off(exchange, head, PlatformError(Reason.UNAVAILABLE), answer.last_chunk)
            raise
        except PlatformError as error:
            await self._break_off(exchange, head, error, answer.last_chunk)

    async def _break_off(
        self, exchange: Exchange, head: inference_service_pb2.InferHead, error: PlatformError, last_chunk: bytes
    ) -> None:
        exchange.reason = error.reason
        if head.content_type == _EVENT_STREAM:
            await exchange.finish(error_event(self._endpoint, error, last_chunk))
        # A JSON document that broke off is left unfinished: the connection closes without the body's end.


def _headers(head: inference_service_pb2.InferHead) -> list[tuple[bytes, bytes]]:
    headers = [(b"content-type", head.content_type.encode("latin-1"))]
    if head.content_type == _EVENT_STREAM:
        headers += _STREAM_HEADERS
    for name, value in head.headers.items():
        if encoded := _header_name(name):
            headers.append((encoded, value.encode("latin-1")))
    return headers


@functools.lru_cache(maxsize=64)
def _header_name(name: str) -> bytes:
    """A router's name for a header as it goes out; nothing for what is the edge's own to say."""
    name = name.lower()
    return b"" if name in _OWN_HEADERS else name.encode("ascii")
