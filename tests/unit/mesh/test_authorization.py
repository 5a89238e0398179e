"""Principals: how they travel, and what they may do."""

from datetime import UTC, datetime

import pytest
from google.protobuf.message import Message

from aiaas.analytics.v1 import usage_service_pb2
from aiaas.identity.v1 import api_key_service_pb2, organization_service_pb2
from aiaas.type.v1 import limits_pb2, options_pb2, principal_pb2
from mesh.auth import (
    ModelRateLimits,
    Principal,
    RateLimits,
    authorize,
    credential_of,
    find_method,
    policy_of,
)
from mesh.errors import PlatformError, Reason
from tests.doubles.principals import principal


def test_a_principal_travels_unchanged() -> None:
    full = Principal(
        kind="service_account",
        id="sa_1",
        organization_id="org_a",
        api_key_id="key_1",
        user_id="usr_1",
        service_account_id="sa_1",
        permissions=frozenset({"a.b", "c.d"}),
        allowed_models=("m", "n"),
        platform=True,
        expire_time=datetime(2027, 1, 1, tzinfo=UTC),
        organization_limits=RateLimits(requests_per_second=0.5, burst_requests=0),
        principal_limits=RateLimits(
            tokens_per_minute=9, concurrent_requests=2, models=(ModelRateLimits("m", tokens_per_minute=1),)
        ),
        allowed_networks=("10.0.0.0/8",),
    )
    wire = principal_pb2.Principal.FromString(full.to_proto().SerializeToString())
    assert Principal.from_proto(wire) == full
    assert hash(full) == hash(Principal.from_proto(wire))


def test_absent_limits_stay_absent() -> None:
    assert RateLimits.from_proto(limits_pb2.RateLimits()) == RateLimits()
    assert not RateLimits().to_proto().HasField("burst_requests")


def test_a_principal_of_unknown_kind_is_not_let_in() -> None:
    with pytest.raises(PlatformError) as raised:
        Principal.from_proto(principal_pb2.Principal(principal_id="x", organization_id="org_a"))
    assert raised.value.reason is Reason.INTERNAL


@pytest.mark.parametrize(
    ("header", "credential"), [("Bearer abc", "abc"), ("bearer abc ", "abc"), ("BEARER  abc", "abc")]
)
def test_the_credential_follows_bearer(header: str, credential: str) -> None:
    assert credential_of(header) == credential


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "abc", "Basic abc", "Bearerabc"])
def test_anything_but_bearer_is_no_credential(header: str) -> None:
    with pytest.raises(PlatformError) as raised:
        credential_of(header)
    assert raised.value.reason is Reason.MISSING_CREDENTIALS


# The policy

LIST_KEYS = policy_of(find_method("/aiaas.identity.v1.ApiKeyService/ListApiKeys"))
CREATE_KEY = policy_of(find_method("/aiaas.identity.v1.ApiKeyService/CreateApiKey"))
LIST_ORGANIZATIONS = policy_of(find_method("/aiaas.identity.v1.OrganizationService/ListOrganizations"))


def keys_of(organization_id: str) -> api_key_service_pb2.ListApiKeysRequest:
    return api_key_service_pb2.ListApiKeysRequest(organization_id=organization_id)


def allowed(caller: Principal | None, policy: options_pb2.MethodPolicy, request: Message) -> bool:
    authorize(caller, policy, request)
    return True


def denied(caller: Principal | None, policy: options_pb2.MethodPolicy, request: Message) -> PlatformError:
    with pytest.raises(PlatformError) as raised:
        authorize(caller, policy, request)
    return raised.value


def test_policies_come_from_the_contract() -> None:
    assert LIST_KEYS.permission == "api_keys.list"
    assert policy_of(find_method("aiaas.identity.v1.AuthService.Authenticate")).internal
    with pytest.raises(KeyError):
        find_method("/aiaas.identity.v1.ApiKeyService/Nothing")


def test_a_principal_with_the_permission_acts_on_its_own_organization() -> None:
    assert allowed(principal("api_keys.list"), LIST_KEYS, keys_of("org_a"))


def test_without_the_permission_it_is_named() -> None:
    error = denied(principal("api_keys.get", platform=True), LIST_KEYS, keys_of("org_a"))
    assert error.reason is Reason.PERMISSION_DENIED
    assert "api_keys.list" in error.message
    assert error.details == {"permission": "api_keys.list"}


def test_another_organization_is_not_found() -> None:
    error = denied(principal("api_keys.list"), LIST_KEYS, keys_of("org_b"))
    assert error.reason is Reason.ORGANIZATION_MISMATCH
    assert error.entry.http == 404


def test_permission_is_judged_before_the_organization() -> None:
    assert denied(principal(), LIST_KEYS, keys_of("org_b")).reason is Reason.PERMISSION_DENIED


def test_a_platform_principal_acts_on_any_organization() -> None:
    assert allowed(principal("api_keys.list", platform=True), LIST_KEYS, keys_of("org_b"))


@pytest.mark.parametrize("platform", [True, False])
def test_an_organization_that_the_path_holds_cannot_be_left_out(platform: bool) -> None:
    error = denied(principal("api_keys.list", platform=platform), LIST_KEYS, keys_of(""))
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "organization_id")


def test_an_organization_that_the_path_does_not_hold_may_be_left_out() -> None:
    policy = options_pb2.MethodPolicy(permission="usage.query")
    request = usage_service_pb2.QueryUsageRequest()
    assert allowed(principal("usage.query"), policy, request)


def test_another_organization_inside_the_resource_is_not_found() -> None:
    request = api_key_service_pb2.CreateApiKeyRequest(organization_id="org_a")
    request.api_key.organization_id = "org_b"
    assert denied(principal("api_keys.create"), CREATE_KEY, request).reason is Reason.ORGANIZATION_MISMATCH
    request.api_key.organization_id = "org_a"
    assert allowed(principal("api_keys.create"), CREATE_KEY, request)


def test_an_rpc_on_no_organization_needs_its_permission_only() -> None:
    request = organization_service_pb2.ListOrganizationsRequest()
    assert allowed(principal(LIST_ORGANIZATIONS.permission), LIST_ORGANIZATIONS, request)
    assert denied(principal(), LIST_ORGANIZATIONS, request).reason is Reason.PERMISSION_DENIED


@pytest.mark.parametrize("access", ["public", "internal"])
def test_public_and_internal_calls_need_no_principal(access: str) -> None:
    policy = options_pb2.MethodPolicy(**{access: True})  # type: ignore[arg-type]
    assert allowed(None, policy, keys_of("org_b"))


def test_an_authenticated_call_needs_any_principal_and_its_own_organization() -> None:
    policy = options_pb2.MethodPolicy(authenticated=True)
    assert allowed(principal(), policy, keys_of("org_a"))
    assert denied(None, policy, keys_of("org_a")).reason is Reason.MISSING_CREDENTIALS
    assert denied(principal(), policy, keys_of("org_b")).reason is Reason.ORGANIZATION_MISMATCH


@pytest.mark.parametrize(
    "policy",
    [
        options_pb2.MethodPolicy(),
        options_pb2.MethodPolicy(public=False),
        options_pb2.MethodPolicy(authenticated=False),
        options_pb2.MethodPolicy(internal=False),
        options_pb2.MethodPolicy(permission=""),
    ],
)
def test_a_policy_that_says_nothing_lets_nobody_in(policy: options_pb2.MethodPolicy) -> None:
    assert denied(principal("", platform=True), policy, keys_of("org_a")).reason is Reason.PERMISSION_DENIED
