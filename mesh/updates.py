"""What an update may change: field masks and etags (AIP-134, AIP-154); it never changes anything itself."""

from collections.abc import Collection

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from mesh.errors import PlatformError, Reason
from mesh.fields import invalid


def fields_to_change(mask: FieldMask, resource: Message, changeable: Collection[str]) -> frozenset[str]:
    """The fields that an update changes: those of the mask, or without one those that are set and can be changed.

    Raises PlatformError(INVALID_ARGUMENT) naming update_mask for every other path.
    """
    if not mask.paths:
        return frozenset(field.name for field, _ in resource.ListFields() if field.name in changeable)
    unknown = [path for path in mask.paths if path not in changeable]
    if unknown:
        raise invalid("update_mask", f"may only hold {', '.join(sorted(changeable))}")
    return frozenset(mask.paths)


def etag_of(revision: int) -> str:
    """The etag of a resource."""
    return str(revision)


def check_etag(etag: str, revision: int, field: str) -> None:
    """Raise PlatformError(FAILED_PRECONDITION) if the client saw another version than the stored one."""
    if etag and etag != etag_of(revision):
        raise PlatformError(
            Reason.FAILED_PRECONDITION,
            field=field,
            description="It has changed since you read it. Read it again, and repeat the change with the new etag.",
        )
