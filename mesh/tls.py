"""TLS between services: the certificate of this process, read again when its files change, and what each side wants of
the other's; it never knows which RPC is whose.

A service is known by a DNS name of its certificate, `<service>.aiaas.internal`, wherever it runs: a channel wants the
name of the service that it calls, a server learns from it who calls (`mesh.interceptors.peer`). Both present a
certificate, and each trusts only the CAs of `AIAAS_TLS_CA_PATH`. A connection is judged when it is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import grpc
from prometheus_client import Gauge

from mesh.clock import Clock, SystemClock
from mesh.config import setting

logger = logging.getLogger(__name__)

# Under .internal nobody else has a name (reserved by ICANN for private use).
_DOMAIN = ".aiaas.internal"

_LOOK_S = 1.0
_WARN_EVERY_S = 3600.0
# Of the life of a certificate. What renews them does so with a third left (cert-manager) or half of it (SPIRE).
_RENEWAL_IS_LATE = 0.2

_EXPIRY = Gauge(
    "aiaas_certificate_expiry_timestamp_seconds",
    "When the certificate of this process, and the first of the CAs it trusts, ends.",
    ["certificate"],
    multiprocess_mode="livemin",
)
_START = Gauge(
    "aiaas_certificate_start_timestamp_seconds",
    "When the certificate of this process began.",
    # Without a label, a process that has none would say that it began in 1970.
    ["certificate"],
    multiprocess_mode="livemin",
)


class CertificateError(Exception):
    """The files make no certificate of a service; the sentence names what is wrong, never what is in a key."""


@dataclass(frozen=True)
class TlsConfig:
    """What a service is told of its certificate. All three paths are set, or none."""

    certificate_path: str = setting(
        "AIAAS_TLS_CERTIFICATE_PATH",
        "PEM of this service's certificate, whose DNS name says which one it is (router.aiaas.internal), and of what"
        " leads from it to the CA; a new one is taken up without a restart",
        default="",
    )
    key_path: str = setting("AIAAS_TLS_KEY_PATH", "PEM of the private key of that certificate", default="")
    ca_path: str = setting(
        "AIAAS_TLS_CA_PATH", "PEM of the CAs that certificates of other services must come from", default=""
    )
    mode: Literal["on", "off"] = setting(
        "AIAAS_TLS",
        "off lets services talk in plain text beyond this machine, where something else encrypts and tells them apart",
        default="on",
    )

    def __post_init__(self) -> None:
        """Raises ValueError for some of the paths, or for all of them with AIAAS_TLS=off."""
        paths = (self.certificate_path, self.key_path, self.ca_path)
        if any(paths) and not all(paths):
            raise ValueError(
                "AIAAS_TLS_CERTIFICATE_PATH, AIAAS_TLS_KEY_PATH and AIAAS_TLS_CA_PATH must be set together"
            )
        if self.mode == "off" and any(paths):
            raise ValueError("AIAAS_TLS is off, so AIAAS_TLS_CERTIFICATE_PATH and its like must not be set")

    @property
    def is_on(self) -> bool:
        """Whether services talk over TLS."""
        return bool(self.certificate_path)

    def check_public(self, **addresses: str) -> None:
        """Hold public gRPC addresses, by their variables, to this: only a certificate tells a service from a client.
        Raises ValueError that names the variable."""
        for variable, address in addresses.items():
            if address and not self.is_on:
                raise ValueError(f"{variable} wants certificates (AIAAS_TLS_CERTIFICATE_PATH and its like)")

    def check(self, **addresses: str | None) -> None:
        """Hold the gRPC addresses of a configuration, by their variables, to this: without TLS they stay on this
        machine. Raises ValueError that names the variable."""
        if self.is_on or self.mode == "off":
            return
        for variable, address in addresses.items():
            if address and not is_local(address):
                raise ValueError(
                    f"{variable} is {address!r}, beyond this machine: that wants certificates"
                    " (AIAAS_TLS_CERTIFICATE_PATH and its like), or AIAAS_TLS=off"
                )


@dataclass(frozen=True, slots=True)
class _Material:
    certificate: bytes
    key: bytes
    ca: bytes
    begin_time: datetime
    expire_time: datetime
    ca_expire_time: datetime


class Tls:
    """The certificate of this process as it is now. `generation` is another one after each renewal."""

    def __init__(self, config: TlsConfig, clock: Clock) -> None:
        """Raises CertificateError."""
        self._paths = (config.certificate_path, config.key_path, config.ca_path)
        self._clock = clock
        self._stamp = self._look()
        self._material = self._read()
        self._warned_at = float("-inf")
        self.generation = 0
        self._take(self._material)

    def renew(self) -> bool:
        """Take up what the files hold, if they have changed; returns whether they had. What makes no certificate is
        logged and not taken: the files may be half written, and are looked at again."""
        try:
            stamp = self._look()
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            material = self._read()
        except CertificateError as error:
            logger.error("the new certificate is not taken: %s", error)
            return False
        self._take(material)
        self.generation += 1
        logger.info("a new certificate is in use", extra={"expires": material.expire_time.isoformat()})
        return True

    async def run(self) -> None:
        """Renew again and again, until cancelled."""
        while True:
            self._warn()
            await asyncio.sleep(_LOOK_S)
            self.renew()

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """What a channel that is made now shows of itself."""
        material = self._material
        return grpc.ssl_channel_credentials(material.ca, material.key, material.certificate)

    def server_credentials(self, *, is_public: bool = False) -> grpc.ServerCredentials:
        """What a server shows, and wants of every peer: of a client of a public address nothing. Each handshake has the
        newest."""
        shown = self.generation

        def newest() -> Any:
            # gRPC calls it from threads of its own, one at a time; without news it keeps what it has.
            nonlocal shown
            if shown == self.generation:
                return None
            shown = self.generation
            return configuration()

        def configuration() -> Any:
            material = self._material
            ca = None if is_public else material.ca
            return grpc.ssl_server_certificate_configuration([(material.key, material.certificate)], ca)

        return grpc.dynamic_ssl_server_credentials(configuration(), newest, not is_public)

    def _look(self) -> tuple[tuple[int, int, int], ...]:
        """What changes when one of the files does, however it is replaced. Raises CertificateError."""
        try:
            return tuple((found.st_ino, found.st_mtime_ns, found.st_size) for found in map(os.stat, self._paths))
        except OSError as error:
            raise CertificateError(f"{error.filename}: {error.strerror}") from error

    def _read(self) -> _Material:
        contents = []
        for path in self._paths:
            try:
                with open(path, "rb") as file:
                    contents.append(file.read())
            except OSError as error:
                raise CertificateError(f"{path}: {error.strerror}") from error
        certificate, key, ca = contents
        return _judged(certificate, key, ca, self._paths)

    def _take(self, material: _Material) -> None:
        self._material = material
        self._warned_at = float("-inf")
        _START.labels("own").set(material.begin_time.timestamp())
        _EXPIRY.labels("own").set(material.expire_time.timestamp())
        _EXPIRY.labels("ca").set(material.ca_expire_time.timestamp())

    def _warn(self) -> None:
        """Say once an hour that a certificate ends soon."""
        material = self._material
        late = material.expire_time - _RENEWAL_IS_LATE * (material.expire_time - material.begin_time)
        if self._clock.now() < late or self._clock.monotonic() - self._warned_at < _WARN_EVERY_S:
            return
        self._warned_at = self._clock.monotonic()
        logger.warning(
            "the certificate ends soon and was not renewed", extra={"expires": material.expire_time.isoformat()}
        )


@contextlib.asynccontextmanager
async def opened(config: TlsConfig, clock: Clock | None = None) -> AsyncIterator[Tls | None]:
    """The certificate of this process, kept new within the block; None where services talk in plain text.

    Raises CertificateError.
    """
    if not config.is_on:
        yield None
        return
    tls = Tls(config, clock or SystemClock())
    keeper = asyncio.create_task(tls.run(), name="certificates")
    try:
        yield tls
    finally:
        keeper.cancel()
        await asyncio.wait([keeper])


def dns_name(service: str) -> str:
    """The name in a service's certificate."""
    return service + _DOMAIN


