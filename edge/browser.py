"""What a browser sends along by itself: cookies, and from which site a request comes; it never judges a session.

Against requests that another site has a browser make (CSRF), what counts is where the browser says that a request comes
from: `Sec-Fetch-Site`, and where there is none `Origin`. No script of a page can set either. Unlike a token in each
form, this also guards what comes before a session - nobody can be signed in as somebody else - and the JSON of /admin
as much as forms; it needs no state, and there is nothing to leak. A request that says neither comes from no browser of
today, and is refused.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from starlette.requests import cookie_parser

from edge.exchange import Exchange
from mesh import tokens
from mesh.errors import PlatformError, Reason

SESSION_COOKIE = "__Host-aiaas_session"
"""The cookie that holds a browser's session token. By its prefix, a browser takes it only for this very host, over
https or from this machine (RFC 6265bis, 4.1.3.2)."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""The methods that ask for no change (RFC 9110, 9.2.1)."""

_SAME = frozenset({"same-origin", "none"})
_is_token = re.compile(r"[A-Za-z0-9_-]{1,512}").fullmatch


def session_token(exchange: Exchange) -> str:
    """The session token in the browser's cookie; empty where there is none."""
    token = cookie(exchange, SESSION_COOKIE)
    return token if token.startswith(tokens.SESSION.prefix) else ""


def cookie(exchange: Exchange, name: str) -> str:
    """The value of a cookie that holds a token; empty where there is none."""
    value = cookie_parser(exchange.header(b"cookie") or "").get(name, "")
    return value if _is_token(value) else ""


def cookie_header(name: str, value: str, max_age_s: int | None = None) -> tuple[bytes, bytes]:
    """The header that gives the browser a token to keep, until it is closed or for `max_age_s`; 0 takes it back.

    Raises ValueError for what is no token.
    """
    if not _is_token(value) and max_age_s != 0:
        raise ValueError(f"{name} would hold no token")
    lifetime = "" if max_age_s is None else f"; Max-Age={max_age_s}"
    # Lax, since people come back from issuers and from clients by following links of theirs.
    return b"set-cookie", f"{name}={value}; Path=/; Secure; HttpOnly; SameSite=Lax{lifetime}".encode("ascii")


def forget(name: str) -> tuple[bytes, bytes]:
    """The header that has the browser forget a cookie."""
    return cookie_header(name, "", 0)


def check_same_origin(exchange: Exchange) -> None:
    """Raises PlatformError(PERMISSION_DENIED) for a request that might be another site's doing."""
    site, origin = exchange.header(b"sec-fetch-site"), exchange.header(b"origin")
    if site is not None:
        is_ours = site in _SAME
    else:
        # The host alone: whether there is TLS in front is not to be seen from here.
        is_ours = origin is not None and _host_of(origin) == (exchange.header(b"host") or "").lower()
    if not is_ours:
        raise PlatformError(Reason.PERMISSION_DENIED, description="The request comes from another site.")


def take_credential(exchange: Exchange, *, required: bool) -> None:
    """Hand on, unjudged, what says who calls: the Authorization header, or else the browser's session, which changes
    nothing on behalf of another site.

    Raises PlatformError: PERMISSION_DENIED, what `Exchange.take_credential` raises.
    """
    token = session_token(exchange) if required and exchange.header(b"authorization") is None else ""
    if not token:
        exchange.take_credential(required=required)
        return
    if exchange.method not in SAFE_METHODS:
        check_same_origin(exchange)
    exchange.use_credential(token)


def _host_of(origin: str) -> str:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return ""
    return parts.netloc.lower() if parts.scheme in ("http", "https") else ""
