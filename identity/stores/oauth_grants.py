"""The tables of what users allowed clients, and of the sign-ins by which tokens come of it; it never decides."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from datetime import datetime

from identity.oauth_authorizations import OauthAuthorization
from identity.oauth_clients import OauthClient
from identity.oauth_grants import OauthGrant
from identity.stores.rows import Connection, Query, Row, found
from mesh.pages import TimePlace

_GRANTS = "SELECT g.*, c.display_name FROM oauth_grants g JOIN oauth_clients c USING (oauth_client_id)"


class OauthGrantRows:
    """Grants, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def standing(self, oauth_client_id: str, user_id: str) -> tuple[str, tuple[str, ...]]:
        """Id and scopes of the grant that stands between a client, whose organization is known, and a user."""
        row = await self._connection.fetchrow(
            "SELECT oauth_grant_id, scopes FROM oauth_grants"
            " WHERE oauth_client_id = $1 AND user_id = $2 AND revoke_time IS NULL",
            oauth_client_id,
            user_id,
        )
        return ("", ()) if row is None else (row["oauth_grant_id"], tuple(row["scopes"]))

    async def give(
        self, oauth_grant_id: str, client: OauthClient, user_id: str, scopes: tuple[str, ...], now: datetime
    ) -> str:
        """Store what a user allows; gives the id of the grant, which is that of the one that stands if there is one."""
        row = await self._connection.fetchrow(
            "INSERT INTO oauth_grants (oauth_grant_id, organization_id, oauth_client_id, user_id, scopes, create_time)"
            " VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (oauth_client_id, user_id) WHERE revoke_time IS NULL"
            " DO UPDATE SET scopes = excluded.scopes RETURNING oauth_grant_id",
            oauth_grant_id,
            client.organization_id,
            client.oauth_client_id,
            user_id,
            scopes,
            now,
        )
        given: str = found(row)["oauth_grant_id"]
        return given

    async def get(
        self, organization_id: str, user_id: str, oauth_grant_id: str, *, lock: bool = False
    ) -> OauthGrant | None:
        """One grant of a user, locked if asked."""
        row = await self._connection.fetchrow(
            f"{_GRANTS} WHERE g.organization_id = $1 AND g.user_id = $2 AND g.oauth_grant_id = $3"
            f"{' FOR NO KEY UPDATE OF g' if lock else ''}",
            organization_id,
            user_id,
            oauth_grant_id,
        )
        return None if row is None else _grant_of(row)

    async def page(self, organization_id: str, user_id: str, before: TimePlace | None, limit: int) -> list[OauthGrant]:
        """Grants of a user, newest first."""
        query = Query()
        query.where("g.organization_id = {} AND g.user_id = {}", organization_id, user_id)
        if before is not None:
            query.where("(g.create_time, g.oauth_grant_id) < ({}, {})", before.create_time, before.id)
        rows = await self._connection.fetch(
            f"{_GRANTS} WHERE {query} ORDER BY g.create_time DESC, g.oauth_grant_id DESC LIMIT {limit:d}", *query.values
        )
        return [_grant_of(row) for row in rows]

    async def note_use(self, oauth_grant_id: str, now: datetime) -> bool:
        """Note that a token is made, for a grant that was found by its token; False if it was taken back."""
        row = await self._connection.fetchrow(
            "UPDATE oauth_grants SET last_use_time = $2 WHERE oauth_grant_id = $1 AND revoke_time IS NULL"
            " RETURNING oauth_grant_id",
            oauth_grant_id,
            now,
        )
        return row is not None

    async def revoke(self, oauth_grant_id: str, now: datetime) -> None:
        """Take a grant back that was found for its user."""
        await self._connection.execute(
            "UPDATE oauth_grants SET revoke_time = $2 WHERE oauth_grant_id = $1", oauth_grant_id, now
        )


class OauthAuthorizationRows:
    """Authorizations, within a transaction. What finds one is the code or token, which knows no organization."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, authorization: OauthAuthorization) -> None:
        """Store a new authorization, whose code is not used."""
        await self._connection.execute(
            "INSERT INTO oauth_authorizations (oauth_authorization_id, organization_id, oauth_client_id,"
            " oauth_grant_id, user_id, digest, redirect_uri, code_challenge, nonce, scopes, auth_time, create_time,"
            " expire_time) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
            authorization.oauth_authorization_id,
            authorization.organization_id,
            authorization.oauth_client_id,
            authorization.oauth_grant_id,
            authorization.user_id,
            authorization.digest,
            authorization.redirect_uri,
            authorization.code_challenge,
            authorization.nonce,
            authorization.scopes,
            authorization.auth_time,
            authorization.create_time,
            authorization.expire_time,
        )

    async def find(self, oauth_authorization_id: str, *, lock: bool = False) -> OauthAuthorization | None:
        """One authorization, locked if asked, so that the uses of one code take turns."""
        row = await self._connection.fetchrow(
            f"SELECT * FROM oauth_authorizations WHERE oauth_authorization_id = $1{' FOR UPDATE' if lock else ''}",
            oauth_authorization_id,
        )
        if row is None:
            return None
        return OauthAuthorization(**{**row, "scopes": tuple(row["scopes"])})

    async def use(self, oauth_authorization_id: str, now: datetime, expire_time: datetime) -> bool:
        """Note that the code is used, and until when its family lasts; False if it was used before."""
        row = await self._connection.fetchrow(
            "UPDATE oauth_authorizations SET use_time = $2, expire_time = $3"
            " WHERE oauth_authorization_id = $1 AND use_time IS NULL RETURNING oauth_authorization_id",
            oauth_authorization_id,
            now,
            expire_time,
        )
        return row is not None

    async def revoke(self, oauth_authorization_id: str, now: datetime) -> None:
        """End a family, and every token of it."""
        await self._connection.execute(
            "UPDATE oauth_authorizations SET revoke_time = $2"
            " WHERE oauth_authorization_id = $1 AND revoke_time IS NULL",
            oauth_authorization_id,
            now,
        )

    async def revoke_of_user(self, organization_id: str, user_id: str, now: datetime) -> None:
        """End all families of a user in an organization."""
        await self._connection.execute(
            "UPDATE oauth_authorizations SET revoke_time = $3"
            " WHERE organization_id = $1 AND user_id = $2 AND revoke_time IS NULL",
            organization_id,
            user_id,
            now,
        )


def _grant_of(row: Row) -> OauthGrant:
    return OauthGrant(
        oauth_grant_id=row["oauth_grant_id"],
        organization_id=row["organization_id"],
        oauth_client_id=row["oauth_client_id"],
        client_display_name=row["display_name"],
        user_id=row["user_id"],
        scopes=tuple(row["scopes"]),
        create_time=row["create_time"],
        last_use_time=row["last_use_time"],
        revoke_time=row["revoke_time"],
    )
