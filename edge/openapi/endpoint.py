"""GET /openapi.json and /docs: the files that were made with gen/, to anybody, as they lie beside this module; it makes
none of them."""

import hashlib
from pathlib import Path

from starlette.types import Receive, Scope, Send

from edge.exchange import Headers, exchange_of

FILES = {"/openapi.json": ("openapi.json", b"application/json"), "/docs": ("index.html", b"text/html; charset=utf-8")}
"""Paths, with the file and its media type."""

# The page has its style within it and nothing else: no script runs, and nothing is fetched.
_POLICY = b"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class FileEndpoint:
    """An ASGI endpoint for one path of `FILES`."""

    def __init__(self, path: str) -> None:
        """Raises OSError if the file is not there."""
        name, media_type = FILES[path]
        self._path = path
        self._content = (Path(__file__).parent / name).read_bytes()
        self._etag = f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'
        self._headers: Headers = (
            (b"content-type", media_type),
            (b"etag", self._etag.encode("ascii")),
            (b"cache-control", b"no-cache"),
            (b"content-security-policy", _POLICY),
            (b"x-content-type-options", b"nosniff"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; with 304 where the client has the file already. Raises PlatformError."""
        exchange = exchange_of(scope)
        exchange.route = self._path
        exchange.allow("GET")
        if self._etag in (exchange.header(b"if-none-match") or ""):
            await exchange.respond(304, self._headers, b"")
        else:
            await exchange.respond(200, self._headers, self._content)
