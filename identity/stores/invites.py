"""The table of invites; it never gives a digest to anybody but the check of a token."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from datetime import datetime

from identity.invites import Invite, InviteState
from identity.stores.rows import Connection, Query, Row
from mesh.pages import TimePlace

_COLUMNS = (
    "invite_id, organization_id, email, role_ids, creator_id, user_id, create_time, expire_time, accept_time,"
    " revoke_time"
)
_OPEN = "accept_time IS NULL AND revoke_time IS NULL"
_STATES = {
    InviteState.PENDING: f"{_OPEN} AND expire_time > {{}}",
    InviteState.EXPIRED: f"{_OPEN} AND expire_time <= {{}}",
    InviteState.ACCEPTED: "accept_time <= {}",
    InviteState.REVOKED: "revoke_time <= {}",
}


class InviteRows:
    """Invites, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, invite: Invite, digest: bytes) -> bool:
        """Store a new invite with the SHA-256 of its token; False if the address has an open one."""
        row = await self._connection.fetchrow(
            "INSERT INTO invites"
            " (invite_id, organization_id, email, role_ids, digest, creator_id, create_time, expire_time)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8)"
            f" ON CONFLICT (organization_id, lower(email)) WHERE {_OPEN} DO NOTHING RETURNING invite_id",
            invite.invite_id,
            invite.organization_id,
            invite.email,
            invite.role_ids,
            digest,
            invite.creator_id,
            invite.create_time,
            invite.expire_time,
        )
        return row is not None

    async def get(self, organization_id: str, invite_id: str, *, lock: bool = False) -> Invite | None:
        """One invite, locked against other changes if asked."""
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS} FROM invites WHERE organization_id = $1 AND invite_id = $2"
            f"{' FOR NO KEY UPDATE' if lock else ''}",
            organization_id,
            invite_id,
        )
        return None if row is None else _invite_of(row)

    async def find(self, invite_id: str, *, lock: bool = False) -> tuple[Invite, bytes] | None:
        """An invite and the digest of its token. It is what finds out the organization, so it cannot name one."""
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS}, digest FROM invites WHERE invite_id = $1{' FOR NO KEY UPDATE' if lock else ''}",
            invite_id,
        )
        return None if row is None else (_invite_of(row), row["digest"])

    async def page(
        self, organization_id: str, after: TimePlace | None, limit: int, state: InviteState | None, now: datetime
    ) -> list[Invite]:
        """Invites oldest first, only those in the state at `now` where given."""
        query = Query()
        query.where("organization_id = {}", organization_id)
        if after is not None:
            query.where("(create_time, invite_id) > ({}, {})", after.create_time, after.id)
        if state is not None:
            query.where(_STATES[state], now)
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM invites WHERE {query} ORDER BY create_time, invite_id LIMIT {limit:d}",
            *query.values,
        )
        return [_invite_of(row) for row in rows]

    async def renew(self, invite: Invite, digest: bytes) -> None:
        """Store the digest of a new token, until when it is accepted and for which roles."""
        await self._connection.execute(
            "UPDATE invites SET digest = $3, expire_time = $4, role_ids = $5"
            " WHERE organization_id = $1 AND invite_id = $2",
            invite.organization_id,
            invite.invite_id,
            digest,
            invite.expire_time,
            invite.role_ids,
        )

    async def end(self, invite: Invite) -> None:
        """Store that it was accepted or revoked."""
        await self._connection.execute(
            "UPDATE invites SET user_id = $3, accept_time = $4, revoke_time = $5"
            " WHERE organization_id = $1 AND invite_id = $2",
            invite.organization_id,
            invite.invite_id,
            invite.user_id or None,
            invite.accept_time,
            invite.revoke_time,
        )


def _invite_of(row: Row) -> Invite:
    return Invite(
        invite_id=row["invite_id"],
        organization_id=row["organization_id"],
        email=row["email"],
        role_ids=tuple(row["role_ids"]),
        creator_id=row["creator_id"],
        user_id=row["user_id"] or "",
        create_time=row["create_time"],
        expire_time=row["expire_time"],
        accept_time=row["accept_time"],
        revoke_time=row["revoke_time"],
    )
