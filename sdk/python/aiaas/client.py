"""Channels for programs that call the platform's gRPC themselves: TLS, an API key, deadlines, and retries of reads; it
never holds a stub.

    key = os.environ["AIAAS_API_KEY"]
    certificate = Certificate.read("tool.pem", "tool-key.pem", ca="ca.pem")
    organizations = organization_service_pb2.DESCRIPTOR.services_by_name["OrganizationService"]
    async with connect("identity.example:7001", organizations, api_key=key, certificate=certificate) as channel:
        stub = OrganizationServiceStub(channel)
        page = await stub.ListOrganizations(ListOrganizationsRequest(page_size=10))
"""

import json
from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from mesh.channel import service_config
from mesh.server import MESSAGE_BYTES
from mesh.tls import dns_name, is_local

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


@dataclass(frozen=True)
class Certificate:
    """What a program shows to services, and the CAs that it trusts; all PEM."""

    chain: bytes
    key: bytes = field(repr=False)
    ca: bytes

    @classmethod
    def read(cls, chain: str | Path, key: str | Path, *, ca: str | Path) -> Self:
        """A certificate from files. Raises OSError."""
        return cls(Path(chain).read_bytes(), Path(key).read_bytes(), Path(ca).read_bytes())


def connect(
    target: str,
    *services: ServiceDescriptor,
    api_key: str = "",
    certificate: Certificate | None = None,
    timeout_s: float = 10.0,
) -> grpc.aio.Channel:
    """A channel to `target` ("host:port" or "dns:///name:port") for calls of `services`, all of one of the platform's.

    With a certificate the peer must be the service whose contracts these are, whatever the target is called. Unary
    calls end after `timeout_s` unless they name a timeout of their own; streams have none. What the contracts call a
    read is tried three times while the service is away (UNAVAILABLE), and nothing else is ever sent twice.

    Raises ValueError for services of several packages, and for an API key that would leave this machine in plain text.
    """
    packages = {service.file.package for service in services}
    if len(packages) != 1:
        raise ValueError("a channel is for services of one package, for example those of aiaas.identity.v1")
    if certificate is None and api_key and not is_local(target):
        raise ValueError("an API key goes to another machine over TLS only: give a certificate")
    options = [*_OPTIONS, ("grpc.service_config", json.dumps(service_config(*services)))]
    interceptors: list[Any] = [_UnaryUnary(api_key, timeout_s), _UnaryStream(api_key, None)]
    if certificate is None:
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
    (package,) = packages
    options.append(("grpc.ssl_target_name_override", dns_name(package.split(".")[1])))
    credentials = grpc.ssl_channel_credentials(certificate.ca, certificate.key, certificate.chain)
    return grpc.aio.secure_channel(target, credentials, options=options, interceptors=interceptors)


class _Caller:
    """Adds to each call what it did not say itself."""

    def __init__(self, api_key: str, timeout_s: float | None) -> None:
        self._authorization = f"Bearer {api_key}" if api_key else ""
        self._timeout_s = timeout_s

    def _completed(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        if self._authorization and "authorization" not in metadata:
            metadata.add("authorization", self._authorization)
        timeout_s = self._timeout_s if details.timeout is None else details.timeout
        return grpc.aio.ClientCallDetails(
            details.method, timeout_s, metadata, details.credentials, details.wait_for_ready
        )


class _UnaryUnary(_Caller, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(self._completed(details), request)


class _UnaryStream(_Caller, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], details: grpc.aio.ClientCallDetails, request: Any
    ) -> AsyncIterable[Any]:
        answer: AsyncIterable[Any] = await continuation(self._completed(details), request)
        return answer
