"""JSON to messages: the wrong field is named in the client's own spelling, and nothing but a named error comes out."""

import json
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import given
from hypothesis import strategies as st

from aiaas.analytics.v1 import usage_service_pb2
from aiaas.identity.v1 import api_key_service_pb2, auth_service_pb2
from aiaas.router.v1 import backend_service_pb2, inference_service_pb2
from aiaas.type.v1 import usage_event_pb2
from edge.transcode.fields import convert, parse_json
from mesh.errors import PlatformError, Reason, to_aip193

CREATE_KEY = api_key_service_pb2.CreateApiKeyRequest.DESCRIPTOR
CREATE_BACKEND = backend_service_pb2.CreateBackendRequest.DESCRIPTOR
QUERY_USAGE = usage_service_pb2.QueryUsageRequest.DESCRIPTOR
DESCRIPTORS: list[Descriptor] = [  # type: ignore[assignment,unused-ignore]
    CREATE_KEY,
    CREATE_BACKEND,
    QUERY_USAGE,
    auth_service_pb2.WatchRevocationsResponse.DESCRIPTOR,
    inference_service_pb2.InferHead.DESCRIPTOR,
    usage_event_pb2.UsageEvent.DESCRIPTOR,
]


def error_of(descriptor: Any, value: dict[str, Any]) -> PlatformError:
    with pytest.raises(PlatformError) as error:
        convert(value, descriptor)
    return error.value


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"no_such": 1}, "no_such"),
        ({"api_key": {"noSuch": 1}}, "api_key.noSuch"),
        ({"apiKey": {"rateLimits": {"models": [{}, {"nope": 1}]}}}, "apiKey.rateLimits.models[1].nope"),
        ({"api_key": {"": 1}}, "api_key."),
        ({"[aiaas.type.v1.policy]": {}}, "[aiaas.type.v1.policy]"),
    ],
)
def test_unknown_field_is_named(value: dict[str, Any], field: str) -> None:
    error = error_of(CREATE_KEY, value)
    assert (error.reason, error.field) == (Reason.UNKNOWN_FIELD, field)


@pytest.mark.parametrize(
    ("value", "field", "words"),
    [
        ({"organization_id": 7}, "organization_id", "a string"),
        ({"organization_id": "\ud800"}, "organization_id", "Unicode"),
        ({"api_key": "x"}, "api_key", "an object"),
        ({"api_key": ""}, "api_key", "an object"),
        ({"api_key": []}, "api_key", "an object"),
        ({"api_key": 1}, "api_key", "an object"),
        ({"api_key": {"scopes": "all"}}, "api_key.scopes", "a list"),
        ({"api_key": {"scopes": ["a", 1]}}, "api_key.scopes[1]", "a string"),
        ({"api_key": {"scopes": [None]}}, "api_key.scopes[0]", "a string"),
        ({"api_key": {"scopes": [[]]}}, "api_key.scopes[0]", "a string"),
        ({"api_key": {"expireTime": "tomorrow"}}, "api_key.expireTime", "RFC 3339"),
        ({"api_key": {"expire_time": {}}}, "api_key.expire_time", "RFC 3339"),
        ({"api_key": {"expire_time": 5}}, "api_key.expire_time", "RFC 3339"),
        ({"api_key": {"state": "API_KEY_STATE_LOST"}}, "api_key.state", "one of API_KEY_STATE_ACTIVE"),
        ({"api_key": {"rate_limits": {"burst_requests": "many"}}}, "api_key.rate_limits.burst_requests", "integer"),
        ({"api_key": {"rate_limits": {"burst_requests": 1.5}}}, "api_key.rate_limits.burst_requests", "64 bits"),
        ({"api_key": {"rate_limits": {"burst_requests": 2**63}}}, "api_key.rate_limits.burst_requests", "64 bits"),
        ({"api_key": {"rate_limits": {"models": [5]}}}, "api_key.rate_limits.models[0]", "an object"),
        ({"api_key": {"rate_limits": {"models": {}}}}, "api_key.rate_limits.models", "a list"),
    ],
)
def test_wrong_type_is_named_and_says_what_is_expected(value: dict[str, Any], field: str, words: str) -> None:
    error = error_of(CREATE_KEY, value)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)
    assert words in error.message


