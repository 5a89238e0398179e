"""Groups of an organization's people as a directory keeps them; it never gives a role: users follow their groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from identity import fields
from identity.scim_documents import Condition, ScimGroup, group_document, read_group, wrong
from mesh.clock import Clock
from mesh.errors import PlatformError
from mesh.ids import new_id

if TYPE_CHECKING:
    from identity.scim import ScimSettings
    from identity.scim_users import ScimUsers
    from identity.stores import Transaction

_GROUPS_PER_ORGANIZATION = 5000


@dataclass(frozen=True, slots=True)
class DirectoryGroup:
    """A group of a directory, with its members' names by their ids."""

    organization_id: str
    scim_group_id: str
    group: ScimGroup
    create_time: datetime
    update_time: datetime


class ScimGroups:
    """The groups of directories."""

    filterable = ("id", "displayname", "externalid", "members", "members.value")

    def __init__(self, users: ScimUsers, clock: Clock) -> None:
        self._users = users
        self._clock = clock

    async def create(self, stored: Transaction, settings: ScimSettings, document: Mapping[str, Any]) -> str:
        """Make a group."""
        wanted, now = _checked(read_group(document)), self._clock.now()
        organization_id = settings.organization_id
        _, total = await stored.scim_groups.find(organization_id, [], 0, 0)
        if total >= _GROUPS_PER_ORGANIZATION:
            raise wrong("tooMany", f"An organization has at most {_GROUPS_PER_ORGANIZATION} groups.")
        group = DirectoryGroup(organization_id, new_id("group", clock=self._clock), wanted, now, now)
        await self._put(stored, settings, group, frozenset())
        return group.scim_group_id

    async def documents(
        self, stored: Transaction, organization_id: str, conditions: Sequence[Condition], offset: int, limit: int
    ) -> tuple[list[dict[str, Any]], int]:
        """Groups as SCIM shows them."""
        groups, total = await stored.scim_groups.find(organization_id, conditions, offset, limit)
        member_ids = frozenset[str]().union(*(group.group.member_ids for group in groups))
        names = await stored.scim_users.names(organization_id, member_ids)
        return [
            group_document(group.scim_group_id, group.group, names, group.create_time, group.update_time)
            for group in groups
        ], total

    async def replace(
        self, stored: Transaction, settings: ScimSettings, resource_id: str, document: Mapping[str, Any]
    ) -> None:
        """Have a group be what the document says."""
        wanted, now = _checked(read_group(document)), self._clock.now()
        (current,), _ = await stored.scim_groups.find(settings.organization_id, [Condition("id", resource_id)], 0, 1)
        if wanted != current.group:
            before = current.group.member_ids
            await self._put(stored, settings, replace(current, group=wanted, update_time=now), before)

    async def remove(self, stored: Transaction, settings: ScimSettings, resource_id: str) -> None:
        """Remove a group; its members lose what it gave."""
        (current,), _ = await stored.scim_groups.find(settings.organization_id, [Condition("id", resource_id)], 0, 1)
        await stored.scim_groups.remove(settings.organization_id, resource_id)
        for user_id in sorted(current.group.member_ids):
            await self._users.follow_groups(stored, settings, user_id)

    async def follow_rules(self, stored: Transaction, settings: ScimSettings) -> None:
        """Nothing: a group holds nothing."""

    async def _put(
        self, stored: Transaction, settings: ScimSettings, group: DirectoryGroup, before: frozenset[str]
    ) -> None:
        organization_id, member_ids = group.organization_id, group.group.member_ids
        named, _ = await stored.scim_groups.find(
            organization_id, [Condition("displayname", group.group.display_name)], 0, 2
        )
        if any(other.scim_group_id != group.scim_group_id for other in named):
            raise wrong("uniqueness", "There is a group with this name already.")
        new = member_ids - before
        if new - (await stored.scim_users.names(organization_id, new)).keys():
            raise wrong("invalidValue", "'members' has somebody who is no user of this organization.")
        for user_id in sorted(new):
            await self._users.adopted(stored, organization_id, user_id)
        await stored.scim_groups.put(group)
        # Another name may give other roles to those who stay.
        for user_id in sorted(member_ids | before):
            await self._users.follow_groups(stored, settings, user_id)


def _checked(group: ScimGroup) -> ScimGroup:
    try:
        fields.check_display_name(group.display_name, "displayName")
    except PlatformError as error:
        raise wrong("invalidValue", error.message) from None
    return group
