"""Every shape of binding: path, query, body, headers, masks; against the contracts as they are."""

import itertools
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from edge.peers import linked_services
from edge.transcode.binding import RestRequest, bind
from edge.transcode.routes import Route, RouteTable
from mesh.errors import PlatformError, Reason

ROUTES: dict[str, Route] = {route.method.name: route for route in RouteTable(linked_services()).routes}
ORGANIZATION = {"organization_id": "org_1"}
KEY = {**ORGANIZATION, "api_key_id": "key_1"}
BACKEND = {"backend_id": "b1"}


def bound(rpc: str, **rest: Any) -> dict[str, Any]:
    """The request that a REST request becomes, as JSON in the contract's names."""
    return json_format.MessageToDict(bind(ROUTES[rpc], RestRequest(**rest)), preserving_proto_field_name=True)


def refused(rpc: str, **rest: Any) -> PlatformError:
    with pytest.raises(PlatformError) as error:
        bind(ROUTES[rpc], RestRequest(**rest))
    return error.value


def mask_of(rpc: str, **rest: Any) -> list[str]:
    request: Any = bind(ROUTES[rpc], RestRequest(**rest))
    return list(request.update_mask.paths)


def test_path_alone() -> None:
    assert bound("GetApiKey", path_values=KEY) == KEY


def test_body_fills_its_field_and_path_and_query_the_rest() -> None:
    assert bound(
        "CreateApiKey",
        path_values=ORGANIZATION,
        query=b"request_id=r1",
        body=b'{"display_name": "x", "scopes": ["a.b"]}',
    ) == {**ORGANIZATION, "request_id": "r1", "api_key": {"display_name": "x", "scopes": ["a.b"]}}


def test_whole_body_is_the_request() -> None:
    assert bound("RotateApiKey", path_values=KEY, body=b'{"overlap": "3600s"}') == {**KEY, "overlap": "3600s"}


@pytest.mark.parametrize("body", [b"", b"{}"])
def test_empty_body_fills_nothing(body: bytes) -> None:
    assert bound("RevokeApiKey", path_values=KEY, body=body) == KEY


def test_body_may_repeat_the_path_but_not_contradict_it() -> None:
    assert bound("RevokeApiKey", path_values=KEY, body=b'{"organizationId": "org_1"}') == KEY
    error = refused("RevokeApiKey", path_values=KEY, body=b'{"organizationId": "org_2"}')
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "organizationId")


def test_query_cannot_contradict_the_path() -> None:
    assert refused("GetApiKey", path_values=KEY, query=b"organization_id=org_2").field == "organization_id"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (b"page_size=7&page_token=a%2Bb%3D", {"page_size": 7, "page_token": "a+b="}),
        (b"pageSize=7", {"page_size": 7}),
        (b"filter.models=a&filter.models=b", {"filter": {"models": ["a", "b"]}}),
        (b"filter.apiKeyIds=k&filter.models=a%2Fb", {"filter": {"api_key_ids": ["k"], "models": ["a/b"]}}),
        (b"group_by=USAGE_DIMENSION_MODEL", {"group_by": ["USAGE_DIMENSION_MODEL"]}),
        (b"interval=USAGE_INTERVAL_HOUR", {"interval": "USAGE_INTERVAL_HOUR"}),
        (b"interval=1", {"interval": "USAGE_INTERVAL_HOUR"}),
        (b"start_time=2026-01-01T00%3A00%3A00Z", {"start_time": "2026-01-01T00:00:00Z"}),
        (b"start_time=2026-01-01T01:00:00%2B01:00", {"start_time": "2026-01-01T00:00:00Z"}),
        (b"time_zone=", {}),
        (b"", {}),
        (b"&&", {}),
    ],
)
def test_query_fields_of_every_kind(query: bytes, expected: dict[str, Any]) -> None:
    assert bound("QueryUsage", path_values=ORGANIZATION, query=query) == {**ORGANIZATION, **expected}


def test_booleans_in_a_query() -> None:
    assert bound("UpdateBackend", path_values=BACKEND, query=b"allow_missing=true")["allow_missing"] is True
    assert refused("UpdateBackend", path_values=BACKEND, query=b"allow_missing=1").field == "allow_missing"


