"""What the edge is told by its environment, read once at start; it never says how any of it is used."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from mesh.config import setting
from mesh.networks import ProxyConfig
from mesh.server import MESSAGE_BYTES
from mesh.tls import TlsConfig

# What a request to the router holds besides the body.
_ENVELOPE_BYTES = 64 << 10


@dataclass(frozen=True)
class EdgeConfig:
    """The edge's configuration. A wrong variable is named by `python -m edge check-config`."""

    address: str = setting(
        "AIAAS_EDGE_ADDRESS",
        "host:port for HTTP clients; port 0 takes a free one",
        default="127.0.0.1:8080",
    )
    workers: Annotated[int, msgspec.Meta(ge=1, le=256)] = setting(
        "AIAAS_EDGE_WORKERS", "processes that serve this address side by side, each on a core of its own", default=1
    )
    max_connections: Annotated[int, msgspec.Meta(ge=1)] = setting(
        "AIAAS_EDGE_MAX_CONNECTIONS",
        "connections of one worker above which requests are answered 503 and closed",
        default=20_000,
    )
    identity_target: str = setting("AIAAS_EDGE_IDENTITY_TARGET", "gRPC target of identity, for /admin")
    router_target: str = setting("AIAAS_EDGE_ROUTER_TARGET", "gRPC target of the router, for /v1 and /admin")
    analytics_target: str = setting("AIAAS_EDGE_ANALYTICS_TARGET", "gRPC target of analytics, for /analytics")
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024, le=MESSAGE_BYTES - _ENVELOPE_BYTES)] = setting(
        "AIAAS_EDGE_MAX_BODY_BYTES", "bytes of the largest request body; a larger one is answered 413", default=4 << 20
    )
    request_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = setting(
        "AIAAS_EDGE_REQUEST_TIMEOUT_S", "seconds that a request may take, its stream included", default=600.0
    )
    drain_s: Annotated[int, msgspec.Meta(ge=0)] = setting(
        "AIAAS_EDGE_DRAIN_S", "seconds that running requests may go on after a signal to stop", default=30
    )
    header_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = setting(
        "AIAAS_EDGE_HEADER_TIMEOUT_S",
        "seconds that headers may take to arrive before the client is cut off",
        default=10.0,
    )
    idle_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = setting(
        "AIAAS_EDGE_IDLE_TIMEOUT_S",
        "seconds a client may pause within its body (408) or leave an answer unread (cut off)",
        default=30.0,
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting(
        "AIAAS_LOG_LEVEL", "least severe log records that are written", default="INFO"
    )
    otlp_endpoint: str | None = setting(
        "AIAAS_OTLP_ENDPOINT", "http://host:port of an OTLP collector; without it no traces are made", default=None
    )
    trace_ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = setting(
        "AIAAS_TRACE_RATIO", "share of requests that are traced, 0 to 1", default=0.01
    )
    tls: TlsConfig = field(default_factory=TlsConfig)
    proxies: ProxyConfig = field(default_factory=ProxyConfig)

    def __post_init__(self) -> None:
        """Raises ValueError if the address is not host:port, and for a target beyond this machine without TLS."""
        self.host_and_port  # noqa: B018 - it raises
        self.tls.check(
            AIAAS_EDGE_IDENTITY_TARGET=self.identity_target,
            AIAAS_EDGE_ROUTER_TARGET=self.router_target,
            AIAAS_EDGE_ANALYTICS_TARGET=self.analytics_target,
        )

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The address, taken apart; an IPv6 host stands in brackets. Raises ValueError if it is not host:port."""
        host, colon, port = self.address.rpartition(":")
        if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65535):
            raise ValueError(f"AIAAS_EDGE_ADDRESS wants host:port: it is {self.address!r}")
        return host.removeprefix("[").removesuffix("]"), int(port)
