"""Passwords: which are good enough, how they are hashed and compared; it never signs anybody in.

bcrypt sees a digest in base64, since it stops at a NUL and refuses more than 72 bytes. The digest is keyed with a name,
so that no list of other sites' digests can be tried. It takes a quarter of a second, in a thread, and not all at once.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import unicodedata
from typing import TYPE_CHECKING

import bcrypt
from zxcvbn import zxcvbn

from identity import fields
from mesh.clock import Clock

if TYPE_CHECKING:
    from identity.stores import Transaction

COST = 12
_LEAST = 15
_LEAST_WITH_MFA = 8
_MOST = 1000
# Beyond that zxcvbn takes long, and who types so much is not guessed.
_JUDGED = 72
_LEAST_GUESSES = 10**9
_NAME = b"aiaas.password.v1"
# A salt and a hash that nothing gives, so that an unknown user takes the time that a known one does.
_NOBODY = "abcdefghijklmnopqrstuu" + "abcdefghijklmnopqrstuvwxyz01234"


class Passwords:
    """People's passwords. `cost` is bcrypt's."""

    def __init__(self, clock: Clock, cost: int = COST) -> None:
        self._clock = clock
        self._cost = cost
        self._at_once = asyncio.Semaphore(os.cpu_count() or 1)

    async def is_right(self, stored_hash: str | None, password: str) -> bool:
        """Whether a password is the one of a hash; never for no hash, which takes as long to tell."""
        compared = (stored_hash or f"$2b${self._cost:02}${_NOBODY}").encode()
        async with self._at_once:
            matches = await asyncio.to_thread(bcrypt.checkpw, _digest(password[:_MOST]), compared)
        return matches and stored_hash is not None and len(password) <= _MOST

    def is_outdated(self, stored_hash: str) -> bool:
        """Whether a hash was made at another cost than new ones are."""
        return not stored_hash.startswith(f"$2b${self._cost:02}$")

    async def set(
        self, stored: Transaction, user_id: str, password: str, *, has_mfa: bool, field: str = "password"
    ) -> None:
        """Store a new password. Raises PlatformError(INVALID_ARGUMENT) naming `field` for one that is too weak."""
        check_strength(password, has_mfa=has_mfa, field=field)
        await self.keep(stored, user_id, password)

    async def keep(self, stored: Transaction, user_id: str, password: str) -> None:
        """Store a password, whatever it is like."""
        async with self._at_once:
            made = await asyncio.to_thread(bcrypt.hashpw, _digest(password), bcrypt.gensalt(self._cost))
        await stored.passwords.put(user_id, made.decode(), self._clock.now())


def check_strength(password: str, *, has_mfa: bool, field: str) -> None:
    """Raises PlatformError(INVALID_ARGUMENT) for a password that is too short or easily guessed (NIST SP 800-63B-4,
    3.1.1.2: length and a blocklist, no rules about kinds of characters)."""
    least = _LEAST_WITH_MFA if has_mfa else _LEAST
    if not least <= len(password) <= _MOST:
        raise fields.invalid(field, f"must have {least} to {_MOST} characters")
    if zxcvbn(password[:_JUDGED])["guesses"] < _LEAST_GUESSES:
        raise fields.invalid(field, "is too easily guessed: it is common, or made of a few words or a pattern")


def _digest(password: str) -> bytes:
    normalized = unicodedata.normalize("NFKC", password).encode(errors="surrogatepass")
    return base64.b64encode(hmac.digest(_NAME, normalized, hashlib.sha256))
