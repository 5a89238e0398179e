"""Which values the fields of identity's resources may have; it never knows where a value comes from or goes to.

Every check takes the field as the client wrote it ("api_key.display_name") and raises PlatformError(INVALID_ARGUMENT)
that names it. None of them repeats the value: it may be anything.
"""

import ipaddress
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime

from mesh.auth import RateLimits
from mesh.errors import PlatformError, Reason

_NAME_LENGTH = 200
_EMAIL_LENGTH = 254
_LIST_LENGTH = 200
_REQUESTS_PER_SECOND = 1_000_000
_COUNT = 1_000_000_000_000
_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_MODEL = re.compile(r"[a-zA-Z0-9._:/-]{1,128}")
# The form that browsers hold an address to (HTML, "valid e-mail address"), with a dot in the domain.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_EMAIL = re.compile(rf"[A-Za-z0-9.!#$%&'*+/=?^_`{{|}}~-]{{1,64}}@{_LABEL}(?:\.{_LABEL})+")
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")


def invalid(field: str, rule: str) -> PlatformError:
    """The error for a field that breaks a rule."""
    return PlatformError(Reason.INVALID_ARGUMENT, field=field, description=f"'{field}' {rule}.")


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
    if (required and not value.strip()) or len(value) > _NAME_LENGTH:
        raise invalid(field, f"must have {1 if required else 0} to {_NAME_LENGTH} characters")
    if any(unicodedata.category(character) in _UNPRINTABLE for character in value):
        raise invalid(field, "must not hold control characters or line breaks")


def check_email(value: str, field: str) -> None:
    """An e-mail address of the usual form."""
    if len(value) > _EMAIL_LENGTH or not _EMAIL.fullmatch(value):
        raise invalid(field, "must be an e-mail address")


def check_models(models: Sequence[str], field: str) -> None:
    """Public ids of models, each once; whether they exist is for the router to know."""
    _check_list(models, field)
    if not all(_MODEL.fullmatch(model) for model in models):
        raise invalid(field, "must hold ids of models: 1 to 128 of a-z A-Z 0-9 . _ : / -")


def checked_networks(networks: Sequence[str], field: str) -> tuple[str, ...]:
    """Networks in CIDR notation, in their usual spelling; an address alone is a network of one."""
    _check_list(networks, field)
    try:
        return tuple(str(ipaddress.ip_network(network)) for network in networks)
    except ValueError:
        raise invalid(field, "must hold networks in CIDR notation, such as 10.0.0.0/8") from None


def check_rate_limits(limits: RateLimits, field: str) -> None:
    """Limits above zero and within reason, and each model's once."""
    _check_rate(limits.requests_per_second, f"{field}.limit_requests_per_second")
    _check_count(limits.burst_requests, f"{field}.burst_requests")
    _check_count(limits.tokens_per_minute, f"{field}.limit_tokens_per_minute")
    _check_count(limits.concurrent_requests, f"{field}.limit_concurrent_requests")
    check_models([model.model for model in limits.models], f"{field}.models")
    for index, model in enumerate(limits.models):
        _check_rate(model.requests_per_second, f"{field}.models[{index}].limit_requests_per_second")
        _check_count(model.tokens_per_minute, f"{field}.models[{index}].limit_tokens_per_minute")
        _check_count(model.concurrent_requests, f"{field}.models[{index}].limit_concurrent_requests")


def check_expire_time(expire_time: datetime | None, now: datetime, field: str) -> None:
    """A time to come, or never."""
    if expire_time is not None and expire_time <= now:
        raise invalid(field, "must lie in the future")


def check_once(values: Iterable[str], field: str) -> None:
    """Values of which none repeats another."""
    seen = list(values)
    if len(seen) != len(set(seen)):
        raise invalid(field, "repeats a value")


def _check_list(values: Sequence[str], field: str) -> None:
    if len(values) > _LIST_LENGTH:
        raise invalid(field, f"may hold {_LIST_LENGTH} values")
    check_once(values, field)


def _check_rate(value: float | None, field: str) -> None:
    if value is not None and not (math.isfinite(value) and 0 < value <= _REQUESTS_PER_SECOND):
        raise invalid(field, f"must be above 0 and at most {_REQUESTS_PER_SECOND}")


def _check_count(value: int | None, field: str) -> None:
    if value is not None and not 1 <= value <= _COUNT:
        raise invalid(field, f"must be 1 to {_COUNT}")
