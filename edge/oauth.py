"""/oauth2 and /.well-known: forms into the RPCs of OauthService, their answers as OAuth2 writes them; it never decides.

What is for programs is JSON; /oauth2/authorize is for people in browsers, and answers with pages and redirects.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

import msgspec
from starlette.types import Receive, Scope, Send

from aiaas.identity.v1 import oauth_service_pb2 as pb
from aiaas.identity.v1 import oauth_service_pb2_grpc
from edge.browser import check_same_origin, session_token
from edge.exchange import Exchange, Headers, exchange_of
from edge.forms import read_form, read_query
from edge.peers import Peer
from edge.sign_in import pages
from edge.sign_in.signing_in import sign_in_address
from mesh.auth import credential_of
from mesh.errors import PlatformError, Reason

NO_STORE: Headers = ((b"cache-control", b"no-store"), (b"pragma", b"no-cache"))
"""What every answer has that may hold a secret (RFC 6749, 5.1)."""

_JSON = (b"content-type", b"application/json")
_PUBLISHED: Headers = (_JSON, (b"cache-control", b"public, max-age=300"), (b"access-control-allow-origin", b"*"))
_TIMEOUT_S = 10.0
_AUTHORIZE = "/oauth2/authorize"
# What the consent page adds to the request that it asks about.
_CONSENT_FIELDS = ("consent_token", "consent")
# In words that people know; all other scopes are permissions, which go by their names.
_SCOPES = {
    "openid": "know who you are here",
    "profile": "see your name",
    "email": "see your e-mail address",
}
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
        is_form = exchange.method == "POST"
        pairs = await read_form(exchange) if is_form else read_query(exchange)
        # Only a form has the user's choice: a link that somebody else wrote must not make it.
        choice = dict(pairs) if is_form else {}
        if "consent" in choice:
            check_same_origin(exchange)
        parameters = [(name, value) for name, value in pairs if name not in _CONSENT_FIELDS]
        request = pb.AuthorizeRequest(
            parameters=_parameters(parameters),
            session_token=_session_token(exchange),
            consent_token=choice.get("consent_token", ""),
            consent_given=choice.get("consent") == "allow",
        )
        answer = await self._identity.call(self._stub.Authorize, request, _TIMEOUT_S)
        match answer.WhichOneof("outcome"):
            case "redirect_uri" if is_form:
                await pages.go_on(exchange, answer.redirect_uri)
            case "redirect_uri":
                await pages.redirect(exchange, answer.redirect_uri)
            case "sign_in_needed":
                needed = answer.sign_in_needed
                again = f"{_AUTHORIZE}?{urlencode(parameters)}"
                if pages.local_path(again) != again:
                    raise PlatformError(Reason.INVALID_ARGUMENT, description="The application asks at too much length.")
                notice = "sign-in-again" if needed.reauthenticate else "sign-in-needed"
                address = sign_in_address(again, needed.login_hint, needed.organization_id, notice)
                await pages.redirect(exchange, address)
            case "consent_needed":
                await _ask(exchange, answer.consent_needed, parameters)
            case _:
                await _tell(exchange, answer.error)

    async def token(self, exchange: Exchange) -> None:
        request = pb.TokenRequest(
            parameters=_parameters(await read_form(exchange)), authorization=exchange.header(b"authorization") or ""
        )
        answer = await self._identity.call(self._stub.Token, request, _TIMEOUT_S)
        await _respond(exchange, answer, "tokens")

    async def introspect(self, exchange: Exchange) -> None:
        request = pb.IntrospectRequest(
            parameters=_parameters(await read_form(exchange)), authorization=exchange.header(b"authorization") or ""
        )
        answer = await self._identity.call(self._stub.Introspect, request, _TIMEOUT_S)
        if answer.HasField("error") or answer.state.active:
            await _respond(exchange, answer, "state")
        else:
            await exchange.respond(200, [_JSON, *NO_STORE], b'{"active":false}')

    async def revoke(self, exchange: Exchange) -> None:
        request = pb.RevokeRequest(
            parameters=_parameters(await read_form(exchange)), authorization=exchange.header(b"authorization") or ""
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
        (_AUTHORIZE, ("GET", "POST"), provider.authorize),
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
    return path.startswith("/oauth2/") and path != _AUTHORIZE


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


async def _ask(exchange: Exchange, needed: pb.OauthConsentNeeded, parameters: list[tuple[str, str]]) -> None:
    """Ask the user, and have the form bring back what it is about."""
    back = urlsplit(dict(parameters).get("redirect_uri", ""))
    await pages.show(
        exchange,
        "consent",
        client=needed.client_display_name,
        organization=needed.organization_display_name,
        scopes=[_SCOPES.get(scope, scope) for scope in needed.scopes],
        host=back.netloc or back.scheme,
        parameters=parameters,
        consent_token=needed.consent_token,
    )


async def _tell(exchange: Exchange, error: pb.OauthError) -> None:
    """Show the user why there is no way to the client."""
    await pages.show(
        exchange,
        "error",
        error.http_status,
        title="This application cannot be let in",
        message=f"{error.error_description} ({error.error})",
    )


def _told(message: Any) -> dict[str, Any]:
    """The fields of a message that are set, by their names in the contract, which are OAuth2's; numbers as numbers."""
    return {field.name: value for field, value in message.ListFields()}


def _parameters(pairs: Iterable[tuple[str, str]]) -> list[pb.OauthParameter]:
    return [pb.OauthParameter(name=name, value=value) for name, value in pairs]


def _session_token(exchange: Exchange) -> str:
    """What the browser's cookie, or a program's Authorization header, says; nothing if neither does."""
    authorization = exchange.header(b"authorization")
    if authorization is not None:
        return credential_of(authorization)
    return session_token(exchange)
