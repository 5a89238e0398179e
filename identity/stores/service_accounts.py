"""The table of service accounts; it never shows one that was removed."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from datetime import datetime

import asyncpg

from identity.service_accounts import ServiceAccount
from identity.stores.rows import Connection, Query, Row, found
from mesh.pages import TimePlace

_COLUMNS = "service_account_id, organization_id, display_name, role_ids, disabled, create_time, update_time, revision"


class ServiceAccountRows:
    """Service accounts, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, account: ServiceAccount) -> bool:
        """Store a new service account; False if its id or name is taken."""
        row = await self._connection.fetchrow(
            "INSERT INTO service_accounts"
            " (service_account_id, organization_id, display_name, role_ids, disabled, create_time, update_time)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING RETURNING service_account_id",
            account.service_account_id,
            account.organization_id,
            account.display_name,
            account.role_ids,
            account.disabled,
            account.create_time,
            account.update_time,
        )
        return row is not None

    async def get(self, organization_id: str, service_account_id: str, *, lock: bool = False) -> ServiceAccount | None:
        """One service account, locked against other changes if asked."""
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS} FROM service_accounts WHERE organization_id = $1 AND service_account_id = $2"
            f" AND delete_time IS NULL{' FOR NO KEY UPDATE' if lock else ''}",
            organization_id,
            service_account_id,
        )
        return None if row is None else _account_of(row)

    async def find_named(self, organization_id: str, display_name: str) -> ServiceAccount | None:
        """The service account of this name."""
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS} FROM service_accounts"
            " WHERE organization_id = $1 AND display_name = $2 AND delete_time IS NULL",
            organization_id,
            display_name,
        )
        return None if row is None else _account_of(row)

    async def page(self, organization_id: str, after: TimePlace | None, limit: int) -> list[ServiceAccount]:
        """Service accounts, oldest first."""
        query = Query()
        query.where("organization_id = {} AND delete_time IS NULL", organization_id)
        if after is not None:
            query.where("(create_time, service_account_id) > ({}, {})", after.create_time, after.id)
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM service_accounts WHERE {query}"
            f" ORDER BY create_time, service_account_id LIMIT {limit:d}",
            *query.values,
        )
        return [_account_of(row) for row in rows]

    async def change(self, account: ServiceAccount) -> ServiceAccount | None:
        """Store what changed of a service account that is there; None, and a lost transaction, if its name is taken."""
        try:
            row = await self._connection.fetchrow(
                "UPDATE service_accounts SET display_name = $3, role_ids = $4, disabled = $5, update_time = $6,"
                " revision = revision + 1 WHERE organization_id = $1 AND service_account_id = $2"
                f" AND delete_time IS NULL RETURNING {_COLUMNS}",
                account.organization_id,
                account.service_account_id,
                account.display_name,
                account.role_ids,
                account.disabled,
                account.update_time,
            )
        except asyncpg.UniqueViolationError:
            return None
        return _account_of(found(row))

    async def remove(self, organization_id: str, service_account_id: str, now: datetime) -> None:
        """Mark a service account as removed."""
        await self._connection.execute(
            "UPDATE service_accounts SET delete_time = $3, update_time = $3, revision = revision + 1"
            " WHERE organization_id = $1 AND service_account_id = $2 AND delete_time IS NULL",
            organization_id,
            service_account_id,
            now,
        )


def _account_of(row: Row) -> ServiceAccount:
    return ServiceAccount(
        service_account_id=row["service_account_id"],
        organization_id=row["organization_id"],
        display_name=row["display_name"],
        role_ids=tuple(row["role_ids"]),
        disabled=row["disabled"],
        create_time=row["create_time"],
        update_time=row["update_time"],
        revision=row["revision"],
    )
