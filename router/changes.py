"""What requests that change a resource have in common: masks, ids, repeated creations; it never changes anything."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from mesh import context
from mesh.errors import PlatformError, Reason
from router.store import Creation

_REQUEST_ID_LENGTH = 128


def require(request: Message, field: str) -> None:
    """Raises PlatformError(INVALID_ARGUMENT) if the message field is absent."""
    if not request.HasField(field):
        raise PlatformError(Reason.INVALID_ARGUMENT, field=field, description=f"'{field}' is required.")


def require_same_id(in_path: str, in_body: str, field: str) -> None:
    """Raises PlatformError(INVALID_ARGUMENT) if a resource in the body names another id than the path."""
    if in_body not in ("", in_path):
        raise PlatformError(
            Reason.INVALID_ARGUMENT, field=field, description=f"'{field}' must be empty or the id in the path."
        )


def fields_to_change(resource: Message, mask: FieldMask, changeable: Collection[str]) -> list[str]:
    """The names of the fields to change: those of the mask, all for "*", those that are set for an empty mask.

    Raises PlatformError(INVALID_ARGUMENT) if the mask names a field that cannot be changed.
    """
    if "*" in mask.paths:
        return list(changeable)
    for path in mask.paths:
        if path not in changeable:
            raise PlatformError(
                Reason.INVALID_ARGUMENT,
                field="update_mask",
                description=f"'update_mask' names '{path}', which cannot be changed; it may name "
                f"{', '.join(changeable)}.",
            )
    if mask.paths:
        return list(mask.paths)
    return [field.name for field, _ in resource.ListFields() if field.name in changeable]


def creation_of(kind: str, request_id: str, resource: Message) -> Creation | None:
    """What identifies this creation of a `kind` of resource by the calling principal (AIP-155); None without a
    `request_id`.

    Raises PlatformError(INVALID_ARGUMENT) if the `request_id` is too long.
    """
    if not request_id:
        return None
    if len(request_id) > _REQUEST_ID_LENGTH:
        raise PlatformError(
            Reason.INVALID_ARGUMENT,
            field="request_id",
            description=f"'request_id' may have {_REQUEST_ID_LENGTH} characters.",
        )
    principal = context.principal.get()
    digest = hashlib.sha256(resource.SerializeToString(deterministic=True)).digest()
    return Creation(f"{kind}/{principal.id if principal else ''}", request_id, digest)
