"""An organization's members as a directory keeps them; it never changes anybody's address, which is the platform's.

A user whom the directory has deactivated is no member: nothing that asks for a membership has to know of it. What is
needed to have it back is remembered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from identity import fields
from identity.granted_roles import give, known_roles
from identity.roles import OWNER
from identity.scim_documents import Condition, ScimUser, read_user, user_document, wrong
from identity.users import User, UserState
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id

if TYPE_CHECKING:
    from identity.scim import ScimSettings
    from identity.stores import Transaction


@dataclass(frozen=True, slots=True)
class DirectoryUser:
    """A member, or one whom the directory has deactivated. `given_role_ids` are those that the directory gave,
    `kept_role_ids` those that a user who is activated again gets back. `email` is the platform's."""

    organization_id: str
    user_id: str
    email: str
    user: ScimUser
    create_time: datetime
    update_time: datetime
    given_role_ids: tuple[str, ...] = ()
    kept_role_ids: tuple[str, ...] = field(default=())


class ScimUsers:
    """The users of directories."""

    filterable = ("id", "username", "externalid", "emails", "emails.value", "displayname", "active")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def create(self, stored: Transaction, settings: ScimSettings, document: Mapping[str, Any]) -> str:
        """Make a member; an address that is known already gets a membership."""
        wanted, now, organization_id = _checked(read_user(document)), self._clock.now(), settings.organization_id
        user_id, email, state = await stored.users.known_or_new(wanted.email, new_id("user", clock=self._clock), now)
        if await stored.scim_users.get(organization_id, user_id) is not None:
            raise wrong("uniqueness", "There is a user with this address already.")
        await self._check_unique(stored, organization_id, user_id, wanted)
        await stored.scim_users.put(DirectoryUser(organization_id, user_id, email, wanted, now, now))
        if wanted.active:
            await self._activate(stored, settings, user_id, state)
        return user_id

    async def documents(
        self, stored: Transaction, organization_id: str, conditions: Sequence[Condition], offset: int, limit: int
    ) -> tuple[list[dict[str, Any]], int]:
        """Users as SCIM shows them."""
        users, total = await stored.scim_users.find(organization_id, conditions, offset, limit)
        groups = await stored.scim_groups.of_users(organization_id, [user.user_id for user in users])
        return [
            user_document(user.user_id, user.user, groups.get(user.user_id, ()), user.create_time, user.update_time)
            for user in users
        ], total

    async def replace(
        self, stored: Transaction, settings: ScimSettings, resource_id: str, document: Mapping[str, Any]
    ) -> None:
        """Have a user be what the document says, and be a member if it says so."""
        wanted, now, organization_id = _checked(read_user(document)), self._clock.now(), settings.organization_id
        current = await self.adopted(stored, organization_id, resource_id)
        if wanted.email.lower() != current.email.lower():
            raise wrong("mutability", "The address of a user cannot be changed by a directory.")
        await self._check_unique(stored, organization_id, resource_id, wanted)
        await stored.scim_users.put(replace(current, user=wanted, update_time=now))
        member = await stored.users.get(organization_id, resource_id)
        if member is None:
            if wanted.active:
                await self._activate(stored, settings, resource_id, UserState.ACTIVE)
        elif not wanted.active:
            await self._deactivate(stored, current, member)
        else:
            if member.display_name != wanted.display_name:
                await stored.users.change(replace(member, display_name=wanted.display_name, update_time=now))
            await self.follow_groups(stored, settings, resource_id)

    async def remove(self, stored: Transaction, settings: ScimSettings, resource_id: str) -> None:
        """End a membership, and revoke the keys that act as it."""
        organization_id = settings.organization_id
        member = await stored.users.get(organization_id, resource_id)
        if member is not None:
            await self._end(stored, member)
        await stored.api_keys.revoke_of_user(organization_id, resource_id, self._clock.now())
        await stored.scim_users.remove(organization_id, resource_id)

    async def follow_rules(self, stored: Transaction, settings: ScimSettings) -> None:
        """Have every user of the directory hold what the rules give."""
        for user_id in await stored.scim_users.ids(settings.organization_id):
            await self.follow_groups(stored, settings, user_id)

    async def adopted(self, stored: Transaction, organization_id: str, user_id: str) -> DirectoryUser:
        """A user as the directory's from now on, whoever made it. Raises PlatformError(NOT_FOUND)."""
        user = await stored.scim_users.get(organization_id, user_id)
        if user is None:
            raise PlatformError(Reason.NOT_FOUND)
        await stored.scim_users.put(user)
        return user

    async def follow_groups(self, stored: Transaction, settings: ScimSettings, user_id: str) -> None:
        """Have a user hold what its groups give, if it is a member."""
        member = await stored.users.get(settings.organization_id, user_id)
        user = await stored.scim_users.get(settings.organization_id, user_id)
        if member is None or user is None:
            return
        groups = await stored.scim_groups.of_users(settings.organization_id, [user_id])
        wanted = settings.rules.role_ids_for({name for _, name in groups.get(user_id, ())})
        _, given = await give(stored, member, user.given_role_ids, wanted, self._clock.now())
        if given != user.given_role_ids:
            await stored.scim_users.put(replace(user, given_role_ids=given))

    async def _activate(self, stored: Transaction, settings: ScimSettings, user_id: str, state: UserState) -> None:
        organization_id, now = settings.organization_id, self._clock.now()
        user = await stored.scim_users.get(organization_id, user_id)
        if user is None:
            raise PlatformError(Reason.NOT_FOUND)
        kept = await known_roles(stored, organization_id, user.kept_role_ids)
        name = user.user.display_name
        await stored.users.add_membership(
            User(user_id, organization_id, user.email, name, tuple(kept), state, now, now)
        )
        await stored.scim_users.put(replace(user, kept_role_ids=()))
        await self.follow_groups(stored, settings, user_id)
        # A cache may hold the refusal of a key that acts again.
        await stored.revoke("user_id", user_id)

    async def _deactivate(self, stored: Transaction, user: DirectoryUser, member: User) -> None:
        kept = tuple(role_id for role_id in member.role_ids if role_id not in user.given_role_ids)
        await self._end(stored, member)
        current = await stored.scim_users.get(user.organization_id, user.user_id)
        if current is not None:
            await stored.scim_users.put(replace(current, given_role_ids=(), kept_role_ids=kept))

    async def _end(self, stored: Transaction, member: User) -> None:
        """End a membership, its sessions, and what acts as it. Raises PlatformError(FAILED_PRECONDITION) for the last
        owner."""
        organization_id, user_id = member.organization_id, member.user_id
        if OWNER in member.role_ids and not await stored.users.is_held_by_another(organization_id, OWNER, user_id):
            raise PlatformError(
                Reason.FAILED_PRECONDITION, description="The last owner of an organization has to stay."
            )
        await stored.users.remove_membership(organization_id, user_id)
        await stored.revoke("user_id", user_id)

    async def _check_unique(self, stored: Transaction, organization_id: str, user_id: str, wanted: ScimUser) -> None:
        named, _ = await stored.scim_users.find(organization_id, [Condition("username", wanted.user_name)], 0, 2)
        if any(user.user_id != user_id for user in named):
            raise wrong("uniqueness", "There is a user with this user name already.")


def _checked(user: ScimUser) -> ScimUser:
    try:
        fields.check_email(user.email, "emails")
        fields.check_display_name(user.display_name, "displayName", required=False)
    except PlatformError as error:
        raise wrong("invalidValue", error.message) from None
    return user
