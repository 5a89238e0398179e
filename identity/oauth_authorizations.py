"""Decides what /oauth2/authorize answers (RFC 6749, 4.1.1; OpenID Connect Core 1.0, 3.1.2); it never makes a token.

The order is RFC 9700's: until client and redirect address are known to belong together, the browser goes nowhere.
"""

from __future__ import annotations

import base64
import hmac
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import msgspec
from authlib.common.urls import add_params_to_uri
from authlib.oauth2.rfc6749 import (
    AccessDeniedError,
    InvalidClientError,
    InvalidRequestError,
    OAuth2Error,
    UnauthorizedClientError,
    UnsupportedResponseTypeError,
)
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from authlib.oauth2.rfc7636.challenge import CODE_VERIFIER_PATTERN
from authlib.oidc.core.errors import (
    ConsentRequiredError,
    LoginRequiredError,
    RequestNotSupportedError,
    RequestURINotSupportedError,
)
from cryptography.exceptions import InvalidTag

from identity import fields
from identity.oauth import AUTHORIZATION_CODE, CODE_LIFETIME, Parameters, are_within, requested_scopes
from identity.oauth_clients import ClientKind, GrantType, OauthClient
from identity.organizations import existing
from mesh import tokens
from mesh.auth import Authenticator, Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import made_at, new_id
from mesh.sealing import Seal

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

_CONSENT_LIFETIME = timedelta(minutes=10)
# Somebody who signed in within this has just been asked to.
_FRESH_SIGN_IN_S = 60
_S256 = re.compile(r"[A-Za-z0-9_-]{43}")
_TEXT = re.compile(r"[ -~]{0,512}")
_SEALED_AS = "oauth_consent"


@dataclass(frozen=True, slots=True)
class OauthAuthorization:
    """One sign-in of a user at a client, and the family of tokens that comes of it.

    `expire_time` is the code's, and once that is used the end of the family.
    """

    oauth_authorization_id: str
    organization_id: str
    oauth_client_id: str
    oauth_grant_id: str
    user_id: str
    digest: bytes = field(repr=False)
    redirect_uri: str
    code_challenge: str
    nonce: str
    scopes: tuple[str, ...]
    auth_time: datetime
    create_time: datetime
    expire_time: datetime
    use_time: datetime | None = None
    revoke_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Redirect:
    """The browser goes there: with a code, or with an error that the client may see."""

    uri: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SignInNeeded:
    """The user must sign in first, to the client's organization; `reauthenticate` even if signed in."""

    client_display_name: str
    login_hint: str
    reauthenticate: bool
    organization_id: str


@dataclass(frozen=True, slots=True)
class ConsentNeeded:
    """The user must be asked; the token comes back with the choice."""

    client_display_name: str
    organization_display_name: str
    scopes: tuple[str, ...]
    consent_token: str = field(repr=False)


Outcome = Redirect | SignInNeeded | ConsentNeeded