@pytest.mark.parametrize(
    ("query", "reason", "field"),
    [
        (b"no_such=1", Reason.UNKNOWN_FIELD, "no_such"),
        (b"filter.noSuch=1", Reason.UNKNOWN_FIELD, "filter.noSuch"),
        (b"page_size.x=1", Reason.UNKNOWN_FIELD, "page_size.x"),
        (b"filter.models.x=1", Reason.UNKNOWN_FIELD, "filter.models.x"),
        (b"start_time.seconds=1", Reason.UNKNOWN_FIELD, "start_time.seconds"),
        (b".=1", Reason.UNKNOWN_FIELD, "."),
        (b"=1", Reason.UNKNOWN_FIELD, ""),
        (b"filter=1", Reason.INVALID_ARGUMENT, "filter"),
        (b"page_size=many", Reason.INVALID_ARGUMENT, "page_size"),
        (b"page_size=1&page_size=2", Reason.INVALID_ARGUMENT, "page_size"),
        (b"page_size=1&pageSize=2", Reason.INVALID_ARGUMENT, "pageSize"),
        (b"interval=99", Reason.INVALID_ARGUMENT, "interval"),
        (b"interval=" + b"9" * 5000, Reason.INVALID_ARGUMENT, "interval"),
        (b"interval=HOURLY", Reason.INVALID_ARGUMENT, "interval"),
        (b"groupBy=USAGE_DIMENSION_MODEL&groupBy=x", Reason.INVALID_ARGUMENT, "groupBy[1]"),
        (b"start_time=yesterday", Reason.INVALID_ARGUMENT, "start_time"),
        (b"filter.endpoints=x", Reason.INVALID_ARGUMENT, "filter.endpoints[0]"),
        (b"time_zone=%FF", Reason.INVALID_ARGUMENT, None),
        (b"&".join([b"filter.models=a"] * 1001), Reason.INVALID_ARGUMENT, None),
        (b"time_zone=\xff", Reason.INVALID_ARGUMENT, None),
    ],
)
def test_wrong_query_field_is_named(query: bytes, reason: Reason, field: str | None) -> None:
    error = refused("QueryUsage", path_values=ORGANIZATION, query=query)
    assert (error.reason, error.field) == (reason, field)


def test_query_has_no_place_beside_a_whole_body_or_in_the_body() -> None:
    assert refused("RevokeApiKey", path_values=KEY, query=b"api_key_id=key_1").reason is Reason.UNKNOWN_FIELD
    error = refused("CreateApiKey", path_values=ORGANIZATION, query=b"api_key.display_name=x")
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "api_key.display_name")


def test_method_without_a_body_takes_none() -> None:
    assert refused("GetApiKey", path_values=KEY, body=b"{}").reason is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"1", b"null"])
def test_body_that_is_no_object_is_refused(body: bytes) -> None:
    assert refused("CreateApiKey", path_values=ORGANIZATION, body=body).reason is Reason.INVALID_ARGUMENT


def test_idempotency_key_is_the_request_id_of_what_is_made() -> None:
    made = bound("CreateApiKey", path_values=ORGANIZATION, body=b"{}", idempotency_key="again")
    assert made["request_id"] == "again"
    error = refused("CreateApiKey", path_values=ORGANIZATION, query=b"request_id=r1", idempotency_key="again")
    assert error.field == "request_id"


def test_idempotency_key_that_could_not_be_kept_is_refused() -> None:
    error = refused("RotateApiKey", path_values=KEY, body=b"{}", idempotency_key="again")
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "Idempotency-Key")


@pytest.mark.parametrize("rpc", ["ListUsageRecords", "UpdateApiKey", "DeleteBackend"])
def test_idempotency_key_changes_nothing_where_a_repeat_does_not(rpc: str) -> None:
    path_values = {"UpdateApiKey": KEY, "DeleteBackend": BACKEND}.get(rpc, ORGANIZATION)
    assert bound(rpc, path_values=path_values, idempotency_key="again") == bound(rpc, path_values=path_values)


