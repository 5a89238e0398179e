"""GET /v1/organization/projects and the API keys below: identity's organizations and keys in OpenAI's words; it never
makes or changes any."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp
from starlette.types import Receive, Scope, Send

from aiaas.identity.v1 import (
    api_key_service_pb2,
    api_key_service_pb2_grpc,
    auth_service_pb2,
    auth_service_pb2_grpc,
    organization_service_pb2,
    organization_service_pb2_grpc,
    service_account_service_pb2,
    service_account_service_pb2_grpc,
    user_service_pb2,
    user_service_pb2_grpc,
)
from edge.exchange import exchange_of
from edge.openai.organization.query import Query, wrong
from edge.openai.organization.shapes import (
    Owner,
    OwnerServiceAccount,
    OwnerUser,
    Project,
    ProjectApiKey,
    ProjectApiKeyPage,
    ProjectPage,
)
from edge.peers import Peer
from mesh.errors import PlatformError, Reason
from mesh.tokens import API_KEY

T = TypeVar("T")

PROJECT_PARAMETERS = ("after", "limit", "include_archived")
"""What a query for projects can have."""
KEY_PARAMETERS = ("after", "limit", "owner_project_access")
"""What a query for API keys can have."""

_TIMEOUT_S = 30.0
_PAGE = 500
_MOST = 100
_DEFAULT = 20
_JSON = (b"content-type", b"application/json")
_NO_STORE = (b"cache-control", b"no-store")
_DELETED = organization_service_pb2.ORGANIZATION_STATE_DELETED
_UNSEEN = (Reason.PERMISSION_DENIED, Reason.NOT_FOUND, Reason.ORGANIZATION_MISMATCH)

Rpc = Callable[..., Awaitable[Any]]


class _Reading:
    """An endpoint that reads from identity."""

    route: str

    def __init__(self, identity: Peer) -> None:
        self._identity = identity
        channel = identity.channel
        self._auth = auth_service_pb2_grpc.AuthServiceStub(channel)
        self._organizations = organization_service_pb2_grpc.OrganizationServiceStub(channel)
        self._keys = api_key_service_pb2_grpc.ApiKeyServiceStub(channel)
        self._users = user_service_pb2_grpc.UserServiceStub(channel)
        self._accounts = service_account_service_pb2_grpc.ServiceAccountServiceStub(channel)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises PlatformError."""
        exchange = exchange_of(scope)
        exchange.route = self.route
        exchange.allow("GET")
        exchange.take_credential()
        answer = await self._answer(scope["path_params"], scope["query_string"])
        await exchange.respond(200, [_JSON, _NO_STORE], msgspec.json.encode(answer))

    async def _answer(self, ids: dict[str, str], query: bytes) -> msgspec.Struct:
        raise NotImplementedError

    async def _call(self, rpc: Rpc, request: Any) -> Any:
        return await self._identity.call(rpc, request, _TIMEOUT_S)

    async def _pages(self, rpc: Rpc, request: Any, name: str) -> AsyncIterator[Any]:
        """Every item of a list, page after page."""
        request.page_size = _PAGE
        while True:
            answer = await self._call(rpc, request)
            for item in getattr(answer, name):
                yield item
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token

    async def _with_owners(self, keys: list[api_key_service_pb2.ApiKey]) -> list[ProjectApiKey]:
        """The keys, each owner asked for once."""
        owners: dict[tuple[str, str], Owner] = {}
        for key in keys:
            who = (key.user_id, key.service_account_id)
            if who not in owners:
                owners[who] = await self._owner(key)
        return [_key(key, owners[key.user_id, key.service_account_id]) for key in keys]

    async def _owner(self, key: api_key_service_pb2.ApiKey) -> Owner:
        if key.user_id:
            return Owner(type="user", user=await self._user(key.organization_id, key.user_id))
        if key.service_account_id:
            account = await self._service_account(key.organization_id, key.service_account_id)
            return Owner(type="service_account", service_account=account)
        return Owner()

    async def _user(self, organization_id: str, user_id: str) -> OwnerUser:
        request = user_service_pb2.GetUserRequest(organization_id=organization_id, user_id=user_id)
        answer = await self._call_unless_unseen(self._users.GetUser, request)
        if answer is None:
            return OwnerUser(id=user_id)
        user = answer.user
        return OwnerUser(id=user_id, name=user.display_name, email=user.email, created_at=user.create_time.seconds)

    async def _service_account(self, organization_id: str, service_account_id: str) -> OwnerServiceAccount:
        request = service_account_service_pb2.GetServiceAccountRequest(
            organization_id=organization_id, service_account_id=service_account_id
        )
        answer = await self._call_unless_unseen(self._accounts.GetServiceAccount, request)
        if answer is None:
            return OwnerServiceAccount(id=service_account_id)
        account = answer.service_account
        return OwnerServiceAccount(
            id=service_account_id, name=account.display_name, created_at=account.create_time.seconds
        )

    async def _call_unless_unseen(self, rpc: Rpc, request: Any) -> Any:
        """The answer; None where the caller may not see it, as who sees a key need not be allowed to see its owner."""
        try:
            return await self._call(rpc, request)
        except PlatformError as error:
            if error.reason in _UNSEEN:
                return None
            raise


