"""The keys with which the platform signs for others to verify: made, rotated, published; it never shows a private one.

RS256, which every OpenID Connect client understands (OpenID Connect Discovery 1.0, 3).
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from joserfc import jwt
from joserfc.jwk import RSAKey

from identity import fields
from identity.oauth import ID_TOKEN_LIFETIME
from mesh.clock import Clock
from mesh.ids import new_id
from mesh.sealing import Seal

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

logger = logging.getLogger(__name__)

ALGORITHM = "RS256"
_BITS = 2048
# A token whose signing had begun before a rotation may be told some seconds after it, and clocks differ.
_MARGIN = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key. The one without a `retire_time` signs; the others are published until theirs."""

    key_id: str
    public_jwk: str
    sealed_private_key: bytes = field(repr=False)
    create_time: datetime
    retire_time: datetime | None = None


class SigningKeys:
    """The platform's signing keys. The first is made when it is first needed."""

    def __init__(self, store: Store, clock: Clock, seal: Seal) -> None:
        self._store = store
        self._clock = clock
        self._seal = seal
        self._opened: dict[str, RSAKey] = {}

    async def sign(self, stored: Transaction, claims: dict[str, Any]) -> str:
        """A JSON Web Token of these claims, by the current key.

        Raises cryptography.exceptions.InvalidTag if the service's secret key is another than when the key was made.
        """
        current = await self._current(stored)
        key = self._opened.get(current.key_id)
        if key is None:
            private = self._seal.open(current.sealed_private_key, _row(current.key_id))
            key = self._opened.setdefault(current.key_id, RSAKey.import_key(private))
        return jwt.encode({"alg": ALGORITHM, "kid": current.key_id, "typ": "JWT"}, claims, key, algorithms=[ALGORITHM])

    async def rotate(self, reason: str) -> SigningKey:
        """Begin to sign with a new key; the old one stays published until nothing that it signed is valid."""
        fields.check_reason(reason, "reason", required=False)
        async with self._store.transaction() as stored:
            await stored.signing_keys.lock()
            now = self._clock.now()
            await stored.signing_keys.retire_current(now + ID_TOKEN_LIFETIME + _MARGIN)
            made = await self._make(stored)
        logger.info("the signing key was rotated", extra={"key_id": made.key_id})
        return made

    async def list(self) -> list[SigningKey]:
        """The keys that are published, newest first."""
        async with self._store.transaction() as stored:
            await self._current(stored)
            return await stored.signing_keys.published(self._clock.now())

    async def _current(self, stored: Transaction) -> SigningKey:
        current = await stored.signing_keys.current()
        if current is None:
            await stored.signing_keys.lock()
            # Somebody else may have made it while this waited.
            current = await stored.signing_keys.current() or await self._make(stored)
        return current

    async def _make(self, stored: Transaction) -> SigningKey:
        key_id = new_id("sigkey", clock=self._clock)
        # It takes a tenth of a second and more.
        key = await asyncio.to_thread(RSAKey.generate_key, _BITS)
        public = {**key.as_dict(private=False), "kid": key_id, "use": "sig", "alg": ALGORITHM}
        made = SigningKey(
            key_id=key_id,
            public_jwk=json.dumps(public, sort_keys=True),
            sealed_private_key=self._seal.close(key.as_der(private=True), _row(key_id)),
            create_time=self._clock.now(),
        )
        await stored.signing_keys.add(made)
        return made


def _row(key_id: str) -> str:
    return f"signing_keys/{key_id}"