def test_everything_that_is_wrong_is_named_at_once() -> None:
    error = refused(
        "CreateApiKey",
        path_values=ORGANIZATION,
        query=b"color=red&request_id=r1",
        body=b'{"display_name": 7, "scopes": ["a", 1, null], "no_such": {}, "rate_limits": {"burst_requests": "many"},'
        b' "state": "API_KEY_STATE_LOST", "expire_time": "2026-01-31T12:00:00Z"}',
    )
    assert [violation.field for violation in error.violations] == [
        "color",
        "api_key.display_name",
        "api_key.scopes[1]",
        "api_key.scopes[2]",
        "api_key.no_such",
        "api_key.rate_limits.burst_requests",
        "api_key.state",
    ]
    assert (error.reason, error.field) == (Reason.UNKNOWN_FIELD, "color")
    assert "'api_key.state'" in error.message


def test_if_match_is_the_etag_of_the_resource_or_of_the_request() -> None:
    updated = bound("UpdateApiKey", path_values=KEY, body=b'{"display_name": "x"}', if_match='"e1"')
    assert updated["api_key"] == {"display_name": "x", "etag": "e1"}
    assert updated["update_mask"] == "displayName"
    assert bound("DeleteBackend", path_values=BACKEND, if_match='"e1"') == {**BACKEND, "etag": "e1"}
    assert bound("DeleteBackend", path_values=BACKEND, if_match="*") == BACKEND


@pytest.mark.parametrize("if_match", ["e1", 'W/"e1"', '"a", "b"', '"', "", '"a"b"'])
def test_if_match_that_is_not_one_strong_etag_is_refused(if_match: str) -> None:
    assert refused("DeleteBackend", path_values=BACKEND, if_match=if_match).field == "If-Match"


def test_if_match_that_cannot_be_kept_is_refused() -> None:
    assert refused("RevokeApiKey", path_values=KEY, if_match='"e1"').field == "If-Match"
    error = refused("UpdateApiKey", path_values=KEY, body=b'{"etag": "e2"}', if_match='"e1"')
    assert error.field == "etag"


def test_mask_of_an_update_is_what_its_body_has() -> None:
    body = b'{"displayName": "x", "rate_limits": null, "scopes": [], "etag": "e1", "api_key_id": "key_1"}'
    assert mask_of("UpdateApiKey", path_values=KEY, body=body) == ["display_name", "rate_limits", "scopes"]
    assert mask_of("UpdateApiKey", path_values=KEY, body=b"") == []


@pytest.mark.parametrize(
    ("query", "paths"),
    [
        (b"update_mask=display_name,scopes", ["display_name", "scopes"]),
        (b"updateMask=displayName%2C%20rateLimits.burstRequests", ["display_name", "rate_limits.burst_requests"]),
        (b"update_mask=*", ["*"]),
        (b"update_mask=", []),
    ],
)
def test_mask_is_a_list_of_names_in_either_spelling(query: bytes, paths: list[str]) -> None:
    assert mask_of("UpdateApiKey", path_values=KEY, query=query, body=b'{"display_name": "x"}') == paths


@pytest.mark.parametrize("mask", [b"no_such", b"display_name.x", b"scopes.0", b"rate_limits.models.model", b"a b"])
def test_mask_that_names_no_field_is_refused(mask: bytes) -> None:
    error = refused("UpdateApiKey", path_values=KEY, query=b"update_mask=" + mask)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "update_mask")


PIECES = st.sampled_from(
    [
        *(f"{a}{b}" for a, b in itertools.product(("filter", "page_size", "group_by", "update_mask"), ("", ".", "="))),
        "models",
        "request_id=",
        "organization_id=",
        "true",
        "%",
        "%00",
        "%ED%A0%80",
        "&",
        "=",
        ",",
        "*",
        "1",
    ]
)


@given(st.sampled_from(sorted(ROUTES)), st.lists(PIECES, max_size=12), st.text(max_size=6), st.text(max_size=6))
def test_any_query_and_header_is_a_request_or_a_named_error(
    rpc: str, pieces: list[str], if_match: str, idempotency_key: str
) -> None:
    path_values = dict.fromkeys(ROUTES[rpc].path_fields, "1")
    rest = RestRequest(path_values, "".join(pieces).encode(), b"", if_match or None, idempotency_key)
    try:
        outcome = bind(ROUTES[rpc], rest).SerializeToString()
    except PlatformError as error:
        outcome = error.reason.value.encode()
    assert isinstance(outcome, bytes)
