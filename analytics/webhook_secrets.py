"""The secrets of webhooks: made, sealed for the database, and signed with; they are never logged or kept in clear.

A secret and a signature have the form that the Standard Webhooks specification gives them
(https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md).
"""

import base64
import hashlib
import hmac
import os
from collections.abc import Iterable

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_PREFIX = "whsec_"
_SECRET_BYTES = 32
_NONCE_BYTES = 12


def new_secret() -> bytes:
    """A new secret, at random."""
    return os.urandom(_SECRET_BYTES)


def as_text(secret: bytes) -> str:
    """A secret as it is shown to whoever verifies signatures."""
    return _PREFIX + base64.b64encode(secret).decode()


def sign(secrets: Iterable[bytes], message_id: str, timestamp: int, body: bytes) -> str:
    """The header webhook-signature: one signature for each secret. `timestamp` is in seconds since 1970."""
    signed = b"%s.%d.%s" % (message_id.encode(), timestamp, body)
    signatures = (base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode() for secret in secrets)
    return " ".join(f"v1,{signature}" for signature in signatures)


class Seal:
    """Encrypts secrets at rest (AES-256-GCM), each bound to its webhook. `key` is base64 of 32 bytes.

    Nonces are random: one key may seal some billions of secrets (NIST SP 800-38D, 8.3).
    """

    def __init__(self, key: str) -> None:
        self._cipher = AESGCM(base64.b64decode(key, validate=True))

    def close(self, secret: bytes, webhook_id: str) -> bytes:
        """A secret as it is stored."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, secret, webhook_id.encode())

    def open(self, sealed: bytes, webhook_id: str) -> bytes:
        """A secret that was stored. Raises cryptography.exceptions.InvalidTag if the key or the webhook is another."""
        return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], webhook_id.encode())
