"""The table of API keys; it never gives a digest to anybody but the check of a credential."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from identity.api_keys import ApiKey, ApiKeyState
from identity.stores.rows import Connection, Query, Row, found, limits_from_json, limits_to_json
from mesh.pages import TimePlace

_COLUMNS = (
    "api_key_id, organization_id, display_name, service_account_id, user_id, scopes, granted, allowed_models,"
    " allowed_networks, rate_limits, creator_id, expire_time, create_time, last_use_time, revoke_time, revision"
)
_STATES = {
    ApiKeyState.ACTIVE: "revoke_time IS NULL AND (expire_time IS NULL OR expire_time > {})",
    ApiKeyState.EXPIRED: "revoke_time IS NULL AND expire_time <= {}",
    ApiKeyState.REVOKED: "revoke_time IS NOT NULL",
}


class ApiKeyRows:
    """API keys, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, key: ApiKey, digest: bytes) -> None:
        """Store a new key with the SHA-256 of its text."""
        await self._connection.execute(
            "INSERT INTO api_keys (api_key_id, organization_id, display_name, service_account_id, user_id, scopes,"
            " granted, allowed_models, allowed_networks, rate_limits, creator_id, expire_time, create_time, digest)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
            key.api_key_id,
            key.organization_id,
            key.display_name,
            key.service_account_id or None,
            key.user_id or None,
            key.scopes,
            sorted(key.granted),
            key.allowed_models,
            key.allowed_networks,
            limits_to_json(key.rate_limits),
            key.creator_id,
            key.expire_time,
            key.create_time,
            digest,
        )

    async def get(self, organization_id: str, api_key_id: str, *, lock: bool = False) -> ApiKey | None:
        """One key, locked against other changes if asked."""
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS} FROM api_keys WHERE organization_id = $1 AND api_key_id = $2"
            f"{' FOR NO KEY UPDATE' if lock else ''}",
            organization_id,
            api_key_id,
        )
        return None if row is None else key_of(row)

    async def page(
        self,
        organization_id: str,
        after: TimePlace | None,
        limit: int,
        *,
        state: ApiKeyState | None,
        now: datetime,
        service_account_id: str,
        user_id: str,
    ) -> list[ApiKey]:
        """Keys oldest first, only those in the state at `now` and of the owner that are given."""
        query = Query()
        query.where("organization_id = {}", organization_id)
        if after is not None:
            query.where("(create_time, api_key_id) > ({}, {})", after.create_time, after.id)
        if state is not None:
            query.where(_STATES[state], *([] if state is ApiKeyState.REVOKED else [now]))
        if service_account_id:
            query.where("service_account_id = {}", service_account_id)
        if user_id:
            query.where("user_id = {}", user_id)
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM api_keys WHERE {query} ORDER BY create_time, api_key_id LIMIT {limit:d}",
            *query.values,
        )
        return [key_of(row) for row in rows]

    async def list_by_creator(self, organization_id: str, creator_id: str) -> list[ApiKey]:
        """Every key that this principal made, oldest first."""
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM api_keys WHERE organization_id = $1 AND creator_id = $2"
            " ORDER BY create_time, api_key_id",
            organization_id,
            creator_id,
        )
        return [key_of(row) for row in rows]

    async def change(self, key: ApiKey) -> ApiKey:
        """Store what changed of a key that is there; gives it with its new revision."""
        row = await self._connection.fetchrow(
            "UPDATE api_keys SET display_name = $3, scopes = $4, granted = $5, allowed_models = $6,"
            " allowed_networks = $7, rate_limits = $8, expire_time = $9, revoke_time = $10, revision = revision + 1"
            f" WHERE organization_id = $1 AND api_key_id = $2 RETURNING {_COLUMNS}",
            key.organization_id,
            key.api_key_id,
            key.display_name,
            key.scopes,
            sorted(key.granted),
            key.allowed_models,
            key.allowed_networks,
            limits_to_json(key.rate_limits),
            key.expire_time,
            key.revoke_time,
        )
        return key_of(found(row))

    async def rotate(
        self, organization_id: str, api_key_id: str, digest: bytes, previous_expire_time: datetime
    ) -> ApiKey:
        """Store the digest of a key's new text; the one it replaces is kept until it expires."""
        row = await self._connection.fetchrow(
            "UPDATE api_keys SET previous_digest = digest, previous_expire_time = $4, digest = $3,"
            f" revision = revision + 1 WHERE organization_id = $1 AND api_key_id = $2 RETURNING {_COLUMNS}",
            organization_id,
            api_key_id,
            digest,
            previous_expire_time,
        )
        return key_of(found(row))

    async def revoke_of_user(self, organization_id: str, user_id: str, now: datetime) -> None:
        """Revoke every key that acts as this user in the organization."""
        await self._connection.execute(
            "UPDATE api_keys SET revoke_time = $3, revision = revision + 1"
            " WHERE organization_id = $1 AND user_id = $2 AND revoke_time IS NULL",
            organization_id,
            user_id,
            now,
        )

    async def revoke_of_service_account(self, organization_id: str, service_account_id: str, now: datetime) -> None:
        """Revoke every key that acts as this service account."""
        await self._connection.execute(
            "UPDATE api_keys SET revoke_time = $3, revision = revision + 1"
            " WHERE organization_id = $1 AND service_account_id = $2 AND revoke_time IS NULL",
            organization_id,
            service_account_id,
            now,
        )

    async def set_last_uses(self, uses: Mapping[tuple[str, str], datetime]) -> None:
        """Store when keys, each by (organization id, key id), were last used; an older use changes nothing."""
        await self._connection.execute(
            "UPDATE api_keys k SET last_use_time = used.at"
            " FROM unnest($1::text[], $2::text[], $3::timestamptz[]) AS used (organization_id, api_key_id, at)"
            " WHERE k.organization_id = used.organization_id AND k.api_key_id = used.api_key_id"
            " AND (k.last_use_time IS NULL OR k.last_use_time < used.at)",
            [organization_id for organization_id, _ in uses],
            [api_key_id for _, api_key_id in uses],
            list(uses.values()),
        )


def key_of(row: Row) -> ApiKey:
    """The key of a row."""
    return ApiKey(
        api_key_id=row["api_key_id"],
        organization_id=row["organization_id"],
        display_name=row["display_name"],
        service_account_id=row["service_account_id"] or "",
        user_id=row["user_id"] or "",
        scopes=tuple(row["scopes"]),
        granted=frozenset(row["granted"]),
        allowed_models=tuple(row["allowed_models"]),
        allowed_networks=tuple(row["allowed_networks"]),
        rate_limits=limits_from_json(row["rate_limits"]),
        creator_id=row["creator_id"],
        expire_time=row["expire_time"],
        create_time=row["create_time"],
        last_use_time=row["last_use_time"],
        revoke_time=row["revoke_time"],
        revision=row["revision"],
    )
