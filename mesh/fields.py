"""Which values the fields that every service has may hold: ids, names, request ids; it never knows a resource.

Every check takes the field as the client wrote it ("api_key.display_name") and raises PlatformError(INVALID_ARGUMENT)
that names it. None of them repeats the value: it may be anything.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable

from mesh.errors import MOST_VIOLATIONS, PlatformError, Reason, together

NAME_LENGTH = 200
"""Characters of a name for people."""

_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")


def invalid(field: str, rule: str) -> PlatformError:
    """The error for a field that breaks a rule."""
    return PlatformError(Reason.INVALID_ARGUMENT, field=field, description=f"'{field}' {rule}.")


def require(holds: bool, field: str, rule: str) -> None:
    """A rule that a field keeps."""
    if not holds:
        raise invalid(field, rule)


def check_all(*checks: Callable[[], object]) -> None:
    """Every check, so that one error names every field that breaks a rule (google.rpc.BadRequest)."""
    wrong: list[PlatformError] = []
    for check in checks:
        try:
            check()
        except PlatformError as error:
            if error.reason is not Reason.INVALID_ARGUMENT or error.field is None:
                raise
            wrong.append(error)
    refuse(wrong)


def refuse(problems: Iterable[PlatformError]) -> None:
    """One error for all of them, but for what is beyond the first 50; none raise nothing."""
    if wrong := list(itertools.islice(problems, MOST_VIOLATIONS)):
        raise together(wrong)


def is_id(value: str) -> bool:
    """Whether the text has the form of an id."""
    return _ID.fullmatch(value) is not None


def check_id(value: str, field: str) -> str:
    """An id that must be there; whether something has it is for the store to say."""
    if not value:
        raise invalid(field, "is required")
    return check_filter(value, field)


def check_filter(value: str, field: str) -> str:
    """An id to filter by, or nothing."""
    if value and not is_id(value):
        raise invalid(field, "is not an id")
    return value


def check_request_id(value: str) -> None:
    """A client's own id for a creation, or nothing."""
    if value and not _REQUEST_ID.fullmatch(value):
        raise invalid("request_id", "must be at most 128 printable ASCII characters")


def check_display_name(value: str, field: str, *, required: bool = True) -> None:
    """A name for people, 1 to 200 characters without control characters; empty where it is not `required`."""
    if (required and not value.strip()) or len(value) > NAME_LENGTH:
        raise invalid(field, f"must have {1 if required else 0} to {NAME_LENGTH} characters")
    if any(unicodedata.category(character) in _UNPRINTABLE for character in value):
        raise invalid(field, "must not hold control characters or line breaks")


def check_once(values: Iterable[Hashable], field: str) -> None:
    """Values of which none repeats another."""
    seen = list(values)
    if len(seen) != len(set(seen)):
        raise invalid(field, "repeats a value")
