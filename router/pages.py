"""Page sizes and the opaque tokens between pages; it never reads what is listed."""

from __future__ import annotations

import base64

import msgspec

from mesh.errors import PlatformError, Reason

_DEFAULT_SIZE = 50
_LARGEST_SIZE = 500


class _Token(msgspec.Struct, array_like=True):
    filter: str
    after: str


_DECODER = msgspec.msgpack.Decoder(_Token)


def page_size(asked: int) -> int:
    """How many a page may hold. Raises PlatformError(INVALID_ARGUMENT) for a negative number."""
    if asked < 0:
        raise PlatformError(Reason.INVALID_ARGUMENT, field="page_size", description="'page_size' must not be negative.")
    return min(asked or _DEFAULT_SIZE, _LARGEST_SIZE)


def encode_token(after: str, filter: str = "") -> str:
    """The token for the page that comes after the id `after`, of a list with that filter."""
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(_Token(filter, after))).decode().rstrip("=")


def decode_token(token: str, filter: str = "") -> str:
    """The id that the page comes after; empty for the first page.

    Raises PlatformError(INVALID_ARGUMENT) for a token that is none of ours, or of a list with another filter.
    """
    if not token:
        return ""
    try:
        decoded = _DECODER.decode(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
    except (ValueError, msgspec.DecodeError):
        decoded = None
    if decoded is None or decoded.filter != filter:
        raise PlatformError(
            Reason.INVALID_ARGUMENT, field="page_token", description="'page_token' is not a token of this list."
        )
    return decoded.after
