"""What an entry tells of a call: who, which RPC, and which ids its request and its answer name; it never tells another
value, so no secret, no name and no address of a person.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from identity.audit_chain import PLATFORM_CHAIN, AuditChange, AuditEntry, AuditOutcome
from identity.fields import is_id
from mesh import context
from mesh.auth import Principal, find_method, policy_of
from mesh.clock import Clock

_DEPTH = 3
_IDS = 40
_REPEATED = 20
_REASON_LENGTH = 1000
_MASK_PATH = re.compile(r"[a-z][a-z0-9_.]{0,99}")
_WORDS = re.compile(r"(?<!^)(?=[A-Z])")
# A client's own id for a creation names nothing that is there.
_NO_TARGETS = ("request_id",)


@dataclass(frozen=True, slots=True)
class Rpc:
    """What the contract says of an RPC. `resource_type` is what it is about, "api_key" for example."""

    method: str
    permission: str
    resource_type: str
    mutates: bool
    internal: bool
    public: bool


@cache
def rpc_of(method_name: str) -> Rpc:
    """The RPC of a gRPC method. Raises KeyError if no imported stub has it."""
    method = find_method(method_name)
    policy = policy_of(method)
    service = _WORDS.sub("_", method.containing_service.name.removesuffix("Service")).lower()
    return Rpc(
        method=method_name,
        permission=policy.permission,
        resource_type=_singular(policy.permission.partition(".")[0]) or service,
        mutates=method.GetOptions().idempotency_level != MethodOptions.NO_SIDE_EFFECTS,
        internal=policy.internal,
        public=policy.public,
    )


class Call:
    """One call of an RPC, as far as entries tell of it."""

    def __init__(self, rpc: Rpc, request: Message, client_address: str, clock: Clock) -> None:
        self._rpc = rpc
        self._request = request
        self._client_address = client_address
        self._clock = clock

    def entry(self, entry_id: str, outcome: AuditOutcome, reason: str, answer: Message | None) -> AuditEntry:
        """The entry of the call. Where `reason` is empty, it is the one that the caller gave."""
        principal = context.principal.get()
        asked = dict(_ids(self._request))
        answered = {} if answer is None else dict(_ids(answer))
        resource_type, resource_id = self._resource(asked, answered)
        return AuditEntry(
            audit_entry_id=entry_id,
            organization_id=self._chain(principal, asked, answered),
            event_time=self._clock.now(),
            method=self._rpc.method,
            outcome=outcome,
            principal_kind="" if principal is None else principal.kind,
            principal_id="" if principal is None else principal.id,
            api_key_id="" if principal is None else principal.api_key_id,
            permission=self._rpc.permission,
            resource_type=resource_type,
            resource_id=resource_id,
            reason=reason or self._given_reason(),
            changes=self._changes(asked, answered),
            request_id=context.request_id.get(),
            client_address=self._client_address,
        )

    def _chain(self, principal: Principal | None, asked: dict[str, list[str]], answered: dict[str, list[str]]) -> str:
        """Whose chain it is: nobody gets an entry into another organization's but the platform, and whom an answer
        let in."""
        if principal is None:
            named = [ids[0] for path, ids in answered.items() if path.rpartition(".")[2] == "organization_id"]
            return named[0] if named else PLATFORM_CHAIN
        if principal.platform:
            return asked.get("organization_id", [PLATFORM_CHAIN])[0]
        return principal.organization_id

    def _resource(self, asked: dict[str, list[str]], answered: dict[str, list[str]]) -> tuple[str, str]:
        """The type and the id of what the call was about: what the permission is for, or what the request names."""
        own = f"{self._rpc.resource_type}_id"
        for path, ids in (*answered.items(), *asked.items()):
            if path.rpartition(".")[2] == own:
                return self._rpc.resource_type, ids[0]
        named = [path for path in asked if path.endswith("_id") and "." not in path and path != "organization_id"]
        return (named[-1].removesuffix("_id"), asked[named[-1]][0]) if named else (self._rpc.resource_type, "")

    def _given_reason(self) -> str:
        field = self._request.DESCRIPTOR.fields_by_name.get("reason")
        if field is None or field.type != FieldDescriptor.TYPE_STRING or _is_redacted(field):
            return ""
        return str(self._request.reason)[:_REASON_LENGTH].replace("\0", "")  # type: ignore[attr-defined]

    def _changes(self, asked: dict[str, list[str]], answered: dict[str, list[str]]) -> tuple[AuditChange, ...]:
        known = list(asked.values())
        told = asked | {path: ids for path, ids in answered.items() if path not in asked and ids not in known}
        mask = getattr(self._request, "update_mask", None)
        if isinstance(mask, FieldMask):
            told["update_mask"] = [path for path in mask.paths if _MASK_PATH.fullmatch(path)]
        return tuple(
            AuditChange(
                path, after_json=msgspec.json.encode(ids if path.endswith(("_ids", "_mask")) else ids[0]).decode()
            )
            for path, ids in list(told.items())[-_IDS:]
            if ids
        )


def _ids(message: Message, prefix: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, list[str]]]:
    """The ids in a message by their paths, without what only looks like a field of ids."""
    for field, value in message.ListFields():
        if _is_redacted(field) or field.name in _NO_TARGETS:
            continue
        if field.message_type is not None:
            if not field.is_repeated and depth:
                yield from _ids(value, f"{prefix}{field.name}.", depth - 1)
        elif field.type == FieldDescriptor.TYPE_STRING and field.name.endswith("_ids" if field.is_repeated else "_id"):
            ids = [text for text in (value[:_REPEATED] if field.is_repeated else [value]) if is_id(text)]
            if ids:
                yield f"{prefix}{field.name}", ids


def _is_redacted(field: Any) -> bool:
    return bool(field.GetOptions().debug_redact)


def _singular(name: str) -> str:
    if name.endswith("ies"):
        return f"{name.removesuffix('ies')}y"
    return name.removesuffix("s")
