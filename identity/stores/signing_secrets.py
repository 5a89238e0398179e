"""The table of API keys' signing secrets; it never opens one."""

from __future__ import annotations

from identity.request_signing import SigningSecret
from identity.stores.rows import Connection


class SigningSecretRows:
    """Signing secrets, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get(self, api_key_id: str) -> SigningSecret | None:
        """A key's. Whose organization it is was found out with the key, so it names none."""
        row = await self._connection.fetchrow(
            "SELECT api_key_id, organization_id, sealed_secret, create_time FROM signing_secrets WHERE api_key_id = $1",
            api_key_id,
        )
        return None if row is None else SigningSecret(**row)

    async def put(self, secret: SigningSecret) -> None:
        """Store one in the place of any that is there."""
        await self._connection.execute(
            "INSERT INTO signing_secrets (api_key_id, organization_id, sealed_secret, create_time)"
            " VALUES ($1, $2, $3, $4) ON CONFLICT (api_key_id)"
            " DO UPDATE SET sealed_secret = excluded.sealed_secret, create_time = excluded.create_time",
            secret.api_key_id,
            secret.organization_id,
            secret.sealed_secret,
            secret.create_time,
        )

    async def remove(self, organization_id: str, api_key_id: str) -> None:
        """Remove a key's, if there is one."""
        await self._connection.execute(
            "DELETE FROM signing_secrets WHERE organization_id = $1 AND api_key_id = $2", organization_id, api_key_id
        )
