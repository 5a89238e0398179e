"""The ASGI application: which path goes to which endpoint, and what holds for every request - its id, its metrics, one
log line, errors in the shape of their area; it never serves a request itself."""

import asyncio
import logging
from collections.abc import Iterable
from functools import cache

import msgspec
from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import Counter, Histogram
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edge.exchange import ClientGoneError, Exchange, Limits
from edge.openai import errors as openai_errors
from edge.openai.inference import ENDPOINTS, InferenceEndpoint
from edge.openai.models import ModelsEndpoint
from edge.operations import HealthEndpoint, MetricsEndpoint, ReadyEndpoint
from edge.peers import Peers
from edge.transcode.endpoint import Transcoder
from mesh import context
from mesh.errors import PlatformError, Reason, as_platform_error, response_headers, to_aip193

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("edge.access")

_REQUESTS = Counter("aiaas_edge_requests", "Requests that were answered or given up.", ["route", "status_class"])
_DURATION = Histogram(
    "aiaas_edge_request_duration_seconds",
    "From the headers of a request to the last byte of its answer.",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)

# nginx's number for a client that closed before it was answered.
_CLIENT_GONE = 499


def build_app(peers: Peers, services: Iterable[ServiceDescriptor], limits: Limits) -> ASGIApp:
    """The whole edge as one ASGI application.

    Raises ValueError if a contract has a REST binding that cannot be served.
    """
    router = peers["router"]
    app = Starlette(
        routes=[
            *(Route(path, InferenceEndpoint(path, router)) for path in ENDPOINTS),
            Route("/v1/models", ModelsEndpoint("/v1/models", router)),
            Route("/v1/models/{model:path}", ModelsEndpoint("/v1/models/{model}", router)),
            Route("/health", HealthEndpoint()),
            Route("/ready", ReadyEndpoint(peers)),
            Route("/metrics", MetricsEndpoint()),
        ],
        middleware=[Middleware(Exchanges, limits=limits)],
    )
    # A redirect would be made from the Host header, which anybody can set.
    app.router.redirect_slashes = False
    app.router.default = _Elsewhere(Transcoder(services, peers))
    return app


class _Elsewhere:
    """Every path that has no route of its own."""

    def __init__(self, transcoder: Transcoder) -> None:
        self._transcoder = transcoder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _is_openai(scope):
            raise PlatformError(Reason.ROUTE_NOT_FOUND)
        await self._transcoder(scope, receive, send)


class Exchanges:
    """Makes an `Exchange` of each request, and sees to it that it gets an answer, metrics and a log line."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises nothing but CancelledError, when the time to drain is over."""
        if scope["type"] != "http":
            return
        common_headers = openai_errors.common_headers if _is_openai(scope) else _no_headers
        exchange = Exchange(scope, receive, send, self._limits, common_headers)
        scope["exchange"] = exchange
        context.request_id.set(exchange.request_id)
        context.credential.set("")
        context.deadline.set(asyncio.get_running_loop().time() + self._limits.request_timeout_s)
        try:
            await self._app(scope, receive, send)
        except ClientGoneError:
            exchange.status = exchange.status or _CLIENT_GONE
            exchange.reason = Reason.CANCELLED
        except asyncio.CancelledError:
            await _answer(exchange, PlatformError(Reason.UNAVAILABLE))
            raise
        except Exception as error:
            await _answer(exchange, error)
        finally:
            _observe(exchange)


async def _answer(exchange: Exchange, error: BaseException) -> None:
    """Answer with an error in the shape of the request's area, unless an answer has begun."""
    known = as_platform_error(error)
    if known is not error and known.reason is Reason.INTERNAL:
        logger.error("a request failed for an unknown reason", extra={"route": exchange.route}, exc_info=error)
    exchange.reason = known.reason
    if exchange.status:
        return
    headers = [(b"content-type", b"application/json")]
    headers += [(name.lower().encode(), value.encode()) for name, value in response_headers(known).items()]
    if known.reason is Reason.METHOD_NOT_ALLOWED and (allowed := known.details.get("allow")):
        headers.append((b"allow", allowed.encode()))
    in_shape = openai_errors.error_body if _is_openai(exchange.scope) else _aip193_body
    try:
        await exchange.respond(known.entry.http, headers, in_shape(known))
    except ClientGoneError:
        return


def _observe(exchange: Exchange) -> None:
    elapsed_s = exchange.elapsed_s
    status_class = f"{exchange.status // 100}xx" if exchange.status else "5xx"
    _requests(exchange.route, status_class).inc()
    _duration(exchange.route).observe(elapsed_s)
    fields = {
        "method": exchange.method,
        "route": exchange.route,
        "status": exchange.status,
        "duration_ms": round(elapsed_s * 1000, 1),
    }
    if exchange.reason is not None:
        fields["reason"] = exchange.reason.value
    access_logger.info("request", extra=fields)


@cache
def _requests(route: str, status_class: str) -> Counter:
    return _REQUESTS.labels(route, status_class)


@cache
def _duration(route: str) -> Histogram:
    return _DURATION.labels(route)


def _is_openai(scope: Scope) -> bool:
    """Whether a request is for the OpenAI-compatible API. The path decides, never a URL made from the Host header."""
    path: str = scope["path"]
    return path == "/v1" or path.startswith("/v1/")


def _no_headers(elapsed_s: float) -> Iterable[tuple[bytes, bytes]]:
    return ()


def _aip193_body(error: PlatformError) -> bytes:
    return msgspec.json.encode(to_aip193(error))