class ProjectsEndpoint(_Reading):
    """An ASGI endpoint for the projects that the caller may see: its own, or all of the platform's."""

    route = "/v1/organization/projects"

    async def _answer(self, ids: dict[str, str], query: bytes) -> ProjectPage:
        asked = Query(query, PROJECT_PARAMETERS)
        limit = asked.number("limit", 1, _MOST) or _DEFAULT
        after = asked.text("after")
        with_archived = bool(asked.boolean("include_archived"))
        principal = (
            await self._call(self._auth.GetCurrentPrincipal, auth_service_pb2.GetCurrentPrincipalRequest())
        ).principal
        if principal.platform:
            request = organization_service_pb2.ListOrganizationsRequest()
            seen = self._pages(self._organizations.ListOrganizations, request, "organizations")
        else:
            seen = self._own(principal.organization_id)
        kept = (project async for project in seen if with_archived or project.state != _DELETED)
        found, has_more = await _cut(kept, limit, after, lambda project: project.organization_id)
        data = [_project(organization) for organization in found]
        return ProjectPage(
            data=data,
            has_more=has_more,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
        )

    async def _own(self, organization_id: str) -> AsyncIterator[organization_service_pb2.Organization]:
        request = organization_service_pb2.GetOrganizationRequest(organization_id=organization_id)
        yield (await self._call(self._organizations.GetOrganization, request)).organization


class ProjectEndpoint(_Reading):
    """An ASGI endpoint for one project."""

    route = "/v1/organization/projects/{project_id}"

    async def _answer(self, ids: dict[str, str], query: bytes) -> Project:
        Query(query, ())
        request = organization_service_pb2.GetOrganizationRequest(organization_id=ids["project_id"])
        return _project((await self._call(self._organizations.GetOrganization, request)).organization)


class ApiKeysEndpoint(_Reading):
    """An ASGI endpoint for the API keys of a project that are accepted."""

    route = "/v1/organization/projects/{project_id}/api_keys"

    async def _answer(self, ids: dict[str, str], query: bytes) -> ProjectApiKeyPage:
        asked = Query(query, KEY_PARAMETERS)
        limit = asked.number("limit", 1, _MOST) or _DEFAULT
        after = asked.text("after")
        # An owner without access takes its keys with it.
        if asked.choice("owner_project_access", ("active", "inactive", "any"), "any") == "inactive":
            return ProjectApiKeyPage(data=[], has_more=False)
        request = api_key_service_pb2.ListApiKeysRequest(
            organization_id=ids["project_id"], state=api_key_service_pb2.API_KEY_STATE_ACTIVE
        )
        seen = self._pages(self._keys.ListApiKeys, request, "api_keys")
        keys, has_more = await _cut(seen, limit, after, lambda key: key.api_key_id)
        data = await self._with_owners(keys)
        return ProjectApiKeyPage(
            data=data,
            has_more=has_more,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
        )


class ApiKeyEndpoint(_Reading):
    """An ASGI endpoint for one API key of a project."""

    route = "/v1/organization/projects/{project_id}/api_keys/{api_key_id}"

    async def _answer(self, ids: dict[str, str], query: bytes) -> ProjectApiKey:
        Query(query, ())
        request = api_key_service_pb2.GetApiKeyRequest(organization_id=ids["project_id"], api_key_id=ids["api_key_id"])
        (key,) = await self._with_owners([(await self._call(self._keys.GetApiKey, request)).api_key])
        return key


ENDPOINTS: tuple[type[_Reading], ...] = (ProjectsEndpoint, ProjectEndpoint, ApiKeysEndpoint, ApiKeyEndpoint)
"""All of them, each with its route."""


async def _cut(
    items: AsyncIterator[T], limit: int, after: str | None, id_of: Callable[[T], str]
) -> tuple[list[T], bool]:
    """At most `limit` items, those after one id where it is given, and whether there are more.

    OpenAI's cursor is an id, and those of the contracts are not: what is before it is read again.

    Raises PlatformError(INVALID_ARGUMENT) if there is no such id.
    """
    found: list[T] = []
    is_before = after is not None
    async for item in items:
        if is_before:
            is_before = id_of(item) != after
        elif len(found) == limit:
            return found, True
        else:
            found.append(item)
    if is_before:
        raise wrong("after", "the id of an item of this list")
    return found, False


def _project(organization: organization_service_pb2.Organization) -> Project:
    is_archived = organization.state == _DELETED
    return Project(
        id=organization.organization_id,
        name=organization.display_name,
        created_at=organization.create_time.seconds,
        archived_at=organization.update_time.seconds if is_archived else None,
        status="archived" if is_archived else "active",
    )


def _key(key: api_key_service_pb2.ApiKey, owner: Owner) -> ProjectApiKey:
    return ProjectApiKey(
        id=key.api_key_id,
        name=key.display_name,
        redacted_value=f"{API_KEY.prefix}{key.api_key_id}_***",
        created_at=key.create_time.seconds,
        last_used_at=_seconds(key, "last_use_time"),
        expires_at=_seconds(key, "expire_time"),
        owner=owner,
    )


def _seconds(key: api_key_service_pb2.ApiKey, name: str) -> int | None:
    time: Timestamp = getattr(key, name)
    return time.seconds if key.HasField(name) else None  # type: ignore[arg-type]
