"""Which values the fields of identity's resources may have; it never knows where a value comes from or goes to.

Every check takes the field as the client wrote it ("api_key.display_name") and raises PlatformError(INVALID_ARGUMENT)
that names it. None of them repeats the value: it may be anything.
"""

import ipaddress
import math
import re
from collections.abc import Sequence
from datetime import datetime

from mesh.auth import RateLimits
from mesh.fields import check_all as check_all
from mesh.fields import check_display_name as check_display_name
from mesh.fields import check_filter as check_filter
from mesh.fields import check_id as check_id
from mesh.fields import check_once as check_once
from mesh.fields import check_request_id as check_request_id
from mesh.fields import invalid as invalid
from mesh.fields import is_id as is_id
from mesh.fields import require as require

_EMAIL_LENGTH = 254
_REASON_LENGTH = 1000
_LIST_LENGTH = 200
_REQUESTS_PER_SECOND = 1_000_000
_COUNT = 1_000_000_000_000
# Of ASCII and Latin-1, all but tab and line feed.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MODEL = re.compile(r"[a-zA-Z0-9._:/-]{1,128}")
# The form that browsers hold an address to (HTML, "valid e-mail address"), with a dot in the domain.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_EMAIL = re.compile(rf"[A-Za-z0-9.!#$%&'*+/=?^_`{{|}}~-]{{1,64}}@{_LABEL}(?:\.{_LABEL})+")


def check_reason(value: str, field: str, *, required: bool = True) -> None:
    """Why something is done, in 1 to 1000 characters of text; empty where it is not `required`."""
    if (required and not value.strip()) or len(value) > _REASON_LENGTH:
        raise invalid(field, f"must have {1 if required else 0} to {_REASON_LENGTH} characters")
    if _CONTROL.search(value):
        raise invalid(field, "must not hold control characters but line breaks and tabs")


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
    check_all(
        lambda: _check_rate(limits.requests_per_second, f"{field}.limit_requests_per_second"),
        lambda: _check_count(limits.burst_requests, f"{field}.burst_requests"),
        lambda: _check_count(limits.tokens_per_minute, f"{field}.limit_tokens_per_minute"),
        lambda: _check_count(limits.concurrent_requests, f"{field}.limit_concurrent_requests"),
        lambda: check_models([model.model for model in limits.models], f"{field}.models"),
    )
    for index, model in enumerate(limits.models):
        _check_rate(model.requests_per_second, f"{field}.models[{index}].limit_requests_per_second")
        _check_count(model.tokens_per_minute, f"{field}.models[{index}].limit_tokens_per_minute")
        _check_count(model.concurrent_requests, f"{field}.models[{index}].limit_concurrent_requests")


def check_expire_time(expire_time: datetime | None, now: datetime, field: str) -> None:
    """A time to come, or never."""
    if expire_time is not None and expire_time <= now:
        raise invalid(field, "must lie in the future")


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
