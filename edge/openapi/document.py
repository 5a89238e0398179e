"""The OpenAPI document: every route of the contracts, and what stands in `edge.openapi.compatible`; it names no RPC."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from edge.openapi import compatible
from edge.openapi.compatible import IDEMPOTENCY_KEY
from edge.openapi.contracts import Contracts
from edge.openapi.samples import sample
from edge.openapi.schemas import Schema, Schemas
from edge.transcode.binding import IF_MATCH
from edge.transcode.fields import is_map, is_mask, is_nested
from edge.transcode.routes import ETAG, REQUEST_ID, WHOLE_REQUEST, Route, RouteTable
from mesh.auth import policy_of

_ABOUT = """\
Names are those of the contracts, in snake_case; camelCase is understood as well. Integers of 64 bits are strings in
answers and may be numbers in requests, enums are names, times are RFC 3339, durations are seconds with an "s", bytes
are base64. A field that is unknown, or of another type, is refused and named.

**Pages.** A list takes `page_size` and `page_token`; its `next_page_token` is empty on the last page.

**Changes.** A PATCH changes the fields that its body has, `null` ones are cleared; `update_mask` names other ones. With
`If-Match`, or the resource's `etag`, it changes only what you saw. An `Idempotency-Key` makes a repeat safe
where an operation names it; a POST that does not refuses it, and all else does the same however often it is sent.

