"""Paths and verbs to RPCs, by the contracts that are linked and by made-up ones that cannot be served."""

import itertools
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor

from aiaas.type.v1 import options_pb2
from edge.peers import PACKAGES, linked_services
from edge.transcode.routes import RouteTable
from mesh.auth import policy_of
from mesh.errors import PlatformError, Reason

KEYS = b"/admin/v1/organizations/org_1/api-keys"

_numbers = itertools.count()


@pytest.fixture(scope="module")
def table() -> RouteTable:
    return RouteTable(linked_services())


def made_up_service(*bindings: tuple[str, str, str], streams: bool = False) -> ServiceDescriptor:
    """A service with one RPC for each (verb, path, body), whose request has thing_id, count, tags and thing."""
    number = next(_numbers)
    package = f"made_up_{number}"
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    file.dependency.append("aiaas/type/v1/options.proto")
    thing = file.message_type.add(name="Thing")
    thing.field.add(name="thing_id", number=1, type=9, label=1)
    request = file.message_type.add(name="Request")
    request.field.add(name="thing_id", number=1, type=9, label=1)
    request.field.add(name="count", number=2, type=3, label=1)
    request.field.add(name="tags", number=3, type=9, label=3)
    request.field.add(name="thing", number=4, type=11, label=1, type_name=f".{package}.Thing")
    service = file.service.add(name="ThingService")
    for position, (verb, path, body) in enumerate(bindings):
        method = service.method.add(
            name=f"Do{position}",
            input_type=f".{package}.Request",
            output_type=f".{package}.Thing",
            client_streaming=streams,
        )
        policy = method.options.Extensions[options_pb2.policy]
        policy.public = True
        policy.rest.verb, policy.rest.path, policy.rest.body = verb, path, body
    pool = descriptor_pool.Default()
    pool.Add(file)
    return pool.FindServiceByName(f"{package}.ThingService")


def reason_of(table: RouteTable, verb: str, path: bytes) -> tuple[Reason, str | None, str | None]:
    with pytest.raises(PlatformError) as error:
        table.find(verb, path)
    return error.value.reason, error.value.field, error.value.details.get("allow")


def test_every_binding_of_the_contracts_is_a_route_that_finds_its_own_rpc(table: RouteTable) -> None:
    bound = [m for s in linked_services() for m in s.methods if policy_of(m).HasField("rest")]
    assert len(bound) == len(table.routes) > 20
    for route in table.routes:
        path = route.template.encode()
        for field in route.path_fields:
            path = path.replace(b"{%s}" % field.encode(), b"value-of-%s" % field.encode())
        found, values = table.find(route.verb, path)
        assert found.rpc == route.rpc
        assert values == {field: f"value-of-{field}" for field in route.path_fields}


def test_every_package_with_services_has_a_peer() -> None:
    assert {service.file.package for service in linked_services()} == set(PACKAGES)


def test_internal_rpcs_are_not_reachable(table: RouteTable) -> None:
    assert not [route.rpc for route in table.routes if policy_of(route.method).internal]


@pytest.mark.parametrize(
    ("segment", "value"),
    [
        (b"a%2Fb", "a/b"),
        (b"a%2fb%3Arotate", "a/b:rotate"),
        (b"%E2%82%AC", "€"),
        (b"llama:8b", "llama:8b"),
        (b"a+b", "a+b"),
        (b"..", ".."),
        (b"100%", "100%"),
    ],
)
def test_path_value_is_decoded_once_and_keeps_its_slashes(table: RouteTable, segment: bytes, value: str) -> None:
    route, values = table.find("GET", b"/admin/v1/models/" + segment)
    assert route.template == "/admin/v1/models/{model_id}"
    assert values == {"model_id": value}


def test_verb_suffix_is_the_rpcs_and_not_the_ids(table: RouteTable) -> None:
    route, values = table.find("POST", KEYS + b"/key_1:rotate")
    assert route.rpc == "/aiaas.identity.v1.ApiKeyService/RotateApiKey"
    assert values == {"organization_id": "org_1", "api_key_id": "key_1"}


def test_collection_below_a_variable_is_told_from_the_variable(table: RouteTable) -> None:
    route, _ = table.find("GET", b"/admin/v1/models/smollm2/prices")
    assert route.rpc.endswith("/ListPrices")


def test_head_is_served_as_get(table: RouteTable) -> None:
    assert table.find("HEAD", KEYS)[0].rpc == table.find("GET", KEYS)[0].rpc


@pytest.mark.parametrize(
    ("verb", "path", "allowed"),
    [
        ("DELETE", KEYS, "GET, POST"),
        ("GET", KEYS + b"/key_1:rotate", None),
        ("PUT", b"/admin/v1/models/m", "DELETE, GET, PATCH"),
        ("POST", b"/admin/v1/principal", "GET"),
    ],
)
def test_wrong_verb_names_the_right_ones(table: RouteTable, verb: str, path: bytes, allowed: str | None) -> None:
    if allowed is None:
        # An id may hold a colon, so this is a key of that name.
        assert table.find(verb, path)[1]["api_key_id"] == "key_1:rotate"
    else:
        assert reason_of(table, verb, path) == (Reason.METHOD_NOT_ALLOWED, None, allowed)


@pytest.mark.parametrize(
    "path",
    [
        b"",
        b"/",
        b"//",
        b"*",
        b"/admin",
        b"/admin/v1",
        b"/admin/v1/no-such",
        b"/admin/v1/models/",
        b"/admin/v1/organizations//api-keys",
        b"/admin/v1/organizations/org_1/api-keys/",
        b"/admin/v1/%6Dodels",
        b"/Admin/v1/models",
        b"/admin/v1/models/a/b",
        b"/admin/v1/models?x=1",
    ],
)
def test_other_path_is_no_route(table: RouteTable, path: bytes) -> None:
    assert reason_of(table, "GET", path)[0] is Reason.ROUTE_NOT_FOUND


def test_path_value_that_is_not_utf8_is_named(table: RouteTable) -> None:
    assert reason_of(table, "GET", b"/admin/v1/models/%FF")[:2] == (Reason.INVALID_ARGUMENT, "model_id")


@pytest.mark.parametrize(
    ("bindings", "problem"),
    [
        ([("FETCH", "/x", "")], "verb"),
        ([("GET", "x", "")], "absolute"),
        ([("GET", "/x/{no_such}", "")], "no_such"),
        ([("GET", "/x/{tags}", "")], "tags"),
        ([("GET", "/x/{thing}", "")], "thing"),
        ([("GET", "/x/{thing_id=y/*}", "")], "not understood"),
        ([("POST", "/x", "count")], "count"),
        ([("POST", "/x", "no_such")], "no_such"),
        ([("GET", "/x/{thing_id}", ""), ("GET", "/x/{count}", "")], "same path"),
    ],
)
def test_binding_that_cannot_be_served_stops_the_start(bindings: list[Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        RouteTable([made_up_service(*bindings)])


def test_rpc_that_takes_a_stream_and_has_a_binding_stops_the_start() -> None:
    with pytest.raises(ValueError, match="streams"):
        RouteTable([made_up_service(("GET", "/x", ""), streams=True)])
