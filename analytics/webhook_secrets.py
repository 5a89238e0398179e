"""The secrets of webhooks: made, shown and signed with; they are never logged or kept in clear.

A secret and a signature have the form that the Standard Webhooks specification gives them
(https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md).
"""

import base64
import hashlib
import hmac
import os
from collections.abc import Iterable

_PREFIX = "whsec_"
_SECRET_BYTES = 32


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
