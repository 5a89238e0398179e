"""What the platform asks of OpenID Connect issuers: their metadata, their keys, a token for a code; it never decides
who a token's subject is.

An issuer is a stranger's server. It is asked over https at public addresses alone, follows nobody elsewhere, and is
heard for a few seconds and a few hundred kilobytes.
"""

from __future__ import annotations

import base64
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
from joserfc import jws, jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, JWKRegistry, OKPKey, RSAKey

from mesh.addresses import public_socket, wrong_with
from mesh.clock import Clock

logger = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""How an ID token may be signed: by keys that only the issuer has, so neither "none" nor with the client's secret."""

TIMEOUT_S = 5.0
SKEW_S = 60
"""How far an issuer's clock may be from ours."""

TOKEN_AGE_S = 600
"""How old an ID token may be: it is asked for right after the browser's return."""

_ANSWER_BYTES = 256 << 10
_ID_TOKEN_LENGTH = 64 << 10
_FRESH_S = 600.0
_ISSUERS_KEPT = 500
_KEYS = 100
_RSA_BITS = 2048


class IssuerError(Exception):
    """What is wrong with an issuer or its answer, as a public sentence; `away` where it could not be asked."""

    def __init__(self, sentence: str, *, away: bool = False) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.away = away


class Metadata(msgspec.Struct, frozen=True):
    """What an issuer says of itself (OpenID Connect Discovery 1.0, 3), as far as it matters here."""

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    token_endpoint_auth_methods_supported: tuple[str, ...] = ("client_secret_basic",)
    id_token_signing_alg_values_supported: tuple[str, ...] = ("RS256",)
    code_challenge_methods_supported: tuple[str, ...] | None = None
    authorization_response_iss_parameter_supported: bool = False


class _KeySet(msgspec.Struct):
    keys: list[dict[str, Any]]


class _Tokens(msgspec.Struct):
    id_token: str = ""


@dataclass(frozen=True, slots=True)
class _Known:
    """An issuer's metadata and public keys, and when they were fetched, in the clock's monotonic seconds."""

    metadata: Metadata
    keys: tuple[RSAKey | ECKey | OKPKey, ...]
    fetched_s: float


class IssuerClient:
    """Asks issuers, for the length of its block. With `allow_private` it asks private addresses and http as well."""

    def __init__(self, clock: Clock, *, allow_private: bool) -> None:
        self._clock = clock
        self._allow_private = allow_private
        self._session: aiohttp.ClientSession | None = None
        self._known: OrderedDict[str, _Known] = OrderedDict()

    async def __aenter__(self) -> IssuerClient:
        connector = aiohttp.TCPConnector(
            force_close=True, use_dns_cache=False, socket_factory=None if self._allow_private else public_socket
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "aiaas-sign-in", "Accept": "application/json"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def metadata(self, issuer_url: str) -> Metadata:
        """What an issuer says of itself, at most ten minutes ago. Raises IssuerError."""
        return (await self._issuer(issuer_url)).metadata

    async def redeem(
        self, issuer_url: str, client_id: str, client_secret: str, code: str, verifier: str, redirect_uri: str
    ) -> str:
        """The ID token for a code. Raises IssuerError."""
        metadata = await self.metadata(issuer_url)
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "code_verifier": verifier,
        }
        headers = {}
        if not client_secret:
            form["client_id"] = client_id
        elif "client_secret_basic" in metadata.token_endpoint_auth_methods_supported:
            # RFC 6749, 2.3.1: both are form-encoded first.
            basic = f"{quote(client_id, safe='')}:{quote(client_secret, safe='')}"
            headers["Authorization"] = f"Basic {base64.b64encode(basic.encode()).decode()}"
        else:
            form |= {"client_id": client_id, "client_secret": client_secret}
        endpoint = metadata.token_endpoint
        answer: _Tokens = await self._ask("POST", endpoint, "tokens", _Tokens, data=form, headers=headers)
        if not 0 < len(answer.id_token) <= _ID_TOKEN_LENGTH:
            raise IssuerError("The issuer gave no ID token.")
        return answer.id_token

    async def claims(
        self, issuer_url: str, client_id: str, id_token: str, nonce: str, now: datetime
    ) -> Mapping[str, Any]:
        """The claims of an ID token that is right in every way (OpenID Connect Core 1.0, 3.1.3.7).

        A key that is not known has the issuer's keys fetched again, once. Raises IssuerError.
        """
        header = _header(id_token)
        known = await self._issuer(issuer_url)
        if not _candidates(known, header):
            known = await self._fetch(issuer_url)
        for key in _candidates(known, header):
            try:
                token = jwt.decode(
                    id_token,
                    key,
                    registry=jws.JWSRegistry(algorithms=ALGORITHMS, strict_check_header=False),
                )
            except (JoseError, ValueError, RecursionError):
                continue
            _check_claims(token.claims, issuer_url, client_id, nonce, now)
            return token.claims
        raise IssuerError("The ID token is not signed by the issuer.")

    async def problems(self, issuer_url: str) -> list[str]:
        """What is wrong with an issuer's metadata and keys, asked for now, a sentence each."""
        try:
            known = await self._fetch(issuer_url)
        except IssuerError as error:
            return [error.sentence]
        problems = []
        metadata = known.metadata
        if not known.keys:
            problems.append("The issuer publishes no key that an ID token can be checked with.")
        if not set(ALGORITHMS) & set(metadata.id_token_signing_alg_values_supported):
            problems.append("The issuer signs ID tokens with no algorithm that is accepted.")
        methods = metadata.code_challenge_methods_supported
        if methods is not None and "S256" not in methods:
            problems.append("The issuer does not support PKCE with S256.")
        return problems

    def forget(self, issuer_url: str) -> None:
        """Have an issuer asked again."""
        self._known.pop(issuer_url, None)

    async def _issuer(self, issuer_url: str) -> _Known:
        known = self._known.get(issuer_url)
        if known is None or self._clock.monotonic() >= known.fetched_s + _FRESH_S:
            return await self._fetch(issuer_url)
        self._known.move_to_end(issuer_url)
        return known

    async def _fetch(self, issuer_url: str) -> _Known:
        url = issuer_url.removesuffix("/") + "/.well-known/openid-configuration"
        metadata = await self._ask("GET", url, "metadata", Metadata)
        if metadata.issuer != issuer_url:
            raise IssuerError("The issuer calls itself by another address in its metadata.")
        # Browsers are sent there: it has to be an address, but not one that this process may reach.
        if wrong := wrong_with(metadata.authorization_endpoint, allow_private=self._allow_private):
            raise IssuerError(f"The issuer's authorization endpoint {wrong}.")
        key_set = await self._ask("GET", metadata.jwks_uri, "keys", _KeySet)
        known = _Known(metadata, _public_keys(key_set), self._clock.monotonic())
        self._known[issuer_url] = known
        self._known.move_to_end(issuer_url)
        while len(self._known) > _ISSUERS_KEPT:
            self._known.popitem(last=False)
        return known

    async def _ask(self, verb: str, url: str, what: str, shape: type[Any], **how: Any) -> Any:
        """The JSON of an answer. Raises IssuerError."""
        if self._session is None:
            raise RuntimeError("it is used outside of its block")
        if wrong := wrong_with(url, allow_private=self._allow_private):
            raise IssuerError(f"The address of the issuer's {what} {wrong}.")
        try:
            async with self._session.request(verb, url, allow_redirects=False, **how) as response:
                body = bytearray()
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > _ANSWER_BYTES:
                        raise IssuerError(f"The issuer's {what} are too long.")
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            logger.info("an issuer could not be asked", extra={"what": what, "error": type(error).__name__})
            raise IssuerError(f"The issuer's {what} cannot be fetched.", away=True) from error
        if response.status != 200:
            raise IssuerError(f"The issuer's {what} were answered {response.status}.", away=response.status >= 500)
        try:
            return msgspec.json.decode(body, type=shape)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise IssuerError(f"The issuer's {what} are not what OpenID Connect has them be.") from None


