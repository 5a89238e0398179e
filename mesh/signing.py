"""Ed25519 (RFC 8032) and the bytes that are hashed and signed, in a form that anybody can make again; it never stores a
key.

A key's id is the first 16 hex digits of SHA-256 over the raw public key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

SEED_BYTES = 32
"""Length of a private key."""


class Signer:
    """One private key, made of its `seed` of 32 bytes. `public_key` is raw."""

    def __init__(self, seed: bytes) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key = self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.key_id = hashlib.sha256(self.public_key).hexdigest()[:16]

    def sign(self, signed: bytes) -> bytes:
        """The signature over `signed`."""
        return self._private.sign(signed)


def has_signed(public_key: bytes, signature: bytes, signed: bytes) -> bool:
    """Whether the private half of a raw public key signed this."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def canonical(content: Sequence[object]) -> bytes:
    """A JSON array in UTF-8, without spaces, non-ASCII characters as they are."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def written(moment: datetime) -> str:
    """A moment in UTC, with six digits of a second and a Z."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
