"""The document that policies see as `input`; it never judges it."""

from __future__ import annotations

from typing import Any

import msgspec

from aiaas.identity.v1 import policy_service_pb2 as pb
from mesh.auth import Principal


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


def _object(text: str) -> Any:
    try:
        found = msgspec.json.decode(text) if text else {}
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}
