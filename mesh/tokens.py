"""The text of every secret that says who calls: how it is made, read and compared; it never stores one and never says
what it may do.

A token is `<prefix><id>_<secret><checksum>`: the id is public and finds the row, the secret is 32 base62 characters
(190 random bits), the checksum is the CRC32 of everything before it in 6 base62 characters. The checksum lets a
mistyped token be refused without a look-up, and lets secret scanners find real ones only. What is stored is the SHA-256
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

_SECRET_LENGTH = 32
_CHECKSUM_LENGTH = 6
_SYSTEM_CLOCK = SystemClock()
_SYSTEM_RANDOM = secrets.SystemRandom()


@dataclass(frozen=True, slots=True)
class NewToken:
    """A new token. `text` is shown to its owner once and kept nowhere; `id` and `digest` are stored."""

    id: str
    text: str = field(repr=False)
    digest: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ParsedToken:
    """A presented token of the right form and checksum: the id to look it up by, and the digest to compare."""

    id: str
    digest: bytes = field(repr=False)


class TokenKind:
    """One kind of token: what its texts begin with, which no other kind's do, and what its ids begin with."""

    def __init__(self, prefix: str, id_prefix: str) -> None:
        self.prefix = prefix
        self._id_prefix = id_prefix
        self._length = len(prefix) + len(id_prefix) + 1 + ID_LENGTH + 1 + _SECRET_LENGTH + _CHECKSUM_LENGTH
        self._form = re.compile(
            rf"{prefix}({id_prefix}_[0-9A-Za-z]{{{ID_LENGTH}}})_[0-9A-Za-z]{{{_SECRET_LENGTH + _CHECKSUM_LENGTH}}}"
        )

    def generate(self, random: Random = _SYSTEM_RANDOM, *, clock: Clock = _SYSTEM_CLOCK) -> NewToken:
        """A new token, whose secret comes from `random`; anything but the system's own source belongs in tests only."""
        token_id = new_id(self._id_prefix, clock=clock, random=random)
        return self.generate_for(token_id, random)

    def generate_for(self, token_id: str, random: Random = _SYSTEM_RANDOM) -> NewToken:
        """A new secret for an id that there is already."""
        body = f"{self.prefix}{token_id}_{''.join(random.choices(ALPHABET, k=_SECRET_LENGTH))}"
        text = body + _checksum(body)
        return NewToken(id=token_id, text=text, digest=digest_of(text))

    def parse(self, text: str) -> ParsedToken:
        """Read a presented token.

        Raises PlatformError(API_KEY_INVALID) if its length, alphabet or checksum is wrong; the error never repeats it.
        """
        form = self._form.fullmatch(text) if len(text) == self._length else None
        if form is None or _checksum(text[:-_CHECKSUM_LENGTH]) != text[-_CHECKSUM_LENGTH:]:
            raise PlatformError(Reason.API_KEY_INVALID)
        return ParsedToken(id=form[1], digest=digest_of(text))


API_KEY = TokenKind("aias_", "key")
SESSION = TokenKind("aiss_", "session")
ACCESS_TOKEN = TokenKind("aiat_", "access")
CREDENTIALS = (API_KEY, SESSION, ACCESS_TOKEN)
"""What a call may be made with."""


def digest_of(text: str) -> bytes:
    """The SHA-256 of a credential's whole text, 32 bytes."""
    return hashlib.sha256(text.encode()).digest()


def matches(parsed: ParsedToken, stored_digest: bytes) -> bool:
    """Whether the presented token is the stored one; takes the same time either way."""
    return hmac.compare_digest(parsed.digest, stored_digest)


def _checksum(text: str) -> str:
    return base62(zlib.crc32(text.encode()), _CHECKSUM_LENGTH)
