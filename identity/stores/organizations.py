"""The table of organizations; it never decides who sees one, nor when one goes."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from datetime import datetime

from identity.organizations import Organization, OrganizationState
from identity.stores.rows import Connection, Query, Row, found, limits_from_json, limits_to_json
from mesh.pages import TimePlace

_COLUMNS = (
    "organization_id, display_name, state, rate_limits, allowed_models, create_time, update_time, purge_time, revision"
)
# Who did what, and that the organization was deleted, is to be known afterwards.
_KEPT = "audit%"
_TABLES = """
    SELECT columns.table_name FROM information_schema.columns JOIN information_schema.tables USING
        (table_schema, table_name)
    WHERE table_schema = 'public' AND column_name = 'organization_id' AND table_type = 'BASE TABLE'
        AND table_name <> 'organizations' AND table_name NOT LIKE $1
"""
# Those of its tables that do not say themselves whose their rows are.
_BUDGETS = "(SELECT budget_id FROM budgets WHERE organization_id = $1)"
_LEASES = "(SELECT budget_lease_id FROM budget_leases WHERE organization_id = $1)"


class OrganizationRows:
    """Organizations, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, organization: Organization) -> bool:
        """Store a new organization; False if its id is taken."""
        row = await self._connection.fetchrow(
            "INSERT INTO organizations"
            " (organization_id, display_name, state, rate_limits, allowed_models, create_time, update_time)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING RETURNING organization_id",
            organization.organization_id,
            organization.display_name,
            organization.state.value,
            limits_to_json(organization.rate_limits),
            organization.allowed_models,
            organization.create_time,
            organization.update_time,
        )
        return row is not None

    async def get(self, organization_id: str, *, lock: bool = False) -> Organization | None:
        """One organization, locked against other changes if asked."""
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS} FROM organizations WHERE organization_id = $1{' FOR NO KEY UPDATE' if lock else ''}",
            organization_id,
        )
        return None if row is None else organization_of(row)

    async def page(
        self, after: TimePlace | None, limit: int, state: OrganizationState | None, only: str | None
    ) -> list[Organization]:
        """Organizations oldest first, in one state, only one of them where given."""
        query = Query()
        if after is not None:
            query.where("(create_time, organization_id) > ({}, {})", after.create_time, after.id)
        if state is not None:
            query.where("state = {}", state.value)
        if only is not None:
            query.where("organization_id = {}", only)
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM organizations WHERE {query} ORDER BY create_time, organization_id LIMIT {limit:d}",
            *query.values,
        )
        return [organization_of(row) for row in rows]

    async def change(self, organization: Organization) -> Organization:
        """Store what changed of an organization that is there; gives it with its new revision."""
        row = await self._connection.fetchrow(
            "UPDATE organizations SET display_name = $2, state = $3, rate_limits = $4, allowed_models = $5,"
            " update_time = $6, purge_time = $7, revision = revision + 1 WHERE organization_id = $1"
            f" RETURNING {_COLUMNS}",
            organization.organization_id,
            organization.display_name,
            organization.state.value,
            limits_to_json(organization.rate_limits),
            organization.allowed_models,
            organization.update_time,
            organization.purge_time,
        )
        return organization_of(found(row))

    async def list_due(self, now: datetime) -> list[str]:
        """Ids of the organizations whose data is to go."""
        rows = await self._connection.fetch(
            "SELECT organization_id FROM organizations WHERE purge_time <= $1 ORDER BY purge_time", now
        )
        return [row["organization_id"] for row in rows]

    async def purge(self, organization_id: str, now: datetime) -> bool:
        """Remove an organization that is due and every row of it, in whichever table; False if it is not due any more
        or somebody else is at it."""
        due = await self._connection.fetchrow(
            "SELECT FROM organizations WHERE organization_id = $1 AND purge_time <= $2 FOR UPDATE SKIP LOCKED",
            organization_id,
            now,
        )
        if due is None:
            return False
        tables = [row["table_name"] for row in await self._connection.fetch(_TABLES, _KEPT)]
        # One statement, at whose end alone it matters what refers to what.
        deletions = [
            f"DELETE FROM budget_lease_lines WHERE budget_lease_id IN {_LEASES}",
            f"DELETE FROM budget_periods WHERE budget_id IN {_BUDGETS}",
            *(f"DELETE FROM {table} WHERE organization_id = $1" for table in tables),
        ]
        steps = ", ".join(f"step_{number} AS ({deletion})" for number, deletion in enumerate(deletions))
        await self._connection.execute(
            f"WITH {steps} DELETE FROM organizations WHERE organization_id = $1", organization_id
        )
        return True


def organization_of(row: Row) -> Organization:
    """The organization of a row."""
    return Organization(
        organization_id=row["organization_id"],
        display_name=row["display_name"],
        state=OrganizationState(row["state"]),
        rate_limits=limits_from_json(row["rate_limits"]),
        allowed_models=tuple(row["allowed_models"]),
        create_time=row["create_time"],
        update_time=row["update_time"],
        purge_time=row["purge_time"],
        revision=row["revision"],
    )
