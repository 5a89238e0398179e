"""What the process is made of, read from top to bottom; nothing else knows every class of identity."""

import asyncio
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor

from aiaas.identity.v1 import (
    api_key_service_pb2,
    api_key_service_pb2_grpc,
    audit_service_pb2,
    audit_service_pb2_grpc,
    auth_service_pb2,
    auth_service_pb2_grpc,
    budget_service_pb2,
    budget_service_pb2_grpc,
    configuration_service_pb2,
    configuration_service_pb2_grpc,
    oauth_service_pb2,
    oauth_service_pb2_grpc,
    organization_service_pb2,
    organization_service_pb2_grpc,
    request_signing_service_pb2,
    request_signing_service_pb2_grpc,
    role_service_pb2,
    role_service_pb2_grpc,
    scim_service_pb2,
    scim_service_pb2_grpc,
    service_account_service_pb2,
    service_account_service_pb2_grpc,
    user_service_pb2,
    user_service_pb2_grpc,
)
from identity.api_key_service import ApiKeyService
from identity.api_keys import ApiKeys
from identity.audit import Audit
from identity.audit_chain import AuditKeys
from identity.audit_interceptor import AuditInterceptor
from identity.audit_service import AuditService
from identity.auth_service import AuthService
from identity.budget_changes import BudgetChanges
from identity.budget_leases import BudgetLeases
from identity.budget_overrides import BudgetOverrides
from identity.budget_service import BudgetService
from identity.budgets import Budgets
from identity.config import IdentityConfig
from identity.configuration_directory import ConfigurationDirectory
from identity.configuration_service import ConfigurationService
from identity.configurations import Configurations
from identity.custom_roles import Roles
from identity.event_outbox import EventOutbox
from identity.last_uses import LastUses
from identity.oauth_authorizations import OauthAuthorizations
from identity.oauth_clients import OauthClients
from identity.oauth_grants import OauthGrants
from identity.oauth_service import OauthService
from identity.oauth_tokens import OauthTokens
from identity.organization_purges import OrganizationPurges
from identity.organization_service import OrganizationService
from identity.organizations import Organizations
from identity.principals import Principals
from identity.request_signing import RequestSigning
from identity.request_signing_service import RequestSigningService
from identity.revocation_feed import RevocationFeed
from identity.revocations import announcer
from identity.role_service import RoleService
from identity.scim import Scim, ScimKind
from identity.scim_groups import ScimGroups
from identity.scim_service import ScimService
from identity.scim_users import ScimUsers
from identity.service_account_service import ServiceAccountService
from identity.service_accounts import ServiceAccounts
from identity.signing_keys import SigningKeys
from identity.stores import Store, open_database
from identity.user_service import UserService
from identity.users import Users
from mesh.broker import Broker
from mesh.cache import Cache
from mesh.clock import Clock, SystemClock
from mesh.interceptors import chain
from mesh.ops import OpsServer
from mesh.sealing import Seal
from mesh.server import AddServicer, GrpcServer
from mesh.topology import EVENTS


def _services(
    store: Store, auth: AuthService, budgets: BudgetService, configurations: ConfigurationService, clock: Clock
) -> list[tuple[ServiceDescriptor, AddServicer, Any]]:
    api_keys = ApiKeyService(ApiKeys(store, clock), clock)
    return [
        (
            organization_service_pb2.DESCRIPTOR.services_by_name["OrganizationService"],
            organization_service_pb2_grpc.add_OrganizationServiceServicer_to_server,
            OrganizationService(Organizations(store, clock)),
        ),
        (
            user_service_pb2.DESCRIPTOR.services_by_name["UserService"],
            user_service_pb2_grpc.add_UserServiceServicer_to_server,
            UserService(Users(store, clock)),
        ),
        (
            service_account_service_pb2.DESCRIPTOR.services_by_name["ServiceAccountService"],
            service_account_service_pb2_grpc.add_ServiceAccountServiceServicer_to_server,
            ServiceAccountService(ServiceAccounts(store, clock)),
        ),
        (
            api_key_service_pb2.DESCRIPTOR.services_by_name["ApiKeyService"],
            api_key_service_pb2_grpc.add_ApiKeyServiceServicer_to_server,
            api_keys,
        ),
        (
            role_service_pb2.DESCRIPTOR.services_by_name["RoleService"],
            role_service_pb2_grpc.add_RoleServiceServicer_to_server,
            RoleService(Roles(store, clock)),
        ),
        (
            budget_service_pb2.DESCRIPTOR.services_by_name["BudgetService"],
            budget_service_pb2_grpc.add_BudgetServiceServicer_to_server,
            budgets,
        ),
        (
            configuration_service_pb2.DESCRIPTOR.services_by_name["ConfigurationService"],
            configuration_service_pb2_grpc.add_ConfigurationServiceServicer_to_server,
            configurations,
        ),
        (
            scim_service_pb2.DESCRIPTOR.services_by_name["ScimService"],
            scim_service_pb2_grpc.add_ScimServiceServicer_to_server,
            ScimService(_scim(store, clock)),
        ),
        (
            auth_service_pb2.DESCRIPTOR.services_by_name["AuthService"],
            auth_service_pb2_grpc.add_AuthServiceServicer_to_server,
            auth,
        ),
    ]


