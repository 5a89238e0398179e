"""Makes the request of an RPC from a path, a query, a body and headers; it never calls anything.

The names of the contract hold everywhere: a query names fields as "page_size" or "filter.models", a body has the same
names, errors tell them from the request's root ("api_key.display_name").
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from edge.transcode.fields import convert, field_named, is_map, is_mask, is_nested, parse_json, wrong
from edge.transcode.routes import ETAG, REQUEST_ID, WHOLE_REQUEST, Route
from mesh.errors import PlatformError, Reason, together

IF_MATCH = "If-Match"
IDEMPOTENCY_KEY = "Idempotency-Key"

_QUERY_FIELDS = 1000


@dataclass(frozen=True, slots=True)
class RestRequest:
    """What a client sent for one route."""

    path_values: Mapping[str, str] = field(default_factory=dict)
    query: bytes = b""
    body: bytes = b""
    if_match: str | None = None
    idempotency_key: str = ""


def bind(route: Route, rest: RestRequest) -> Message:
    """The request of the route's RPC.

    Raises PlatformError: INVALID_JSON, UNKNOWN_FIELD, INVALID_ARGUMENT, naming every field that is wrong.
    """
    descriptor = route.method.input_type
    values = _body_values(route, rest.body)
    given_in_body = values.get(route.body) if route.resource is not None else None
    problems: list[PlatformError] = []
    for name, text in _query(rest.query):
        try:
            _put_query_value(values, route, name, text)
        except PlatformError as error:
            problems.append(error)
    for name, text in rest.path_values.items():
        _put(values, descriptor, name, text, f"'{name}' contradicts the path.")
    if route.verb != "GET":
        _put_etag(values, route, rest.if_match)
        _put_idempotency_key(values, route, rest.idempotency_key)
    masks = _take_masks(values, descriptor)
    try:
        request = convert(values, descriptor)
    except PlatformError as error:
        raise together([*problems, error]) from None
    if problems:
        raise together(problems)
    for mask in (known for known in descriptor.fields if is_mask(known)):
        if mask.name in masks:
            paths = _mask_paths(masks[mask.name], mask.name, route.resource)
        elif route.verb == "PATCH" and isinstance(given_in_body, dict) and route.resource is not None:
            paths = _derived_paths(given_in_body, route.resource, route.path_fields)
        else:
            continue
        getattr(request, mask.name).paths.extend(paths)
    return request


def _body_values(route: Route, body: bytes) -> dict[str, Any]:
    """The request's fields that the body fills; an empty body fills none."""
    if not body:
        return {}
    if not route.body:
        raise PlatformError(Reason.INVALID_ARGUMENT, description="This method takes no body.")
    value = parse_json(body)
    if not isinstance(value, dict):
        raise PlatformError(Reason.INVALID_ARGUMENT, description="The body has to be a JSON object.")
    return dict(value) if route.body == WHOLE_REQUEST else {route.body: value}


def _query(query: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_QUERY_FIELDS)
    except ValueError:
        raise PlatformError(
            Reason.INVALID_ARGUMENT, description="The query is not valid: too many fields, or not UTF-8."
        ) from None


def _put_query_value(values: dict[str, Any], route: Route, name: str, text: str) -> None:
    """Add one query field to the values, making the objects around it."""
    descriptor = route.method.input_type
    *outer, last = name.split(".")
    if route.body == WHOLE_REQUEST:
        # Such a body is the request; a field beside it has no place.
        raise PlatformError(Reason.UNKNOWN_FIELD, field=name)
    where = values
    for position, part in enumerate(outer):
        known = field_named(descriptor, part)
        if known is None or not is_nested(known) or known.is_repeated or known.message_type is None:
            raise PlatformError(Reason.UNKNOWN_FIELD, field=name)
        if position == 0 and known.name == route.body:
            raise PlatformError(Reason.INVALID_ARGUMENT, field=name, description=f"'{name}' belongs in the body.")
        descriptor = known.message_type
        where = where.setdefault(_key(where, known, part), {})
    known = field_named(descriptor, last)
    if known is None:
        raise PlatformError(Reason.UNKNOWN_FIELD, field=name)
    if is_nested(known) or is_map(known):
        words = "its fields one by one, as in 'filter.models=a'"
        raise PlatformError(
            Reason.INVALID_ARGUMENT, field=name, description=f"Invalid value for '{name}': expected {words}."
        )
    key = _key(where, known, last)
    value = _from_text(known, text)
    if known.is_repeated:
        where.setdefault(key, []).append(value)
    elif key in where:
        raise PlatformError(Reason.INVALID_ARGUMENT, field=name, description=f"'{name}' is given more than once.")
    else:
        where[key] = value


