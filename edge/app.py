"""The ASGI application: which path goes to which endpoint, and what holds for every request - its id, its metrics, one
log line, errors in the shape of their area; it never serves a request itself."""

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping
from functools import cache

import msgspec
from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import Counter, Histogram
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from edge import oauth
from edge.access_log import AccessLog
from edge.exchange import ClientGoneError, Exchange, Headers, Limits
from edge.openai import errors as openai_errors
from edge.openai.inference import ENDPOINTS, InferenceEndpoint
from edge.openai.models import ModelsEndpoint
from edge.openai.organization import projects
from edge.openai.organization.usage import COSTS, USAGE, CostsEndpoint, UsageEndpoint
from edge.openapi.endpoint import FILES, FileEndpoint
from edge.operations import HealthEndpoint, MetricsEndpoint, ReadyEndpoint
from edge.peers import Peers
from edge.routers import Routers
from edge.scim import errors as scim_errors
from edge.scim.endpoints import KINDS, AboutEndpoint, ListEndpoint, ResourceEndpoint
from edge.sign_in import pages
from edge.sign_in.accounts import Accounts
from edge.sign_in.pages import StyleEndpoint
from edge.sign_in.second_factor import SecondFactor
from edge.sign_in.signing_in import SigningIn
from edge.transcode.endpoint import Transcoder
from mesh import context
from mesh.errors import PlatformError, Reason, as_platform_error, response_headers, to_aip193

logger = logging.getLogger(__name__)

_REQUESTS = Counter("aiaas_edge_requests", "Requests that were answered or given up.", ["route", "status_class"])
_DURATION = Histogram(
    "aiaas_edge_request_duration_seconds",
    "From the headers of a request to the last byte of its answer.",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)

# nginx's number for a client that closed before it was answered.
_CLIENT_GONE = 499
# What tells an operator about an edge that sheds load must not be shed itself.
_NEVER_SHED = frozenset({"/health", "/ready", "/metrics"})


def build_app(
    peers: Peers,
    routers: Routers,
    services: Iterable[ServiceDescriptor],
    limits: Limits,
    access_log: AccessLog | None,
) -> ASGIApp:
    """The whole edge as one ASGI application; without an `access_log` it writes no line for each request.

    Raises ValueError if a contract has a REST binding that cannot be served.
    """
    inference = {path: InferenceEndpoint(path, routers) for path in ENDPOINTS}
    models = peers["router"]
    others = Router(
        routes=[
            Route("/v1/models", ModelsEndpoint("/v1/models", models)),
            Route("/v1/models/{model:path}", ModelsEndpoint("/v1/models/{model}", models)),
            *(Route(path, UsageEndpoint(path, peers)) for path in USAGE),
            Route(COSTS, CostsEndpoint(peers)),
            *(Route(endpoint.route, endpoint(peers["identity"])) for endpoint in projects.ENDPOINTS),
            Route("/scim/v2/ServiceProviderConfig", AboutEndpoint("ServiceProviderConfig")),
            Route("/scim/v2/ResourceTypes", AboutEndpoint("ResourceTypes")),
            *(Route(f"/scim/v2/{path}", ListEndpoint(path, peers["identity"])) for path in KINDS),
            *(Route(f"/scim/v2/{path}/{{id}}", ResourceEndpoint(path, peers["identity"])) for path in KINDS),
            *(Route(path, endpoint) for path, endpoint in oauth.endpoints(peers["identity"]).items()),
            *(Route(path, FileEndpoint(path)) for path in FILES),
            *(Route(path, page) for path, page in SigningIn(peers["identity"]).pages()),
            *(Route(path, page) for path, page in Accounts(peers["identity"]).pages()),
            *(Route(path, page) for path, page in SecondFactor(peers["identity"]).pages()),
            Route(pages.STYLE_PATH, StyleEndpoint()),
            Route("/health", HealthEndpoint()),
            Route("/ready", ReadyEndpoint(peers)),
            Route("/metrics", MetricsEndpoint()),
        ],
        # A redirect would be made from the Host header, which anybody can set.
        redirect_slashes=False,
        default=_Elsewhere(Transcoder(services, peers)),
    )
    return Exchanges(inference, others, limits, access_log)


class _Elsewhere:
    """Every path that has no route of its own."""

    def __init__(self, transcoder: Transcoder) -> None:
        self._transcoder = transcoder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _is_openai(scope):
            raise PlatformError(Reason.ROUTE_NOT_FOUND)
        await self._transcoder(scope, receive, send)


