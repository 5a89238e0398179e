"""GET /health, /ready and /metrics, on the port that users use; it says of each peer whether it serves, never more."""

import asyncio
import os
from collections.abc import Mapping

import msgspec
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import Receive, Scope, Send

from edge.exchange import exchange_of
from edge.peers import Peer, Peers
from mesh.errors import PlatformError

_JSON = (b"content-type", b"application/json")


class HealthEndpoint:
    """Answers as long as the process does."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange = exchange_of(scope)
        exchange.route = "/health"
        exchange.allow("GET")
        await exchange.respond(200, [_JSON], b'{"status":"ok"}')


class ReadyEndpoint:
    """Tells of each peer whether it serves. The edge is ready when the router is: without identity and analytics keys
    that are known go on working, and taking every edge away would stop them."""

    def __init__(self, peers: Peers, *, required: str = "router") -> None:
        self._peers = peers
        self._required = required

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange = exchange_of(scope)
        exchange.route = "/ready"
        exchange.allow("GET")
        checks = dict(await asyncio.gather(*(_check(peer) for peer in self._peers)))
        is_ready = checks[self._required] == "ok"
        await exchange.respond(200 if is_ready else 503, [_JSON], _report(is_ready, checks))


class MetricsEndpoint:
    """Writes the metrics of this process for Prometheus; of one of several workers, the sums over all of them, as
    nobody can choose which one answers."""

    def __init__(self) -> None:
        self._registry = REGISTRY
        # Where it is set, prometheus_client keeps its values in files of that folder (edge/workers.py).
        if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            self._registry = CollectorRegistry()
            MultiProcessCollector(self._registry, folder)  # type: ignore[no-untyped-call]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange = exchange_of(scope)
        exchange.route = "/metrics"
        exchange.allow("GET")
        encode, content_type = choose_encoder(exchange.header(b"accept") or "")
        await exchange.respond(200, [(b"content-type", content_type.encode("latin-1"))], encode(self._registry))


async def _check(peer: Peer) -> tuple[str, str]:
    try:
        await peer.check_health()
    except PlatformError as error:
        return peer.name, error.message
    return peer.name, "ok"


def _report(is_ready: bool, checks: Mapping[str, str]) -> bytes:
    return msgspec.json.encode({"status": "ready" if is_ready else "not_ready", "checks": checks})
