"""API keys: who may make which, what they may do, when they end; it never keeps or logs a key's text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from random import Random
from secrets import SystemRandom
from typing import TYPE_CHECKING

from identity import fields, roles
from identity.organizations import existing
from mesh import tokens
from mesh.auth import Principal, RateLimits
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.pages import TimePlace
from mesh.updates import check_etag

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

_NEVER = datetime.fromtimestamp(0, UTC)
_SCOPES = 200
_LONGEST_OVERLAP = timedelta(days=30)


class ApiKeyState(StrEnum):
    """Where a key is in its life."""

    ACTIVE = "active"
    REVOKED = "revoked"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its text. It acts as a service account, as a user, or, with neither, for its organization.

    No `scopes` means inference only, no `allowed_models` all, no `allowed_networks` anywhere. `granted` is what
    whoever set the scopes held then.
    """

    api_key_id: str
    organization_id: str
    display_name: str
    service_account_id: str = ""
    user_id: str = ""
    scopes: tuple[str, ...] = ()
    granted: frozenset[str] = frozenset()
    allowed_models: tuple[str, ...] = ()
    allowed_networks: tuple[str, ...] = ()
    rate_limits: RateLimits = field(default_factory=RateLimits)
    creator_id: str = ""
    expire_time: datetime | None = None
    create_time: datetime = _NEVER
    last_use_time: datetime | None = None
    revoke_time: datetime | None = None
    revision: int = field(default=1, compare=False)

    def state_at(self, now: datetime) -> ApiKeyState:
        """Where it is in its life. Revoked stays revoked, also after its expire_time."""
        if self.revoke_time is not None:
            return ApiKeyState.REVOKED
        if self.expire_time is not None and self.expire_time <= now:
            return ApiKeyState.EXPIRED
        return ApiKeyState.ACTIVE


CHANGEABLE = ("display_name", "scopes", "allowed_models", "allowed_networks", "rate_limits", "expire_time")
"""What an update may change; a key acts as the same actor for its whole life."""


@dataclass(frozen=True, slots=True)
class _Owner:
    """Whom a key acts as: ids of which at most one is set."""

    service_account_id: str
    user_id: str


