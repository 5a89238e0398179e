"""Roles that people hold because an issuer or a directory says so, beside those given by hand; it never asks who
says it.

Whoever writes the rules has to hold what they give. What is given is remembered apart from what a member holds anyway,
so that it can be taken back without taking more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from identity import fields
from identity.custom_roles import ROLES_PER_HOLDER, check_assignment
from identity.roles import OWNER, is_known_in
from mesh.auth import Principal

if TYPE_CHECKING:
    from identity.stores import Transaction
    from identity.users import User

_RULES = 200
_GROUP_LENGTH = 256


@dataclass(frozen=True, slots=True)
class GroupRoles:
    """The roles that a group gives; its name is compared with case."""

    group: str
    role_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RoleRules:
    """Which roles people are given: by their groups, and all of them."""

    group_roles: tuple[GroupRoles, ...] = ()
    default_role_ids: tuple[str, ...] = ()

    def role_ids_for(self, groups: Collection[str]) -> tuple[str, ...]:
        """The roles of somebody in these groups, each once."""
        given = list(self.default_role_ids)
        for rule in self.group_roles:
            if rule.group in groups:
                given += rule.role_ids
        return tuple(dict.fromkeys(given))


NO_RULES = RoleRules()
"""Nobody is given anything."""


async def check_rules(
    stored: Transaction, caller: Principal, organization_id: str, wanted: RoleRules, current: RoleRules, field: str
) -> None:
    """Whether the caller may have these rules instead of the current ones: they give and take what the caller could.

    Raises PlatformError, naming a field within `field`: INVALID_ARGUMENT, PERMISSION_DENIED.
    """
    if len(wanted.group_roles) > _RULES:
        raise fields.invalid(f"{field}.group_roles", f"may hold {_RULES} groups")
    fields.check_once([rule.group for rule in wanted.group_roles], f"{field}.group_roles")
    before = {rule.group: rule.role_ids for rule in current.group_roles}
    for index, rule in enumerate(wanted.group_roles):
        within = f"{field}.group_roles[{index}]"
        if not 1 <= len(rule.group) <= _GROUP_LENGTH or "\0" in rule.group:
            raise fields.invalid(f"{within}.group", f"must have 1 to {_GROUP_LENGTH} characters")
        await check_assignment(
            stored,
            caller,
            organization_id,
            rule.role_ids,
            f"{within}.role_ids",
            current=before.get(rule.group, ()),
        )
    await check_assignment(
        stored,
        caller,
        organization_id,
        wanted.default_role_ids,
        f"{field}.default_role_ids",
        current=current.default_role_ids,
    )


async def give(
    stored: Transaction, member: User, given: Collection[str], wanted: Iterable[str], now: datetime
) -> tuple[User, tuple[str, ...]]:
    """Have a member hold the roles `wanted` instead of `given`, those that the same rules gave before; also which of
    them it holds by the rules alone.

    Roles that are gone are left out, as are those above what anybody may hold. The last owner stays one. The
    organization's row has to be locked.
    """
    known = await known_roles(stored, member.organization_id, wanted)
    if OWNER in member.role_ids and OWNER in given and OWNER not in known:
        held = await stored.users.is_held_by_another(member.organization_id, OWNER, member.user_id)
        known = known if held else [*known, OWNER]
    now_given = [role_id for role_id in known if role_id in given or role_id not in member.role_ids]
    others = [role_id for role_id in member.role_ids if role_id not in given]
    role_ids = tuple(dict.fromkeys([*others, *now_given]))[:ROLES_PER_HOLDER]
    if set(role_ids) != set(member.role_ids):
        await stored.revoke("user_id", member.user_id)
        member = await stored.users.change(replace(member, role_ids=role_ids, update_time=now))
    return member, tuple(role_id for role_id in now_given if role_id in role_ids)


async def known_roles(stored: Transaction, organization_id: str, role_ids: Iterable[str]) -> list[str]:
    """Those of the roles that there are, each once."""
    wanted = list(dict.fromkeys(role_ids))
    custom = [role_id for role_id in wanted if not is_known_in(role_id, organization_id)]
    found = {role.role_id for role in await stored.roles.hold(organization_id, custom)}
    return [role_id for role_id in wanted if role_id in found or is_known_in(role_id, organization_id)]
