"""A running identity and short ways to call it; it never reaches around the gRPC API but for what no RPC offers."""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from aiaas.identity.v1 import (
    api_key_service_pb2,
    api_key_service_pb2_grpc,
    audit_service_pb2_grpc,
    auth_service_pb2,
    auth_service_pb2_grpc,
    budget_service_pb2_grpc,
    organization_service_pb2,
    organization_service_pb2_grpc,
    role_service_pb2_grpc,
    service_account_service_pb2,
    service_account_service_pb2_grpc,
    user_service_pb2,
    user_service_pb2_grpc,
)
from aiaas.type.v1.principal_pb2 import Principal
from identity.bootstrap import Bootstrapped, bootstrap
from identity.config import IdentityConfig
from identity.roles import BUILT_IN
from identity.server import serve
from identity.stores import Store
from mesh.clock import Clock, SystemClock
from mesh.database import Database
from mesh.errors import PlatformError, Reason, from_rpc_error

T = TypeVar("T")

NO_BROKER = "amqp://127.0.0.1:1/"
AUDIT_KEY = base64.b64encode(bytes(range(32))).decode()
SECRET_KEY = base64.b64encode(bytes(range(1, 33))).decode()
PUBLIC_URL = "https://platform.example"


@dataclass(frozen=True)
class Member:
    """Somebody in an organization, with a key that carries all of the role."""

    organization_id: str
    user_id: str
    secret: str


class Identity:
    """Stubs of a running identity, whose calls carry a credential: the platform administrator's unless told."""

    def __init__(self, channel: grpc.aio.Channel, platform: Bootstrapped, stop: Callable[[], None]) -> None:
        assert platform.secret is not None
        self.channel = channel
        self.stop = stop
        self.platform = platform
        self.admin: str = platform.secret
        self.organizations = organization_service_pb2_grpc.OrganizationServiceStub(channel)
        self.users = user_service_pb2_grpc.UserServiceStub(channel)
        self.service_accounts = service_account_service_pb2_grpc.ServiceAccountServiceStub(channel)
        self.api_keys = api_key_service_pb2_grpc.ApiKeyServiceStub(channel)
        self.roles = role_service_pb2_grpc.RoleServiceStub(channel)
        self.budgets = budget_service_pb2_grpc.BudgetServiceStub(channel)
        self.audit = audit_service_pb2_grpc.AuditServiceStub(channel)
        self.auth = auth_service_pb2_grpc.AuthServiceStub(channel)

    async def call(self, method: Callable[..., Awaitable[T]], request: object, secret: str | None = None) -> T:
        """The answer to a call with this credential."""
        credential = self.admin if secret is None else secret
        return await method(request, metadata=(("authorization", f"Bearer {credential}"),), timeout=10)

    async def refused(
        self, method: Callable[..., Awaitable[Any]], request: object, secret: str | None = None
    ) -> PlatformError:
        """The error of a call that must fail."""
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.call(method, request, secret)
        return from_rpc_error(raised.value)

    async def authenticate(self, secret: str) -> Principal:
        """The principal behind a credential. Raises the PlatformError that identity raised."""
        try:
            response = await self.auth.Authenticate(auth_service_pb2.AuthenticateRequest(credential=secret), timeout=10)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return response.principal

    async def is_refused(self, secret: str) -> bool:
        """Whether a credential is judged and refused; anything but a verdict is raised."""
        try:
            await self.authenticate(secret)
        except PlatformError as error:
            if error.reason is Reason.API_KEY_INVALID:
                return True
            raise
        return False

    async def organization(self, display_name: str = "Tenant", **fields: Any) -> str:
        """The id of a new organization."""
        wanted = organization_service_pb2.Organization(display_name=display_name, **fields)
        request = organization_service_pb2.CreateOrganizationRequest(organization=wanted)
        return (await self.call(self.organizations.CreateOrganization, request)).organization.organization_id

    async def key(
        self, organization_id: str, *scopes: str, secret: str | None = None, **fields: Any
    ) -> api_key_service_pb2.CreateApiKeyResponse:
        """A new key."""
        wanted = api_key_service_pb2.ApiKey(**{"display_name": "Key", "scopes": scopes, **fields})
        request = api_key_service_pb2.CreateApiKeyRequest(organization_id=organization_id, api_key=wanted)
        return await self.call(self.api_keys.CreateApiKey, request, secret)

    async def member(self, organization_id: str, role_id: str, email: str = "") -> Member:
        """A new member with one built-in role."""
        wanted = user_service_pb2.User(email=email or f"{role_id}@example.com", role_ids=[role_id])
        request = user_service_pb2.CreateUserRequest(organization_id=organization_id, user=wanted)
        user = (await self.call(self.users.CreateUser, request)).user
        key = await self.key(organization_id, *BUILT_IN[role_id].permissions, user_id=user.user_id)
        return Member(organization_id, user.user_id, key.secret)

    async def service_account(
        self, organization_id: str, display_name: str = "Worker", role_ids: tuple[str, ...] = ()
    ) -> service_account_service_pb2.ServiceAccount:
        """A new service account."""
        wanted = service_account_service_pb2.ServiceAccount(display_name=display_name, role_ids=role_ids)
        request = service_account_service_pb2.CreateServiceAccountRequest(
            organization_id=organization_id, service_account=wanted
        )
        return (await self.call(self.service_accounts.CreateServiceAccount, request)).service_account


@asynccontextmanager
async def running_identity(
    database_url: str,
    folder: Path,
    redis_url: str = "",
    amqp_url: str = NO_BROKER,
    drain_s: float = 1.0,
    configuration_path: str = "",
    restarted: bool = False,
    smtp_url: str = "",
    public_url: str = PUBLIC_URL,
    allow_private_issuers: bool = False,
) -> AsyncIterator[Identity]:
    """identity on a unix socket over a migrated database, bootstrapped. Without a broker its events wait.

    One that is `restarted` over the same database has a new key for its administrator.
    """
    socket = f"unix:{folder}/identity.sock"
    config = IdentityConfig(
        grpc_address=socket,
        ops_address="127.0.0.1:0",
        database_url=database_url,
        amqp_url=amqp_url,
        audit_keys=AUDIT_KEY,
        secret_key=SECRET_KEY,
        public_url=public_url,
        redis_url=redis_url,
        drain_s=drain_s,
        configuration_path=configuration_path,
        smtp_url=smtp_url,
        allow_private_issuers=allow_private_issuers,
    )
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        server = tasks.create_task(serve(config, stop))
        try:
            platform = await bootstrapped(database_url, rotate=restarted)
            async with grpc.aio.insecure_channel(socket) as channel, asyncio.timeout(10):
                await channel.channel_ready()
                assert not server.done()
                yield Identity(channel, platform, stop.set)
        finally:
            stop.set()


async def bootstrapped(database_url: str, *, rotate: bool = False, clock: Clock | None = None) -> Bootstrapped:
    """What bootstrap makes or finds."""
    database = Database(database_url)
    try:
        return await bootstrap(Store(database, _announce_nothing), clock or SystemClock(), "Platform", rotate=rotate)
    finally:
        await database.close()


async def _announce_nothing(_: object) -> None:
    pass
