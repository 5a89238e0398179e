"""Random messages of every bound RPC: what is sent as REST arrives over gRPC as it was meant, and what comes back over
gRPC is told whole in JSON."""

import base64
import itertools
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.peers import PACKAGES, linked_services
from edge.transcode.routes import WHOLE_REQUEST, Route, RouteTable
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import Edge

ROUTES = RouteTable(linked_services()).routes
TIMES = "google.protobuf.Timestamp"
DURATIONS = "google.protobuf.Duration"
MASKS = "google.protobuf.FieldMask"
EXAMPLES = 120
DEPTH = 4

INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
# A client that tidies up paths would not send these.
PATH_TEXT = TEXT.filter(lambda text: text not in ("", ".", ".."))


def fill(data: st.DataObject, message: Any, depth: int = 0) -> None:
    """Give some of a message's fields random values."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.full_name == MASKS:
            continue
        if not data.draw(st.booleans()) or (depth >= DEPTH and field.message_type is not None):
            continue
        if field.containing_oneof is not None and message.WhichOneof(field.containing_oneof.name):
            continue
        if field.is_repeated and field.message_type is not None:
            for _ in range(data.draw(st.integers(0, 2))):
                fill_message(data, getattr(message, field.name).add(), depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(data.draw(st.lists(scalars(field), max_size=3)))
        elif field.message_type is not None:
            getattr(message, field.name).SetInParent()
            fill_message(data, getattr(message, field.name), depth + 1)
        else:
            setattr(message, field.name, data.draw(scalars(field)))


def fill_message(data: st.DataObject, message: Any, depth: int) -> None:
    if message.DESCRIPTOR.full_name == TIMES:
        message.seconds = data.draw(st.integers(-62_135_596_800, 253_402_300_799))
        message.nanos = data.draw(st.integers(0, 999_999_999))
    elif message.DESCRIPTOR.full_name == DURATIONS:
        message.seconds = data.draw(st.integers(0, 315_576_000_000))
    else:
        assert not message.DESCRIPTOR.full_name.startswith("google.")
        fill(data, message, depth)


def scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.enum_type is not None:
        return st.sampled_from([value.number for value in field.enum_type.values])
    if field.cpp_type in INTEGERS:
        return st.integers(*INTEGERS[field.cpp_type])
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=8)
    if field.type == FieldDescriptor.TYPE_STRING:
        return TEXT
    return st.floats(width=32 if field.type == FieldDescriptor.TYPE_FLOAT else 64, allow_nan=False)


def random_request(data: st.DataObject, route: Route) -> Any:
    """A request that REST can tell: a query has no lists of messages, and no messages without anything in them."""
    request: Any = route.request_class()
    fill(data, request)
    for name in route.path_fields:
        setattr(request, name, data.draw(PATH_TEXT))
    if route.body != WHOLE_REQUEST:
        for field in in_query(route):
            if field.message_type is not None:
                prune(request, field)
    if route.resource is not None:
        getattr(request, route.body).SetInParent()
        if "update_mask" in request.DESCRIPTOR.fields_by_name:
            names = [field.name for field in route.resource.fields]
            request.update_mask.paths.extend(data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True)))
    return request


def in_query(route: Route) -> Iterator[FieldDescriptor]:
    for field in route.method.input_type.fields:
        if field.name not in route.path_fields and field.name != route.body:
            yield field


def prune(message: Any, field: FieldDescriptor) -> None:
    assert field.message_type is not None
    if field.is_repeated:
        message.ClearField(field.name)
    elif message.HasField(field.name) and not field.message_type.full_name.startswith("google."):
        inner = getattr(message, field.name)
        for part in field.message_type.fields:
            if part.message_type is not None:
                prune(inner, part)
        if not inner.ListFields():
            message.ClearField(field.name)


def pairs(message: Message, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The fields of a message as names and texts of a query, made from the message alone."""
    for field, value in message.ListFields():
        for one in value if field.is_repeated else [value]:
            if field.message_type is None:
                yield prefix + field.name, text_of(field, one)
            elif field.message_type.full_name == MASKS:
                yield prefix + field.name, ",".join(one.paths)
            elif field.message_type.full_name.startswith("google."):
                yield prefix + field.name, one.ToJsonString()
            else:
                yield from pairs(one, f"{prefix}{field.name}.")


def text_of(field: FieldDescriptor, value: Any) -> str:
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    if field.type == FieldDescriptor.TYPE_BOOL:
        return "true" if value else "false"
    if field.type == FieldDescriptor.TYPE_BYTES:
        return base64.b64encode(value).decode()
    return repr(value) if isinstance(value, float) else str(value)


def as_rest(route: Route, request: Any) -> tuple[str, bytes]:
    """The path with its query, and the body."""
    path = route.template
    for name in route.path_fields:
        path = path.replace(f"{{{name}}}", quote(getattr(request, name), safe=""))
    rest = type(request)()
    rest.CopyFrom(request)
    for name in route.path_fields:
        rest.ClearField(name)
    if route.body == WHOLE_REQUEST:
        return path, json_format.MessageToJson(rest).encode()
    body = b""
    if route.body:
        body = json_format.MessageToJson(getattr(rest, route.body), preserving_proto_field_name=True).encode()
        rest.ClearField(route.body)
    query = "&".join(f"{quote(name)}={quote(text, safe='')}" for name, text in pairs(rest))
    return f"{path}?{query}", body


UNARY = [route for route in ROUTES if not route.method.server_streaming]


@pytest.mark.parametrize("number", range(4))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[*HealthCheck],
)
@given(data=st.data())
async def test_messages_go_through_rest_unchanged(
    edge: Edge, peers: dict[str, PeerDouble], number: int, data: st.DataObject
) -> None:
    route = data.draw(st.sampled_from(UNARY[number::4]), label="route")
    peer = peers[PACKAGES[route.method.containing_service.file.package]]
    request = random_request(data, route)
    response: Any = route.response_class()
    fill(data, response)
    peer.answers[route.method.name] = response
    target, body = as_rest(route, request)
    answer = await edge.client.request(route.verb, target, content=body or None)
    assert answer.status_code == 200, answer.text
    assert peer.received.pop().request == request
    assert json_format.Parse(answer.content, route.response_class()) == response
    assert_complete(answer.json(), route.method.output_type)


def assert_complete(value: Any, message: Descriptor) -> None:
    """Whatever cannot be absent is there, under the contract's name."""
    assert set(value) <= set(message.fields_by_name)
    assert {field.name for field in message.fields if not field.has_presence} <= set(value)
    for field in message.fields:
        inner = field.message_type
        if inner is not None and field.name in value and not inner.full_name.startswith("google."):
            for one in value[field.name] if field.is_repeated else [value[field.name]]:
                assert_complete(one, inner)


def test_every_kind_of_field_is_among_the_contracts() -> None:
    """Should this fail, `fill` has to learn what is new."""
    kinds: set[str] = set()
    waiting = list(itertools.chain(*((route.method.input_type, route.method.output_type) for route in ROUTES)))
    seen: set[str] = set()
    while waiting:
        message = waiting.pop()
        if message.full_name in seen or message.full_name.startswith("google."):
            continue
        seen.add(message.full_name)
        assert not message.GetOptions().map_entry
        for field in message.fields:
            if field.message_type is not None:
                kinds.add(field.message_type.full_name)
                waiting.append(field.message_type)
    assert {kind for kind in kinds if kind.startswith("google.")} == {TIMES, DURATIONS, MASKS}
