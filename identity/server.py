"""What the process is made of, read from top to bottom; nothing else knows every class of identity."""

import asyncio
from types import ModuleType
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
    federation_service_pb2,
    federation_service_pb2_grpc,
    invite_service_pb2,
    invite_service_pb2_grpc,
    mfa_service_pb2,
    mfa_service_pb2_grpc,
    oauth_service_pb2,
    oauth_service_pb2_grpc,
    organization_service_pb2,
    organization_service_pb2_grpc,
    policy_service_pb2,
    policy_service_pb2_grpc,
    request_signing_service_pb2,
    request_signing_service_pb2_grpc,
    role_service_pb2,
    role_service_pb2_grpc,
    scim_service_pb2,
    scim_service_pb2_grpc,
    service_account_service_pb2,
    service_account_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
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
from identity.federation import Federation
from identity.federation_service import FederationService
from identity.invite_service import InviteService
from identity.invites import Invites
from identity.issuer_client import IssuerClient
from identity.issuers import Issuers
from identity.last_uses import LastUses
from identity.mail import Mailer
from identity.mfa import Mfa
from identity.mfa_service import MfaService
from identity.mfa_setup import MfaSetup
from identity.oauth_authorizations import OauthAuthorizations
from identity.oauth_clients import OauthClients
from identity.oauth_grants import OauthGrants
from identity.oauth_service import OauthService
from identity.oauth_tokens import OauthTokens
from identity.organization_purges import OrganizationPurges
from identity.organization_service import OrganizationService
from identity.organizations import Organizations
from identity.passwords import Passwords
from identity.policies import Policies
from identity.policy_decisions import PolicyDecisions
from identity.policy_dry_runs import PolicyDryRuns
from identity.policy_judge import PolicyJudge
from identity.policy_service import PolicyService
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
from identity.session_service import SessionService, sign_in_to_proto
from identity.sessions import Sessions
from identity.sign_ins import SignIns
from identity.signing_keys import SigningKeys
from identity.stores import Store, open_database
from identity.throttles import Throttles
from identity.user_service import UserService
from identity.users import Users
from mesh.broker import Broker
from mesh.cache import Cache
from mesh.clock import Clock, SystemClock
from mesh.interceptors import chain
from mesh.ops import OpsServer
from mesh.process import spare_collector
from mesh.sealing import Seal
from mesh.server import AddServicer, GrpcServer
from mesh.tls import opened
from mesh.topology import EVENTS


def _served(messages: ModuleType, stubs: ModuleType, servicer: Any) -> tuple[ServiceDescriptor, AddServicer, Any]:
    """A servicer, named as its .proto names the service, with what registers it."""
    name = type(servicer).__name__
    return messages.DESCRIPTOR.services_by_name[name], getattr(stubs, f"add_{name}Servicer_to_server"), servicer


