"""The table of signing keys, which belong to the platform and to no organization; private ones are sealed."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from datetime import datetime

from identity.signing_keys import SigningKey
from identity.stores.rows import Connection

_COLUMNS = "key_id, public_jwk, sealed_private_key, create_time, retire_time"


class SigningKeyRows:
    """Signing keys, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def lock(self) -> None:
        """Wait for anybody else who makes a key; the lock goes with the transaction."""
        await self._connection.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended('aiaas.identity.signing_keys', 0))"
        )

    async def current(self) -> SigningKey | None:
        """The key that signs."""
        row = await self._connection.fetchrow(f"SELECT {_COLUMNS} FROM signing_keys WHERE retire_time IS NULL")
        return None if row is None else SigningKey(**row)

    async def published(self, now: datetime) -> list[SigningKey]:
        """The keys that something valid may be signed with, newest first."""
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM signing_keys WHERE retire_time IS NULL OR retire_time > $1"
            " ORDER BY create_time DESC, key_id DESC",
            now,
        )
        return [SigningKey(**row) for row in rows]

    async def retire_current(self, retire_time: datetime) -> None:
        """Have no key sign any more."""
        await self._connection.execute(
            "UPDATE signing_keys SET retire_time = $1 WHERE retire_time IS NULL", retire_time
        )

    async def add(self, key: SigningKey) -> None:
        """Store the key that signs from now on."""
        await self._connection.execute(
            "INSERT INTO signing_keys (key_id, public_jwk, sealed_private_key, create_time) VALUES ($1, $2, $3, $4)",
            key.key_id,
            key.public_jwk,
            key.sealed_private_key,
            key.create_time,
        )
