"""What users allowed clients to do, shown to them and taken back by them; it never gives anything."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from mesh.auth import Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.pages import TimePlace

if TYPE_CHECKING:
    from identity.stores import Store


@dataclass(frozen=True, slots=True)
class OauthGrant:
    """What one user allowed one client; it stands until it has a `revoke_time`."""

    oauth_grant_id: str
    organization_id: str
    oauth_client_id: str
    client_display_name: str
    user_id: str
    scopes: tuple[str, ...]
    create_time: datetime
    last_use_time: datetime | None = None
    revoke_time: datetime | None = None


class OauthGrants:
    """The operations of people on their own grants, in the organization that they are signed in to."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def list(self, caller: Principal, before: TimePlace | None, limit: int) -> list[OauthGrant]:
        """Up to `limit` grants of the caller that come before `before`, newest first."""
        async with self._store.transaction() as stored:
            return await stored.oauth_grants.page(caller.organization_id, caller.user_id, before, limit)

    async def revoke(self, caller: Principal, oauth_grant_id: str) -> OauthGrant:
        """Take a grant back, and with it every token made from it. Again changes nothing. Raises NOT_FOUND."""
        async with self._store.transaction() as stored:
            current = await stored.oauth_grants.get(caller.organization_id, caller.user_id, oauth_grant_id, lock=True)
            if current is None:
                raise PlatformError(Reason.NOT_FOUND)
            # Announced again as well: the first announcement may have been lost.
            await stored.revoke("user_id", caller.user_id)
            if current.revoke_time is not None:
                return current
            now = self._clock.now()
            await stored.oauth_grants.revoke(oauth_grant_id, now)
            return replace(current, revoke_time=now)
