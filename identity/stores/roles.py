"""The table of custom roles; it never has a row for a built-in one."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from collections.abc import Sequence

from identity.roles import Role
from identity.stores.rows import Connection, Row, found

_COLUMNS = "role_id, organization_id, display_name, permissions, create_time, update_time, revision"


class RoleRows:
    """Custom roles, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, role: Role) -> None:
        """Store a new role."""
        await self._connection.execute(
            "INSERT INTO roles (role_id, organization_id, display_name, permissions, create_time, update_time)"
            " VALUES ($1, $2, $3, $4, $5, $6)",
            role.role_id,
            role.organization_id,
            role.display_name,
            sorted(role.permissions),
            role.create_time,
            role.update_time,
        )

    async def get(self, organization_id: str, role_id: str, *, lock: bool = False) -> Role | None:
        """One role, locked against other changes and against being given if asked."""
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS} FROM roles WHERE organization_id = $1 AND role_id = $2{' FOR UPDATE' if lock else ''}",
            organization_id,
            role_id,
        )
        return None if row is None else _role_of(row)

    async def all(self, organization_id: str) -> list[Role]:
        """Every custom role of the organization, in the order of their ids."""
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM roles WHERE organization_id = $1 ORDER BY role_id", organization_id
        )
        return [_role_of(row) for row in rows]

    async def hold(self, organization_id: str, role_ids: Sequence[str]) -> list[Role]:
        """Those of the roles that exist; none of them changes or goes before the transaction ends."""
        if not role_ids:
            return []
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM roles WHERE organization_id = $1 AND role_id = ANY ($2)"
            " ORDER BY role_id FOR SHARE",
            organization_id,
            role_ids,
        )
        return [_role_of(row) for row in rows]

    async def change(self, role: Role) -> Role:
        """Store what changed of a role that is there; gives it with its new revision."""
        row = await self._connection.fetchrow(
            "UPDATE roles SET display_name = $3, permissions = $4, update_time = $5, revision = revision + 1"
            f" WHERE organization_id = $1 AND role_id = $2 RETURNING {_COLUMNS}",
            role.organization_id,
            role.role_id,
            role.display_name,
            sorted(role.permissions),
            role.update_time,
        )
        return _role_of(found(row))

    async def is_held(self, organization_id: str, role_id: str) -> bool:
        """Whether a member or a service account holds the role."""
        held: bool = await self._connection.fetchval(
            "SELECT EXISTS (SELECT FROM memberships WHERE organization_id = $1 AND role_ids @> ARRAY[$2])"
            " OR EXISTS (SELECT FROM service_accounts"
            " WHERE organization_id = $1 AND role_ids @> ARRAY[$2] AND delete_time IS NULL)",
            organization_id,
            role_id,
        )
        return held

    async def remove(self, organization_id: str, role_id: str) -> None:
        """Remove a role."""
        await self._connection.execute(
            "DELETE FROM roles WHERE organization_id = $1 AND role_id = $2", organization_id, role_id
        )


def _role_of(row: Row) -> Role:
    return Role(
        role_id=row["role_id"],
        display_name=row["display_name"],
        permissions=frozenset(row["permissions"]),
        organization_id=row["organization_id"],
        create_time=row["create_time"],
        update_time=row["update_time"],
        revision=row["revision"],
    )
