"""Errors as SCIM writes them (RFC 7644, 3.12); it never chooses a status."""

import msgspec

from mesh.errors import PlatformError, Reason

CONTENT_TYPE = (b"content-type", b"application/scim+json")

_ERROR = "urn:ietf:params:scim:api:messages:2.0:Error"


def status_of(error: PlatformError) -> int:
    """The HTTP status: the catalog's, but for a version that is not the current one (RFC 7644, 3.14)."""
    if error.reason is Reason.FAILED_PRECONDITION and error.field == "version":
        return 412
    return error.entry.http


def error_body(error: PlatformError) -> bytes:
    """The body of an answer that is an error."""
    body = {"schemas": [_ERROR], "status": str(status_of(error)), "detail": error.message}
    if scim_type := error.details.get("scim_type"):
        body["scimType"] = scim_type
    return msgspec.json.encode(body)
