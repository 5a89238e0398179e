"""/oauth2 and /.well-known: forms into the RPCs of OauthService, their answers as OAuth2 writes them; it never decides.

Whether somebody has to sign in or to be asked is told as JSON, for the page that does it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from google.protobuf.json_format import MessageToDict
from starlette.types import Receive, Scope, Send

from aiaas.identity.v1 import oauth_service_pb2 as pb
from aiaas.identity.v1 import oauth_service_pb2_grpc
from edge.exchange import Exchange, Headers, exchange_of
from edge.peers import Peer
from mesh.auth import credential_of
from mesh.errors import PlatformError, Reason

SESSION_COOKIE = "__Host-aiaas_session"
"""The cookie that holds a browser's session token."""

NO_STORE: Headers = ((b"cache-control", b"no-store"), (b"pragma", b"no-cache"))
"""What every answer has that may hold a secret (RFC 6749, 5.1)."""

_JSON = (b"content-type", b"application/json")
# A code in an address must not go on to the client's own links (RFC 9700, 4.2.4).
_NO_REFERRER = (b"referrer-policy", b"no-referrer")
_PUBLISHED: Headers = (_JSON, (b"cache-control", b"public, max-age=300"), (b"access-control-allow-origin", b"*"))
_TIMEOUT_S = 10.0
_FIELDS = 100
_FORM = "application/x-www-form-urlencoded"
# What the consent page adds to the request that it asks about.
_CONSENT_FIELDS = ("consent_token", "consent")
_FAILURES = {400: "invalid_request", 401: "invalid_token", 503: "temporarily_unavailable"}


