"""Secrets at rest: sealed for the database and opened again; it never keeps, logs or makes one.

A service has one key from its configuration. Whoever changes it has every secret that was sealed with it made anew.
"""

import base64
import os

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_PATTERN = r"^[A-Za-z0-9+/]{43}=$"
"""The form of a key in a configuration: base64 of 32 bytes."""

_NONCE_BYTES = 12


class Seal:
    """Encrypts secrets (AES-256-GCM), each bound to the row it is stored in. `key` is base64 of 32 bytes.

    `bound_to` names the row, and where ids do not tell tables apart, the table too: a sealed secret that was copied
    into another row does not open. Nonces are random: one key may seal some billions of secrets (NIST SP 800-38D, 8.3).
    """

    def __init__(self, key: str) -> None:
        self._cipher = AESGCM(base64.b64decode(key, validate=True))

    def close(self, secret: bytes, bound_to: str) -> bytes:
        """A secret as it is stored."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, secret, bound_to.encode())

    def open(self, sealed: bytes, bound_to: str) -> bytes:
        """A secret that was stored. Raises cryptography.exceptions.InvalidTag if the key or the row is another."""
        return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], bound_to.encode())
