"""POST endpoints that run a model: the body goes to the router as it came, the answer comes back as the router sends
it; nothing in either is read, copied together or held back."""

import asyncio
import logging

import grpc
from starlette.types import Receive, Scope, Send

from aiaas.router.v1 import inference_service_pb2, inference_service_pb2_grpc
from aiaas.type.v1 import usage_event_pb2
from edge.exchange import Exchange, exchange_of
from edge.openai.sse import error_event
from edge.peers import Peer, following
from mesh.errors import PlatformError, Reason

logger = logging.getLogger(__name__)

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

InferCall = grpc.aio.UnaryStreamCall[inference_service_pb2.InferRequest, inference_service_pb2.InferResponse]


class InferenceEndpoint:
    """An ASGI endpoint for one path of `ENDPOINTS`."""

    def __init__(self, path: str, router: Peer) -> None:
        self._path = path
        self._endpoint = ENDPOINTS[path]
        self._router = router
        self._stub = inference_service_pb2_grpc.InferenceServiceStub(router.channel)

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
        request = inference_service_pb2.InferRequest(
            endpoint=self._endpoint,
            body=await exchange.read_body(),
            idempotency_key=exchange.header(b"idempotency-key") or "",
            client_address=exchange.client_address,
        )
        await self._router.until_ready()
        call: InferCall = self._stub.Infer(request)
        await _Answer(exchange, self._endpoint).relay(call)


class _Answer:
    """What has been sent of one answer."""

    def __init__(self, exchange: Exchange, endpoint: usage_event_pb2.Endpoint.ValueType) -> None:
        self._exchange = exchange
        self._endpoint = endpoint
        self._streams = False
        self._last_chunk = b""

    async def relay(self, call: InferCall) -> None:
        try:
            with following(self._exchange, call):
                async for part in call:
                    await self._send(part)
            if not self._exchange.finished:
                logger.error("the router ended an answer without its tail")
                raise PlatformError(Reason.INTERNAL)
        except asyncio.CancelledError:
            # The drain time is over; whoever still reads is told so before the connection goes.
            await self._fail(PlatformError(Reason.UNAVAILABLE))
            raise
        except PlatformError as error:
            await self._fail(error)

    async def _send(self, part: inference_service_pb2.InferResponse) -> None:
        exchange = self._exchange
        kind = part.WhichOneof("part")
        if kind == "data" and exchange.status:
            self._last_chunk = part.data
            await exchange.write(self._last_chunk)
        elif kind == "head" and not exchange.status:
            await self._start(part.head)
        elif kind == "tail" and exchange.status:
            await exchange.finish()
        else:
            logger.error("the router sent a part out of order", extra={"part": kind})
            raise PlatformError(Reason.INTERNAL)

    async def _start(self, head: inference_service_pb2.InferHead) -> None:
        self._streams = head.content_type.startswith(_EVENT_STREAM)
        headers = [(b"content-type", head.content_type.encode("latin-1"))]
        if self._streams:
            headers += _STREAM_HEADERS
        for name, value in head.headers.items():
            if name.lower() not in _OWN_HEADERS:
                headers.append((name.lower().encode("ascii"), value.encode("latin-1")))
        await self._exchange.start(200, headers)

    async def _fail(self, error: PlatformError) -> None:
        exchange = self._exchange
        if not exchange.status:
            raise error
        if exchange.finished:
            # The client has the whole answer; only the router's bookkeeping can have failed.
            logger.warning("the router failed after an answer's tail", extra={"reason": error.reason.value})
            return
        exchange.reason = error.reason
        if self._streams:
            await exchange.finish(error_event(self._endpoint, error, self._last_chunk))
        # A JSON document that broke off is left unfinished: the connection closes without the body's end.
