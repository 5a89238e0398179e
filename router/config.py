"""What the router is told by its environment, read once at start; it never says how any of it is used."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from mesh.config import setting
from mesh.networks import ProxyConfig
from mesh.tls import TlsConfig


@dataclass(frozen=True)
class RouterConfig:
    """The router's configuration. A wrong variable is named by `python -m router check-config`.

    Besides these, the variables AIAAS_ENGINE_* hold the keys of engines that want one; a backend names its variable.
    """

    database_url: str = setting(
        "AIAAS_ROUTER_DATABASE_URL", "postgresql://... of the router's own database", secret=True
    )
    redis_url: str = setting(
        "AIAAS_ROUTER_REDIS_URL", "redis://... that keeps rate limits and announces revocations", secret=True
    )
    amqp_url: str = setting("AIAAS_ROUTER_AMQP_URL", "amqp://... that usage events are published to", secret=True)
    identity_target: str = setting("AIAAS_ROUTER_IDENTITY_TARGET", "gRPC target of identity, which judges credentials")
    journal_path: str = setting(
        "AIAAS_ROUTER_JOURNAL_PATH",
        "folder of the journal of requests: of this router alone, and kept over restarts, since it is what is billed",
    )
    journal_limit_bytes: Annotated[int, msgspec.Meta(ge=16 << 20)] = setting(
        "AIAAS_ROUTER_JOURNAL_LIMIT_BYTES",
        "size of the journal at which new requests are refused; published entries make room before, and after 72 hours",
        default=4 << 30,
    )
    grpc_address: str = setting(
        "AIAAS_ROUTER_GRPC_ADDRESS", "host:port or unix:path that gRPC listens on", default="127.0.0.1:27003"
    )
    public_grpc_address: str = setting(
        "AIAAS_ROUTER_PUBLIC_GRPC_ADDRESS",
        "host:port for gRPC clients that have no certificate, behind a proxy that ends their TLS; empty: for none",
        default="",
    )
    advertised_address: str | None = setting(
        "AIAAS_ROUTER_ADVERTISED_ADDRESS",
        "gRPC target at which analytics reaches this replica, where that is not the address that it listens on",
        default=None,
    )
    ops_address: Annotated[str, msgspec.Meta(pattern=r"^[^:]+:\d{1,5}$")] = setting(
        "AIAAS_ROUTER_OPS_ADDRESS", "host:port of /health, /ready and /metrics", default="127.0.0.1:27013"
    )
    first_byte_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = setting(
        "AIAAS_ROUTER_FIRST_BYTE_TIMEOUT_S",
        "seconds an engine may take to the first byte of a stream before another one is tried",
        default=60.0,
    )
    answer_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = setting(
        "AIAAS_ROUTER_ANSWER_TIMEOUT_S",
        "seconds an engine may take to an answer that is not streamed, of which nothing comes before it is whole",
        default=600.0,
    )
    idle_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = setting(
        "AIAAS_ROUTER_IDLE_TIMEOUT_S", "seconds of silence in an answer after which it is broken off", default=60.0
    )
    unconfirmed_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = setting(
        "AIAAS_ROUTER_UNCONFIRMED_S",
        "seconds that known credentials go on being accepted while identity is away, beyond the cache's minute",
        default=900.0,
    )
    connect_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = setting(
        "AIAAS_ROUTER_CONNECT_TIMEOUT_S", "seconds an engine may take to accept a connection", default=2.0
    )
    drain_s: Annotated[float, msgspec.Meta(ge=0)] = setting(
        "AIAAS_ROUTER_DRAIN_S", "seconds that running requests may go on after a signal to stop", default=30.0
    )
    default_requests_per_second: Annotated[float, msgspec.Meta(gt=0)] = setting(
        "AIAAS_ROUTER_DEFAULT_REQUESTS_PER_SECOND",
        "sustained requests per second of an organization, and of a key, that has no limit of its own",
        default=100.0,
    )
    default_burst_requests: Annotated[int, msgspec.Meta(ge=1)] = setting(
        "AIAAS_ROUTER_DEFAULT_BURST_REQUESTS",
        "requests that may come at once at that rate; at another rate as many seconds' worth",
        default=200,
    )
    default_concurrent_requests: Annotated[int, msgspec.Meta(ge=1)] = setting(
        "AIAAS_ROUTER_DEFAULT_CONCURRENT_REQUESTS",
        "requests in flight of an organization, and of a key, that has no limit of its own",
        default=64,
    )
    default_tokens_per_minute: Annotated[int, msgspec.Meta(ge=1)] | None = setting(
        "AIAAS_ROUTER_DEFAULT_TOKENS_PER_MINUTE",
        "tokens per minute of an organization, and of a key, that has no limit of its own; none where it is not set",
        default=None,
    )
    reflection: bool = setting("AIAAS_ROUTER_REFLECTION", "whether gRPC reflection is served", default=True)
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
        """Raises ValueError for an address beyond this machine, or a public one, without TLS."""
        self.tls.check_public(AIAAS_ROUTER_PUBLIC_GRPC_ADDRESS=self.public_grpc_address)
        self.tls.check(AIAAS_ROUTER_GRPC_ADDRESS=self.grpc_address, AIAAS_ROUTER_IDENTITY_TARGET=self.identity_target)