def _public_keys(key_set: _KeySet) -> tuple[RSAKey | ECKey | OKPKey, ...]:
    """The keys that can check an ID token; what is not understood is left out (RFC 7517, 5)."""
    keys: list[RSAKey | ECKey | OKPKey] = []
    for published in key_set.keys[:_KEYS]:
        if published.get("kty") not in ("RSA", "EC", "OKP") or published.get("use", "sig") != "sig":
            continue
        try:
            key = JWKRegistry.import_key({name: published[name] for name in published if name in _KEY_PARTS})
        except (JoseError, ValueError, TypeError):
            continue
        if isinstance(key, RSAKey) and key.public_key.key_size < _RSA_BITS:
            continue
        if isinstance(key, RSAKey | ECKey | OKPKey):
            keys.append(key)
    return tuple(keys)


_KEY_PARTS = frozenset({"kty", "kid", "alg", "n", "e", "crv", "x", "y"})


def _header(id_token: str) -> Mapping[str, Any]:
    try:
        header = jws.extract_compact(id_token.encode()).headers()
    except (JoseError, ValueError, RecursionError):
        raise IssuerError("The ID token is not one.") from None
    if header.get("alg") not in ALGORITHMS:
        raise IssuerError("The ID token is not signed in a way that is accepted.")
    return header


def _candidates(known: _Known, header: Mapping[str, Any]) -> list[RSAKey | ECKey | OKPKey]:
    """The keys that may have signed a token: the one that it names, or without a name all."""
    kid = header.get("kid")
    return [key for key in known.keys if kid is None or key.kid == kid]


def _check_claims(claims: dict[str, Any], issuer_url: str, client_id: str, nonce: str, now: datetime) -> None:
    now_s = int(now.timestamp())
    registry = jwt.JWTClaimsRegistry(
        now=now_s,
        leeway=SKEW_S,
        iss={"essential": True, "value": issuer_url},
        aud={"essential": True, "value": client_id},
        sub={"essential": True},
        exp={"essential": True},
        iat={"essential": True},
        nonce={"essential": True, "value": nonce},
    )
    try:
        registry.validate(claims)
    except (JoseError, ValueError, TypeError):
        raise IssuerError("The ID token is not for this sign-in.") from None
    if claims["iat"] < now_s - TOKEN_AGE_S - SKEW_S:
        raise IssuerError("The ID token is too old.")
    audience, azp = claims["aud"], claims.get("azp")
    if azp != client_id and (azp is not None or (isinstance(audience, list) and len(audience) > 1)):
        raise IssuerError("The ID token is for another client.")
    if not isinstance(claims["sub"], str) or not 1 <= len(claims["sub"]) <= 255 or "\0" in claims["sub"]:
        raise IssuerError("The ID token has no subject.")