**Errors** under /admin and /analytics are those of AIP-193, under /v1 those of OpenAI, under /oauth2 those of RFC 6749.
All fields that are wrong are named at once. Every answer has an `X-Request-Id`."""

_ERROR: Schema = {
    "type": "object",
    "description": "An error as AIP-193 has it.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "status", "details"],
            "properties": {
                "code": {"type": "integer", "description": "The HTTP status."},
                "message": {"type": "string", "description": "For people."},
                "status": {"type": "string", "description": "The gRPC code.", "examples": ["INVALID_ARGUMENT"]},
                "details": {
                    "type": "array",
                    "description": "Always an ErrorInfo, whose `reason` programs decide by; a BadRequest where a field "
                    "is wrong, a RetryInfo where another try makes sense, a QuotaFailure where a budget is used up.",
                    "items": {
                        "type": "object",
                        "required": ["@type"],
                        "properties": {
                            "@type": {"type": "string", "examples": ["type.googleapis.com/google.rpc.BadRequest"]},
                            "reason": {"type": "string", "examples": ["UNKNOWN_FIELD"]},
                            "domain": {"type": "string", "examples": ["aiaas"]},
                            "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
                            "fieldViolations": {
                                "type": "array",
                                "items": {
                                    "type": "object",
                                    "properties": {
                                        "field": {"type": "string", "examples": ["api_key.display_name"]},
                                        "description": {"type": "string"},
                                    },
                                },
                            },
                        },
                    },
                },
            },
        }
    },
}


def document(contracts: Contracts) -> dict[str, Any]:
    """The whole document. Raises ValueError for contracts that cannot be served."""
    schemas = Schemas(contracts.comments)
    table = RouteTable(contracts.services)
    paths: dict[str, dict[str, Any]] = {}
    for route in sorted(table.routes, key=lambda route: (route.template, route.verb)):
        paths.setdefault(route.template, {})[route.verb.lower()] = _operation(route, schemas)
    _hold_apart(route.method.name for route in table.routes)
    components: dict[str, Any] = {
        "schemas": schemas.components() | {"Error": _ERROR},
        "responses": {
            "Error": {
                "description": "What went wrong.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            }
        },
        "securitySchemes": {
            "bearer": {
                "type": "http",
                "scheme": "bearer",
                "description": "An API key, an access token or a session token.",
            },
        },
    }
    tags = [
        {"name": service.name, "description": schemas.comment(service.full_name)}
        for service in contracts.services
        if any(policy_of(method).HasField("rest") for method in service.methods)
    ]
    compatible.add(paths, components, tags, schemas, contracts.services)
    for operations in paths.values():
        for operation in operations.values():
            _add_samples(operation, components["schemas"])
    return {
        "openapi": "3.1.0",
        "info": {"title": "aiaas", "version": "v1", "description": _ABOUT, "license": _LICENSE},
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}],
        "tags": tags,
        "paths": dict(sorted(paths.items())),
        "components": components,
    }


_LICENSE = {"name": "Apache-2.0", "identifier": "Apache-2.0"}


def _hold_apart(names: Iterator[str]) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ValueError(f"several services have an RPC of the name {', '.join(twice)}")


def _operation(route: Route, schemas: Schemas) -> dict[str, Any]:
    method = route.method
    comment = schemas.comment(method.full_name)
    permission = policy_of(method).permission
    said = [comment]
    if permission:
        said.append(f"Needs the permission `{permission}`.")
    if method.server_streaming:
        said.append("The answer is a line of JSON for each item; an error among them is the last line.")
    operation: dict[str, Any] = {
        "operationId": method.name,
        "tags": [method.containing_service.name],
        "summary": comment.partition(". ")[0].rstrip("."),
        "description": " ".join(said),
        "x-rpc": route.rpc,
    }
    if permission:
        operation["x-permission"] = permission
    if route.is_public:
        operation["security"] = []
    if parameters := [*_path_parameters(route, schemas), *_query_parameters(route, schemas), *_headers(route)]:
        operation["parameters"] = parameters
    if route.body:
        operation["requestBody"] = {"content": {"application/json": {"schema": _body(route, schemas)}}}
    media_type = "application/x-ndjson" if method.server_streaming else "application/json"
    answer: dict[str, Any] = {
        "description": schemas.comment(method.output_type.full_name),
        "content": {media_type: {"schema": schemas.reference(method.output_type)}},
    }
    if route.etag_path:
        answer["headers"] = {"ETag": {"description": "The resource's etag, quoted.", "schema": {"type": "string"}}}
    operation["responses"] = {"200": answer, "default": {"$ref": "#/components/responses/Error"}}
    return operation


def _path_parameters(route: Route, schemas: Schemas) -> Iterator[Schema]:
    for segment in route.segments:
        if segment.field:
            field = route.method.input_type.fields_by_name[segment.field]
            yield _parameter(segment.field, "path", field, schemas) | {"required": True}


def _query_parameters(route: Route, schemas: Schemas) -> Iterator[Schema]:
    if route.body == WHOLE_REQUEST:
        return
    left_out = _told_elsewhere(route) | {route.body}
    for field in route.method.input_type.fields:
        if field.name in left_out:
            continue
        for parameter in _flattened(field.name, field, schemas, ()):
            if route.resource is not None and is_mask(field):
                parameter["schema"] |= _mask_of(route.resource)
            yield parameter


def _mask_of(resource: Descriptor) -> Schema:
    """What a mask may name; fields of fields, with dots between them, are too many to tell."""
    names = "|".join(field.name for field in resource.fields)
    return {"pattern": rf"^(\*|({names})(,({names}))*)$", "examples": [resource.fields[0].name]}


def _flattened(name: str, field: FieldDescriptor, schemas: Schemas, around: tuple[Descriptor, ...]) -> Iterator[Schema]:
    """The parameters of one field: of a message, those of its fields, as a query cannot hold the message itself."""
    if not is_nested(field) or field.message_type is None:
        if not is_map(field):
            yield _parameter(name, "query", field, schemas)
    elif not field.is_repeated and field.message_type not in around:
        for inner in field.message_type.fields:
            yield from _flattened(f"{name}.{inner.name}", inner, schemas, (*around, field.message_type))


def _parameter(name: str, place: str, field: FieldDescriptor, schemas: Schemas) -> Schema:
    schema = schemas.of(field, taken=True)
    parameter: Schema = {"name": name, "in": place}
    if description := schema.pop("description", ""):
        parameter["description"] = description
    return parameter | {"schema": schema}


def _headers(route: Route) -> Iterator[Schema]:
    if route.takes_request_id:
        yield IDEMPOTENCY_KEY
    if route.takes_etag:
        said = "The etag that the resource must have, in quotes; one in the body must be the same."
        schema = {"type": "string", "pattern": r'^(\*|"[!#-~]*")$'}
        yield {"name": IF_MATCH, "in": "header", "description": said, "schema": schema}


def _body(route: Route, schemas: Schemas) -> Schema:
    if route.resource is not None:
        return schemas.reference(route.resource, taken=True)
    return schemas.request(route.method.input_type, _told_elsewhere(route))


def _told_elsewhere(route: Route) -> set[str]:
    """The request's fields that the path or a header tells."""
    told = set(route.path_fields)
    if route.takes_request_id:
        told.add(REQUEST_ID)
    if route.takes_etag:
        told.add(ETAG)
    return told


def _add_samples(operation: dict[str, Any], schemas: dict[str, Schema]) -> None:
    for media in operation.get("requestBody", {}).get("content", {}).values():
        media.setdefault("example", sample(media["schema"], schemas))
