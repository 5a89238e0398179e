"""Two organizations with one of everything in each, and one of everybody who may call; it never judges an answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from google.protobuf import json_format

from deploy.local.stack import Stack
from identity.roles import BUILT_IN, OWNER, PLATFORM_ADMIN
from mesh.ids import new_id
from tests.security.calls import Answer, Caller, calling

PASSWORD = "river-stone-lantern-41"
MEMBERS = tuple(role_id for role_id in BUILT_IN if role_id != PLATFORM_ADMIN)
"""Those who hold one built-in role, by its id."""

CALLERS = (*MEMBERS, "custom", "service_account", "narrow_key", "access_token", "session", PLATFORM_ADMIN)
"""Everybody whose credential is good."""

STRANGERS = {
    "nobody": "missing_credentials",
    "forger": "api_key_invalid",
    "revoked": "api_key_invalid",
    "expired": "api_key_invalid",
    "suspended": "api_key_invalid",
}
"""Everybody else, and why each is refused."""

REGO = "package aiaas.policy\n\nimport rego.v1\n\ndefault allow := true\n"


@dataclass
class Tenant:
    """One organization. `ids` are of what it has, by the names of the fields that hold them; `mark` is in what only its
    own people may read."""

    organization_id: str
    ids: dict[str, str] = field(default_factory=dict)
    mark: str = ""


@dataclass
class World:
    """What there is. `spare` is an organization that may come to harm."""

    stack: Stack
    own: Tenant
    other: Tenant
    spare: Tenant
    credentials: dict[str, str] = field(repr=False)


async def built(stack: Stack) -> World:
    """Make all of it."""
    async with calling(stack) as caller:
        return await _Builder(stack, caller).build()


async def furnished(stack: Stack, caller: Caller) -> Tenant:
    """A new organization with one of everything."""
    builder = _Builder(stack, caller)
    tenant = await builder.tenant("Fresh")
    await builder.furnish(tenant)
    return tenant


async def owned(stack: Stack, caller: Caller) -> tuple[Tenant, str]:
    """A new organization with one of everything, and an owner's key to all that a key may be for."""
    builder = _Builder(stack, caller)
    tenant = await builder.tenant("Owned")
    await builder.furnish(tenant)
    return tenant, await builder.key_of(tenant, OWNER)


