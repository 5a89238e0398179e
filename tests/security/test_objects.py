"""Every id in every request, in the hands of another organization: the answer is the one for an id that nothing has.

Each request is first made with ids of its own organization, which must be found, so that it is the id that is refused.
"""

import asyncio
import base64
import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions

from identity.roles import PLATFORM_ADMIN
from mesh.auth import policy_of
from mesh.ids import new_id
from tests.security.calls import METHODS, Answer, calling
from tests.security.verdicts import VERDICTS
from tests.security.world import Tenant, World, furnished, strange_id

_ROLE = {"display_name": "Changed"}
_DAY = {"start_time": "2026-01-01T00:00:00Z", "end_time": "2026-01-02T00:00:00Z"}
_USAGE_OF: list[dict[str, Any]] = [
    {"filter": {f"{kind}s": [f"@{kind}"]}} for kind in ("api_key_id", "user_id", "service_account_id")
]
_BUDGET = {
    "display_name": "Another",
    "unit": "BUDGET_UNIT_COST",
    "interval": "BUDGET_INTERVAL_DAILY",
    "enforcement": "BUDGET_ENFORCEMENT_SOFT",
    "limit": 5,
}
_OVERRIDE = {"amount": 10, "reason": "A launch.", "expire_time": "2099-01-01T00:00:00Z"}
_ISSUER = {"display_name": "Another", "issuer_url": "https://another.login.example", "client_id": "x"}
_MACHINE = {
    "display_name": "Machine",
    "kind": "OAUTH_CLIENT_KIND_CONFIDENTIAL",
    "grant_types": ["OAUTH_GRANT_TYPE_CLIENT_CREDENTIALS"],
    "scopes": ["usage.query"],
}
_USER = {"schemas": ["urn:ietf:params:scim:schemas:core:2.0:User"], "userName": "renamed@member.example"}
_PATCH = {
    "schemas": ["urn:ietf:params:scim:api:messages:2.0:PatchOp"],
    "Operations": [{"op": "replace", "path": "displayName", "value": "Renamed"}],
}


def _encoded(document: Any) -> str:
    return base64.b64encode(json.dumps(document).encode()).decode()


_SCIM = {"resource_type": "SCIM_RESOURCE_TYPE_USER"}

# What a request needs besides the ids that stand in it by themselves, several where one cannot hold all. "@" makes the
# name of a field an id that could stand there.
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "ApiKeyService/CreateApiKey": [
        {"api_key": {"display_name": "Key", "user_id": "@user_id"}},
        {"api_key": {"display_name": "Key", "service_account_id": "@service_account_id"}},
    ],
    "ApiKeyService/UpdateApiKey": [{"api_key": _ROLE, "update_mask": "displayName"}],
    # Not by what was tried to reach: that is in the log of whoever tried.
    "AuditService/ListAuditEntries": [{"filter": {"principal_id": "@principal_id"}}],
    "AuditService/ExportAuditEntries": [{"filter": {"principal_id": "@principal_id"}}],
    "BudgetService/CreateBudget": [
        {"budget": {**_BUDGET, subject: f"@{subject}"}} for subject in ("user_id", "service_account_id", "api_key_id")
    ],
    "BudgetService/UpdateBudget": [{"budget": _ROLE, "update_mask": "displayName"}],
    "BudgetService/CreateBudgetOverride": [{"budget_override": _OVERRIDE}],
    "BudgetService/RejectBudgetOverride": [{"reason": "No."}],
    "BudgetService/RevokeBudgetOverride": [{"reason": "No."}],
    "FederationService/CreateIssuer": [
        {"issuer": {**_ISSUER, "default_role_ids": ["@role_id"]}},
        {"issuer": {**_ISSUER, "group_roles": [{"group": "all", "role_ids": ["@role_id"]}]}},
    ],
    "FederationService/UpdateIssuer": [
        {"issuer": {"default_role_ids": ["@role_id"]}, "update_mask": "defaultRoleIds"},
    ],
    "InviteService/CreateInvite": [{"invite": {"email": "new@invited.example", "role_ids": ["@role_id"]}}],
    "MfaService/ResetUserMfa": [{"reason": "Lost."}],
    "MfaService/UpdateMfaRequirement": [
        {"mfa_requirement": {"role_ids": ["@role_id"]}, "update_mask": "roleIds"},
    ],
    "OauthService/CreateOauthClient": [{"oauth_client": {**_MACHINE, "service_account_id": "@service_account_id"}}],
    "OauthService/UpdateOauthClient": [{"oauth_client": _ROLE, "update_mask": "displayName"}],
    "PolicyService/UpdatePolicy": [{"policy": _ROLE, "update_mask": "displayName"}],
    "PolicyService/ListPolicyDecisions": [_DAY],
    "ReliabilityService/QueryReliability": [{**_DAY, **form} for form in _USAGE_OF],
    "RoleService/UpdateRole": [{"role": _ROLE, "update_mask": "displayName"}],
    "ScimService/GetScimResource": [_SCIM],
    "ScimService/ReplaceScimResource": [{**_SCIM, "resource_json": _encoded(_USER)}],
    "ScimService/PatchScimResource": [{**_SCIM, "patch_json": _encoded(_PATCH)}],
    "ScimService/DeleteScimResource": [_SCIM],
    "ScimService/UpdateScimSettings": [
        {"scim_settings": {"default_role_ids": ["@role_id"]}, "update_mask": "defaultRoleIds"},
        {
            "scim_settings": {"group_roles": [{"group": "all", "role_ids": ["@role_id"]}]},
            "update_mask": "groupRoles",
        },
    ],
    "ServiceAccountService/CreateServiceAccount": [
        {"service_account": {"display_name": "Another", "role_ids": ["@role_id"]}}
    ],
    "ServiceAccountService/UpdateServiceAccount": [
        {"service_account": {"role_ids": ["@role_id"]}, "update_mask": "roleIds"}
    ],
    "SpendService/QuerySpend": [{**_DAY, **form} for form in _USAGE_OF],
    "SpendService/QueryTopSpend": [{**_DAY, "dimension": "USAGE_DIMENSION_MODEL", **form} for form in _USAGE_OF],
    "SpendService/ForecastSpend": _USAGE_OF,
    "UsageService/QueryUsage": [{**_DAY, **form} for form in _USAGE_OF],
    "UsageService/ListUsageRecords": [{**_DAY, "filter": {"api_key_ids": ["@api_key_id"]}}],
    "UserService/CreateUser": [{"user": {"email": "new@member.example", "role_ids": ["@role_id"]}}],
    "UserService/UpdateUser": [{"user": {"role_ids": ["@role_id"]}, "update_mask": "roleIds"}],
    "WebhookService/UpdateWebhook": [{"webhook": _ROLE, "update_mask": "displayName"}],
}

