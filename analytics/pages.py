"""The opaque tokens between the pages of an answer; it never knows what the pages hold.

A token is the place where the last page ended and a digest of that with the request, all but its size. A token that was
changed, or that another request was answered with, is refused by the digest; one that is forged with effort names only
another place in an answer that the caller may read anyway.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from google.protobuf.message import Message

from mesh.errors import PlatformError, Reason

P = TypeVar("P", bound=msgspec.Struct)
T = TypeVar("T")
M = TypeVar("M", bound=Message)

PAGE_BYTES = 3 * 1024 * 1024
"""Most that a page holds, since gRPC refuses messages beyond 4 MiB."""

_DIGEST_BYTES = 12


def read_page_size(page_size: int, default: int, most: int) -> int:
    """How many items a page may hold. Raises PlatformError(INVALID_ARGUMENT) if `page_size` is negative."""
    if page_size < 0:
        raise _invalid("page_size", "must not be negative")
    return min(page_size or default, most)


def read_token(request: M, place: type[P]) -> P | None:
    """Where the page before ended, by the request's `page_token`; None for the first page.

    Raises PlatformError(INVALID_ARGUMENT) if it is not one that an answer to this request had.
    """
    token: str = request.page_token  # type: ignore[attr-defined]
    if not token:
        return None
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        if raw[:_DIGEST_BYTES] != _digest(request, raw[_DIGEST_BYTES:]):
            raise wrong_token()
        return msgspec.msgpack.decode(raw[_DIGEST_BYTES:], type=place)
    except (ValueError, msgspec.DecodeError):
        raise wrong_token() from None


def write_token(request: M, place: msgspec.Struct) -> str:
    """The token with which `request` is continued after `place`."""
    raw = msgspec.msgpack.encode(place)
    return base64.urlsafe_b64encode(_digest(request, raw) + raw).decode().rstrip("=")


def wrong_token() -> PlatformError:
    """The error for a page_token that no answer had."""
    return _invalid("page_token", "is not from an answer to this request")


def cut(items: Sequence[T], size: int, to_message: Callable[[T], M]) -> list[M]:
    """The messages of one page: the first `size` of `items`, or as many as fit into PAGE_BYTES, at least one.

    There is a next page if these are fewer than the items.
    """
    messages: list[M] = []
    total = 0
    for item in items[:size]:
        message = to_message(item)
        total += message.ByteSize()
        if messages and total > PAGE_BYTES:
            break
        messages.append(message)
    return messages


def _digest(request: Message, raw: bytes) -> bytes:
    asked = type(request)()
    asked.CopyFrom(request)
    asked.ClearField("page_token")
    asked.ClearField("page_size")
    return hashlib.sha256(asked.SerializeToString(deterministic=True) + b"\x00" + raw).digest()[:_DIGEST_BYTES]


def _invalid(field: str, rule: str) -> PlatformError:
    return PlatformError(Reason.INVALID_ARGUMENT, field=field, description=f"'{field}' {rule}.")
