"""Decides what /oauth2/token, /introspect, /revoke and /userinfo answer; it never asks a user anything.

A refusal that changes what is stored (a code or refresh token that comes a second time) is returned out of the
transaction and raised after it, so that the refusal does not undo the revocation.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from authlib.oauth2.rfc6749 import (
    InvalidClientError,
    InvalidGrantError,
    InvalidScopeError,
    OAuth2Error,
    UnauthorizedClientError,
    UnsupportedGrantTypeError,
)
from authlib.oauth2.rfc6750 import InsufficientScopeError, InvalidTokenError
from authlib.oidc.core.util import create_half_hash

from identity import roles
from identity.oauth import (
    ACCESS_LIFETIME,
    AUTHORIZATION_CODE,
    FAMILY_LIFETIME,
    ID_TOKEN_LIFETIME,
    OPENID_SCOPES,
    REFRESH_TOKEN,
    Parameters,
    are_within,
    permissions_of,
    requested_scopes,
)
from identity.oauth_authorizations import OauthAuthorization, is_verifier
from identity.oauth_clients import ClientKind, GrantType, OauthClient, authenticated_client
from identity.organizations import OrganizationState
from identity.principals import Holder
from identity.signing_keys import ALGORITHM, SigningKeys
from mesh import tokens
from mesh.auth import Principal, RateLimits
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

logger = logging.getLogger(__name__)

_SWEEP_INTERVAL_S = 3600.0
# What is over is kept for so long, so that its next use is still known for what it is.
_KEPT = timedelta(days=1)
_KINDS = (tokens.ACCESS_TOKEN, REFRESH_TOKEN)


@dataclass(frozen=True, slots=True)
class OauthToken:
    """An access or refresh token, of a user by an authorization or of a client's service account."""

    oauth_token_id: str
    organization_id: str
    oauth_client_id: str
    oauth_authorization_id: str
    user_id: str
    service_account_id: str
    digest: bytes = field(repr=False)
    scopes: tuple[str, ...]
    create_time: datetime
    expire_time: datetime
    use_time: datetime | None = None
    revoke_time: datetime | None = None

    @property
    def is_refresh(self) -> bool:
        """Whether it gets tokens and nothing else."""
        return self.oauth_token_id.startswith("refresh_")


@dataclass(frozen=True, slots=True)
class StoredToken:
    """A token and all that decides on it. `holder` is None when the user or service account is gone.

    `chain_revoked` says that the authorization or the grant that it came from is.
    """

    token: OauthToken
    chain_revoked: bool
    client_disabled: bool
    client_scopes: tuple[str, ...]
    organization_state: OrganizationState
    organization_limits: RateLimits
    organization_models: tuple[str, ...]
    holder: Holder | None
    policy_bound: bool

    def what_is_wrong(self, parsed: tokens.ParsedToken, now: datetime) -> str:
        """Why it is not accepted; nothing if it is."""
        token = self.token
        if not tokens.matches(parsed, token.digest):
            return "secret"
        if token.revoke_time is not None or self.chain_revoked:
            return "revoked"
        if token.use_time is not None:
            return "used"
        if token.expire_time <= now:
            return "expired"
        if self.client_disabled:
            return "client"
        if self.organization_state is not OrganizationState.ACTIVE:
            return "organization"
        return "" if self.holder is not None and self.holder.acting else "owner"

    def principal(self) -> Principal:
        """What an accepted access token may do: what its owner holds now, within what was granted, and within what the
        client may still ask for."""
        token, holder = self.token, self.holder
        if holder is None:
            raise PlatformError(Reason.API_KEY_INVALID)
        held = roles.held_through(holder.role_ids, holder.custom_permissions, token.organization_id)
        is_of_platform = token.organization_id == roles.PLATFORM_ORGANIZATION_ID
        return Principal(
            kind="user" if token.user_id else "service_account",
            id=token.user_id or token.service_account_id,
            organization_id=token.organization_id,
            user_id=token.user_id,
            service_account_id=token.service_account_id,
            permissions=held & permissions_of(token.scopes) & permissions_of(self.client_scopes),
            allowed_models=self.organization_models,
            platform=is_of_platform and roles.PLATFORM_ADMIN in holder.role_ids,
            expire_time=token.expire_time,
            organization_limits=self.organization_limits,
            policy_bound=self.policy_bound,
        )


