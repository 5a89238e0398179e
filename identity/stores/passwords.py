"""The tables of passwords and of recoveries; it never compares a password."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from identity.stores.rows import Connection
from identity.users import UserState


@dataclass(frozen=True, slots=True)
class Account:
    """A user as it signs in; no hash is no password."""

    user_id: str
    email: str
    state: UserState
    password_hash: str | None = field(repr=False)


class PasswordRows:
    """Hashes of passwords, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def account(self, email: str) -> Account | None:
        """Whoever has an address."""
        return await self._account("lower(email) = lower($1)", email)

    async def account_of(self, user_id: str) -> Account | None:
        """A user by its id."""
        return await self._account("user_id = $1", user_id)

    async def _account(self, condition: str, value: str) -> Account | None:
        row = await self._connection.fetchrow(
            f"SELECT user_id, email, state, hash FROM users LEFT JOIN passwords USING (user_id) WHERE {condition}",
            value,
        )
        return None if row is None else Account(row["user_id"], row["email"], UserState(row["state"]), row["hash"])

    async def put(self, user_id: str, password_hash: str, now: datetime) -> None:
        """Store a hash in the place of any that is there."""
        await self._connection.execute(
            "INSERT INTO passwords (user_id, hash, update_time) VALUES ($1, $2, $3)"
            " ON CONFLICT (user_id) DO UPDATE SET hash = excluded.hash, update_time = excluded.update_time",
            user_id,
            password_hash,
            now,
        )


class RecoveryRows:
    """Recoveries that have begun, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, recovery_id: str, user_id: str, digest: bytes, expire_time: datetime) -> None:
        """Store a recovery in the place of the user's others."""
        await self.remove_of_user(user_id)
        await self._connection.execute(
            "INSERT INTO recoveries (recovery_id, user_id, digest, expire_time) VALUES ($1, $2, $3, $4)",
            recovery_id,
            user_id,
            digest,
            expire_time,
        )

    async def find(self, recovery_id: str, now: datetime) -> tuple[str, bytes] | None:
        """The user and the digest of one that is not over, locked."""
        row = await self._connection.fetchrow(
            "SELECT user_id, digest FROM recoveries WHERE recovery_id = $1 AND expire_time > $2 FOR UPDATE",
            recovery_id,
            now,
        )
        return None if row is None else (row["user_id"], row["digest"])

    async def remove_of_user(self, user_id: str) -> None:
        """Remove all of a user."""
        await self._connection.execute("DELETE FROM recoveries WHERE user_id = $1", user_id)

    async def forget_until(self, moment: datetime) -> None:
        """Remove those that were over by then."""
        await self._connection.execute("DELETE FROM recoveries WHERE expire_time < $1", moment)
