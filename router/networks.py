"""Holds a client's address against the networks from which it may come; it never learns its credential."""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from mesh.errors import PlatformError, Reason


def check_network(allowed_networks: tuple[str, ...], client_address: str) -> None:
    """Raises PlatformError(PERMISSION_DENIED) for a client outside of the networks; none at all means anywhere."""
    if not allowed_networks:
        return
    try:
        address = ipaddress.ip_address(client_address)
    except ValueError:
        address = None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address is None or not any(address in network for network in _networks(allowed_networks)):
        raise PlatformError(
            Reason.PERMISSION_DENIED, description="These credentials cannot be used from your network address."
        )


@lru_cache(maxsize=10_000)
def _networks(allowed_networks: tuple[str, ...]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(ipaddress.ip_network(network, strict=False) for network in allowed_networks)