class _Consent(msgspec.Struct, frozen=True, array_like=True):
    """What was asked, of whom, in which session, and until when the answer counts."""

    session: str
    parameters: str
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that is in order."""

    scopes: tuple[str, ...]
    code_challenge: str
    nonce: str
    prompts: frozenset[str]
    max_age_s: int | None


class OauthAuthorizations:
    """The step in which a user lets a client act. `issuer` is the provider's public address."""

    def __init__(self, store: Store, clock: Clock, authenticator: Authenticator, seal: Seal, issuer: str) -> None:
        self._store = store
        self._clock = clock
        self._authenticator = authenticator
        self._seal = seal
        self._issuer = issuer

    async def authorize(
        self, parameters: Parameters, session_token: str, consent_token: str, consent_given: bool
    ) -> Outcome:
        """What the browser is answered.

        Raises OAuth2Error for what the user has to see, since the client or its address cannot be trusted, and
        PlatformError (AUTH_UNAVAILABLE, UNAVAILABLE) while nobody can tell.
        """
        parameters.check_once("client_id", "redirect_uri")
        client_id, redirect_uri = parameters.need("client_id"), parameters.need("redirect_uri")
        async with self._store.transaction() as stored:
            registered = await stored.oauth_clients.find(client_id) if fields.is_id(client_id) else None
        if registered is None or not registered.is_accepted:
            raise InvalidClientError("The client is unknown.", status_code=400)
        client = registered.client
        if redirect_uri not in client.redirect_uris:
            raise InvalidRequestError("The redirect_uri is none of the client's.")
        try:
            parameters.check_once()
            asked = _asked(client, parameters)
            principal = await self._signed_in(session_token, client.organization_id)
            if principal is None or self._is_too_old(asked, session_token):
                if "none" in asked.prompts:
                    raise LoginRequiredError()
                hint = parameters.get("login_hint")[:254]
                return SignInNeeded(client.display_name, hint, principal is not None, client.organization_id)
            consent = self._opened(consent_token, parameters, session_token)
            if consent and not consent_given:
                raise AccessDeniedError("The user refused.")
            return await self._decide(client, parameters, asked, principal, session_token, consented=consent)
        except OAuth2Error as refusal:
            return Redirect(self._back(parameters, error=refusal.error, error_description=refusal.description))

    async def _decide(
        self,
        client: OauthClient,
        parameters: Parameters,
        asked: _Asked,
        principal: Principal,
        session_token: str,
        *,
        consented: bool,
    ) -> Outcome:
        now = self._clock.now()
        code = AUTHORIZATION_CODE.generate(clock=self._clock)
        async with self._store.transaction() as stored:
            grant_id, allowed = await stored.oauth_grants.standing(client.oauth_client_id, principal.user_id)
            # Anybody can say to be a public client, so its users are asked each time (RFC 9700, 4.13; ASVS 10.7.1).
            is_known = client.kind is ClientKind.CONFIDENTIAL and bool(grant_id) and are_within(asked.scopes, allowed)
            if not consented:
                if "none" in asked.prompts and not is_known:
                    raise ConsentRequiredError()
                if "consent" in asked.prompts or not is_known:
                    return await self._consent_needed(stored, client, parameters, asked, session_token)
            else:
                scopes = tuple(dict.fromkeys((*allowed, *asked.scopes)))
                grant_id = await stored.oauth_grants.give(
                    new_id("grant", clock=self._clock), client, principal.user_id, scopes, now
                )
            await stored.oauth_authorizations.add(
                OauthAuthorization(
                    oauth_authorization_id=code.id,
                    organization_id=client.organization_id,
                    oauth_client_id=client.oauth_client_id,
                    oauth_grant_id=grant_id,
                    user_id=principal.user_id,
                    digest=code.digest,
                    redirect_uri=parameters.get("redirect_uri"),
                    code_challenge=asked.code_challenge,
                    nonce=asked.nonce,
                    scopes=asked.scopes,
                    auth_time=_signed_in_at(session_token),
                    create_time=now,
                    expire_time=now + CODE_LIFETIME,
                )
            )
        return Redirect(self._back(parameters, code=code.text))

    async def _consent_needed(
        self, stored: Transaction, client: OauthClient, parameters: Parameters, asked: _Asked, session_token: str
    ) -> ConsentNeeded:
        expire_time = self._clock.now() + _CONSENT_LIFETIME
        consent = _Consent(tokens.digest_of(session_token).hex(), parameters.digest(), expire_time)
        sealed = self._seal.close(msgspec.json.encode(consent), _SEALED_AS)
        organization = await existing(stored, client.organization_id)
        return ConsentNeeded(
            client_display_name=client.display_name,
            organization_display_name=organization.display_name,
            scopes=asked.scopes,
            consent_token=base64.urlsafe_b64encode(sealed).decode(),
        )

    def _opened(self, consent_token: str, parameters: Parameters, session_token: str) -> bool:
        """Whether this very request was put to the user of this very session, not long ago."""
        if not consent_token:
            return False
        try:
            sealed = base64.b64decode(consent_token, altchars=b"-_", validate=True)
            consent = msgspec.json.decode(self._seal.open(sealed, _SEALED_AS), type=_Consent)
        except (ValueError, InvalidTag):
            return False
        expected = (tokens.digest_of(session_token).hex(), parameters.digest())
        return (consent.session, consent.parameters) == expected and self._clock.now() < consent.expire_time

    async def _signed_in(self, session_token: str, organization_id: str) -> Principal | None:
        """The user, signed in to the client's organization. What is not a session must not count: with an access token
        a client could give itself more."""
        if not session_token.startswith(tokens.SESSION.prefix):
            return None
        try:
            principal = await self._authenticator.authenticate(session_token)
        except PlatformError as error:
            if error.reason is Reason.API_KEY_INVALID:
                return None
            raise
        return principal if principal.kind == "user" and principal.organization_id == organization_id else None

    def _is_too_old(self, asked: _Asked, session_token: str) -> bool:
        """Whether the client wants the user to have signed in later than they did."""
        limits_s = [_FRESH_SIGN_IN_S] if "login" in asked.prompts else []
        if asked.max_age_s is not None:
            limits_s.append(asked.max_age_s)
        age = self._clock.now() - _signed_in_at(session_token)
        return any(age.total_seconds() > limit_s for limit_s in limits_s)

    def _back(self, parameters: Parameters, **told: str) -> str:
        """The client's address with an answer, which says who gives it (RFC 9207)."""
        answer = [(name, value) for name, value in told.items() if value]
        if state := parameters.get("state"):
            answer.append(("state", state))
        answer.append(("iss", self._issuer))
        address: str = add_params_to_uri(parameters.get("redirect_uri"), answer)
        return address


