"""What analytics is told by its environment, read once at start; it never says how any of it is used."""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated, Literal

import msgspec

from analytics.usage_retention import Kept
from mesh.config import setting
from mesh.networks import ProxyConfig
from mesh.sealing import KEY_PATTERN
from mesh.tls import TlsConfig


@dataclass(frozen=True)
class AnalyticsConfig:
    """The configuration of analytics. A wrong variable is named by `python -m analytics check-config`."""

    database_url: str = setting(
        "AIAAS_ANALYTICS_DATABASE_URL", "postgresql://... of the database of usage events and their sums", secret=True
    )
    redis_url: str = setting("AIAAS_ANALYTICS_REDIS_URL", "redis://... that revocations are announced on", secret=True)
    amqp_url: str = setting("AIAAS_ANALYTICS_AMQP_URL", "amqp://... that usage events are taken from", secret=True)
    identity_target: str = setting(
        "AIAAS_ANALYTICS_IDENTITY_TARGET", "gRPC target of identity, which judges credentials and keeps the ledger"
    )
    router_target: str = setting(
        "AIAAS_ANALYTICS_ROUTER_TARGET", "gRPC target of any router, which knows all of them and what engines counted"
    )
    grpc_address: str = setting(
        "AIAAS_ANALYTICS_GRPC_ADDRESS", "host:port or unix:path that gRPC listens on", default="127.0.0.1:27005"
    )
    public_grpc_address: str = setting(
        "AIAAS_ANALYTICS_PUBLIC_GRPC_ADDRESS",
        "host:port for gRPC clients that have no certificate, behind a proxy that ends their TLS; empty: for none",
        default="",
    )
    ops_address: str = setting(
        "AIAAS_ANALYTICS_OPS_ADDRESS", "host:port of /health, /ready and /metrics", default="127.0.0.1:27105"
    )
    drain_s: Annotated[float, msgspec.Meta(ge=0)] = setting(
        "AIAAS_ANALYTICS_DRAIN_S", "seconds that running calls may go on after a signal to stop", default=10.0
    )
    reflection: bool = setting("AIAAS_ANALYTICS_REFLECTION", "whether gRPC reflection is served", default=True)
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=5000)] = setting(
        "AIAAS_ANALYTICS_BATCH_SIZE",
        "events that one transaction takes at most; more need more memory, fewer take longer",
        default=5000,
    )
    events_kept_days: Annotated[int, msgspec.Meta(ge=3)] = setting(
        "AIAAS_ANALYTICS_EVENTS_KEPT_DAYS",
        "days that single usage events are kept, and how old one may be that is counted",
        default=400,
    )
    # Forecasts look back for eight weeks.
    hourly_kept_days: Annotated[int, msgspec.Meta(ge=60)] = setting(
        "AIAAS_ANALYTICS_HOURLY_KEPT_DAYS",
        "days that sums of hours are kept; beyond them usage is told by days in UTC",
        default=90,
    )
    daily_kept_months: Annotated[int, msgspec.Meta(ge=3)] = setting(
        "AIAAS_ANALYTICS_DAILY_KEPT_MONTHS",
        "months that sums of days are kept; what is older is told nowhere",
        default=13,
    )
    secret_key: Annotated[str, msgspec.Meta(pattern=KEY_PATTERN)] = setting(
        "AIAAS_ANALYTICS_SECRET_KEY",
        "base64 of 32 random bytes, by which the secrets of webhooks and the keys of statements are encrypted; without"
        " it the former must be rotated, and older statements are verified by whoever kept their public key",
        secret=True,
    )
    webhook_allow_private: bool = setting(
        "AIAAS_ANALYTICS_WEBHOOK_ALLOW_PRIVATE",
        "whether webhooks may lead into private networks, and be http; only where everybody may reach these anyway",
        default=False,
    )
    s3_url: str = setting(
        "AIAAS_ANALYTICS_S3_URL",
        "http(s)://host of object storage that speaks S3, where exports go and are fetched from; without it none are"
        " made",
        default="",
    )
    s3_bucket: str = setting("AIAAS_ANALYTICS_S3_BUCKET", "the bucket of exports", default="aiaas")
    s3_region: str = setting(
        "AIAAS_ANALYTICS_S3_REGION", "the region that requests are signed for", default="us-east-1"
    )
    s3_access_key: str = setting("AIAAS_ANALYTICS_S3_ACCESS_KEY", "the id of the key to the bucket", default="")
    s3_secret_key: str = setting(
        "AIAAS_ANALYTICS_S3_SECRET_KEY", "the secret of the key to the bucket", default="", secret=True
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

    @property
    def kept(self) -> Kept:
        """How long usage is kept."""
        return Kept(
            timedelta(days=self.events_kept_days), timedelta(days=self.hourly_kept_days), self.daily_kept_months
        )

    def __post_init__(self) -> None:
        """Raises ValueError for an address beyond this machine, or a public one, without TLS."""
        self.tls.check_public(AIAAS_ANALYTICS_PUBLIC_GRPC_ADDRESS=self.public_grpc_address)
        self.tls.check(
            AIAAS_ANALYTICS_GRPC_ADDRESS=self.grpc_address,
            AIAAS_ANALYTICS_IDENTITY_TARGET=self.identity_target,
            AIAAS_ANALYTICS_ROUTER_TARGET=self.router_target,
        )
