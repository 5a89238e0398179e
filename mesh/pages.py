"""Pages of a list and the opaque tokens between them; it never knows what a list holds.

A token is the place where the last page ended and a digest of that with the request, all but its size. A token that was
changed, or that another request was answered with, is refused by the digest; one that is forged with effort names only
another place in a list that the caller may read anyway.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, TypeAlias, TypeVar

import msgspec
from google.protobuf.message import Message

from mesh.errors import PlatformError, Reason

P = TypeVar("P", bound=msgspec.Struct)
T = TypeVar("T")
M = TypeVar("M", bound=Message)

PAGE_BYTES = 3 * 1024 * 1024
"""Most that a page holds, since gRPC refuses messages beyond 4 MiB."""

Moment: TypeAlias = Annotated[datetime, msgspec.Meta(tz=True)]
"""A moment in a place; one without a zone is none."""

Text: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[^\0]*$")]
"""Text in a place. PostgreSQL has no NUL in text."""

_DIGEST_BYTES = 12


class IdPlace(msgspec.Struct, frozen=True, array_like=True):
    """A place in the order of ids."""

    id: Text


class TimePlace(msgspec.Struct, frozen=True, array_like=True):
    """A place in the order of (create_time, id)."""

    create_time: Moment
    id: Text


def read_page_size(page_size: int, default: int = 50, most: int = 500) -> int:
    """How many items a page may hold. Raises PlatformError(INVALID_ARGUMENT) if `page_size` is negative."""
    if page_size < 0:
        raise _invalid("page_size", "must not be negative")
    return min(page_size or default, most)


def read_token(request: Message, place: type[P]) -> P | None:
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
    except ValueError:
        raise wrong_token() from None


def write_token(request: Message, place: msgspec.Struct) -> str:
    """The token with which `request` is continued after `place`."""
    raw = msgspec.msgpack.encode(place)
    return base64.urlsafe_b64encode(_digest(request, raw) + raw).decode().rstrip("=")


def wrong_token() -> PlatformError:
    """The error for a page_token that no answer had."""
    return _invalid("page_token", "is not from an answer to this request")


def cut(
    request: Message,
    items: Sequence[T],
    size: int,
    to_message: Callable[[T], M],
    place: Callable[[T], msgspec.Struct],
) -> tuple[list[M], str]:
    """The messages of one page and the token of the next, empty on the last; `place` is where an item stands.

    A page is the first `size` of `items`, or as many as fit into PAGE_BYTES, at least one; whoever reads one item more
    than `size` learns whether there is a next page.
    """
    messages: list[M] = []
    total = 0
    for item in items[:size]:
        message = to_message(item)
        total += message.ByteSize()
        if messages and total > PAGE_BYTES:
            break
        messages.append(message)
    more = len(messages) < len(items)
    return messages, write_token(request, place(items[len(messages) - 1])) if more else ""


def _digest(request: Message, raw: bytes) -> bytes:
    asked = type(request)()
    asked.CopyFrom(request)
    asked.ClearField("page_token")
    asked.ClearField("page_size")
    # Requests of two lists may hold the same fields.
    told = b"\x00".join((request.DESCRIPTOR.full_name.encode(), asked.SerializeToString(deterministic=True), raw))
    return hashlib.sha256(told).digest()[:_DIGEST_BYTES]


def _invalid(field: str, rule: str) -> PlatformError:
    return PlatformError(Reason.INVALID_ARGUMENT, field=field, description=f"'{field}' {rule}.")