class Endpoint:
    """One path: which verbs it has, and what answers."""

    def __init__(self, path: str, verbs: tuple[str, ...], answer: Callable[[Exchange], Awaitable[None]]) -> None:
        self._path = path
        self.verbs = verbs
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises PlatformError."""
        exchange = exchange_of(scope)
        exchange.route = self._path
        exchange.allow(*self.verbs)
        await self._answer(exchange)


class _Provider:
    def __init__(self, identity: Peer) -> None:
        self._identity = identity
        self._stub = oauth_service_pb2_grpc.OauthServiceStub(identity.channel)

    async def authorize(self, exchange: Exchange) -> None:
        pairs = await _form(exchange) if exchange.method == "POST" else _pairs(exchange.scope["query_string"])
        # Only a form has the user's choice: a link that somebody else wrote must not make it.
        choice = dict(pairs) if exchange.method == "POST" else {}
        request = pb.AuthorizeRequest(
            parameters=_parameters((name, value) for name, value in pairs if name not in _CONSENT_FIELDS),
            session_token=_session_token(exchange),
            consent_token=choice.get("consent_token", ""),
            consent_given=choice.get("consent") == "allow",
        )
        answer = await self._identity.call(self._stub.Authorize, request, _TIMEOUT_S)
        outcome = answer.WhichOneof("outcome")
        if outcome == "redirect_uri":
            location = (b"location", answer.redirect_uri.encode("ascii"))
            # After a form, the browser must not send it on to the client (RFC 9700, 4.12).
            await exchange.respond(303, [*NO_STORE, _NO_REFERRER, location], b"")
        elif outcome == "error":
            await _refuse(exchange, answer.error)
        else:
            needed = MessageToDict(
                getattr(answer, outcome or ""),
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
            await exchange.respond(200, [_JSON, *NO_STORE, _NO_REFERRER], msgspec.json.encode({outcome: needed}))

    async def token(self, exchange: Exchange) -> None:
        request = pb.TokenRequest(
            parameters=_parameters(await _form(exchange)), authorization=exchange.header(b"authorization") or ""
        )
        answer = await self._identity.call(self._stub.Token, request, _TIMEOUT_S)
        await _respond(exchange, answer, "tokens")

    async def introspect(self, exchange: Exchange) -> None:
        request = pb.IntrospectRequest(
            parameters=_parameters(await _form(exchange)), authorization=exchange.header(b"authorization") or ""
        )
        answer = await self._identity.call(self._stub.Introspect, request, _TIMEOUT_S)
        if answer.HasField("error") or answer.state.active:
            await _respond(exchange, answer, "state")
        else:
            await exchange.respond(200, [_JSON, *NO_STORE], b'{"active":false}')

    async def revoke(self, exchange: Exchange) -> None:
        request = pb.RevokeRequest(
            parameters=_parameters(await _form(exchange)), authorization=exchange.header(b"authorization") or ""
        )
        answer = await self._identity.call(self._stub.Revoke, request, _TIMEOUT_S)
        if answer.HasField("error"):
            await _refuse(exchange, answer.error)
        else:
            await exchange.respond(200, NO_STORE, b"")

    async def user_info(self, exchange: Exchange) -> None:
        await exchange.read_body()
        token = credential_of(exchange.header(b"authorization") or "")
        answer = await self._identity.call(
            self._stub.GetUserInfo, pb.GetUserInfoRequest(access_token=token), _TIMEOUT_S
        )
        if answer.HasField("error"):
            await _refuse(exchange, answer.error)
            return
        info = _told(answer.user_info)
        if "email" in info:
            info["email_verified"] = answer.user_info.email_verified
        await exchange.respond(200, [_JSON, *NO_STORE], msgspec.json.encode(info))

    async def keys(self, exchange: Exchange) -> None:
        answer = await self._identity.call(self._stub.ListSigningKeys, pb.ListSigningKeysRequest(), _TIMEOUT_S)
        keys = [msgspec.Raw(key.jwk_json.encode()) for key in answer.signing_keys]
        await exchange.respond(200, _PUBLISHED, msgspec.json.encode({"keys": keys}))

    async def metadata(self, exchange: Exchange) -> None:
        answer = await self._identity.call(self._stub.GetProviderMetadata, pb.GetProviderMetadataRequest(), _TIMEOUT_S)
        await exchange.respond(200, _PUBLISHED, answer.metadata_json.encode())


def endpoints(identity: Peer) -> Mapping[str, Endpoint]:
    """What is served, by path."""
    provider = _Provider(identity)
    served: tuple[tuple[str, tuple[str, ...], Callable[[Exchange], Awaitable[None]]], ...] = (
        ("/oauth2/authorize", ("GET", "POST"), provider.authorize),
        ("/oauth2/token", ("POST",), provider.token),
        ("/oauth2/introspect", ("POST",), provider.introspect),
        ("/oauth2/revoke", ("POST",), provider.revoke),
        ("/oauth2/userinfo", ("GET", "POST"), provider.user_info),
        ("/oauth2/keys", ("GET",), provider.keys),
        ("/.well-known/openid-configuration", ("GET",), provider.metadata),
        ("/.well-known/oauth-authorization-server", ("GET",), provider.metadata),
    )
    return {path: Endpoint(path, verbs, answer) for path, verbs, answer in served}


def is_for(scope: Scope) -> bool:
    """Whether a request's errors are to have OAuth2's shape."""
    path: str = scope["path"]
    return path.startswith("/oauth2/")


def error_body(error: PlatformError) -> bytes:
    """The body of an answer that failed before, or instead of, a decision (RFC 6749, 5.2)."""
    name = _FAILURES.get(error.entry.http, "server_error" if error.entry.http >= 500 else "invalid_request")
    return msgspec.json.encode({"error": name, "error_description": error.message})


async def _respond(exchange: Exchange, answer: Any, outcome: str) -> None:
    if answer.HasField("error"):
        await _refuse(exchange, answer.error)
    else:
        body = msgspec.json.encode(_told(getattr(answer, outcome)))
        await exchange.respond(200, [_JSON, *NO_STORE], body)


async def _refuse(exchange: Exchange, error: pb.OauthError) -> None:
    headers = [_JSON, *NO_STORE]
    if error.www_authenticate:
        headers.append((b"www-authenticate", error.www_authenticate.encode("latin-1")))
    body = {"error": error.error, "error_description": error.error_description}
    await exchange.respond(error.http_status, headers, msgspec.json.encode(body))


def _told(message: Any) -> dict[str, Any]:
    """The fields of a message that are set, by their names in the contract, which are OAuth2's; numbers as numbers."""
    return {field.name: value for field, value in message.ListFields()}


async def _form(exchange: Exchange) -> list[tuple[str, str]]:
    declared = (exchange.header(b"content-type") or "").partition(";")[0].strip().lower()
    if declared != _FORM:
        raise PlatformError(Reason.UNSUPPORTED_MEDIA_TYPE)
    return _pairs(await exchange.read_body())


def _pairs(encoded: bytes) -> list[tuple[str, str]]:
    """Names and values in their order, with repetitions. Raises PlatformError(INVALID_ARGUMENT) if they are none."""
    try:
        return parse_qsl(encoded.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_FIELDS)
    except ValueError:
        raise PlatformError(
            Reason.INVALID_ARGUMENT, description="The parameters are not form-encoded UTF-8, or too many."
        ) from None


def _parameters(pairs: Iterable[tuple[str, str]]) -> list[pb.OauthParameter]:
    return [pb.OauthParameter(name=name, value=value) for name, value in pairs]


def _session_token(exchange: Exchange) -> str:
    """What the browser's cookie, or a program's Authorization header, says; nothing if neither does."""
    authorization = exchange.header(b"authorization")
    if authorization is not None:
        return credential_of(authorization)
    try:
        cookie = SimpleCookie(exchange.header(b"cookie") or "").get(SESSION_COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie else ""
