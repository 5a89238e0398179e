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
    organization_service_pb2,
    organization_service_pb2_grpc,
    role_service_pb2,
    role_service_pb2_grpc,
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
from identity.organization_service import OrganizationService
from identity.organizations import Organizations
from identity.principals import Principals
from identity.revocations import announcer
from identity.role_service import RoleService
from identity.service_account_service import ServiceAccountService
from identity.service_accounts import ServiceAccounts
from identity.stores import Store, open_database
from identity.user_service import UserService
from identity.users import Users
from mesh.broker import Broker
from mesh.clock import Clock, SystemClock
from mesh.interceptors import chain
from mesh.ops import OpsServer
from mesh.server import AddServicer, GrpcServer
from mesh.topology import EVENTS


def _services(
    store: Store, principals: Principals, budgets: BudgetService, configurations: ConfigurationService, clock: Clock
) -> list[tuple[ServiceDescriptor, AddServicer, Any]]:
    api_keys = ApiKeyService(ApiKeys(store, clock), clock)  # type: ignore[abstract]  # RotateApiKey comes later
    return [
        (
            organization_service_pb2.DESCRIPTOR.services_by_name["OrganizationService"],
            organization_service_pb2_grpc.add_OrganizationServiceServicer_to_server,
            OrganizationService(Organizations(store, clock)),  # type: ignore[abstract]  # DeleteOrganization comes later
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
            auth_service_pb2.DESCRIPTOR.services_by_name["AuthService"],
            auth_service_pb2_grpc.add_AuthServiceServicer_to_server,
            AuthService(principals),  # type: ignore[abstract]  # WatchRevocations comes later
        ),
    ]


async def serve(config: IdentityConfig, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain. Raises mesh.server.AddressInUseError, OSError for a taken ops port."""
    clock = SystemClock()
    database = open_database(config.database_url)
    broker = Broker(config.amqp_url, EVENTS)
    try:
        async with announcer(config.redis_url, clock) as revocations, asyncio.TaskGroup() as tasks:
            audit_keys = AuditKeys(config.audit_keys)
            store = Store(database, revocations.announce, audit_keys)
            audit = Audit(store, clock, audit_keys)
            last_uses = LastUses(store)
            # Its own principals are asked of the domain at each call: nothing here may be older than the database.
            principals = Principals(store, clock, last_uses)
            overrides = BudgetOverrides(store, clock)
            changes = BudgetChanges(store)
            outbox = EventOutbox(store, broker)
            leases = BudgetLeases(store, clock)
            budgets = BudgetService(Budgets(store, clock), overrides, leases, changes)
            configurations = Configurations(store, clock)
            directory = ConfigurationDirectory(configurations, config.configuration_path)
            grpc_server = GrpcServer(
                config.grpc_address,
                [
                    *_services(store, principals, budgets, ConfigurationService(configurations, directory), clock),
                    (
                        audit_service_pb2.DESCRIPTOR.services_by_name["AuditService"],
                        audit_service_pb2_grpc.add_AuditServiceServicer_to_server,
                        AuditService(audit),
                    ),
                ],
                chain(principals, traced=bool(config.otlp_endpoint), witnesses=[AuditInterceptor(audit, clock)]),
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
                    audit.run,
                ):
                    tasks.create_task(run(ended))
                await stop.wait()
            finally:
                # Watches would last as long as the drain; their routers watch elsewhere from now on.
                await grpc_server.set_serving(False)
                await changes.close()
                await grpc_server.stop()
                await ops_server.stop()
                ended.set()
    finally:
        await broker.close()
        await database.close()
