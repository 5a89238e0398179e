"""An OpenID Connect issuer with real keys, which tells of whoever it is told to, and can misbehave in every way."""

import base64
import hashlib
import hmac
import html
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote, urlencode, urlsplit

from aiohttp import web
from joserfc import jwt
from joserfc.jwk import RSAKey

CLIENT_ID = "platform"
CLIENT_SECRET = "a secret, with: odd characters"


def new_key(kid: str) -> RSAKey:
    return RSAKey.generate_key(2048, {"kid": kid, "use": "sig"})


@dataclass
class OpenIdIssuer:
    """Listens for the length of its block. `claims` are who signs in next; `change` may spoil them, `alg` and `key` how
    the token is signed."""

    claims: dict[str, Any] = field(default_factory=dict)
    change: Callable[[dict[str, Any]], None] = lambda _: None
    alg: str = "RS256"
    key: Any = field(default_factory=lambda: new_key("one"))
    published: list[Any] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    status: int = 200
    padding: int = 0
    redirect: str = ""
    asked: list[str] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self.published = self.published or [self.key]
        self._codes: dict[str, dict[str, str]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def rotate(self, kid: str, *, publish: bool = True) -> None:
        """Sign with a new key from now on."""
        self.key = new_key(kid)
        if publish:
            self.published = [self.key]

    def sign_in(self, redirect_uri: str) -> list[tuple[str, str]]:
        """What a browser that was sent to `redirect_uri` comes back with, once somebody has signed in."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(redirect_uri).query).items()}
        assert asked["response_type"] == "code"
        assert asked["code_challenge_method"] == "S256"
        assert "openid" in asked["scope"].split()
        code = secrets.token_urlsafe(16)
        self._codes[code] = asked
        return parse_qsl(urlencode({"code": code, "state": asked["state"]}))

    async def __aenter__(self) -> "OpenIdIssuer":
        app = web.Application()
        app.router.add_get("/.well-known/openid-configuration", self._configuration)
        app.router.add_get("/authorize", self._authorize)
        app.router.add_get("/keys", self._keys)
        app.router.add_post("/token", self._token)
        self._runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _configuration(self, request: web.Request) -> web.Response:
        self.asked.append("metadata")
        if self.redirect:
            raise web.HTTPFound(self.redirect)
        metadata = {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/keys",
            "padding": "x" * self.padding,
            **self.metadata,
        }
        return web.json_response(metadata, status=self.status)

    async def _authorize(self, request: web.Request) -> web.Response:
        """The page on which a person says who they are."""
        parameters = urlencode(self.sign_in(str(request.url)))
        back = html.escape(f"{request.query['redirect_uri']}?{parameters}")
        return web.Response(text=f'<a href="{back}">It is me</a>', content_type="text/html")

    async def _keys(self, request: web.Request) -> web.Response:
        self.asked.append("keys")
        return web.json_response({"keys": [key.as_dict(private=False) for key in self.published]}, status=self.status)

    async def _token(self, request: web.Request) -> web.Response:
        self.asked.append("token")
        form = await request.post()
        scheme, _, basic = request.headers["authorization"].partition(" ")
        assert scheme == "Basic"
        assert [unquote(part) for part in base64.b64decode(basic).decode().split(":")] == [CLIENT_ID, CLIENT_SECRET]
        asked = self._codes.pop(str(form["code"]), None)
        if asked is None:
            return web.json_response({"error": "invalid_grant"}, status=400)
        assert form["redirect_uri"] == asked["redirect_uri"]
        challenge = base64.urlsafe_b64encode(hashlib.sha256(str(form["code_verifier"]).encode()).digest())
        if challenge.decode().rstrip("=") != asked["code_challenge"]:
            return web.json_response({"error": "invalid_grant"}, status=400)
        now = int(time.time())
        claims = {"iss": self.url, "aud": CLIENT_ID, "iat": now, "exp": now + 300, "nonce": asked["nonce"]}
        claims |= self.claims
        self.change(claims)
        return web.json_response({"access_token": "a", "token_type": "Bearer", "id_token": self._signed(claims)})

    def _signed(self, claims: dict[str, Any]) -> str:
        header = {"alg": self.alg, "kid": self.key.kid}
        if self.alg.startswith("RS"):
            return jwt.encode(header, claims, self.key, algorithms=[self.alg])
        signed = f"{_base64(json.dumps(header).encode())}.{_base64(json.dumps(claims).encode())}"
        # The classic confusion: the public key as a shared secret.
        shared = self.key.as_pem(private=False)
        signature = b"" if self.alg == "none" else hmac.digest(shared, signed.encode(), hashlib.sha256)
        return f"{signed}.{_base64(signature)}"


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
