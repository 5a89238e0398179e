"""Custom roles of an organization, and the rules for giving and taking any role; it never defines a built-in one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from identity import fields
from identity.organizations import existing
from identity.roles import BUILT_IN, PLATFORM_ADMIN, PROTECTED, TENANT_PERMISSIONS, Role, is_known_in
from mesh.auth import Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.pages import TimePlace
from mesh.updates import check_etag

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

CHANGEABLE = ("display_name", "permissions")
"""What an update may change."""

_ROLES_PER_ORGANIZATION = 200
ROLES_PER_HOLDER = 20


class Roles:
    """The operations on roles."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def create(self, caller: Principal, organization_id: str, wanted: Role, request_id: str) -> Role:
        """Make a custom role; a repeat with the same `request_id` gives the first one."""
        fields.check_request_id(request_id)
        _check(caller, wanted)
        now = self._clock.now()
        role_id = new_id("role", clock=self._clock)
        new = replace(wanted, role_id=role_id, organization_id=organization_id, create_time=now, update_time=now)
        async with self._store.transaction() as stored:
            await existing(stored, organization_id, lock=True)
            if first := await stored.creations.claim(organization_id, "CreateRole", request_id, role_id, now):
                return await self._custom(stored, organization_id, first)
            if len(await stored.roles.all(organization_id)) >= _ROLES_PER_ORGANIZATION:
                raise PlatformError(
                    Reason.FAILED_PRECONDITION,
                    description=f"An organization has at most {_ROLES_PER_ORGANIZATION} roles.",
                )
            await stored.roles.add(new)
        return new

    async def get(self, organization_id: str, role_id: str) -> Role:
        """One role, built-in or custom. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            if is_known_in(role_id, organization_id):
                return BUILT_IN[role_id]
            return await self._custom(stored, organization_id, role_id)

    async def list(self, organization_id: str, after: TimePlace | None) -> list[Role]:
        """The roles that come after `after`, built-in ones first."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            custom = await stored.roles.all(organization_id)
        known = [*(role for role in BUILT_IN.values() if is_known_in(role.role_id, organization_id)), *custom]
        if after is None:
            return known
        last = (after.id not in BUILT_IN, after.id)
        return [role for role in known if (not role.built_in, role.role_id) > last]

    async def update(
        self, caller: Principal, organization_id: str, role_id: str, wanted: Role, changed: Collection[str], etag: str
    ) -> Role:
        """Change the fields `changed` of a custom role to the values of `wanted`."""
        _refuse_built_in(role_id)
        async with self._store.transaction() as stored:
            current = await self._custom(stored, organization_id, role_id, lock=True)
            check_etag(etag, current.revision, "role.etag")
            new = replace(current, **{name: getattr(wanted, name) for name in changed})
            _check(caller, new, unchecked=current.permissions)
            if new == current:
                return current
            if new.permissions != current.permissions:
                # A cache does not know who holds a role, but it knows whose organization this is.
                await stored.revoke("organization_id", organization_id)
            return await stored.roles.change(replace(new, update_time=self._clock.now()))

    async def delete(self, organization_id: str, role_id: str) -> None:
        """Remove a custom role that nobody holds. Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION."""
        _refuse_built_in(role_id)
        async with self._store.transaction() as stored:
            await self._custom(stored, organization_id, role_id, lock=True)
            if await stored.roles.is_held(organization_id, role_id):
                raise PlatformError(Reason.FAILED_PRECONDITION, description="Somebody holds the role.")
            await stored.roles.remove(organization_id, role_id)

    async def _custom(self, stored: Transaction, organization_id: str, role_id: str, *, lock: bool = False) -> Role:
        role = await stored.roles.get(organization_id, role_id, lock=lock)
        if role is None:
            raise PlatformError(Reason.NOT_FOUND)
        return role


async def check_assignment(
    stored: Transaction,
    caller: Principal,
    organization_id: str,
    wanted: Sequence[str],
    field: str,
    *,
    current: Iterable[str] = (),
) -> None:
    """Whether the caller may have somebody hold the roles `wanted` instead of `current`.

    Nobody gives what they do not hold, and only those who hold as much take a protected role away. The custom roles
    that are given cannot be removed before the transaction ends.

    Raises PlatformError, naming `field`: INVALID_ARGUMENT for an unknown role, PERMISSION_DENIED.
    """
    fields.check_once(wanted, field)
    if len(wanted) > ROLES_PER_HOLDER:
        raise fields.invalid(field, f"may hold {ROLES_PER_HOLDER} roles")
    given, taken = set(wanted) - set(current), set(current) - set(wanted)
    custom = {role_id for role_id in given if not is_known_in(role_id, organization_id)}
    if not all(fields.is_id(role_id) for role_id in custom):
        raise fields.invalid(field, "names an unknown role")
    found = {role.role_id: role for role in await stored.roles.hold(organization_id, sorted(custom))}
    if custom - found.keys():
        raise fields.invalid(field, "names an unknown role")
    permissions: set[str] = set()
    for role_id in given | taken.intersection(PROTECTED):
        permissions |= found[role_id].permissions if role_id in found else BUILT_IN[role_id].permissions
    if not permissions <= caller.permissions:
        raise PlatformError(
            Reason.PERMISSION_DENIED,
            field=field,
            description=f"'{field}' gives or takes a role that holds more than you do.",
        )


def _refuse_built_in(role_id: str) -> None:
    if role_id in BUILT_IN:
        raise PlatformError(Reason.FAILED_PRECONDITION, description="A built-in role cannot be changed.")


def _check(caller: Principal, role: Role, *, unchecked: frozenset[str] = frozenset()) -> None:
    fields.check_display_name(role.display_name, "role.display_name")
    new = role.permissions - unchecked
    if not role.permissions:
        raise fields.invalid("role.permissions", "must name at least one permission")
    if not new <= TENANT_PERMISSIONS:
        raise fields.invalid("role.permissions", f"names what no role but {PLATFORM_ADMIN} can hold, or nothing at all")
    if not new <= caller.permissions:
        raise PlatformError(
            Reason.PERMISSION_DENIED,
            field="role.permissions",
            description="'role.permissions' names a permission that you do not hold.",
        )
