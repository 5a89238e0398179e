"""From a credential to the principal behind it, and whether it is accepted at all; it never authorizes a call.

Everything that ends a credential ends it here, by one and the same refusal: revoked, expired, a wrong secret, a
suspended organization or user, a disabled service account, an owner that is gone. Why is logged, never told.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING

from identity import attempts, roles
from identity.api_keys import ApiKey
from identity.organizations import OrganizationState
from mesh import context, tokens
from mesh.auth import Authenticator, Principal, RateLimits
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason

if TYPE_CHECKING:
    from identity.last_uses import LastUses
    from identity.stores import Store

logger = logging.getLogger(__name__)

NO_MODEL = ("",)
"""The allowed models of a principal that may use none, as an empty list means all and no model has an empty id."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A service account or user in an organization: its roles, what the custom ones of them grant, and whether it may
    act."""

    role_ids: tuple[str, ...]
    custom_permissions: frozenset[str]
    acting: bool


@dataclass(frozen=True, slots=True)
class Credential:
    """All that decides on an API key. `holder` is None for a key without an owner, and for one whose owner is gone.

    `previous_digest` is that of the text before the last rotation, which is accepted until `previous_expire_time`.
    """

    key: ApiKey
    digest: bytes = field(repr=False)
    organization_state: OrganizationState
    organization_limits: RateLimits
    organization_models: tuple[str, ...]
    holder: Holder | None
    previous_digest: bytes | None = field(default=None, repr=False)
    previous_expire_time: datetime | None = None
    signature_required: bool = False
    policy_bound: bool = False

    def presented(self, parsed: tokens.ParsedToken) -> Credential:
        """The same as the text that was presented has it: the one before the last rotation ends with its overlap."""
        if (
            not self.previous_digest
            or not self.previous_expire_time
            or not tokens.matches(parsed, self.previous_digest)
        ):
            return self
        ends = min(self.key.expire_time or self.previous_expire_time, self.previous_expire_time)
        return replace(self, digest=self.previous_digest, key=replace(self.key, expire_time=ends))


class Principals:
    """Turns credentials into principals; the mesh's Authenticator, answered out of the database."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        last_uses: LastUses,
        access_tokens: Authenticator,
        sessions: Authenticator,
    ) -> None:
        self._store = store
        self._clock = clock
        self._last_uses = last_uses
        self._access_tokens = access_tokens
        self._sessions = sessions

    async def authenticate(self, credential: str) -> Principal:
        """The principal behind an API key, an access token or a session.

        Raises PlatformError: API_KEY_INVALID, AUTH_UNAVAILABLE when the database is away.
        """
        if credential.startswith(tokens.ACCESS_TOKEN.prefix):
            return await self._access_tokens.authenticate(credential)
        if credential.startswith(tokens.SESSION.prefix):
            return await self._sessions.authenticate(credential)
        parsed = tokens.API_KEY.parse(credential)
        try:
            found = await self._store.credential(parsed.id)
        except PlatformError as error:
            if error.reason in (Reason.UNAVAILABLE, Reason.DEADLINE_EXCEEDED):
                raise PlatformError(Reason.AUTH_UNAVAILABLE, retry_after_s=error.retry_after_s) from error
            raise
        if found is not None:
            found = found.presented(parsed)
        now = self._clock.now()
        wrong = "unknown" if found is None else _what_is_wrong(found, parsed, now)
        if found is None or wrong:
            logger.info("an API key was refused", extra={"api_key_id": parsed.id, "why": wrong})
            raise PlatformError(Reason.API_KEY_INVALID)
        self._last_uses.note(found.key.organization_id, found.key.api_key_id, now)
        return principal_of(found)

    async def held_now(self, principal: Principal) -> frozenset[str]:
        """The permissions that somebody holds now, of an API key those within its scopes; none for who is gone. The
        scopes of an access token are not known by its holder's id."""
        if principal.api_key_id:
            found = await self._store.credential(principal.api_key_id)
            return frozenset() if found is None else principal_of(found).permissions
        organization_id = principal.organization_id
        with attempts.apart():
            async with self._store.transaction(across=True) as stored:
                holder = await stored.holders.find(organization_id, principal.service_account_id, principal.user_id)
        if holder is None or not holder.acting:
            return frozenset()
        return roles.held_through(holder.role_ids, holder.custom_permissions, organization_id)


def caller() -> Principal:
    """Who makes the call that is being served. Raises PlatformError(MISSING_CREDENTIALS) outside of an authenticated
    one."""
    principal = context.principal.get()
    if principal is None:
        raise PlatformError(Reason.MISSING_CREDENTIALS)
    return principal


def signed_in() -> Principal:
    """The person who makes the call that is being served, signed in and in person.

    A program with an access token is of the same kind, and yet must not decide what programs may do. Raises
    PlatformError: MISSING_CREDENTIALS, PERMISSION_DENIED for whoever presented anything but a session.
    """
    principal = caller()
    if not is_signed_in(principal):
        raise PlatformError(Reason.PERMISSION_DENIED, description="Only somebody who is signed in may do this.")
    return principal


def is_signed_in(principal: Principal) -> bool:
    """Whether the caller is a person who makes the call in person."""
    return principal.kind == "user" and context.credential.get().startswith(tokens.SESSION.prefix)


def principal_of(credential: Credential) -> Principal:
    """What an accepted key may do: what its owner holds now, or for a key without one what its creator held when its
    scopes were set, within its scopes."""
    key, holder = credential.key, credential.holder
    held, platform = key.granted & roles.TENANT_PERMISSIONS, False
    if holder is not None:
        held = roles.held_through(holder.role_ids, holder.custom_permissions, key.organization_id)
        platform = roles.PLATFORM_ADMIN in holder.role_ids and key.organization_id == roles.PLATFORM_ORGANIZATION_ID
    return Principal(
        kind="api_key",
        id=key.api_key_id,
        organization_id=key.organization_id,
        api_key_id=key.api_key_id,
        user_id=key.user_id,
        service_account_id=key.service_account_id,
        permissions=held & roles.expand_all(key.scopes),
        allowed_models=_both(credential.organization_models, key.allowed_models),
        platform=platform,
        expire_time=key.expire_time,
        organization_limits=credential.organization_limits,
        principal_limits=key.rate_limits,
        allowed_networks=key.allowed_networks,
        signature_required=credential.signature_required,
        policy_bound=credential.policy_bound,
    )


def _what_is_wrong(credential: Credential, parsed: tokens.ParsedToken, now: datetime) -> str:
    key, holder = credential.key, credential.holder
    if not tokens.matches(parsed, credential.digest):
        return "secret"
    if key.revoke_time is not None:
        return "revoked"
    if key.expire_time is not None and key.expire_time <= now:
        return "expired"
    if credential.organization_state is not OrganizationState.ACTIVE:
        return "organization"
    if (key.service_account_id or key.user_id) and (holder is None or not holder.acting):
        return "owner"
    return ""


def _both(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    """The models that both lists allow, where an empty list allows all."""
    if not one or not other:
        return one or other
    return tuple(model for model in other if model in one) or NO_MODEL