class Exchanges:
    """Makes an `Exchange` of each request, and sees to it that it gets an answer, metrics and a log line.

    `endpoints` are found by their exact path; every other path goes through `others`. A look-up is all that stands
    before an inference: Starlette's application and route, which other paths go through, cost a third of the rest.
    """

    def __init__(
        self, endpoints: Mapping[str, ASGIApp], others: ASGIApp, limits: Limits, access_log: AccessLog | None
    ) -> None:
        self._endpoints = endpoints
        self._others = others
        self._limits = limits
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises nothing but CancelledError, when the time to drain is over."""
        if scope["type"] != "http":
            return
        path = scope["path"]
        endpoint = self._endpoints.get(path)
        common_headers = openai_errors.common_headers if endpoint or _is_openai(scope) else _no_headers
        exchange = Exchange(scope, receive, send, self._limits, common_headers)
        scope["exchange"] = exchange
        # All of them every time: a request that was pipelined begins with what the one before it left.
        context.request_id.set(exchange.request_id)
        context.credential.set("")
        context.signature.set(None)
        context.deadline.set(asyncio.get_running_loop().time() + self._limits.request_timeout_s)
        try:
            if exchange.is_shed and path not in _NEVER_SHED:
                raise PlatformError(Reason.OVERLOADED)
            if endpoint is None:
                endpoint = self._others
                context.client_address.set(exchange.client_address)
                context.user_agent.set(exchange.header(b"user-agent") or "")
            await endpoint(scope, receive, send)
        except ClientGoneError:
            exchange.status = exchange.status or _CLIENT_GONE
            exchange.reason = Reason.CANCELLED
        except asyncio.CancelledError:
            await _answer(exchange, PlatformError(Reason.UNAVAILABLE))
            raise
        except Exception as error:
            await _answer(exchange, error)
        finally:
            # They refer to each other, which would leave every request to the garbage collector.
            del scope["exchange"]
            self._observe(exchange)

    def _observe(self, exchange: Exchange) -> None:
        elapsed_s = exchange.elapsed_s
        count, duration = _metrics(exchange.route, exchange.status // 100 or 5)
        count.inc()
        duration.observe(elapsed_s)
        if self._access_log is not None:
            self._access_log.write(exchange, elapsed_s)


async def _answer(exchange: Exchange, error: BaseException) -> None:
    """Answer with an error in the shape of the request's area, unless an answer has begun."""
    known = as_platform_error(error)
    if known is not error and known.reason is Reason.INTERNAL:
        logger.error("a request failed for an unknown reason", extra={"route": exchange.route}, exc_info=error)
    exchange.reason = known.reason
    if exchange.status:
        return
    if pages.is_for(exchange.scope):
        with contextlib.suppress(ClientGoneError):
            await exchange.respond(*pages.error_page(known))
        return
    is_scim = exchange.scope["path"].startswith("/scim/")
    headers = [scim_errors.CONTENT_TYPE if is_scim else (b"content-type", b"application/json")]
    headers += [(name.lower().encode(), value.encode()) for name, value in response_headers(known).items()]
    if known.reason is Reason.METHOD_NOT_ALLOWED and (allowed := known.details.get("allow")):
        headers.append((b"allow", allowed.encode()))
    in_shape = openai_errors.error_body if _is_openai(exchange.scope) else _aip193_body
    status = known.entry.http
    if is_scim:
        in_shape, status = scim_errors.error_body, scim_errors.status_of(known)
    elif oauth.is_for(exchange.scope):
        in_shape = oauth.error_body
        headers += oauth.NO_STORE
    try:
        await exchange.respond(status, headers, in_shape(known))
    except ClientGoneError:
        return


@cache
def _metrics(route: str, status_class: int) -> tuple[Counter, Histogram]:
    """What counts the requests of a route that ended alike. Binding labels costs more than counting, so it is kept."""
    return _REQUESTS.labels(route, f"{status_class}xx"), _DURATION.labels(route)


def _is_openai(scope: Scope) -> bool:
    """Whether a request is for the OpenAI-compatible API. The path decides, never a URL made from the Host header."""
    path: str = scope["path"]
    return path == "/v1" or path.startswith("/v1/")


def _no_headers(elapsed_s: float) -> Headers:
    return ()


def _aip193_body(error: PlatformError) -> bytes:
    return msgspec.json.encode(to_aip193(error))
