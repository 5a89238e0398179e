"""The tables of sessions and of challenges, and what decides on a session in one query; it never decides itself."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from identity.organizations import OrganizationState
from identity.sessions import Challenge, Session, StoredSession
from identity.stores.credentials import CUSTOM, HOLDERS, POLICY_BOUND, holder_of
from identity.stores.rows import Connection, Row, limits_from_json
from mesh.database import Database
from mesh.pages import TimePlace

_COLUMNS = (
    "session_id, organization_id, user_id, multi_factor, issuer_id, client_address, user_agent, create_time,"
    " last_use_time, expire_time"
)
_FIND = (
    "SELECT s.*, o.state, o.rate_limits AS organization_limits, o.allowed_models AS organization_models,"
    " h.role_ids, h.acting, c.custom_permissions, s.issuer_id IS NOT NULL AND i.issuer_id IS NULL AS issuer_disabled,"
    " EXISTS (SELECT FROM mfa_requirements r WHERE r.organization_id = s.organization_id"
    " AND (r.everyone OR r.role_ids && h.role_ids)) AS mfa_required,"
    f" {POLICY_BOUND} AS policy_bound"
    " FROM sessions s JOIN organizations o USING (organization_id)"
    " LEFT JOIN issuers i ON i.issuer_id = s.issuer_id AND NOT i.disabled"
    f" LEFT JOIN LATERAL ({HOLDERS}) h ON true LEFT JOIN LATERAL ({CUSTOM}) c ON true WHERE s.session_id = $1"
).format(organization="s.organization_id", service_account="NULL", user="s.user_id")


class SessionRows:
    """Sessions, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, session: Session, digest: bytes) -> None:
        """Store a new session with the SHA-256 of its token."""
        await self._connection.execute(
            f"INSERT INTO sessions ({_COLUMNS}, digest) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
            session.session_id,
            session.organization_id,
            session.user_id,
            session.multi_factor,
            session.issuer_id or None,
            session.client_address,
            session.user_agent,
            session.create_time,
            session.last_use_time,
            session.expire_time,
            digest,
        )

    async def get(self, session_id: str) -> Session | None:
        """One session that was not ended."""
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS} FROM sessions WHERE session_id = $1 AND end_time IS NULL", session_id
        )
        return None if row is None else _session_of(row)

    async def page(
        self, user_id: str, before: TimePlace | None, limit: int, now: datetime, used_after: datetime
    ) -> list[Session]:
        """A user's sessions that are still accepted, newest first."""
        place = ("(create_time, session_id) < ($4, $5) AND ", before.create_time, before.id) if before else ("",)
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM sessions WHERE {place[0]}"
            "user_id = $1 AND end_time IS NULL AND expire_time > $2 AND last_use_time > $3"
            f" ORDER BY create_time DESC, session_id DESC LIMIT {limit:d}",
            user_id,
            now,
            used_after,
            *place[1:],
        )
        return [_session_of(row) for row in rows]

    async def last_organization_id(self, user_id: str) -> str | None:
        """Where a user acted last, and may act now; else the first of its organizations where it may."""
        organization_id: str | None = await self._connection.fetchval(
            "SELECT m.organization_id FROM memberships m JOIN organizations o USING (organization_id)"
            " LEFT JOIN LATERAL (SELECT max(last_use_time) AS last FROM sessions s"
            " WHERE s.user_id = m.user_id AND s.organization_id = m.organization_id) s ON true"
            " WHERE m.user_id = $1 AND o.state = 'active' ORDER BY s.last DESC NULLS LAST, m.create_time LIMIT 1",
            user_id,
        )
        return organization_id

    async def end(
        self,
        user_id: str,
        now: datetime,
        *,
        session_id: str = "",
        organization_id: str = "",
        issuer_id: str = "",
        but_session_id: str = "",
    ) -> int:
        """End sessions of a user: one, those in an organization, those of an issuer, all but one; gives how many."""
        ended = await self._connection.fetch(
            "UPDATE sessions SET end_time = $2 WHERE user_id = $1 AND end_time IS NULL AND $3 IN ('', session_id)"
            " AND $4 IN ('', organization_id) AND ($5 = '' OR issuer_id = $5) AND session_id <> $6"
            " RETURNING session_id",
            user_id,
            now,
            session_id,
            organization_id,
            issuer_id,
            but_session_id,
        )
        return len(ended)

    async def pass_mfa(self, session_id: str) -> None:
        """A second factor was proven in a session."""
        await self._connection.execute("UPDATE sessions SET multi_factor = true WHERE session_id = $1", session_id)

    async def set_last_uses(self, uses: Mapping[str, datetime]) -> None:
        """Note when sessions were used last, by their ids."""
        await self._connection.execute(
            "UPDATE sessions SET last_use_time = used.last_use_time"
            " FROM unnest($1::text[], $2::timestamptz[]) AS used (session_id, last_use_time)"
            " WHERE sessions.session_id = used.session_id AND sessions.last_use_time < used.last_use_time",
            list(uses),
            list(uses.values()),
        )

    async def forget_until(self, moment: datetime) -> None:
        """Remove sessions that were over by then."""
        await self._connection.execute("DELETE FROM sessions WHERE expire_time < $1", moment)


