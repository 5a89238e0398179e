"""The table of OAuth2 clients; it never holds a secret's text."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from datetime import datetime

from identity.oauth_clients import ClientKind, GrantType, OauthClient, RegisteredClient
from identity.organizations import OrganizationState
from identity.stores.rows import Connection, Query, Row, found
from mesh.pages import TimePlace

_COLUMNS = (
    "oauth_client_id, organization_id, display_name, kind, redirect_uris, grant_types, scopes, service_account_id,"
    " disabled, create_time, update_time, revision"
)


class OauthClientRows:
    """Clients, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, client: OauthClient, digest: bytes | None) -> None:
        """Store a new client, and its secret's digest if it has one."""
        await self._connection.execute(
            "INSERT INTO oauth_clients (oauth_client_id, organization_id, display_name, kind, redirect_uris,"
            " grant_types, scopes, service_account_id, disabled, create_time, update_time, digest)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
            client.oauth_client_id,
            client.organization_id,
            client.display_name,
            client.kind.value,
            client.redirect_uris,
            client.grant_types,
            client.scopes,
            client.service_account_id or None,
            client.disabled,
            client.create_time,
            client.update_time,
            digest,
        )

    async def get(self, organization_id: str, oauth_client_id: str, *, lock: bool = False) -> OauthClient | None:
        """One client, locked against changes and against new tokens if asked."""
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS} FROM oauth_clients WHERE organization_id = $1 AND oauth_client_id = $2"
            f"{' FOR NO KEY UPDATE' if lock else ''}",
            organization_id,
            oauth_client_id,
        )
        return None if row is None else _client_of(row)

    async def find(self, oauth_client_id: str, *, lock: bool = False) -> RegisteredClient | None:
        """A client with what decides on it, locked against changes if asked, but not against others who ask.

        It is what finds out the organization, so it cannot name one.
        """
        row = await self._connection.fetchrow(
            "SELECT c.*, o.state FROM oauth_clients c JOIN organizations o USING (organization_id)"
            f" WHERE c.oauth_client_id = $1{' FOR SHARE OF c' if lock else ''}",
            oauth_client_id,
        )
        if row is None:
            return None
        return RegisteredClient(
            client=_client_of(row),
            digest=row["digest"],
            previous_digest=row["previous_digest"],
            previous_expire_time=row["previous_expire_time"],
            organization_state=OrganizationState(row["state"]),
        )

    async def page(self, organization_id: str, after: TimePlace | None, limit: int) -> list[OauthClient]:
        """Clients oldest first."""
        query = Query()
        query.where("organization_id = {}", organization_id)
        if after is not None:
            query.where("(create_time, oauth_client_id) > ({}, {})", after.create_time, after.id)
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM oauth_clients WHERE {query} ORDER BY create_time, oauth_client_id LIMIT {limit:d}",
            *query.values,
        )
        return [_client_of(row) for row in rows]

    async def change(self, client: OauthClient) -> OauthClient:
        """Store what changed of a client that is there; gives it with its new revision."""
        row = await self._connection.fetchrow(
            "UPDATE oauth_clients SET display_name = $3, redirect_uris = $4, grant_types = $5, scopes = $6,"
            " service_account_id = $7, disabled = $8, update_time = $9, revision = revision + 1"
            f" WHERE organization_id = $1 AND oauth_client_id = $2 RETURNING {_COLUMNS}",
            client.organization_id,
            client.oauth_client_id,
            client.display_name,
            client.redirect_uris,
            client.grant_types,
            client.scopes,
            client.service_account_id or None,
            client.disabled,
            client.update_time,
        )
        return _client_of(found(row))

    async def rotate(
        self, client: OauthClient, digest: bytes, previous_expire_time: datetime, now: datetime
    ) -> OauthClient:
        """Store a new secret's digest; the one there becomes the previous one."""
        row = await self._connection.fetchrow(
            "UPDATE oauth_clients SET previous_digest = digest, previous_expire_time = $4, digest = $3,"
            " update_time = $5, revision = revision + 1"
            f" WHERE organization_id = $1 AND oauth_client_id = $2 RETURNING {_COLUMNS}",
            client.organization_id,
            client.oauth_client_id,
            digest,
            previous_expire_time,
            now,
        )
        return _client_of(found(row))

    async def remove(self, organization_id: str, oauth_client_id: str) -> None:
        """Remove a client, and everything that came of it."""
        await self._connection.execute(
            "DELETE FROM oauth_clients WHERE organization_id = $1 AND oauth_client_id = $2",
            organization_id,
            oauth_client_id,
        )


def _client_of(row: Row) -> OauthClient:
    return OauthClient(
        oauth_client_id=row["oauth_client_id"],
        organization_id=row["organization_id"],
        display_name=row["display_name"],
        kind=ClientKind(row["kind"]),
        redirect_uris=tuple(row["redirect_uris"]),
        grant_types=tuple(map(GrantType, row["grant_types"])),
        scopes=tuple(row["scopes"]),
        service_account_id=row["service_account_id"] or "",
        disabled=row["disabled"],
        create_time=row["create_time"],
        update_time=row["update_time"],
        revision=row["revision"],
    )