def _services(
    store: Store, auth: AuthService, budgets: BudgetService, configurations: ConfigurationService, clock: Clock
) -> list[tuple[ServiceDescriptor, AddServicer, Any]]:
    return [
        _served(
            organization_service_pb2,
            organization_service_pb2_grpc,
            OrganizationService(Organizations(store, clock)),
        ),
        _served(user_service_pb2, user_service_pb2_grpc, UserService(Users(store, clock))),
        _served(
            service_account_service_pb2,
            service_account_service_pb2_grpc,
            ServiceAccountService(ServiceAccounts(store, clock)),
        ),
        _served(api_key_service_pb2, api_key_service_pb2_grpc, ApiKeyService(ApiKeys(store, clock), clock)),
        _served(role_service_pb2, role_service_pb2_grpc, RoleService(Roles(store, clock))),
        _served(budget_service_pb2, budget_service_pb2_grpc, budgets),
        _served(configuration_service_pb2, configuration_service_pb2_grpc, configurations),
        _served(scim_service_pb2, scim_service_pb2_grpc, ScimService(_scim(store, clock))),
        _served(auth_service_pb2, auth_service_pb2_grpc, auth),
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
        async with (
            opened(config.tls) as tls,
            announcer(config.redis_url, clock) as revocations,
            IssuerClient(clock, allow_private=config.allow_private_issuers) as issuer_client,
            asyncio.TaskGroup() as tasks,
        ):
            audit_keys = AuditKeys(config.audit_keys)
            store = Store(database, revocations.announce, audit_keys)
            audit = Audit(store, clock, audit_keys)
            last_uses = LastUses(store)
            # Its own principals are asked of the domain at each call: nothing here may be older than the database.
            keys = SigningKeys(store, clock, seal)
            oauth_tokens = OauthTokens(store, clock, keys, config.public_url)
            mfa, throttles, passwords = Mfa(store, clock, seal), Throttles(store, clock), Passwords(clock)
            mail = Mailer(config.smtp_url, config.mail_from, config.public_url) if config.smtp_url else None
            sessions = Sessions(store, clock, mfa, throttles, last_uses)
            sign_ins = SignIns(store, clock, passwords, sessions, mfa, throttles, mail)
            issuers = Issuers(store, clock, issuer_client, seal, allow_private=config.allow_private_issuers)
            federation = Federation(
                store,
                clock,
                issuer_client,
                seal,
                sessions,
                throttles,
                f"{config.public_url.rstrip('/')}/sign-in/issuer",
            )
            principals = Principals(store, clock, last_uses, oauth_tokens, sessions)
            # What is tried must not hold up what is decided.
            judge, trial_judge = PolicyJudge(clock), PolicyJudge(clock)
            policies, decisions = Policies(store, clock, trial_judge), PolicyDecisions(store, clock, judge)
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
                        AuthService(principals, feed, Users(store, clock), Organizations(store, clock), sessions),
                        budgets,
                        ConfigurationService(configurations, directory),
                        clock,
                    ),
                    _served(
                        session_service_pb2,
                        session_service_pb2_grpc,
                        SessionService(sign_ins, sessions),
                    ),
                    _served(
                        mfa_service_pb2,
                        mfa_service_pb2_grpc,
                        MfaService(MfaSetup(store, clock, seal, mfa, sign_ins)),
                    ),
                    _served(
                        federation_service_pb2,
                        federation_service_pb2_grpc,
                        FederationService(issuers, federation, sign_in_to_proto),
                    ),
                    _served(
                        invite_service_pb2,
                        invite_service_pb2_grpc,
                        InviteService(Invites(store, passwords, mail, clock), clock),
                    ),
                    _served(
                        policy_service_pb2,
                        policy_service_pb2_grpc,
                        PolicyService(policies, decisions, PolicyDryRuns(policies, decisions, trial_judge, principals)),
                    ),
                    _served(audit_service_pb2, audit_service_pb2_grpc, AuditService(audit)),
                    _served(
                        request_signing_service_pb2,
                        request_signing_service_pb2_grpc,
                        RequestSigningService(signing),
                    ),
                    _served(oauth_service_pb2, oauth_service_pb2_grpc, oauth),
                ],
                chain(
                    principals,
                    signatures=signing,
                    decider=decisions,
                    traced=bool(config.otlp_endpoint),
                    witnesses=[AuditInterceptor(audit, clock)],
                    trusted_proxies=config.proxies.trusted_proxies,
                ),
                reflect=config.reflection,
                drain_s=config.drain_s,
                tls=tls,
                public_address=config.public_grpc_address,
            )
            host, _, port = config.ops_address.rpartition(":")
            ops_server = OpsServer(int(port), {"database": database.check}, host=host)
            ended = asyncio.Event()
            await grpc_server.start()
            try:
                await ops_server.start()
                for run in (
                    *(last_uses.run, overrides.run, leases.run, changes.run, outbox.run, directory.run),
                    *(audit.run, feed.run, purges.run, oauth_tokens.run, sessions.run, sign_ins.run, decisions.run),
                ):
                    tasks.create_task(run(ended))
                spare_collector()
                await stop.wait()
            finally:
                # Watches would last as long as the drain; their routers watch elsewhere from now on.
                await grpc_server.set_serving(False)
                await changes.close()
                await feed.close()
                await grpc_server.stop()
                await ops_server.stop()
                await judge.close()
                await trial_judge.close()
                ended.set()
    finally:
        if cache is not None:
            await cache.close()
        await broker.close()
        await database.close()