def _scim(store: Store, clock: Clock) -> Scim:
    users = ScimUsers(clock)
    return Scim(store, clock, {ScimKind.USER: users, ScimKind.GROUP: ScimGroups(users, clock)})


async def serve(config: IdentityConfig, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain. Raises mesh.server.AddressInUseError, OSError for a taken ops port."""
    clock = SystemClock()
    database = open_database(config.database_url)
    broker = Broker(config.amqp_url, EVENTS)
    seal = Seal(config.secret_key)
    cache = Cache(config.redis_url, clock) if config.redis_url else None
    try:
        async with announcer(config.redis_url, clock) as revocations, asyncio.TaskGroup() as tasks:
            audit_keys = AuditKeys(config.audit_keys)
            store = Store(database, revocations.announce, audit_keys)
            audit = Audit(store, clock, audit_keys)
            last_uses = LastUses(store)
            # Its own principals are asked of the domain at each call: nothing here may be older than the database.
            keys = SigningKeys(store, clock, seal)
            oauth_tokens = OauthTokens(store, clock, keys, config.public_url)
            principals = Principals(store, clock, last_uses, oauth_tokens)
            oauth = OauthService(
                OauthClients(store, clock),
                OauthGrants(store, clock),
                OauthAuthorizations(store, clock, principals, seal, config.public_url),
                oauth_tokens,
                keys,
                config.public_url,
            )
            overrides = BudgetOverrides(store, clock)
            changes = BudgetChanges(store)
            feed = RevocationFeed(store)
            purges = OrganizationPurges(store, clock, audit)
            outbox = EventOutbox(store, broker)
            leases = BudgetLeases(store, clock)
            signing = RequestSigning(store, clock, seal, ApiKeys(store, clock), cache)
            budgets = BudgetService(Budgets(store, clock), overrides, leases, changes)
            configurations = Configurations(store, clock)
            directory = ConfigurationDirectory(configurations, audit, config.configuration_path)
            grpc_server = GrpcServer(
                config.grpc_address,
                [
                    *_services(
                        store,
                        AuthService(principals, feed),
                        budgets,
                        ConfigurationService(configurations, directory),
                        clock,
                    ),
                    (
                        audit_service_pb2.DESCRIPTOR.services_by_name["AuditService"],
                        audit_service_pb2_grpc.add_AuditServiceServicer_to_server,
                        AuditService(audit),
                    ),
                    (
                        request_signing_service_pb2.DESCRIPTOR.services_by_name["RequestSigningService"],
                        request_signing_service_pb2_grpc.add_RequestSigningServiceServicer_to_server,
                        RequestSigningService(signing),
                    ),
                    (
                        oauth_service_pb2.DESCRIPTOR.services_by_name["OauthService"],
                        oauth_service_pb2_grpc.add_OauthServiceServicer_to_server,
                        oauth,
                    ),
                ],
                chain(
                    principals,
                    signatures=signing,
                    traced=bool(config.otlp_endpoint),
                    witnesses=[AuditInterceptor(audit, clock)],
                ),
                reflect=config.reflection,
                drain_s=config.drain_s,
            )
            host, _, port = config.ops_address.rpartition(":")
            ops_server = OpsServer(int(port), {"database": database.check}, host=host)
            ended = asyncio.Event()
            await grpc_server.start()
            try:
                await ops_server.start()
                for run in (
                    *(last_uses.run, overrides.run, leases.run, changes.run, outbox.run, directory.run),
                    *(audit.run, feed.run, purges.run, oauth_tokens.run),
                ):
                    tasks.create_task(run(ended))
                await stop.wait()
            finally:
                # Watches would last as long as the drain; their routers watch elsewhere from now on.
                await grpc_server.set_serving(False)
                await changes.close()
                await feed.close()
                await grpc_server.stop()
                await ops_server.stop()
                ended.set()
    finally:
        if cache is not None:
            await cache.close()
        await broker.close()
        await database.close()
