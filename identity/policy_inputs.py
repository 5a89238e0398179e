"""The document that policies see as `input`; it never judges it."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from aiaas.identity.v1 import policy_service_pb2 as pb
from mesh.auth import Principal
from mesh.conversions import from_timestamp
from mesh.errors import PlatformError
from mesh.fields import invalid

RESOURCE_LENGTH: Final = 64 << 10


def input_json(asked: pb.PolicyInput) -> str:
    """An input as JSON; docs/policies.md tells its fields. A resource that is no JSON object is empty."""
    principal = Principal.from_proto(asked.principal)
    document = {
        "principal": {
            "kind": principal.kind,
            "id": principal.id,
            "organization_id": principal.organization_id,
            "user_id": principal.user_id,
            "service_account_id": principal.service_account_id,
            "api_key_id": principal.api_key_id,
            "permissions": sorted(principal.permissions),
        },
        "method": asked.method,
        "permission": asked.permission,
        "resource": _object(asked.resource_json),
        "client_address": asked.client_address,
        "time": asked.request_time.ToJsonString(),
    }
    return msgspec.json.encode(document).decode()


def checked_input_json(asked: pb.PolicyInput) -> str:
    """The same of an input that somebody made up. Raises PlatformError(INVALID_ARGUMENT) naming the field."""
    if len(asked.resource_json) > RESOURCE_LENGTH:
        raise invalid("input.resource_json", f"must have at most {RESOURCE_LENGTH} characters")
    try:
        is_object = not asked.resource_json or isinstance(msgspec.json.decode(asked.resource_json), dict)
    except (msgspec.DecodeError, RecursionError):
        is_object = False
    if not is_object:
        raise invalid("input.resource_json", "must be a JSON object")
    from_timestamp(asked.request_time, "input.request_time")
    try:
        return input_json(asked)
    except (PlatformError, ValueError, OverflowError):
        raise invalid("input.principal", "is nobody who could call") from None


def _object(text: str) -> Any:
    try:
        found = msgspec.json.decode(text) if text else {}
    except (msgspec.DecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