class ChallengeRows:
    """Sign-ins that wait for a second factor, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, challenge: Challenge, digest: bytes) -> None:
        """Store a new challenge with the SHA-256 of its token."""
        await self._connection.execute(
            "INSERT INTO challenges (challenge_id, organization_id, user_id, issuer_id, expire_time, digest)"
            " VALUES ($1, $2, $3, $4, $5, $6)",
            challenge.challenge_id,
            challenge.organization_id,
            challenge.user_id,
            challenge.issuer_id or None,
            challenge.expire_time,
            digest,
        )

    async def attempt(self, challenge_id: str, now: datetime, most: int) -> tuple[Challenge, bytes] | None:
        """A challenge that is not over and its digest, with one attempt more; None where there were `most` already."""
        row = await self._connection.fetchrow(
            "UPDATE challenges SET attempts = attempts + 1"
            " WHERE challenge_id = $1 AND expire_time > $2 AND attempts < $3 RETURNING *",
            challenge_id,
            now,
            most,
        )
        if row is None:
            return None
        return Challenge(
            row["challenge_id"], row["organization_id"], row["user_id"], row["issuer_id"] or "", row["expire_time"]
        ), row["digest"]

    async def remove(self, challenge_id: str) -> bool:
        """Remove a challenge; False if it is gone."""
        removed = await self._connection.fetchrow(
            "DELETE FROM challenges WHERE challenge_id = $1 RETURNING challenge_id", challenge_id
        )
        return removed is not None

    async def remove_of_user(self, user_id: str) -> None:
        """Remove all of a user."""
        await self._connection.execute("DELETE FROM challenges WHERE user_id = $1", user_id)

    async def forget_until(self, moment: datetime) -> None:
        """Remove challenges that were over by then."""
        await self._connection.execute("DELETE FROM challenges WHERE expire_time < $1", moment)


async def find_session(database: Database, session_id: str) -> StoredSession | None:
    """All that decides on a session. It is what finds out the organization, so it cannot name one."""
    row = await database.fetchrow(_FIND, session_id)
    if row is None:
        return None
    return StoredSession(
        session=_session_of(row),
        digest=row["digest"],
        ended=row["end_time"] is not None,
        organization_state=OrganizationState(row["state"]),
        organization_limits=limits_from_json(row["organization_limits"]),
        organization_models=tuple(row["organization_models"]),
        holder=None if row["role_ids"] is None else holder_of(row),
        issuer_disabled=row["issuer_disabled"],
        mfa_required=row["mfa_required"],
        policy_bound=row["policy_bound"],
    )


def _session_of(row: Row) -> Session:
    return Session(
        session_id=row["session_id"],
        organization_id=row["organization_id"],
        user_id=row["user_id"],
        multi_factor=row["multi_factor"],
        issuer_id=row["issuer_id"] or "",
        client_address=row["client_address"],
        user_agent=row["user_agent"],
        create_time=row["create_time"],
        last_use_time=row["last_use_time"],
        expire_time=row["expire_time"],
    )
