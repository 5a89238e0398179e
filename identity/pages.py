"""Pages of a list in the order of (create_time, id), and the opaque tokens between them; it never reads a row itself.

A token holds where the last page ended and a digest of that with the list and its filters. A token that was changed,
or that belongs to another list, is refused by the digest; one forged with effort only names another place in a list
that the caller may read anyway.
"""

import base64
import binascii
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from identity.fields import invalid

T = TypeVar("T")

_DEFAULT_SIZE = 50
_MAX_SIZE = 500
_DIGEST_LENGTH = 12
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last row of the page before."""

    create_time: datetime
    id: str


@dataclass(frozen=True, slots=True)
class Page:
    """What a client asks for: at most `size` rows after `after`. `list_name` is the list with its filters."""

    size: int
    after: Cursor | None
    list_name: str

    @property
    def limit(self) -> int:
        """How many rows to read: one more than is shown tells whether there is a next page."""
        return self.size + 1

    def cut(self, rows: Sequence[T], place: Callable[[T], Cursor]) -> tuple[list[T], str]:
        """The rows of this page and the token of the next, empty on the last; `place` is where a row stands."""
        shown = list(rows[: self.size])
        return shown, _write(place(shown[-1]), self.list_name) if len(rows) > self.size else ""


def read_page(page_size: int, page_token: str, *list_name: str) -> Page:
    """What a client asks for. Raises PlatformError(INVALID_ARGUMENT) naming page_size or page_token."""
    if page_size < 0:
        raise invalid("page_size", "must not be negative")
    name = "\x1f".join(list_name)
    return Page(min(page_size or _DEFAULT_SIZE, _MAX_SIZE), _read(page_token, name) if page_token else None, name)


def _write(cursor: Cursor, list_name: str) -> str:
    text = f"{(cursor.create_time - _EPOCH) // _MICROSECOND}:{cursor.id}".encode()
    return base64.urlsafe_b64encode(_digest(text, list_name) + text).decode().rstrip("=")


def _read(token: str, list_name: str) -> Cursor:
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        text = raw[_DIGEST_LENGTH:]
        if raw[:_DIGEST_LENGTH] != _digest(text, list_name):
            raise ValueError
        micros, _, row_id = text.decode().partition(":")
        return Cursor(_EPOCH + int(micros) * _MICROSECOND, row_id)
    except (ValueError, OverflowError, binascii.Error):
        raise invalid("page_token", "is not one that this list gave") from None


def _digest(text: bytes, list_name: str) -> bytes:
    return hashlib.sha256(list_name.encode() + b"\x00" + text).digest()[:_DIGEST_LENGTH]
