"""What the router is made of, read top to bottom; nothing else knows every class."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor

from aiaas.identity.v1 import (
    auth_service_pb2,
    auth_service_pb2_grpc,
    budget_service_pb2,
    budget_service_pb2_grpc,
    policy_service_pb2,
    policy_service_pb2_grpc,
    request_signing_service_pb2,
    request_signing_service_pb2_grpc,
)
from aiaas.router.v1 import (
    backend_service_pb2,
    backend_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    journal_service_pb2,
    journal_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    price_service_pb2,
    price_service_pb2_grpc,
    router_service_pb2,
    router_service_pb2_grpc,
    routing_policy_service_pb2,
    routing_policy_service_pb2_grpc,
)
from mesh.auth import CachedAuthenticator, RemoteAuthenticator
from mesh.broker import Broker
from mesh.cache import Cache
from mesh.channel import connect
from mesh.clock import SystemClock
from mesh.database import Database
from mesh.errors import PlatformError
from mesh.ids import new_id
from mesh.interceptors import chain
from mesh.ops import OpsServer
from mesh.policies import RemoteDecider
from mesh.process import spare_collector
from mesh.request_signatures import RemoteVerifier
from mesh.revocations import listen, watch
from mesh.scripts import Scripts
from mesh.server import AddServicer, GrpcServer
from mesh.tls import opened
from mesh.topology import USAGE
from router.backend_service import BackendService
from router.backends import CREDENTIAL_PREFIX, Registry
from router.budget_ledger import RemoteLedger
from router.budgets import Budgets
from router.config import RouterConfig
from router.engine_token_store import EngineTokenStore
from router.engine_tokens import EngineTokenReader
from router.health import HealthProber
from router.idempotency import IDEMPOTENCY, Idempotency
from router.inference import INFER, Engine
from router.inference_service import InferenceService
from router.journal import Journal
from router.journal_service import JournalService
from router.model_service import ModelService
from router.price_service import PriceService
from router.publisher import UsagePublisher
from router.rate_limits import RATE_LIMITS, ROUTERS, Defaults, RateLimiter
from router.rechecks import Rechecks
from router.relay import Relays
from router.router_service import RouterService
from router.router_store import RouterStore
from router.routers import Condition, Heartbeats, Replica
from router.routing import Routing
from router.routing_policy_service import RoutingPolicyService
from router.snapshot import RouterSnapshot
from router.store import Store
from router.upstream import HttpUpstream, Timeouts
from router.usage import abort_event

_FLUSH_S = 5.0
_KEPT_ANSWERS_TIMEOUT_S = 0.25


async def serve(
    config: RouterConfig, stop: asyncio.Event, *, announce: Callable[[Relays], None] = lambda _: None
) -> None:
    """Serve until `stop` is set, then drain. `announce` gets the relays once they can be opened: an edge in the same
    process opens one without gRPC.

    Raises mesh.tls.CertificateError, mesh.server.AddressInUseError, OSError for a taken operations port, and the group
    of what ended a background task, of which none may end before the process does.
    """
    clock = SystemClock()
    random = secrets.SystemRandom()
    credentials = {name: value for name, value in os.environ.items() if name.startswith(CREDENTIAL_PREFIX)}
    async with contextlib.AsyncExitStack() as resources:
        database = Database(config.database_url)
        resources.push_async_callback(database.close)
        redis = Cache(config.redis_url, clock)
        resources.push_async_callback(redis.close)
        scripts = Scripts(config.redis_url, clock, RATE_LIMITS, ROUTERS)
        # Whole answers travel here, and nobody can judge in its place: it has its own connection, and more patience.
        kept_answers = Scripts(config.redis_url, clock, IDEMPOTENCY, timeout_s=_KEPT_ANSWERS_TIMEOUT_S)
        broker = Broker(config.amqp_url, USAGE)
        resources.push_async_callback(broker.close)
        tls = await resources.enter_async_context(opened(config.tls))
        identity = await resources.enter_async_context(
            connect(
                config.identity_target,
                auth_service_pb2.DESCRIPTOR.services_by_name["AuthService"],
                budget_service_pb2.DESCRIPTOR.services_by_name["BudgetService"],
                request_signing_service_pb2.DESCRIPTOR.services_by_name["RequestSigningService"],
                policy_service_pb2.DESCRIPTOR.services_by_name["PolicyService"],
                tls=tls,
            )
        )
        upstream = await resources.enter_async_context(HttpUpstream(credentials))

        identity_auth = auth_service_pb2_grpc.AuthServiceStub(identity)
        authenticator = CachedAuthenticator(
            RemoteAuthenticator(identity_auth), clock, random, stale_s=config.unconfirmed_s
        )
        resources.push_async_callback(authenticator.close)
        decider = RemoteDecider(policy_service_pb2_grpc.PolicyServiceStub(identity))
        signatures = RemoteVerifier(request_signing_service_pb2_grpc.RequestSigningServiceStub(identity))

        store = Store(database)
        registry = Registry(store)
        prober = HealthProber(registry, upstream)
        limiter = RateLimiter(
            scripts,
            clock,
            new_id("router"),
            Defaults(
                config.default_requests_per_second,
                config.default_burst_requests,
                config.default_concurrent_requests,
                config.default_tokens_per_minute,
            ),
        )
        idempotency = Idempotency(kept_answers, new_id("router"))
        journal = Journal(Path(config.journal_path), config.journal_limit_bytes, clock, abort_event)
        resources.push_async_callback(journal.close)
        publisher = UsagePublisher(broker, journal, random)
        budgets = Budgets(
            RemoteLedger(budget_service_pb2_grpc.BudgetServiceStub(identity)),
            clock,
            journal,
        )
        known = Path(config.journal_path) / "known"
        snapshot = RouterSnapshot(known, authenticator, registry, budgets, clock, config.unconfirmed_s)
        snapshot.restore()
        resources.callback(snapshot.close)
        engine = Engine(
            registry=registry,
            routing=Routing(random, clock),
            limiter=limiter,
            treasury=budgets,
            upstream=upstream,
            journal=journal,
            clock=clock,
            timeouts=Timeouts(
                config.connect_timeout_s,
                config.first_byte_timeout_s,
                config.answer_timeout_s,
                config.idle_timeout_s,
            ),
            router_id=journal.router_id,
            idempotency=idempotency,
            decider=decider,
        )
        relays = Relays(engine, authenticator, signatures)
        inference_service = InferenceService(engine, registry, relays)
        replicas, engine_tokens = RouterStore(database), EngineTokenStore(database)
        heartbeats = Heartbeats(
            replicas,
            Replica(
                journal.router_id,
                journal.instance_id,
                config.advertised_address or config.grpc_address,
                version("aiaas"),
                clock.now(),
            ),
            lambda: Condition(relays.draining, journal.open_entries, journal.unpublished_entries),
        )
        grpc_server = GrpcServer(
            config.grpc_address,
            _services(
                store,
                registry,
                inference_service,
                JournalService(journal, publisher, clock),
                RouterService(replicas, engine_tokens),
            ),
            chain(
                authenticator,
                signatures=signatures,
                decider=decider,
                asking_policies=[INFER],
                traced=config.otlp_endpoint is not None,
                trusted_proxies=config.proxies.trusted_proxies,
            ),
            reflect=config.reflection,
            drain_s=config.drain_s,
            tls=tls,
            public_address=config.public_grpc_address,
        )
        ops_host, _, ops_port = config.ops_address.rpartition(":")
        ops_server = OpsServer(int(ops_port), {"registry": registry.check_loaded}, host=ops_host)

        # Before the first call comes, so that it finds its model and a backend; without PostgreSQL, what was known.
        with contextlib.suppress(PlatformError):
            await registry.refresh()
        await prober.probe_all()
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(run(), name=name)
                for name, run in (
                    ("registry", registry.run),
                    ("health", prober.run),
                    ("journal", journal.run),
                    ("publisher", publisher.run),
                    ("budgets", budgets.run),
                    ("engine tokens", EngineTokenReader(registry, upstream, engine_tokens, clock).run),
                    ("heartbeats", heartbeats.run),
                    # It ends before its connection does, so that it can say goodbye.
                    ("rate limits", limiter.run),
                    ("scripts", scripts.run_connection),
                    ("idempotency", idempotency.run),
                    ("kept answers", kept_answers.run_connection),
                    ("revocations", functools.partial(listen, redis, authenticator)),
                    ("watched revocations", functools.partial(watch, identity_auth, authenticator)),
                    ("snapshot", snapshot.run),
                    ("rechecks", Rechecks(authenticator, relays.running, inference_service.running).run),
                )
            ]
            await ops_server.start()
            try:
                await grpc_server.start()
                announce(relays)
                spare_collector()
                await stop.wait()
            finally:
                relays.drain()
                await grpc_server.stop()
                await budgets.close()
                await publisher.flush(_FLUSH_S)
                await ops_server.stop()
                for task in background:
                    task.cancel()
                await snapshot.write()


def _services(
    store: Store, registry: Registry, inference: InferenceService, journal: JournalService, routers: RouterService
) -> list[tuple[ServiceDescriptor, AddServicer, Any]]:
    return [
        (
            inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"],
            inference_service_pb2_grpc.add_InferenceServiceServicer_to_server,
            inference,
        ),
        (
            model_service_pb2.DESCRIPTOR.services_by_name["ModelService"],
            model_service_pb2_grpc.add_ModelServiceServicer_to_server,
            ModelService(store, registry),
        ),
        (
            backend_service_pb2.DESCRIPTOR.services_by_name["BackendService"],
            backend_service_pb2_grpc.add_BackendServiceServicer_to_server,
            BackendService(store, registry),
        ),
        (
            price_service_pb2.DESCRIPTOR.services_by_name["PriceService"],
            price_service_pb2_grpc.add_PriceServiceServicer_to_server,
            PriceService(store, registry),
        ),
        (
            routing_policy_service_pb2.DESCRIPTOR.services_by_name["RoutingPolicyService"],
            routing_policy_service_pb2_grpc.add_RoutingPolicyServiceServicer_to_server,
            RoutingPolicyService(store, registry),
        ),
        (
            journal_service_pb2.DESCRIPTOR.services_by_name["JournalService"],
            journal_service_pb2_grpc.add_JournalServiceServicer_to_server,
            journal,
        ),
        (
            router_service_pb2.DESCRIPTOR.services_by_name["RouterService"],
            router_service_pb2_grpc.add_RouterServiceServicer_to_server,
            routers,
        ),
    ]
