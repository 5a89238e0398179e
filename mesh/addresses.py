"""Which addresses of others the platform calls, by what a URL says and by where that leads; it never connects.

A URL is judged when it is stored, for the sake of whoever writes it. What keeps callers out of private networks is the
judgement of each address at the moment of connecting to it: a name may lead elsewhere by then.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

_URL = re.compile(r"[!-~]{1,2048}")
# Addresses of IPv4 within IPv6, as translators reach them (RFC 6052).
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class PrivateAddressError(OSError):
    """The way leads into a private network."""


def wrong_with(url: str, *, allow_private: bool) -> str | None:
    """What is wrong with a URL as a rule that it breaks; None if it may be called.

    `allow_private` allows http and addresses in private networks.
    """
    if not _URL.fullmatch(url):
        return "must be an address of at most 2048 printable ASCII characters"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "must be an address"
    if parts.scheme != "https" and not (allow_private and parts.scheme == "http"):
        return "must begin with https://"
    if not host or port == 0:
        return "must be an address"
    if parts.username is not None or parts.password is not None or parts.fragment:
        return "must hold no user, password or fragment"
    if not allow_private and _is_private_name(host):
        return "must not lead into a private network"
    return None


def is_public(address: str) -> bool:
    """Whether an IP address is one of the Internet's: not private, loopback, link-local, multicast or reserved."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        # Forms of IPv6 that lead to an address of IPv4.
        translated = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        ip = translated or ip.ipv4_mapped or ip.sixtofour or ip
    return ip.is_global and not ip.is_multicast


def public_socket(address: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
    """The socket for an address that is about to be connected to, an aiohttp connector's `socket_factory`. Raises
    PrivateAddressError if it is not public."""
    family, kind, protocol, _, place = address
    if not is_public(str(place[0]).partition("%")[0]):
        raise PrivateAddressError("the address is not public")
    return socket.socket(family, kind, protocol)


def _is_private_name(host: str) -> bool:
    try:
        return not is_public(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
