"""People as members of organizations, of whom the last owner stays; it never checks a password."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from identity import fields
from identity.custom_roles import check_assignment
from identity.organizations import existing
from identity.roles import OWNER
from mesh.auth import Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.pages import TimePlace
from mesh.updates import check_etag

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

_NEVER = datetime.fromtimestamp(0, UTC)


class UserState(StrEnum):
    """Whether a user can act."""

    ACTIVE = "active"
    SUSPENDED = "suspended"


@dataclass(frozen=True, slots=True)
class User:
    """A person as a member of an organization. The address and the state are the platform's, the rest is the
    membership's, so that no organization writes what another one reads."""

    user_id: str
    organization_id: str
    email: str
    display_name: str = ""
    role_ids: tuple[str, ...] = ()
    state: UserState = UserState.ACTIVE
    create_time: datetime = _NEVER
    update_time: datetime = _NEVER
    revision: int = field(default=1, compare=False)


CHANGEABLE = ("display_name", "role_ids")
"""What an update may change."""


class Users:
    """The operations on members."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def create(self, caller: Principal, wanted: User, request_id: str) -> User:
        """Make a member of `wanted.organization_id`; an address that is known already gets a membership.

        A repeat with the same `request_id` gives the first answer. Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT,
        PERMISSION_DENIED, ALREADY_EXISTS for an address that is a member.
        """
        fields.check_request_id(request_id)
        fields.check_all(
            lambda: fields.check_email(wanted.email, "user.email"),
            lambda: fields.check_display_name(wanted.display_name, "user.display_name", required=False),
        )
        now = self._clock.now()
        organization_id = wanted.organization_id
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            user_id, email, state = await stored.users.known_or_new(
                wanted.email, new_id("user", clock=self._clock), now
            )
            if first := await stored.creations.claim(organization_id, "CreateUser", request_id, user_id, now):
                return await self._member(stored, organization_id, first)
            await check_assignment(stored, caller, organization_id, wanted.role_ids, "user.role_ids")
            new = replace(wanted, user_id=user_id, email=email, state=state, create_time=now, update_time=now)
            if not await stored.users.add_membership(new):
                raise PlatformError(
                    Reason.ALREADY_EXISTS, field="user.email", description="'user.email' is that of a member already."
                )
        return new

    async def get(self, organization_id: str, user_id: str) -> User:
        """One member. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            return await self._member(stored, organization_id, user_id)

    async def list(
        self, organization_id: str, after: TimePlace | None, limit: int, *, email: str, role_id: str
    ) -> list[User]:
        """Up to `limit` members who come after `after`, only those with this address and this role where given."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            return await stored.users.page(organization_id, after, limit, email, role_id)

    async def update(self, caller: Principal, wanted: User, changed: Collection[str], etag: str) -> User:
        """Change the fields `changed` of a member to the values of `wanted`.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, PERMISSION_DENIED, FAILED_PRECONDITION for another etag, and
        when the last owner would lose the role.
        """
        organization_id, user_id = wanted.organization_id, wanted.user_id
        async with self._store.transaction() as stored:
            await existing(stored, organization_id, lock=True)
            current = await self._member(stored, organization_id, user_id)
            check_etag(etag, current.revision, "user.etag")
            new = replace(current, **{name: getattr(wanted, name) for name in changed})
            fields.check_display_name(new.display_name, "user.display_name", required=False)
            if new == current:
                return current
            if new.role_ids != current.role_ids:
                await check_assignment(
                    stored, caller, organization_id, new.role_ids, "user.role_ids", current=current.role_ids
                )
                if OWNER not in new.role_ids:
                    await self._keep_last_owner(stored, current, "user.role_ids")
                await stored.revoke("user_id", user_id)
            return await stored.users.change(replace(new, update_time=self._clock.now()))

    async def remove(self, caller: Principal, organization_id: str, user_id: str) -> None:
        """End a membership and revoke the keys that act as it.

        Raises PlatformError: NOT_FOUND, PERMISSION_DENIED, FAILED_PRECONDITION for the last owner.
        """
        async with self._store.transaction() as stored:
            await existing(stored, organization_id, lock=True)
            current = await self._member(stored, organization_id, user_id)
            await check_assignment(stored, caller, organization_id, (), "user_id", current=current.role_ids)
            await self._keep_last_owner(stored, current, "user_id")
            await stored.api_keys.revoke_of_user(organization_id, user_id, self._clock.now())
            await stored.users.remove_membership(organization_id, user_id)
            await stored.revoke("user_id", user_id)

    async def _member(self, stored: Transaction, organization_id: str, user_id: str) -> User:
        user = await stored.users.get(organization_id, user_id)
        if user is None:
            raise PlatformError(Reason.NOT_FOUND)
        return user

    async def _keep_last_owner(self, stored: Transaction, user: User, field: str) -> None:
        # The organization's row is locked, so two owners cannot leave at the same time.
        if OWNER in user.role_ids and not await stored.users.is_held_by_another(
            user.organization_id, OWNER, user.user_id
        ):
            raise PlatformError(
                Reason.FAILED_PRECONDITION, field=field, description="The last owner of an organization has to stay."
            )