def _key(values: Mapping[str, Any], known: FieldDescriptor, spelled: str) -> str:
    """The name under which a field is in the values already, else the client's own spelling of it."""
    return next((name for name in (known.name, known.json_name) if name in values), spelled)


def _from_text(known: FieldDescriptor, text: str) -> Any:
    """A query's or path's text as JSON has it; json_format takes numbers and enums from strings, but no booleans."""
    if known.type == FieldDescriptor.TYPE_BOOL and text in ("true", "false"):
        return text == "true"
    return text


def _put(values: dict[str, Any], descriptor: Descriptor, name: str, text: str, contradiction: str) -> None:
    """Set a field that comes from elsewhere than body and query; those may repeat it, but not contradict it."""
    known = descriptor.fields_by_name[name]
    key = _key(values, known, name)
    value = _from_text(known, text)
    if values.setdefault(key, value) != value:
        raise PlatformError(Reason.INVALID_ARGUMENT, field=key, description=contradiction)


def _put_etag(values: dict[str, Any], route: Route, if_match: str | None) -> None:
    """Bind If-Match to the etag of the request, or of the resource in its body (AIP-154)."""
    if if_match is None or if_match == "*":
        return
    if len(if_match) < 2 or not (if_match[0] == if_match[-1] == '"') or '"' in if_match[1:-1]:
        raise wrong('one etag in quotes, for example "abc"', IF_MATCH)
    etag = if_match[1:-1]
    contradiction = "'etag' contradicts If-Match."
    descriptor = route.method.input_type
    if ETAG in descriptor.fields_by_name:
        _put(values, descriptor, ETAG, etag, contradiction)
    elif route.resource is not None and ETAG in route.resource.fields_by_name:
        # A copy: the derived mask is made from what the client itself wrote.
        values[route.body] = dict(values.get(route.body, {}))
        _put(values[route.body], route.resource, ETAG, etag, contradiction)
    else:
        raise PlatformError(Reason.INVALID_ARGUMENT, field=IF_MATCH, description="This method takes no etag.")


def _put_idempotency_key(values: dict[str, Any], route: Route, key: str) -> None:
    """Bind Idempotency-Key to the request's id. Where a repeat would do something again and nothing could tell, the
    key is refused: what it asks for is not kept. Another verb does the same however often it is sent."""
    if not key:
        return
    if route.takes_request_id:
        contradiction = f"'request_id' contradicts {IDEMPOTENCY_KEY}."
        _put(values, route.method.input_type, REQUEST_ID, key, contradiction)
    elif route.verb == "POST":
        raise PlatformError(
            Reason.INVALID_ARGUMENT,
            field=IDEMPOTENCY_KEY,
            description=f"This method takes no {IDEMPOTENCY_KEY}: look what became of a call before you repeat it.",
        )


def _take_masks(values: dict[str, Any], descriptor: Descriptor) -> dict[str, Any]:
    """Remove the field masks from the values: json_format takes only camelCase within them."""
    masks = {}
    for name in list(values):
        known = field_named(descriptor, name)
        if known is not None and is_mask(known):
            masks[known.name] = values.pop(name)
    return {name: value for name, value in masks.items() if value is not None}


def _mask_paths(mask: Any, name: str, resource: Descriptor | None) -> Iterable[str]:
    """The paths of a mask in the contract's spelling (AIP-134, AIP-161)."""
    if not isinstance(mask, str):
        raise wrong("names of fields in one string, separated by commas", name)
    return [_mask_path(path.strip(), name, resource) for path in mask.split(",") if path.strip()]


def _mask_path(path: str, name: str, resource: Descriptor | None) -> str:
    if path == "*" or resource is None:
        return path
    spelled = []
    message: Descriptor | None = resource
    for part in path.split("."):
        known = field_named(message, part) if message is not None else None
        if known is None:
            raise PlatformError(
                Reason.INVALID_ARGUMENT, field=name, description=f"'{name}' names '{path}', which is no field."
            )
        spelled.append(known.name)
        message = known.message_type if is_nested(known) and not known.is_repeated else None
    return ".".join(spelled)


def _derived_paths(body: Mapping[str, Any], resource: Descriptor, path_fields: frozenset[str]) -> list[str]:
    """What an update without a mask changes: every field that its body has, null ones too, but neither the etag nor the
    ids that the path tells."""
    present = (field_named(resource, name) for name in body)
    kept_out = path_fields | {ETAG}
    return [known.name for known in present if known is not None and known.name not in kept_out]