@dataclass(frozen=True, slots=True)
class IssuedTokens:
    """Tokens as their client gets them, this once; texts are empty where there is no such token."""

    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    id_token: str = field(repr=False)
    scopes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UserInfo:
    """What a client may know of a user; empty where it may not."""

    user_id: str
    organization_id: str
    email: str
    display_name: str


class OauthTokens:
    """Tokens: made, renewed, described, revoked. `issuer` is the provider's public address."""

    def __init__(self, store: Store, clock: Clock, keys: SigningKeys, issuer: str) -> None:
        self._store = store
        self._clock = clock
        self._keys = keys
        self._issuer = issuer

    async def authenticate(self, credential: str) -> Principal:
        """The principal behind an access token.

        Raises PlatformError: API_KEY_INVALID, AUTH_UNAVAILABLE when the database is away.
        """
        parsed = tokens.ACCESS_TOKEN.parse(credential)
        try:
            found = await self._store.oauth_token(parsed.id)
        except PlatformError as error:
            if error.reason in (Reason.UNAVAILABLE, Reason.DEADLINE_EXCEEDED):
                raise PlatformError(Reason.AUTH_UNAVAILABLE, retry_after_s=error.retry_after_s) from error
            raise
        wrong = "unknown" if found is None else found.what_is_wrong(parsed, self._clock.now())
        if found is None or wrong:
            logger.info("an access token was refused", extra={"oauth_token_id": parsed.id, "why": wrong})
            raise PlatformError(Reason.API_KEY_INVALID)
        return found.principal()

    async def token(self, parameters: Parameters, authorization: str) -> IssuedTokens:
        """The tokens that a grant is worth. Raises OAuth2Error, PlatformError(UNAVAILABLE)."""
        parameters.check_once()
        ways = {
            GrantType.AUTHORIZATION_CODE: self._by_code,
            GrantType.REFRESH_TOKEN: self._by_refresh,
            GrantType.CLIENT_CREDENTIALS: self._by_credentials,
        }
        async with self._store.transaction() as stored:
            client = await authenticated_client(stored, parameters, authorization, self._clock.now())
            asked = parameters.need("grant_type")
            if asked not in ways:
                raise UnsupportedGrantTypeError(asked)
            grant_type = GrantType(asked)
            if grant_type not in client.grant_types:
                raise UnauthorizedClientError("The client may not use this grant_type.")
            outcome = await ways[grant_type](stored, client, parameters)
        if isinstance(outcome, OAuth2Error):
            raise outcome
        return outcome

    async def introspect(self, parameters: Parameters, authorization: str) -> OauthToken | None:
        """The token, if it is the client's own and accepted (RFC 7662). Raises OAuth2Error."""
        parameters.check_once()
        now = self._clock.now()
        async with self._store.transaction() as stored:
            client = await authenticated_client(stored, parameters, authorization, now)
            if client.kind is ClientKind.PUBLIC:
                raise InvalidClientError("Only a client with a secret may ask.", status_code=401)
            parsed = _parsed(parameters.need("token"), *_KINDS)
            found = await stored.oauth_tokens.find(parsed.id) if parsed else None
        if parsed is None or found is None or found.what_is_wrong(parsed, now):
            return None
        return found.token if found.token.oauth_client_id == client.oauth_client_id else None

    async def revoke(self, parameters: Parameters, authorization: str) -> None:
        """Refuse a token for good; of a refresh token, all of its family (RFC 7009). An unknown one is none already.

        Raises OAuth2Error, PlatformError(UNAVAILABLE) if it could not be stored.
        """
        parameters.check_once()
        now = self._clock.now()
        async with self._store.transaction() as stored:
            client = await authenticated_client(stored, parameters, authorization, now)
            parsed = _parsed(parameters.need("token"), *_KINDS)
            found = await stored.oauth_tokens.find(parsed.id) if parsed else None
            if parsed is None or found is None or not tokens.matches(parsed, found.token.digest):
                return
            token = found.token
            if token.oauth_client_id != client.oauth_client_id:
                raise InvalidGrantError("The token is another client's.")
            if token.is_refresh:
                await stored.oauth_authorizations.revoke(token.oauth_authorization_id, now)
            else:
                await stored.oauth_tokens.revoke(token.oauth_token_id, now)
            await _announce(stored, token)

    async def user_info(self, access_token: str) -> UserInfo:
        """What the token's client may know of its user. Raises InvalidTokenError, InsufficientScopeError."""
        parsed = _parsed(access_token, tokens.ACCESS_TOKEN)
        async with self._store.transaction() as stored:
            found = await stored.oauth_tokens.find(parsed.id) if parsed else None
            if parsed is None or found is None or found.what_is_wrong(parsed, self._clock.now()):
                raise InvalidTokenError()
            token = found.token
            if "openid" not in token.scopes:
                raise InsufficientScopeError()
            user = await stored.users.get(token.organization_id, token.user_id)
        if user is None:
            raise InvalidTokenError()
        return UserInfo(
            user_id=user.user_id,
            organization_id=token.organization_id,
            email=user.email if "email" in token.scopes else "",
            display_name=user.display_name if "profile" in token.scopes else "",
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Forget what is long over, once an hour, until `stop` is set."""
        while not stop.is_set():
            try:
                async with self._store.transaction() as stored:
                    await stored.oauth_tokens.forget_until(self._clock.now() - _KEPT)
            except PlatformError as error:
                logger.warning("expired tokens were not removed: %s", error.reason.value)
            try:
                async with asyncio.timeout(_SWEEP_INTERVAL_S):
                    await stop.wait()
            except TimeoutError:
                pass

    async def _by_code(
        self, stored: Transaction, client: OauthClient, parameters: Parameters
    ) -> IssuedTokens | OAuth2Error:
        """RFC 6749, 4.1.3 with RFC 7636, 4.5. A code that comes again revokes what came of it (RFC 6749, 4.1.2)."""
        parsed = _parsed(parameters.need("code"), AUTHORIZATION_CODE)
        now = self._clock.now()
        refusal = InvalidGrantError("The code is unknown, expired, used, or another client's.")
        found = await stored.oauth_authorizations.find(parsed.id, lock=True) if parsed else None
        if parsed is None or found is None or not tokens.matches(parsed, found.digest):
            raise refusal
        if found.oauth_client_id != client.oauth_client_id:
            raise refusal
        if found.use_time is not None:
            await self._end_family(stored, found, "a code")
            return refusal
        if found.expire_time <= now or found.revoke_time is not None:
            raise refusal
        if parameters.need("redirect_uri") != found.redirect_uri:
            raise InvalidGrantError("The redirect_uri is not the one that the code was sent to.")
        if not is_verifier(parameters.need("code_verifier"), found.code_challenge):
            raise InvalidGrantError("The code_verifier does not belong to the code_challenge.")
        if not await stored.oauth_authorizations.use(found.oauth_authorization_id, now, now + FAMILY_LIFETIME):
            raise refusal
        family = replace(found, use_time=now, expire_time=now + FAMILY_LIFETIME)
        return await self._issue_to_user(stored, client, family, family.scopes, nonce=family.nonce)

    async def _by_refresh(
        self, stored: Transaction, client: OauthClient, parameters: Parameters
    ) -> IssuedTokens | OAuth2Error:
        """RFC 6749, 6, with rotation and detection of reuse (RFC 9700, 4.14.2): of the uses of one token, which take
        turns here, the first is answered and every other ends the family."""
        parsed = _parsed(parameters.need("refresh_token"), REFRESH_TOKEN)
        refusal = InvalidGrantError("The refresh token is unknown, expired, used, revoked, or another client's.")
        if parsed is None or not await stored.oauth_tokens.lock(parsed.id):
            raise refusal
        found = await stored.oauth_tokens.find(parsed.id)
        if found is None or not tokens.matches(parsed, found.token.digest):
            raise refusal
        token, now = found.token, self._clock.now()
        if token.oauth_client_id != client.oauth_client_id:
            raise refusal
        family = await stored.oauth_authorizations.find(token.oauth_authorization_id)
        if family is None:
            raise refusal
        if token.use_time is not None:
            await self._end_family(stored, family, "a refresh token")
            return refusal
        if found.what_is_wrong(parsed, now):
            raise refusal
        # What the client may ask for may have become less since; what the user allowed never becomes more.
        scopes = requested_scopes(parameters, token.scopes)
        if not are_within(scopes, client.scopes):
            raise InvalidScopeError("The client may no longer ask for these scopes.")
        await stored.oauth_tokens.use(token.oauth_token_id, now)
        return await self._issue_to_user(stored, client, family, scopes)

    async def _by_credentials(
        self, stored: Transaction, client: OauthClient, parameters: Parameters
    ) -> IssuedTokens | OAuth2Error:
        """RFC 6749, 4.4: the client acts as its service account, and nobody is told who a user is."""
        holder = await stored.holders.find(client.organization_id, client.service_account_id, "")
        if holder is None or not holder.acting:
            raise UnauthorizedClientError("The client's service account cannot act.")
        bounds = tuple(scope for scope in client.scopes if scope not in OPENID_SCOPES)
        scopes = requested_scopes(parameters, bounds)
        access = await self._add(
            stored, client, tokens.ACCESS_TOKEN, scopes, self._clock.now() + ACCESS_LIFETIME, family=None
        )
        return IssuedTokens(access, "", "", scopes)

    async def _issue_to_user(
        self,
        stored: Transaction,
        client: OauthClient,
        family: OauthAuthorization,
        scopes: tuple[str, ...],
        *,
        nonce: str = "",
    ) -> IssuedTokens:
        """New tokens of a family; none of them is left standing if the grant is taken back meanwhile."""
        now = self._clock.now()
        holder = await stored.holders.find(client.organization_id, "", family.user_id)
        if holder is None or not holder.acting or not await stored.oauth_grants.note_use(family.oauth_grant_id, now):
            raise InvalidGrantError("The user cannot act, or took the grant back.")
        access = await self._add(stored, client, tokens.ACCESS_TOKEN, scopes, now + ACCESS_LIFETIME, family=family)
        refresh = ""
        if GrantType.REFRESH_TOKEN in client.grant_types:
            refresh = await self._add(stored, client, REFRESH_TOKEN, scopes, family.expire_time, family=family)
        id_token = ""
        if "openid" in scopes:
            claims = {
                "iss": self._issuer,
                "sub": family.user_id,
                "aud": client.oauth_client_id,
                "iat": int(now.timestamp()),
                "exp": int((now + ID_TOKEN_LIFETIME).timestamp()),
                "auth_time": int(family.auth_time.timestamp()),
                "at_hash": create_half_hash(access, ALGORITHM).decode(),
                **({"nonce": nonce} if nonce else {}),
            }
            id_token = await self._keys.sign(stored, claims)
        return IssuedTokens(access, refresh, id_token, scopes)

    async def _add(
        self,
        stored: Transaction,
        client: OauthClient,
        kind: tokens.TokenKind,
        scopes: tuple[str, ...],
        expire_time: datetime,
        *,
        family: OauthAuthorization | None,
    ) -> str:
        new = kind.generate(clock=self._clock)
        await stored.oauth_tokens.add(
            OauthToken(
                oauth_token_id=new.id,
                organization_id=client.organization_id,
                oauth_client_id=client.oauth_client_id,
                oauth_authorization_id=family.oauth_authorization_id if family else "",
                user_id=family.user_id if family else "",
                service_account_id="" if family else client.service_account_id,
                digest=new.digest,
                scopes=scopes,
                create_time=self._clock.now(),
                expire_time=expire_time,
            )
        )
        return new.text

    async def _end_family(self, stored: Transaction, family: OauthAuthorization, what: str) -> None:
        logger.warning("%s came a second time", what, extra={"oauth_client_id": family.oauth_client_id})
        await stored.oauth_authorizations.revoke(family.oauth_authorization_id, self._clock.now())
        await stored.revoke("user_id", family.user_id)


async def _announce(stored: Transaction, token: OauthToken) -> None:
    if token.user_id:
        await stored.revoke("user_id", token.user_id)
    else:
        await stored.revoke("service_account_id", token.service_account_id)


def _parsed(text: str, *kinds: tokens.TokenKind) -> tokens.ParsedToken | None:
    """A presented token of one of these kinds; None for anything else."""
    for kind in kinds:
        if text.startswith(kind.prefix):
            try:
                return kind.parse(text)
            except PlatformError:
                return None
    return None
