"""The configuration of identity, one variable a field; it never has a default for what must be secret."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from identity.audit_chain import KEYS_PATTERN
from identity.mail import URL_PATTERN
from mesh.config import setting
from mesh.networks import ProxyConfig
from mesh.sealing import KEY_PATTERN
from mesh.tls import TlsConfig


@dataclass(frozen=True)
class IdentityConfig:
    """What identity is told by its environment."""

    database_url: str = setting(
        "AIAAS_IDENTITY_DATABASE_URL", "PostgreSQL of identity, postgresql://user@host:port/name", secret=True
    )
    amqp_url: str = setting("AIAAS_IDENTITY_AMQP_URL", "amqp://... that events are published to", secret=True)
    audit_keys: Annotated[str, msgspec.Meta(pattern=KEYS_PATTERN)] = setting(
        "AIAAS_IDENTITY_AUDIT_KEY",
        "base64 of 32 random bytes, by which the audit log is signed; after a comma those that signed before it,"
        " without which what they signed is no longer taken for the platform's",
        secret=True,
    )
    secret_key: Annotated[str, msgspec.Meta(pattern=KEY_PATTERN)] = setting(
        "AIAAS_IDENTITY_SECRET_KEY",
        "base64 of 32 random bytes, by which secrets that must be read again are encrypted; with another one MFA has to"
        " be reset, signing secrets and issuers' secrets have to be set anew, and the signing key has to be rotated",
        secret=True,
    )
    public_url: Annotated[str, msgspec.Meta(pattern=r"^https?://[^/?#\s]+$")] = setting(
        "AIAAS_IDENTITY_PUBLIC_URL",
        "https://host of the edge as clients see it: the issuer of tokens, and where OAuth2 is served",
        default="http://127.0.0.1:8080",
    )
    smtp_url: Annotated[str, msgspec.Meta(pattern=URL_PATTERN)] = setting(
        "AIAAS_IDENTITY_SMTP_URL",
        "smtp://user:password@host:port (STARTTLS) or smtps://..., by which invites and recoveries are mailed; without"
        " it whoever invites is told the token, and nobody recovers a password",
        default="",
        secret=True,
    )
    mail_from: str = setting("AIAAS_IDENTITY_MAIL_FROM", "the sender of mail", default="aiaas@localhost")
    allow_private_issuers: bool = setting(
        "AIAAS_IDENTITY_ALLOW_PRIVATE_ISSUERS",
        "whether OpenID Connect issuers may be in private networks and speak http; for tests",
        default=False,
    )
    grpc_address: str = setting(
        "AIAAS_IDENTITY_GRPC_ADDRESS", "host:port or unix:path of the gRPC server", default="127.0.0.1:27001"
    )
    public_grpc_address: str = setting(
        "AIAAS_IDENTITY_PUBLIC_GRPC_ADDRESS",
        "host:port for gRPC clients that have no certificate, behind a proxy that ends their TLS; empty: for none",
        default="",
    )
    ops_address: Annotated[str, msgspec.Meta(pattern=r"^[^:]+:\d{1,5}$")] = setting(
        "AIAAS_IDENTITY_OPS_ADDRESS", "host:port of /health, /ready and /metrics", default="127.0.0.1:27011"
    )
    redis_url: str = setting(
        "AIAAS_IDENTITY_REDIS_URL",
        "Redis that carries revocations; without it, other processes notice one when their caches age",
        default="",
        secret=True,
    )
    configuration_path: str = setting(
        "AIAAS_IDENTITY_CONFIGURATION_PATH",
        "watched directory of <organization id>.yaml, which organizations are brought to; without it there is none",
        default="",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting(
        "AIAAS_LOG_LEVEL", "the least severe log records that are written", default="INFO"
    )
    otlp_endpoint: str = setting(
        "AIAAS_OTLP_ENDPOINT", "where spans are sent, http://host:port; without it none are recorded", default=""
    )
    trace_ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = setting(
        "AIAAS_TRACE_RATIO", "the part of traces beginning here that is recorded, 0 to 1", default=1.0
    )
    reflection: bool = setting("AIAAS_IDENTITY_REFLECTION", "whether gRPC reflection is served", default=True)
    drain_s: Annotated[float, msgspec.Meta(ge=0, le=300)] = setting(
        "AIAAS_IDENTITY_DRAIN_S", "seconds that calls get to end in when the process stops", default=10.0
    )
    tls: TlsConfig = field(default_factory=TlsConfig)
    proxies: ProxyConfig = field(default_factory=ProxyConfig)

    def __post_init__(self) -> None:
        """Raises ValueError for an address beyond this machine, or a public one, without TLS."""
        self.tls.check_public(AIAAS_IDENTITY_PUBLIC_GRPC_ADDRESS=self.public_grpc_address)
        self.tls.check(AIAAS_IDENTITY_GRPC_ADDRESS=self.grpc_address)
