"""Network addresses of clients: how one is written, which is the client's where proxies stand between, and whether it
is within the networks from which a credential may be used; it never learns the credential."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import lru_cache

from mesh.config import setting
from mesh.errors import PlatformError, Reason


@dataclass(frozen=True)
class ProxyConfig:
    """What a service is told of what stands between it and its clients."""

    trusted_proxies: tuple[str, ...] = setting(
        "AIAAS_TRUSTED_PROXIES",
        "networks (CIDR) of the proxies whose X-Forwarded-For says which client they ask for; from elsewhere it counts"
        " for nothing, and whoever connects is the client",
        default=(),
    )

    def __post_init__(self) -> None:
        """Raises ValueError for what is no network."""
        for network in self.trusted_proxies:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"AIAAS_TRUSTED_PROXIES: {error}") from None


def written(address: str) -> str:
    """An address in its usual spelling, IPv4 also where IPv6 carries it; empty for what is none."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return ""
    return str(parsed.ipv4_mapped or parsed if isinstance(parsed, ipaddress.IPv6Address) else parsed)


def check_network(allowed_networks: tuple[str, ...], client_address: str) -> None:
    """Raises PlatformError(PERMISSION_DENIED) for a client outside of the networks; none at all means anywhere."""
    if not allowed_networks:
        return
    if not _is_within(written(client_address), allowed_networks):
        raise PlatformError(
            Reason.PERMISSION_DENIED, description="These credentials cannot be used from your network address."
        )


@lru_cache(maxsize=10_000)
def client_of(peer: str, forwarded_for: str, trusted_proxies: tuple[str, ...]) -> str:
    """The client of a connection from `peer`: the last address in X-Forwarded-For that is no trusted proxy's, as those
    before it are whatever the client wrote. Where all are proxies', it is the first."""
    address = peer
    for named in reversed(forwarded_for.split(",")):
        before = written(named.strip())
        if not before or not _is_within(written(address), trusted_proxies):
            break
        address = before
    return address


def _is_within(address: str, networks: tuple[str, ...]) -> bool:
    """Whether an address, as it is usually written, is in one of the networks; one that is not known is in none."""
    return bool(address) and any(ipaddress.ip_address(address) in network for network in _networks(networks))


@lru_cache(maxsize=10_000)
def _networks(allowed_networks: tuple[str, ...]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(ipaddress.ip_network(network, strict=False) for network in allowed_networks)
