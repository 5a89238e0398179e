"""The text of an API key: how it is made, read and compared; it never stores one and never says what a key may do.

A key is `aias_<key id>_<secret><checksum>`: the key id is public and finds the row, the secret is 32 base62 characters
(190 random bits), the checksum is the CRC32 of everything before it in 6 base62 characters. The checksum lets a
mistyped key be refused without a look-up, and lets secret scanners find real keys only. What is stored is the SHA-256
of the whole text; a slow hash would protect nothing that 190 random bits do not.
"""

import hashlib
import hmac
import re
import secrets
import zlib
from dataclasses import dataclass, field
from random import Random

from mesh.clock import Clock, SystemClock
from mesh.errors import PlatformError, Reason
from mesh.ids import ALPHABET, ID_LENGTH, base62, new_id

PREFIX = "aias_"
"""What every key begins with, and no other credential of this platform."""

_SECRET_LENGTH = 32
_CHECKSUM_LENGTH = 6
_ID_PREFIX = "key"
_FORM = re.compile(
    rf"{PREFIX}({_ID_PREFIX}_[0-9A-Za-z]{{{ID_LENGTH}}})_[0-9A-Za-z]{{{_SECRET_LENGTH + _CHECKSUM_LENGTH}}}"
)
_LENGTH = len(PREFIX) + len(_ID_PREFIX) + 1 + ID_LENGTH + 1 + _SECRET_LENGTH + _CHECKSUM_LENGTH
_SYSTEM_CLOCK = SystemClock()
_SYSTEM_RANDOM = secrets.SystemRandom()


@dataclass(frozen=True, slots=True)
class ApiKeySecret:
    """A new key. `text` is shown to its owner once and kept nowhere; `key_id` and `digest` are stored."""

    key_id: str
    text: str = field(repr=False)
    digest: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """A presented key of the right form and checksum: the id to look it up by, and the digest to compare."""

    key_id: str
    digest: bytes = field(repr=False)


def generate(random: Random = _SYSTEM_RANDOM, *, clock: Clock = _SYSTEM_CLOCK) -> ApiKeySecret:
    """A new key, whose secret comes from `random`; anything but the system's own source belongs in tests only."""
    key_id = new_id(_ID_PREFIX, clock=clock, random=random)
    body = f"{PREFIX}{key_id}_{''.join(random.choices(ALPHABET, k=_SECRET_LENGTH))}"
    text = body + _checksum(body)
    return ApiKeySecret(key_id=key_id, text=text, digest=digest_of(text))


def parse(text: str) -> ParsedKey:
    """Read a presented key.

    Raises PlatformError(API_KEY_INVALID) if its length, alphabet or checksum is wrong; the error never repeats it.
    """
    form = _FORM.fullmatch(text) if len(text) == _LENGTH else None
    if form is None or _checksum(text[:-_CHECKSUM_LENGTH]) != text[-_CHECKSUM_LENGTH:]:
        raise PlatformError(Reason.API_KEY_INVALID)
    return ParsedKey(key_id=form[1], digest=digest_of(text))


def digest_of(text: str) -> bytes:
    """The SHA-256 of a credential's whole text, 32 bytes."""
    return hashlib.sha256(text.encode()).digest()


def matches(parsed: ParsedKey, stored_digest: bytes) -> bool:
    """Whether the presented key is the stored one; takes the same time either way."""
    return hmac.compare_digest(parsed.digest, stored_digest)


def _checksum(text: str) -> str:
    return base62(zlib.crc32(text.encode()), _CHECKSUM_LENGTH)
