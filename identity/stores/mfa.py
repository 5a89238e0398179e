"""The tables of second factors, of recovery codes and of what organizations require; it never opens a sealed secret."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

from identity.mfa import Enrollment, MfaRequirement, Totp
from identity.stores.rows import Connection, Row, found


class TotpRows:
    """TOTP secrets in use, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get(self, user_id: str) -> Totp | None:
        """The one that a user has in use."""
        row = await self._connection.fetchrow(
            "SELECT user_id, sealed_secret, last_step, enable_time FROM totps WHERE user_id = $1", user_id
        )
        return None if row is None else Totp(**row)

    async def put(self, totp: Totp) -> None:
        """Store one in the place of any that is there."""
        await self._connection.execute(
            "INSERT INTO totps (user_id, sealed_secret, last_step, enable_time) VALUES ($1, $2, $3, $4)"
            " ON CONFLICT (user_id) DO UPDATE SET sealed_secret = excluded.sealed_secret,"
            " last_step = excluded.last_step, enable_time = excluded.enable_time, attempts = 0, attempts_since = NULL",
            totp.user_id,
            totp.sealed_secret,
            totp.last_step,
            totp.enable_time,
        )

    async def use_step(self, totp: Totp, step: int) -> bool:
        """Take a time step, and any before it, out of use; False if it is already, or the secret is another by now.

        Of transactions at the same time one succeeds: the others wait for its row and find the step used.
        """
        row = await self._connection.fetchrow(
            "UPDATE totps SET last_step = $3, attempts = 0 WHERE user_id = $1 AND sealed_secret = $2 AND last_step < $3"
            " RETURNING user_id",
            totp.user_id,
            totp.sealed_secret,
            step,
        )
        return row is not None

    async def count_attempt(self, user_id: str, now: datetime, since: datetime) -> int:
        """Which attempt this one is of those that began after `since` and did not succeed; 0 for who has no TOTP."""
        count: int | None = await self._connection.fetchval(
            "UPDATE totps SET attempts = CASE WHEN attempts_since > $3 THEN attempts + 1 ELSE 1 END,"
            " attempts_since = CASE WHEN attempts_since > $3 THEN attempts_since ELSE $2 END"
            " WHERE user_id = $1 RETURNING attempts",
            user_id,
            now,
            since,
        )
        return count or 0

    async def forget_attempts(self, user_id: str) -> None:
        """Begin to count anew."""
        await self._connection.execute("UPDATE totps SET attempts = 0 WHERE user_id = $1", user_id)

    async def remove(self, user_id: str) -> None:
        """Remove a user's, if there is one."""
        await self._connection.execute("DELETE FROM totps WHERE user_id = $1", user_id)


class EnrollmentRows:
    """TOTP secrets that wait for their first code, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def put(self, enrollment: Enrollment) -> None:
        """Store one in the place of any that is there."""
        await self._connection.execute(
            "INSERT INTO totp_enrollments (user_id, sealed_secret, expire_time) VALUES ($1, $2, $3)"
            " ON CONFLICT (user_id) DO UPDATE SET sealed_secret = excluded.sealed_secret,"
            " expire_time = excluded.expire_time",
            enrollment.user_id,
            enrollment.sealed_secret,
            enrollment.expire_time,
        )

    async def take(self, user_id: str) -> Enrollment | None:
        """Remove a user's and give it."""
        row = await self._connection.fetchrow(
            "DELETE FROM totp_enrollments WHERE user_id = $1 RETURNING user_id, sealed_secret, expire_time", user_id
        )
        return None if row is None else Enrollment(**row)


class RecoveryCodeRows:
    """Digests of recovery codes that were not used yet, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def put(self, user_id: str, digests: Collection[bytes]) -> None:
        """Store these in the place of those that are there."""
        await self._connection.execute("DELETE FROM recovery_codes WHERE user_id = $1", user_id)
        await self._connection.executemany(
            "INSERT INTO recovery_codes (user_id, digest) VALUES ($1, $2)", [(user_id, digest) for digest in digests]
        )

    async def use(self, user_id: str, digest: bytes) -> bool:
        """Remove one; False if it is not there."""
        row = await self._connection.fetchrow(
            "DELETE FROM recovery_codes WHERE user_id = $1 AND digest = $2 RETURNING user_id", user_id, digest
        )
        return row is not None

    async def count(self, user_id: str) -> int:
        """How many a user has left."""
        count: int = await self._connection.fetchval("SELECT count(*) FROM recovery_codes WHERE user_id = $1", user_id)
        return count


class MfaRequirementRows:
    """Whom organizations require to use MFA, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get(self, organization_id: str) -> MfaRequirement | None:
        """An organization's."""
        row = await self._connection.fetchrow(
            "SELECT * FROM mfa_requirements WHERE organization_id = $1", organization_id
        )
        return None if row is None else _requirement_of(row)

    async def put(self, requirement: MfaRequirement) -> MfaRequirement:
        """Store one in the place of any that is there; gives it with its new revision."""
        row = await self._connection.fetchrow(
            "INSERT INTO mfa_requirements (organization_id, everyone, role_ids, update_time) VALUES ($1, $2, $3, $4)"
            " ON CONFLICT (organization_id) DO UPDATE SET everyone = excluded.everyone, role_ids = excluded.role_ids,"
            " update_time = excluded.update_time, revision = mfa_requirements.revision + 1 RETURNING *",
            requirement.organization_id,
            requirement.everyone,
            requirement.role_ids,
            requirement.update_time,
        )
        return _requirement_of(found(row))

    async def binds(self, organization_id: str, role_ids: Sequence[str]) -> bool:
        """Whether an organization requires MFA of a member with these roles."""
        bound: bool = await self._connection.fetchval(
            "SELECT EXISTS (SELECT FROM mfa_requirements WHERE organization_id = $1 AND (everyone OR role_ids && $2))",
            organization_id,
            role_ids,
        )
        return bound

    async def binds_anywhere(self, user_id: str) -> bool:
        """Whether any of a user's organizations requires MFA of it; it has to see all of them."""
        bound: bool = await self._connection.fetchval(
            "SELECT EXISTS (SELECT FROM memberships m JOIN mfa_requirements r USING (organization_id)"
            " WHERE m.user_id = $1 AND (r.everyone OR r.role_ids && m.role_ids))",
            user_id,
        )
        return bound


def _requirement_of(row: Row) -> MfaRequirement:
    return MfaRequirement(
        organization_id=row["organization_id"],
        everyone=row["everyone"],
        role_ids=tuple(row["role_ids"]),
        update_time=row["update_time"],
        revision=row["revision"],
    )
