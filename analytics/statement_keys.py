"""The keys that sign statements: made when one is needed, sealed at rest; it never shows a private one.

A key counts only while the service can open it: then nobody wrote it into the database who does not have the service's
secret key. What was signed under another secret key is verified with public keys that its readers kept.
"""

from __future__ import annotations

import logging
import os

from cryptography.exceptions import InvalidTag

from analytics.statement_store import Issuing, StatementStore, StoredKey
from mesh.clock import Clock
from mesh.sealing import Seal
from mesh.signing import SEED_BYTES, Signer

logger = logging.getLogger(__name__)


class StatementKeys:
    """The keys of this service."""

    def __init__(self, store: StatementStore, seal: Seal, clock: Clock) -> None:
        self._store = store
        self._seal = seal
        self._clock = clock

    async def signer(self, stored: Issuing) -> Signer:
        """The newest key that opens; a new one, if there is none."""
        await stored.lock_keys()
        for key in await stored.keys():
            if signer := self._opened(key):
                return signer
        seed = os.urandom(SEED_BYTES)
        signer = Signer(seed)
        sealed = self._seal.close(seed, _row(signer.key_id))
        await stored.add_key(StoredKey(signer.key_id, signer.public_key, sealed, self._clock.now()))
        logger.info("a key for statements was made", extra={"key_id": signer.key_id})
        return signer

    async def public_key(self, key_id: str) -> bytes | None:
        """The raw public key, if it is one of this service's, and told by its private half."""
        key = await self._store.key(key_id)
        signer = None if key is None else self._opened(key)
        return None if signer is None else signer.public_key

    def _opened(self, key: StoredKey) -> Signer | None:
        try:
            return Signer(self._seal.open(key.sealed_private_key, _row(key.key_id)))
        except InvalidTag:
            return None


def _row(key_id: str) -> str:
    return f"statement_keys/{key_id}"