class _Builder:
    def __init__(self, stack: Stack, caller: Caller) -> None:
        self._stack = stack
        self._caller = caller

    async def build(self) -> World:
        own, other, spare, suspended = [await self.tenant(name) for name in ("Own", "Other", "Spare", "Suspended")]
        expires = datetime.now(UTC) + timedelta(seconds=1)
        expired = await self._key(own, expire_time=expires.isoformat())
        for tenant in (own, other):
            await self.furnish(tenant)
        credentials = {
            PLATFORM_ADMIN: self._stack.platform_key,
            "nobody": "",
            "forger": "not-a-key",
            "expired": expired,
        }
        for role_id in MEMBERS:
            credentials[role_id] = await self.key_of(own, role_id)
        role = await self._make(
            own, "RoleService/CreateRole", role={"display_name": "Reads keys", "permissions": ["api_keys.list"]}
        )
        custom = await self._make(
            own,
            "UserService/CreateUser",
            user={"email": "custom@own.example", "role_ids": [role["role"]["role_id"]]},
        )
        credentials["custom"] = await self._key(own, user_id=custom["user"]["user_id"], scopes=["api_keys.list"])
        worker = await self._make(
            own,
            "ServiceAccountService/CreateServiceAccount",
            service_account={"display_name": "Worker", "role_ids": ["analyst"]},
        )
        worker_id = worker["service_account"]["service_account_id"]
        analyses = sorted(BUILT_IN["analyst"].permissions)
        credentials["service_account"] = await self._key(own, service_account_id=worker_id, scopes=analyses)
        credentials["narrow_key"] = await self._key(own)
        credentials["access_token"] = await self._access_token(own, worker_id)
        credentials["session"] = await self._session(own, "session@own.example", "owner")
        revoked = await self._new_key(own)
        await self._make(own, "ApiKeyService/RevokeApiKey", api_key_id=revoked["api_key"]["api_key_id"])
        credentials["revoked"] = revoked["secret"]
        credentials["suspended"] = await self._key(suspended, scopes=["organizations.get"])
        await self._make(suspended, "OrganizationService/SuspendOrganization", reason="Unpaid.")
        while datetime.now(UTC) <= expires:
            await asyncio.sleep(0.05)
        return World(self._stack, own, other, spare, credentials)

    async def tenant(self, name: str) -> Tenant:
        """A new organization."""
        made = await self._call("OrganizationService/CreateOrganization", organization={"display_name": name})
        return Tenant(made["organization"]["organization_id"])

    async def key_of(self, tenant: Tenant, role_id: str) -> str:
        """A key of somebody new in this role, with all that the role may."""
        email = f"{role_id}@{tenant.organization_id[-6:].lower()}.example"
        user = await self._make(tenant, "UserService/CreateUser", user={"email": email, "role_ids": [role_id]})
        scopes = sorted(BUILT_IN[role_id].permissions)
        return await self._key(tenant, user_id=user["user"]["user_id"], scopes=scopes)

    async def furnish(self, tenant: Tenant) -> None:
        """One of everything that an id can name."""
        ids, name = tenant.ids, f"mark-{tenant.organization_id[-6:].lower()}"
        tenant.mark = name
        user = await self._make(
            tenant, "UserService/CreateUser", user={"email": f"{name}@member.example", "role_ids": ["developer"]}
        )
        account = await self._make(
            tenant,
            "ServiceAccountService/CreateServiceAccount",
            service_account={"display_name": "Account", "role_ids": ["developer"]},
        )
        ids["user_id"] = ids["principal_id"] = ids["scim_resource_id"] = user["user"]["user_id"]
        ids["service_account_id"] = account["service_account"]["service_account_id"]
        await self._make(
            tenant, "ScimService/UpdateScimSettings", scim_settings={"enabled": True}, update_mask="enabled"
        )
        key = await self._new_key(tenant, user_id=ids["user_id"])
        ids["api_key_id"] = ids["resource_id"] = key["api_key"]["api_key_id"]
        role = await self._make(
            tenant, "RoleService/CreateRole", role={"display_name": "Role", "permissions": ["usage.query"]}
        )
        ids["role_id"] = role["role"]["role_id"]
        budget = await self._make(
            tenant,
            "BudgetService/CreateBudget",
            budget={
                "display_name": "Budget",
                "unit": "BUDGET_UNIT_TOKENS",
                "interval": "BUDGET_INTERVAL_MONTHLY",
                "enforcement": "BUDGET_ENFORCEMENT_HARD",
                "limit": 1_000_000,
            },
        )
        ids["budget_id"] = budget["budget"]["budget_id"]
        override = await self._make(
            tenant,
            "BudgetService/CreateBudgetOverride",
            budget_id=ids["budget_id"],
            budget_override={
                "amount": 10,
                "reason": "A launch.",
                "expire_time": (datetime.now(UTC) + timedelta(hours=1)).isoformat(),
            },
        )
        ids["budget_override_id"] = override["budget_override"]["budget_override_id"]
        issuer = await self._make(
            tenant,
            "FederationService/CreateIssuer",
            issuer={
                "display_name": "Issuer",
                "issuer_url": f"https://{name}.login.example",
                "client_id": "platform",
                "client_secret": "secret-of-the-issuer",
            },
        )
        ids["issuer_id"] = issuer["issuer"]["issuer_id"]
        invite = await self._make(
            tenant, "InviteService/CreateInvite", invite={"email": f"{name}@invited.example", "role_ids": ["analyst"]}
        )
        ids["invite_id"] = invite["invite"]["invite_id"]
        client = await self._make(
            tenant,
            "OauthService/CreateOauthClient",
            oauth_client={
                "display_name": "App",
                "kind": "OAUTH_CLIENT_KIND_CONFIDENTIAL",
                "redirect_uris": ["https://app.example/callback"],
                "grant_types": ["OAUTH_GRANT_TYPE_AUTHORIZATION_CODE"],
                "scopes": ["openid"],
            },
        )
        ids["oauth_client_id"] = client["oauth_client"]["oauth_client_id"]
        policy = await self._make(
            tenant,
            "PolicyService/CreatePolicy",
            policy={"display_name": "Policy", "modules": [{"path": "all.rego", "source": REGO}], "disabled": True},
        )
        ids["policy_id"] = policy["policy"]["policy_id"]
        webhook = await self._make(
            tenant,
            "WebhookService/CreateWebhook",
            webhook={"display_name": "Webhook", "url": "https://receiver.example/events"},
        )
        ids["webhook_id"] = webhook["webhook"]["webhook_id"]
        export = await self._make(
            tenant,
            "ExportService/CreateExport",
            export={
                "granularity": "EXPORT_GRANULARITY_DAILY",
                "format": "EXPORT_FORMAT_CSV",
                "start_time": "2026-01-01T00:00:00Z",
                "end_time": "2026-01-02T00:00:00Z",
            },
        )
        ids["export_id"] = export["export"]["export_id"]
        ids["statement_id"] = await self._statement(tenant)
        entries = await self._make(tenant, "AuditService/ListAuditEntries")
        ids["audit_entry_id"] = entries["audit_entries"][0]["audit_entry_id"]

    async def _statement(self, tenant: Tenant) -> str:
        """The statement of last month, once analytics says that its usage is counted: some seconds after it started."""
        before = datetime.now(UTC).replace(day=1) - timedelta(days=1)
        request = {"organization_id": tenant.organization_id, "year": before.year, "month": before.month}
        async with asyncio.timeout(30):
            while True:
                answer = await self._caller.call("StatementService/IssueStatement", request, self._stack.platform_key)
                if answer.message is not None:
                    return str(answer.message.statement.statement_id)  # type: ignore[attr-defined]
                assert answer.reason == "failed_precondition", answer.told
                await asyncio.sleep(0.2)

    async def _new_key(self, tenant: Tenant, **fields: Any) -> dict[str, Any]:
        return await self._make(tenant, "ApiKeyService/CreateApiKey", api_key={"display_name": "Key", **fields})

    async def _key(self, tenant: Tenant, **fields: Any) -> str:
        return str((await self._new_key(tenant, **fields))["secret"])

    async def _access_token(self, tenant: Tenant, service_account_id: str) -> str:
        client = await self._make(
            tenant,
            "OauthService/CreateOauthClient",
            oauth_client={
                "display_name": "Machine",
                "kind": "OAUTH_CLIENT_KIND_CONFIDENTIAL",
                "grant_types": ["OAUTH_GRANT_TYPE_CLIENT_CREDENTIALS"],
                "scopes": ["usage.query"],
                "service_account_id": service_account_id,
            },
        )
        auth = (client["oauth_client"]["oauth_client_id"], client["client_secret"])
        async with httpx.AsyncClient(base_url=self._stack.base_url, trust_env=False, timeout=15) as http:
            form = {"grant_type": "client_credentials", "scope": "usage.query"}
            answer = await http.post("/oauth2/token", data=form, auth=auth)
        return str(answer.raise_for_status().json()["access_token"])

    async def _session(self, tenant: Tenant, email: str, role_id: str) -> str:
        invite = await self._make(tenant, "InviteService/CreateInvite", invite={"email": email, "role_ids": [role_id]})
        await self._call("InviteService/AcceptInvite", invite_token=invite["invite_token"], password=PASSWORD)
        made = await self._call("SessionService/CreateSession", email=email, password=PASSWORD)
        return str(made["sign_in"]["signed_in"]["session_token"])

    async def _make(self, tenant: Tenant, rpc: str, **request: Any) -> dict[str, Any]:
        return await self._call(rpc, organization_id=tenant.organization_id, **request)

    async def _call(self, rpc: str, **request: Any) -> dict[str, Any]:
        answer: Answer = await self._caller.call(rpc, request, self._stack.platform_key)
        assert answer.message is not None, f"{rpc}: {answer.told}"
        told: dict[str, Any] = json_format.MessageToDict(answer.message, preserving_proto_field_name=True)
        return told


def strange_id(like: str) -> str:
    """An id of the same form that nothing has."""
    return new_id(like.rpartition("_")[0])
