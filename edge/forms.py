"""Forms and queries, as lists of names and values; it never knows which of them mean anything."""

from __future__ import annotations

from urllib.parse import parse_qsl

from edge.exchange import Exchange
from mesh.errors import PlatformError, Reason

Pairs = list[tuple[str, str]]

_FIELDS = 100
_FORM = "application/x-www-form-urlencoded"


async def read_form(exchange: Exchange) -> Pairs:
    """The names and values of the body.

    Raises PlatformError: UNSUPPORTED_MEDIA_TYPE for anything but a form, INVALID_ARGUMENT, what reading a body raises.
    """
    declared = (exchange.header(b"content-type") or "").partition(";")[0].strip().lower()
    if declared != _FORM:
        raise PlatformError(Reason.UNSUPPORTED_MEDIA_TYPE, description="Send the body as a form.")
    return pairs_of(await exchange.read_body())


def read_query(exchange: Exchange) -> Pairs:
    """The names and values after the path. Raises PlatformError(INVALID_ARGUMENT)."""
    query: bytes = exchange.scope["query_string"]
    return pairs_of(query)


def pairs_of(encoded: bytes) -> Pairs:
    """Names and values in their order, with repetitions. Raises PlatformError(INVALID_ARGUMENT) if they are none."""
    try:
        return parse_qsl(encoded.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_FIELDS)
    except ValueError:
        raise PlatformError(
            Reason.INVALID_ARGUMENT, description="The parameters are not form-encoded UTF-8, or too many."
        ) from None