def test_request_of_nothing_but_wrong_fields_is_not_read_to_its_end() -> None:
    error = error_of(CREATE_KEY, {f"f{n}": n for n in range(200_000)})
    assert error.field == "f0"
    assert 20 < len(error.violations) <= 50
    assert error_of(CREATE_KEY, {"api_key": {"scopes": [1] * 200_000}}).field == "api_key.scopes[0]"


def test_field_in_both_spellings_is_refused() -> None:
    assert error_of(CREATE_KEY, {"organization_id": "a", "organizationId": "a"}).field == "organizationId"


def test_two_of_one_choice_are_refused() -> None:
    descriptor = auth_service_pb2.WatchRevocationsResponse.DESCRIPTOR
    assert error_of(descriptor, {"api_key_id": "a", "user_id": "b"}).field == "user_id"


def test_value_is_never_repeated_in_an_error() -> None:
    secret = "aias_very_secret"
    for value in (
        {"api_key": {"state": secret}},
        {"api_key": {"expire_time": secret}},
        {"api_key": {"rate_limits": {"burst_requests": secret}}},
        {"api_key": {"rate_limits": secret}},
    ):
        assert secret not in json.dumps(to_aip193(error_of(CREATE_KEY, value)))


def test_both_spellings_integers_as_strings_and_null_are_taken() -> None:
    request: Any = convert(
        {
            "organizationId": "org_1",
            "api_key": {
                "displayName": "x",
                "expire_time": "2026-01-31T12:00:00.5Z",
                "state": None,
                "rate_limits": {"burst_requests": "9007199254740993", "limit_requests_per_second": 0.5},
            },
        },
        CREATE_KEY,  # type: ignore[arg-type,unused-ignore]
    )
    assert request.organization_id == "org_1"
    assert request.api_key.display_name == "x"
    assert request.api_key.expire_time.nanos == 500_000_000
    assert request.api_key.rate_limits.burst_requests == 9007199254740993
    assert not request.api_key.rate_limits.HasField("limit_tokens_per_minute")


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"{}{}",
        b"NaN",
        b'{"a": Infinity}',
        b"[" * 100_000,
        b"1" * 10_000,
        '{"a": 1}'.encode("utf-16"),
        b"{'a': 1}",
        b"\x00",
    ],
)
def test_broken_json_is_invalid_json(body: bytes) -> None:
    with pytest.raises(PlatformError) as error:
        parse_json(body)
    assert error.value.reason is Reason.INVALID_JSON


def test_broken_json_tells_where() -> None:
    with pytest.raises(PlatformError, match="line 2, column 3"):
        parse_json(b'{"a": 1,\n  oops}')


def test_repeated_name_is_named() -> None:
    with pytest.raises(PlatformError) as error:
        parse_json(b'{"a": {"b": 1, "b": 2}}')
    assert (error.value.reason, error.value.field) == (Reason.INVALID_JSON, "b")


def _names(descriptor: Any, depth: int = 3) -> set[str]:
    names = {name for field in descriptor.fields for name in (field.name, field.json_name)}
    for field in descriptor.fields if depth else ():
        if field.message_type is not None:
            names |= _names(field.message_type, depth - 1)
    return names


# Lone surrogates too, which JSON can write and UTF-8 cannot.
ANY_CHARACTER = st.characters() | st.characters(categories=["Cs"])
NAMES = st.sampled_from(sorted(set().union(*(_names(descriptor) for descriptor in DESCRIPTORS)))) | st.text(
    ANY_CHARACTER, max_size=8
)
TEXTS = st.text(ANY_CHARACTER, max_size=12) | st.sampled_from(
    ["2026-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "1s", "-1", "1e400", "aa"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(DESCRIPTORS), st.dictionaries(NAMES, VALUES, max_size=5))
def test_any_object_is_a_message_or_a_named_error(descriptor: Descriptor, value: dict[str, Any]) -> None:
    outcome: bytes | PlatformError
    try:
        outcome = convert(value, descriptor).SerializeToString()
    except PlatformError as error:
        outcome = error
    if isinstance(outcome, PlatformError):
        assert outcome.reason in (Reason.UNKNOWN_FIELD, Reason.INVALID_ARGUMENT)
        assert outcome.field is not None
        json.dumps(to_aip193(outcome)).encode()


@given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_json_or_invalid_json(body: bytes) -> None:
    try:
        outcome = parse_json(body)
    except PlatformError as error:
        outcome = error.reason
    assert not isinstance(outcome, Reason) or outcome is Reason.INVALID_JSON