def peer_services(context: grpc.aio.ServicerContext[Any, Any]) -> frozenset[str]:
    """The services that the caller's certificate names; none for a caller without one."""
    names = context.auth_context().get("peer_dns", ())
    return frozenset(
        name.decode().removesuffix(_DOMAIN) for name in names if name.isascii() and name.endswith(_DOMAIN.encode())
    )


def is_client(context: grpc.aio.ServicerContext[Any, Any]) -> bool:
    """Whether the caller is a client of a public address: it came over TLS, and has no certificate."""
    found = context.auth_context()
    return found.get("transport_security_type") == [b"ssl"] and "x509_pem_cert" not in found


def is_local(target: str) -> bool:
    """Whether a gRPC target, or an address to listen on, is of this machine alone."""
    scheme, colon, rest = target.partition(":")
    if colon and scheme in ("unix", "unix-abstract"):
        return True
    if colon and scheme in ("dns", "ipv4", "ipv6"):
        target = rest.rpartition("/")[2]
    return all(_is_loopback(address.strip()) for address in target.split(","))


def _is_loopback(address: str) -> bool:
    host, colon, _ = address.rpartition(":")
    host = (host if colon else address).strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _judged(certificate: bytes, key: bytes, ca: bytes, paths: tuple[str, str, str]) -> _Material:
    """What three files hold together. Raises CertificateError."""
    # Only here, as what starts without TLS shall not wait for it.
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    def parsed(path: str, parse: Callable[[], Any]) -> Any:
        try:
            return parse()
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            # Not the library's own words: they may quote what it read.
            raise CertificateError(f"{path} is not what it should be in PEM") from error

    own = parsed(paths[0], lambda: x509.load_pem_x509_certificates(certificate))[0]
    private = parsed(paths[1], lambda: load_pem_private_key(key, None))
    authorities = parsed(paths[2], lambda: x509.load_pem_x509_certificates(ca))
    if private.public_key() != own.public_key():
        raise CertificateError(f"the key in {paths[1]} is not that of the certificate in {paths[0]}")
    return _Material(
        certificate,
        key,
        ca,
        own.not_valid_before_utc,
        own.not_valid_after_utc,
        min(authority.not_valid_after_utc for authority in authorities),
    )