def _asked(client: OauthClient, parameters: Parameters) -> _Asked:
    """What a request asks for. Raises OAuth2Error for what the client is to be told."""
    if parameters.get("request"):
        raise RequestNotSupportedError()
    if parameters.get("request_uri"):
        raise RequestURINotSupportedError()
    if parameters.need("response_type") != "code":
        raise UnsupportedResponseTypeError(parameters.get("response_type"), description="Only code is supported.")
    if parameters.get("response_mode") not in ("", "query"):
        raise InvalidRequestError("Only the response_mode query is supported.")
    if GrantType.AUTHORIZATION_CODE not in client.grant_types:
        raise UnauthorizedClientError("The client may not use codes.")
    # A missing method would mean plain (RFC 7636, 4.3).
    if parameters.get("code_challenge_method") != "S256" or not _S256.fullmatch(parameters.get("code_challenge")):
        raise InvalidRequestError("A code_challenge of the method S256 is required.")
    nonce, prompts = parameters.get("nonce"), frozenset(parameters.get("prompt").split())
    if not _TEXT.fullmatch(nonce):
        raise InvalidRequestError("The nonce must be at most 512 printable ASCII characters.")
    if "none" in prompts and len(prompts) > 1:
        raise InvalidRequestError("The prompt none stands alone.")
    max_age = parameters.get("max_age")
    if max_age and not re.fullmatch(r"[0-9]{1,9}", max_age):
        raise InvalidRequestError("The max_age must be a number of seconds.")
    return _Asked(
        scopes=requested_scopes(parameters, client.scopes),
        code_challenge=parameters.get("code_challenge"),
        nonce=nonce,
        prompts=prompts,
        max_age_s=int(max_age) if max_age else None,
    )


def _signed_in_at(session_token: str) -> datetime:
    """When the session was opened, which its id says."""
    return made_at(tokens.SESSION.parse(session_token).id)


def is_verifier(code_verifier: str, code_challenge: str) -> bool:
    """Whether a verifier is the one whose S256 challenge was sent (RFC 7636, 4.6)."""
    if not CODE_VERIFIER_PATTERN.fullmatch(code_verifier):
        return False
    return hmac.compare_digest(create_s256_code_challenge(code_verifier), code_challenge)
