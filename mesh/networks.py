"""Network addresses of clients: how one is written, and whether it is within the networks from which a credential may
be used; it never learns the credential."""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from mesh.errors import PlatformError, Reason


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
    known = written(client_address)
    if not known or not any(ipaddress.ip_address(known) in network for network in _networks(allowed_networks)):
        raise PlatformError(
            Reason.PERMISSION_DENIED, description="These credentials cannot be used from your network address."
        )


@lru_cache(maxsize=10_000)
def _networks(allowed_networks: tuple[str, ...]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(ipaddress.ip_network(network, strict=False) for network in allowed_networks)
