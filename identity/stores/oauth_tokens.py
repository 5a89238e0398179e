"""The table of OAuth2 tokens, found with all that decides on them; it never decides itself.

What finds a token is its id, which knows no organization.
"""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from datetime import datetime

from identity.oauth_tokens import OauthToken, StoredToken
from identity.organizations import OrganizationState
from identity.stores.credentials import CUSTOM, HOLDERS, POLICY_BOUND, holder_of
from identity.stores.rows import Connection, limits_from_json
from mesh.database import Database

_OF_TOKEN = {"organization": "t.organization_id", "service_account": "t.service_account_id", "user": "t.user_id"}
_FIND = (
    "SELECT t.*, a.revoke_time IS NOT NULL OR g.revoke_time IS NOT NULL AS chain_revoked,"
    " c.disabled AS client_disabled, c.scopes AS client_scopes, o.state, o.rate_limits AS organization_limits,"
    " o.allowed_models AS organization_models, h.role_ids, h.acting, c2.custom_permissions,"
    f" {POLICY_BOUND} AS policy_bound"
    " FROM oauth_tokens t JOIN oauth_clients c USING (oauth_client_id)"
    " JOIN organizations o ON o.organization_id = t.organization_id"
    " LEFT JOIN oauth_authorizations a ON a.oauth_authorization_id = t.oauth_authorization_id"
    " LEFT JOIN oauth_grants g ON g.oauth_grant_id = a.oauth_grant_id"
    f" LEFT JOIN LATERAL ({HOLDERS}) h ON true LEFT JOIN LATERAL ({CUSTOM}) c2 ON true WHERE t.oauth_token_id = $1"
).format(**_OF_TOKEN)


class OauthTokenRows:
    """Tokens, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, token: OauthToken) -> None:
        """Store a new token."""
        await self._connection.execute(
            "INSERT INTO oauth_tokens (oauth_token_id, organization_id, oauth_client_id, oauth_authorization_id,"
            " user_id, service_account_id, digest, scopes, create_time, expire_time)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            token.oauth_token_id,
            token.organization_id,
            token.oauth_client_id,
            token.oauth_authorization_id or None,
            token.user_id or None,
            token.service_account_id or None,
            token.digest,
            token.scopes,
            token.create_time,
            token.expire_time,
        )

    async def find(self, oauth_token_id: str) -> StoredToken | None:
        """A token with all that decides on it."""
        return await find_token(self._connection, oauth_token_id)

    async def lock(self, oauth_token_id: str) -> bool:
        """Wait until nobody else uses the token, and keep others waiting until the transaction ends; False without
        one. What is read afterwards is as the one before left it."""
        row = await self._connection.fetchrow(
            "SELECT FROM oauth_tokens WHERE oauth_token_id = $1 FOR UPDATE", oauth_token_id
        )
        return row is not None

    async def use(self, oauth_token_id: str, now: datetime) -> None:
        """Note that a refresh token was exchanged."""
        await self._connection.execute(
            "UPDATE oauth_tokens SET use_time = $2 WHERE oauth_token_id = $1", oauth_token_id, now
        )

    async def revoke(self, oauth_token_id: str, now: datetime) -> None:
        """End one token."""
        await self._connection.execute(
            "UPDATE oauth_tokens SET revoke_time = $2 WHERE oauth_token_id = $1 AND revoke_time IS NULL",
            oauth_token_id,
            now,
        )

    async def revoke_of_client(self, oauth_client_id: str, now: datetime) -> None:
        """End all tokens and codes of a client that was found for its organization."""
        for table in ("oauth_authorizations", "oauth_tokens"):
            await self._connection.execute(
                f"UPDATE {table} SET revoke_time = $2 WHERE oauth_client_id = $1 AND revoke_time IS NULL",
                oauth_client_id,
                now,
            )

    async def forget_until(self, moment: datetime) -> None:
        """Remove what had expired by then."""
        await self._connection.execute("DELETE FROM oauth_authorizations WHERE expire_time < $1", moment)
        await self._connection.execute("DELETE FROM oauth_tokens WHERE expire_time < $1", moment)


async def find_token(source: Database | Connection, oauth_token_id: str) -> StoredToken | None:
    """A token with all that decides on it, in one query."""
    row = await source.fetchrow(_FIND, oauth_token_id)
    if row is None:
        return None
    return StoredToken(
        token=OauthToken(
            oauth_token_id=row["oauth_token_id"],
            organization_id=row["organization_id"],
            oauth_client_id=row["oauth_client_id"],
            oauth_authorization_id=row["oauth_authorization_id"] or "",
            user_id=row["user_id"] or "",
            service_account_id=row["service_account_id"] or "",
            digest=row["digest"],
            scopes=tuple(row["scopes"]),
            create_time=row["create_time"],
            expire_time=row["expire_time"],
            use_time=row["use_time"],
            revoke_time=row["revoke_time"],
        ),
        chain_revoked=row["chain_revoked"],
        client_disabled=row["client_disabled"],
        client_scopes=tuple(row["client_scopes"]),
        organization_state=OrganizationState(row["state"]),
        organization_limits=limits_from_json(row["organization_limits"]),
        organization_models=tuple(row["organization_models"]),
        holder=None if row["role_ids"] is None else holder_of(row),
        policy_bound=row["policy_bound"],
    )