# Ids of what none of the organizations here has, or that name nothing of an organization.
ABSENT = {
    *("webhook_delivery_id", "budget_lease_id", "event_id", "reconciliation_id"),
    *("model_id", "backend_id", "session_id", "oauth_grant_id", "request_id"),
}


def _ids(method: MethodDescriptor) -> Iterator[str]:
    for field in method.input_type.fields:
        if field.type == FieldDescriptor.TYPE_STRING and field.name.endswith("_id") and field.name != "organization_id":
            yield field.name


_REFUSED = {"not_found", "invalid_argument"}
_TIME = re.compile(r"(seconds|nanos): \d+\s*")
JUDGED = [
    rpc
    for rpc, method in METHODS.items()
    if policy_of(method).permission
    and "organization_id" in method.input_type.fields_by_name
    and (rpc in REQUESTS or set(_ids(method)) - ABSENT)
]


@pytest.fixture(scope="session")
def before(world: World) -> dict[str, str]:
    """The other organization, before anybody tries to reach it."""
    return asyncio.run(_seen(world))


@pytest.mark.parametrize("rpc", JUDGED)
async def test_object_of_another_organization_is_as_one_that_does_not_exist(
    world: World, before: dict[str, str], rpc: str
) -> None:
    method = METHODS[rpc]
    absent = {name: new_id("absent") for name in set(_ids(method)) & ABSENT - {"request_id"}}
    reached = set(_ids(method)) - ABSENT
    assert reached <= set(world.other.ids), "the worlds lack something that can be named"
    async with calling(world.stack) as caller:
        for form in REQUESTS.get(rpc, [{}]):
            whole = absent | {name: f"@{name}" for name in reached} | form
            is_read = method.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS
            tenant = world.own if is_read else await furnished(world.stack, caller)
            own = await caller.call(rpc, _filled(whole, tenant), world.credentials[PLATFORM_ADMIN])
            assert absent or own.reason not in ("not_found", "internal"), f"nobody finds their own: {own.told}"
            for kind in _named(whole):
                for who in {"owner", PLATFORM_ADMIN} & set(VERDICTS[rpc]):
                    theirs, nobodys = world.other.ids[kind], strange_id(world.other.ids[kind])
                    refused, expected = [
                        await caller.call(rpc, _filled(whole, world.own, {kind: id_}), world.credentials[who])
                        for id_ in (theirs, nobodys)
                    ]
                    _judge(world, refused, expected, theirs, nobodys)
                    assert absent or refused.reason in ("ok", *_REFUSED - {own.reason}), refused.told


async def test_nothing_of_the_other_organization_has_changed(world: World, before: dict[str, str]) -> None:
    assert await _seen(world) == before


def _judge(world: World, theirs: Answer, nobodys: Answer, their_id: str, nobodys_id: str) -> None:
    # Answers say how fresh they are.
    assert _TIME.sub("", theirs.told.replace(their_id, "ID")) == _TIME.sub("", nobodys.told.replace(nobodys_id, "ID"))
    if theirs.reason == "ok":
        # A list of what has to do with it: there is nothing.
        assert not any(known in theirs.told.replace(their_id, "") for known in world.other.ids.values()), theirs.told
    else:
        assert theirs.reason in _REFUSED, theirs.told


def _filled(form: Any, tenant: Tenant, instead: dict[str, str] | None = None) -> dict[str, Any]:
    ids = tenant.ids | (instead or {})

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        return ids[value[1:]] if isinstance(value, str) and value.startswith("@") else value

    return {"organization_id": tenant.organization_id, **filled(copy.deepcopy(form))}


def _named(form: Any) -> set[str]:
    return set(_kinds(json.dumps(form)))


def _kinds(text: str) -> Iterator[str]:
    for part in text.split('"@')[1:]:
        yield part.partition('"')[0]


async def _seen(world: World) -> dict[str, str]:
    """Everything of the other organization that can be got by its id."""
    seen = {}
    async with calling(world.stack) as caller:
        for rpc, method in METHODS.items():
            # An export goes on by itself.
            if method.name.startswith("Get") and rpc in JUDGED and rpc not in (*REQUESTS, "ExportService/GetExport"):
                form = {name: f"@{name}" for name in _ids(method)}
                answer = await caller.call(rpc, _filled(form, world.other), world.credentials[PLATFORM_ADMIN])
                assert answer.reason == "ok", answer.told
                seen[rpc] = answer.told
    return seen
