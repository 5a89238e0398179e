"""How a page looks and what it may do: templates, headers, errors for people; it never calls anybody.

Pages work without a script and may not run one. Templates escape whatever they are given.
"""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.types import Receive, Scope, Send

from edge.exchange import Exchange, Headers, exchange_of
from mesh.errors import PlatformError, Reason, response_headers

HOME = "/"
"""Where people go who came from nowhere."""

_STYLE = files("edge.sign_in").joinpath("style.css").read_bytes()
STYLE_PATH = f"/sign-in/{hashlib.sha256(_STYLE).hexdigest()[:16]}.css"
"""Where the stylesheet is; another one is elsewhere, so browsers may keep it."""

_AREAS = ("/sign-in", "/sign-out", "/account", "/recover", "/invites", "/oauth2/authorize")
# A path on this host: a second slash, or what browsers read as one, would begin the name of another host.
_LOCAL_PATH = re.compile(r"/(?:[!-.0-\[\]-~][!-\[\]-~]{0,2046})?")
_POLICY = "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
_HEADERS: Headers = (
    (b"content-type", b"text/html; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", _POLICY.encode()),
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    # With no-referrer, browsers would not say where a form comes from either.
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_STYLE_HEADERS: Headers = (
    (b"content-type", b"text/css; charset=utf-8"),
    (b"cache-control", b"public, max-age=31536000, immutable"),
    (b"x-content-type-options", b"nosniff"),
)
_REDIRECT_HEADERS: Headers = (
    (b"cache-control", b"no-store"),
    # A code in an address must not go on to the client's own links (RFC 9700, 4.2.4).
    (b"referrer-policy", b"no-referrer"),
)
_TITLES = {
    Reason.METHOD_NOT_ALLOWED: "That does not work here",
    Reason.NOT_FOUND: "There is no such page",
    Reason.ROUTE_NOT_FOUND: "There is no such page",
    Reason.PERMISSION_DENIED: "That is not allowed",
    Reason.RATE_LIMIT_EXCEEDED: "Too many attempts",
}

_templates = Environment(
    loader=PackageLoader("edge.sign_in"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.globals["style_path"] = STYLE_PATH


def is_for(scope: Scope) -> bool:
    """Whether a request's errors are to be pages."""
    path: str = scope["path"]
    return path == HOME or any(path == area or path.startswith(f"{area}/") for area in _AREAS)


def local_path(wanted: str) -> str:
    """A path to go on to, if it stays on this host; else the home page."""
    return wanted if _LOCAL_PATH.fullmatch(wanted) else HOME


async def show(exchange: Exchange, template: str, status: int = 200, headers: Headers = (), **values: Any) -> None:
    """Answer with a page."""
    page = _templates.get_template(f"{template}.html").render({"error": None, **values})
    await exchange.respond(status, [*_HEADERS, *headers], page.encode())


async def show_again(
    exchange: Exchange, template: str, error: PlatformError, headers: Headers = (), **values: Any
) -> None:
    """Answer with a page whose form was not accepted, and why not.

    Raises `error` itself where nobody could have filled it in better.
    """
    if error.entry.http >= 500:
        raise error
    exchange.reason = error.reason
    await show(exchange, template, status_of(error), [*headers, *error_headers(error)], error=error, **values)


async def redirect(exchange: Exchange, location: str, headers: Headers = ()) -> None:
    """Send the browser elsewhere, by GET."""
    await exchange.respond(303, [*_REDIRECT_HEADERS, *headers, (b"location", location.encode("ascii"))], b"")


async def go_on(exchange: Exchange, location: str, headers: Headers = ()) -> None:
    """Send the browser on after a form, to what may lead to another site in the end.

    By a page of its own: browsers hold all redirects that follow a form to the form's `form-action`.
    """
    await show(exchange, "go_on", headers=headers, location=location)


class StyleEndpoint:
    """The stylesheet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises PlatformError(METHOD_NOT_ALLOWED)."""
        exchange = exchange_of(scope)
        exchange.route = "/sign-in/style"
        exchange.allow("GET")
        await exchange.respond(200, _STYLE_HEADERS, _STYLE)


def error_page(error: PlatformError) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of the answer to a request that failed."""
    default = "That did not work"
    if error.entry.http >= 500:
        default = "That does not work at the moment"
    title = _TITLES.get(error.reason, default)
    page = _templates.get_template("error.html").render(title=title, message=error.message)
    return status_of(error), [*_HEADERS, *error_headers(error)], page.encode()


def status_of(error: PlatformError) -> int:
    """The status of a page. One of 401 would have to name a scheme that browsers know (RFC 9110, 15.5.2)."""
    return 403 if error.entry.http == 401 else error.entry.http


def error_headers(error: PlatformError) -> list[tuple[bytes, bytes]]:
    """What a page that tells of an error carries besides the headers of all pages, Retry-After above all."""
    told = response_headers(error)
    told.pop("WWW-Authenticate", None)
    if error.reason is Reason.METHOD_NOT_ALLOWED and (allowed := error.details.get("allow")):
        told["Allow"] = allowed
    return [(name.lower().encode(), value.encode()) for name, value in told.items()]