class ApiKeys:
    """The operations on API keys."""

    def __init__(self, store: Store, clock: Clock, random: Random | None = None) -> None:
        self._store = store
        self._clock = clock
        self._random = random or SystemRandom()

    async def create(self, caller: Principal, wanted: ApiKey, request_id: str) -> tuple[ApiKey, str]:
        """Make a key of `wanted.organization_id`; gives it and its text, which exists nowhere else from then on.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, PERMISSION_DENIED (both naming the field), ALREADY_EXISTS
        for a `request_id` that has made a key.
        """
        fields.check_request_id(request_id)
        now = self._clock.now()
        wanted = _checked(wanted)
        fields.check_expire_time(wanted.expire_time, now, "api_key.expire_time")
        secret = tokens.API_KEY.generate(self._random, clock=self._clock)
        organization_id = wanted.organization_id
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            if await stored.creations.claim(organization_id, "CreateApiKey", request_id, secret.id, now):
                raise PlatformError(
                    Reason.ALREADY_EXISTS,
                    field="request_id",
                    description="'request_id' has made a key already, and a key's text cannot be shown twice.",
                )
            owner = await self._owner_of_new(stored, caller, wanted)
            new = replace(
                wanted,
                api_key_id=secret.id,
                service_account_id=owner.service_account_id,
                user_id=owner.user_id,
                granted=await self._granted(stored, caller, organization_id, owner, wanted.scopes),
                creator_id=caller.id,
                create_time=now,
            )
            await stored.api_keys.add(new, secret.digest)
        return new, secret.text

    async def get(self, caller: Principal, organization_id: str, api_key_id: str) -> ApiKey:
        """One key. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            return await self._visible(stored, caller, organization_id, api_key_id)

    async def list(
        self,
        caller: Principal,
        organization_id: str,
        after: TimePlace | None,
        limit: int,
        *,
        state: ApiKeyState | None,
        service_account_id: str,
        user_id: str,
    ) -> list[ApiKey]:
        """Up to `limit` keys that come after `after` and that the caller may see."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            own = await self._only_own(stored, caller, organization_id)
            if own is not None and (service_account_id or own.service_account_id, user_id or own.user_id) != (
                own.service_account_id,
                own.user_id,
            ):
                return []
            return await stored.api_keys.page(
                organization_id,
                after,
                limit,
                state=state,
                now=self._clock.now(),
                service_account_id=own.service_account_id if own else service_account_id,
                user_id=own.user_id if own else user_id,
            )

    async def update(self, caller: Principal, wanted: ApiKey, changed: Collection[str], etag: str) -> ApiKey:
        """Change the fields `changed` of a key to the values of `wanted`.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, PERMISSION_DENIED, FAILED_PRECONDITION for another etag and
        for a key that is revoked.
        """
        async with self._store.transaction() as stored:
            current = await self._visible(stored, caller, wanted.organization_id, wanted.api_key_id, lock=True)
            check_etag(etag, current.revision, "api_key.etag")
            if current.revoke_time is not None:
                raise PlatformError(Reason.FAILED_PRECONDITION, description="The key is revoked.")
            new = _checked(replace(current, **{name: getattr(wanted, name) for name in changed}))
            if new == current:
                return current
            if new.expire_time != current.expire_time:
                fields.check_expire_time(new.expire_time, self._clock.now(), "api_key.expire_time")
            if new.scopes != current.scopes:
                owner = _Owner(new.service_account_id, new.user_id)
                granted = await self._granted(stored, caller, new.organization_id, owner, new.scopes)
                new = replace(new, granted=granted)
            await stored.revoke("api_key_id", new.api_key_id)
            return await stored.api_keys.change(new)

    async def rotate(
        self, caller: Principal, organization_id: str, api_key_id: str, overlap: timedelta
    ) -> tuple[ApiKey, str]:
        """Give a key a new text; the one before it is accepted for `overlap` and any older one no longer.

        Whoever has the text can do what the key can, so the caller has to hold that. Raises PlatformError: NOT_FOUND,
        INVALID_ARGUMENT, PERMISSION_DENIED, FAILED_PRECONDITION for a key that is revoked or expired.
        """
        if not timedelta(0) <= overlap <= _LONGEST_OVERLAP:
            raise fields.invalid("overlap", f"must be 0 to {_LONGEST_OVERLAP.days} days")
        now = self._clock.now()
        async with self._store.transaction() as stored:
            current = await self._visible(stored, caller, organization_id, api_key_id, lock=True)
            if (state := current.state_at(now)) is not ApiKeyState.ACTIVE:
                raise PlatformError(Reason.FAILED_PRECONDITION, description=f"The key is {state.value}.")
            await self._check_may_act_as(stored, caller, current)
            secret = tokens.API_KEY.generate_for(api_key_id, self._random)
            await stored.revoke("api_key_id", api_key_id)
            rotated = await stored.api_keys.rotate(organization_id, api_key_id, secret.digest, now + overlap)
        return rotated, secret.text

    async def revoke(self, caller: Principal, organization_id: str, api_key_id: str) -> ApiKey:
        """Refuse a key for good. Revoking it again changes nothing. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            current = await self._visible(stored, caller, organization_id, api_key_id, lock=True)
            # Announced again as well: the first announcement may have been lost.
            await stored.revoke("api_key_id", api_key_id)
            if current.revoke_time is not None:
                return current
            return await stored.api_keys.change(replace(current, revoke_time=self._clock.now()))

    async def _owner_of_new(self, stored: Transaction, caller: Principal, wanted: ApiKey) -> _Owner:
        """Whom a new key acts as; for a caller that is confined to its own keys, that is the caller."""
        if wanted.service_account_id and wanted.user_id:
            raise fields.invalid("api_key.user_id", "cannot be set together with 'api_key.service_account_id'")
        owner = _Owner(wanted.service_account_id, wanted.user_id)
        own = await self._only_own(stored, caller, wanted.organization_id)
        if own is None:
            return owner
        for name in ("service_account_id", "user_id"):
            if getattr(owner, name) not in ("", getattr(own, name)):
                raise PlatformError(
                    Reason.PERMISSION_DENIED,
                    field=f"api_key.{name}",
                    description="You may make keys that act as yourself only.",
                )
        return own

    async def _only_own(self, stored: Transaction, caller: Principal, organization_id: str) -> _Owner | None:
        """The owner of the only keys that the caller may deal with; None if it may deal with all."""
        if caller.platform or not (caller.service_account_id or caller.user_id):
            return None
        holder = await stored.holders.find(organization_id, caller.service_account_id, caller.user_id)
        if holder is not None and not roles.confined_to_own_keys(holder.role_ids, holder.custom_permissions):
            return None
        return _Owner(caller.service_account_id, caller.user_id)

    async def _visible(
        self, stored: Transaction, caller: Principal, organization_id: str, api_key_id: str, *, lock: bool = False
    ) -> ApiKey:
        found = await stored.api_keys.get(organization_id, api_key_id, lock=lock)
        if found is not None:
            own = await self._only_own(stored, caller, organization_id)
            if own is None or own == _Owner(found.service_account_id, found.user_id):
                return found
        raise PlatformError(Reason.NOT_FOUND)

    async def _check_may_act_as(self, stored: Transaction, caller: Principal, key: ApiKey) -> None:
        held = key.granted & roles.TENANT_PERMISSIONS
        if key.service_account_id or key.user_id:
            holder = await stored.holders.find(key.organization_id, key.service_account_id, key.user_id)
            held = frozenset()
            if holder is not None:
                _check_of_platform(caller, holder.role_ids, "api_key_id")
                held = roles.held_through(holder.role_ids, holder.custom_permissions, key.organization_id)
        if excess := (held & roles.expand_all(key.scopes)) - caller.permissions:
            raise PlatformError(
                Reason.PERMISSION_DENIED,
                field="api_key_id",
                description=f"'api_key_id' may do what you may not: {_some(excess)}.",
            )

    async def _granted(
        self, stored: Transaction, caller: Principal, organization_id: str, owner: _Owner, scopes: tuple[str, ...]
    ) -> frozenset[str]:
        """What the scopes are granted out of: the caller's permissions, within what the owner can hold.

        Raises PlatformError naming api_key.scopes: PERMISSION_DENIED for more than the caller holds, INVALID_ARGUMENT
        for more than the owner holds; naming the owner's field if there is no such owner.
        """
        held = roles.TENANT_PERMISSIONS
        if owner.service_account_id or owner.user_id:
            holder = await stored.holders.find(organization_id, owner.service_account_id, owner.user_id)
            if holder is None:
                name = "service_account_id" if owner.service_account_id else "user_id"
                raise fields.invalid(f"api_key.{name}", "names nobody in this organization")
            _check_of_platform(caller, holder.role_ids, "api_key.scopes")
            held = roles.held_through(holder.role_ids, holder.custom_permissions, organization_id)
        wanted = roles.expand_all(scopes)
        if excess := wanted - caller.permissions:
            raise PlatformError(
                Reason.PERMISSION_DENIED,
                field="api_key.scopes",
                description=f"'api_key.scopes' names what you do not hold: {_some(excess)}.",
            )
        if excess := wanted - held:
            raise fields.invalid("api_key.scopes", f"names what the key's owner does not hold: {_some(excess)}")
        return caller.permissions & held


def _check_of_platform(caller: Principal, role_ids: Collection[str], field: str) -> None:
    """A key of a platform administrator reaches every organization, whatever its scopes."""
    if roles.PLATFORM_ADMIN in role_ids and not caller.platform:
        raise PlatformError(
            Reason.PERMISSION_DENIED,
            field=field,
            description=f"'{field}' is for the platform's administrators to decide: the key would act as one.",
        )


def _checked(key: ApiKey) -> ApiKey:
    """The key with its networks in their usual spelling. Raises PlatformError(INVALID_ARGUMENT) naming the fields."""
    fields.check_all(
        lambda: fields.check_display_name(key.display_name, "api_key.display_name"),
        lambda: fields.check_models(key.allowed_models, "api_key.allowed_models"),
        lambda: fields.check_rate_limits(key.rate_limits, "api_key.rate_limits"),
        lambda: _check_scopes(key.scopes),
        lambda: fields.checked_networks(key.allowed_networks, "api_key.allowed_networks"),
    )
    return replace(key, allowed_networks=fields.checked_networks(key.allowed_networks, "api_key.allowed_networks"))


def _check_scopes(scopes: Collection[str]) -> None:
    if len(scopes) > _SCOPES:
        raise fields.invalid("api_key.scopes", f"may hold {_SCOPES} values")
    fields.check_once(scopes, "api_key.scopes")
    if not all(roles.expand(scope) for scope in scopes):
        raise fields.invalid("api_key.scopes", "names a permission that does not exist")


def _some(permissions: frozenset[str]) -> str:
    names = sorted(permissions)
    return ", ".join(names[:5]) + (" and more" if len(names) > 5 else "")
