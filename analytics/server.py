"""What analytics is made of, read top to bottom; nothing else knows every class."""

import asyncio
import contextlib
import secrets

from aiaas.analytics.v1 import (
    event_service_pb2,
    event_service_pb2_grpc,
    export_service_pb2,
    export_service_pb2_grpc,
    ingestion_service_pb2,
    ingestion_service_pb2_grpc,
    reconciliation_service_pb2,
    reconciliation_service_pb2_grpc,
    reliability_service_pb2,
    reliability_service_pb2_grpc,
    spend_service_pb2,
    spend_service_pb2_grpc,
    statement_service_pb2,
    statement_service_pb2_grpc,
    usage_service_pb2,
    usage_service_pb2_grpc,
    webhook_service_pb2,
    webhook_service_pb2_grpc,
)
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
from aiaas.router.v1 import router_service_pb2, router_service_pb2_grpc
from analytics import metrics
from analytics.config import AnalyticsConfig
from analytics.consumer import Consumer
from analytics.event_retention import keep_clean
from analytics.event_service import EventService
from analytics.event_store import EventStore
from analytics.export_service import ExportService
from analytics.export_store import ExportStore
from analytics.exporter import Exporter
from analytics.freshness import Marks
from analytics.ingestion import Ingestion
from analytics.ingestion_service import IngestionService
from analytics.object_storage import Storage
from analytics.partitions import keep_partitions
from analytics.platform_events import EventConsumer
from analytics.reconciler import Reconciler
from analytics.reconciliation_service import ReconciliationService
from analytics.reconciliation_sources import Sources
from analytics.reconciliation_store import ReconciliationStore
from analytics.reliability_service import ReliabilityService
from analytics.spend_service import SpendService
from analytics.statement_issuer import StatementIssuer
from analytics.statement_keys import StatementKeys
from analytics.statement_service import StatementService
from analytics.statement_store import StatementStore
from analytics.statement_verifier import StatementVerifier
from analytics.store import UsageStore
from analytics.sums_store import SumsStore
from analytics.usage_retention import keep_sums
from analytics.usage_service import UsageService
from analytics.watch_store import WatchStore
from analytics.watcher import Watcher
from analytics.webhook_sender import Poster, Sender
from analytics.webhook_service import WebhookService
from analytics.webhook_store import WebhookStore
from analytics.webhooks import Webhooks
from mesh.auth import CachedAuthenticator, RemoteAuthenticator
from mesh.broker import Broker
from mesh.cache import Cache
from mesh.channel import connect
from mesh.clock import SystemClock
from mesh.database import Database
from mesh.interceptors import chain
from mesh.ops import OpsServer
from mesh.policies import RemoteDecider
from mesh.request_signatures import RemoteVerifier
from mesh.revocations import listen, watch
from mesh.sealing import Seal
from mesh.server import GrpcServer
from mesh.tls import opened
from mesh.topology import EVENTS, USAGE


async def serve(config: AnalyticsConfig, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain.

    Raises mesh.tls.CertificateError, mesh.server.AddressInUseError, OSError for a taken operations port, and the group
    of what ended a background task, of which none may end before the process does.
    """
    clock = SystemClock()
    async with contextlib.AsyncExitStack() as resources:
        database = Database(config.database_url)
        resources.push_async_callback(database.close)
        redis = Cache(config.redis_url, clock)
        resources.push_async_callback(redis.close)
        broker = Broker(config.amqp_url, USAGE, EVENTS)
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
        router = await resources.enter_async_context(
            connect(config.router_target, router_service_pb2.DESCRIPTOR.services_by_name["RouterService"], tls=tls)
        )
        identity_auth = auth_service_pb2_grpc.AuthServiceStub(identity)
        authenticator = CachedAuthenticator(RemoteAuthenticator(identity_auth), clock, secrets.SystemRandom())
        resources.push_async_callback(authenticator.close)
        decider = RemoteDecider(policy_service_pb2_grpc.PolicyServiceStub(identity))
        signatures = RemoteVerifier(request_signing_service_pb2_grpc.RequestSigningServiceStub(identity))

        store, sums, kept = UsageStore(database), SumsStore(database), config.kept
        consumer = Consumer(store, broker, USAGE, clock, config.batch_size, kept.events)
        marks = Marks(broker, USAGE.name, store, clock)
        metrics.LAG_SECONDS.set_function(marks.lag_s)
        ingestion = Ingestion(broker, USAGE, consumer, clock)

        reconciliations = ReconciliationStore(database)
        sources = Sources(
            router_service_pb2_grpc.RouterServiceStub(router),
            budget_service_pb2_grpc.BudgetServiceStub(identity),
            tls,
        )
        reconciler = Reconciler(reconciliations, store, sources, broker, clock)

        events, webhook_store = EventStore(database), WebhookStore(database)
        seal = Seal(config.secret_key)
        poster = await resources.enter_async_context(Poster(allow_private=config.webhook_allow_private))
        sender = Sender(webhook_store, poster, seal, clock, secrets.SystemRandom())
        event_consumer = EventConsumer(events, broker, EVENTS, clock, sender.wake)
        watcher = Watcher(WatchStore(database), store, broker, USAGE, clock, sender.wake)
        webhooks = Webhooks(
            webhook_store,
            events,
            seal,
            clock,
            allow_private=config.webhook_allow_private,
            send=sender.send,
            wake=sender.wake,
        )

        exports, storage = ExportStore(database), storage_of(config)
        exporter = Exporter(exports, storage, clock) if storage else None

        statements = StatementStore(database)
        statement_keys = StatementKeys(statements, seal, clock)
        issuer = StatementIssuer(statements, store, statement_keys, clock, kept.events)
        verifier = StatementVerifier(statements, statement_keys, clock, kept.events)

        grpc_server = GrpcServer(
            config.grpc_address,
            [
                (
                    usage_service_pb2.DESCRIPTOR.services_by_name["UsageService"],
                    usage_service_pb2_grpc.add_UsageServiceServicer_to_server,
                    UsageService(store, sums, clock),
                ),
                (
                    spend_service_pb2.DESCRIPTOR.services_by_name["SpendService"],
                    spend_service_pb2_grpc.add_SpendServiceServicer_to_server,
                    SpendService(store, sums, clock),
                ),
                (
                    reliability_service_pb2.DESCRIPTOR.services_by_name["ReliabilityService"],
                    reliability_service_pb2_grpc.add_ReliabilityServiceServicer_to_server,
                    ReliabilityService(store, sums, clock),
                ),
                (
                    event_service_pb2.DESCRIPTOR.services_by_name["EventService"],
                    event_service_pb2_grpc.add_EventServiceServicer_to_server,
                    EventService(events, clock),
                ),
                (
                    webhook_service_pb2.DESCRIPTOR.services_by_name["WebhookService"],
                    webhook_service_pb2_grpc.add_WebhookServiceServicer_to_server,
                    WebhookService(webhooks),
                ),
                (
                    reconciliation_service_pb2.DESCRIPTOR.services_by_name["ReconciliationService"],
                    reconciliation_service_pb2_grpc.add_ReconciliationServiceServicer_to_server,
                    ReconciliationService(reconciliations, reconciler, clock),
                ),
                (
                    export_service_pb2.DESCRIPTOR.services_by_name["ExportService"],
                    export_service_pb2_grpc.add_ExportServiceServicer_to_server,
                    ExportService(exports, storage, exporter, clock),
                ),
                (
                    ingestion_service_pb2.DESCRIPTOR.services_by_name["IngestionService"],
                    ingestion_service_pb2_grpc.add_IngestionServiceServicer_to_server,
                    IngestionService(ingestion, store, clock),
                ),
                (
                    statement_service_pb2.DESCRIPTOR.services_by_name["StatementService"],
                    statement_service_pb2_grpc.add_StatementServiceServicer_to_server,
                    StatementService(statements, issuer, verifier),
                ),
            ],
            chain(
                authenticator,
                signatures=signatures,
                decider=decider,
                traced=config.otlp_endpoint is not None,
                trusted_proxies=config.proxies.trusted_proxies,
            ),
            reflect=config.reflection,
            drain_s=config.drain_s,
            tls=tls,
            public_address=config.public_grpc_address,
        )
        ops_host, _, ops_port = config.ops_address.rpartition(":")
        ops_server = OpsServer(int(ops_port), {"database": database.check}, host=ops_host)

        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(keep_partitions(store, clock), name="partitions"),
                tasks.create_task(keep_sums(store, clock, kept), name="sums"),
                tasks.create_task(consumer.run(), name="consumer"),
                tasks.create_task(marks.run(), name="marks"),
                tasks.create_task(event_consumer.run(), name="events"),
                tasks.create_task(sender.run(), name="webhooks"),
                tasks.create_task(keep_clean(events, webhook_store, clock), name="retention"),
                tasks.create_task(reconciler.run(), name="reconciler"),
                tasks.create_task(ingestion.run(), name="ingestion"),
                tasks.create_task(issuer.run(), name="statements"),
                tasks.create_task(watcher.run(), name="watcher"),
                tasks.create_task(listen(redis, authenticator), name="revocations"),
                tasks.create_task(watch(identity_auth, authenticator), name="watched revocations"),
            ]
            if exporter is not None:
                background.append(tasks.create_task(exporter.run(), name="exporter"))
            await ops_server.start()
            try:
                await grpc_server.start()
                await stop.wait()
            finally:
                await grpc_server.stop()
                await ops_server.stop()
                for task in background:
                    task.cancel()


def storage_of(config: AnalyticsConfig) -> Storage | None:
    """Where exports go; None where there is no object storage."""
    if not config.s3_url:
        return None
    return Storage(config.s3_url, config.s3_bucket, config.s3_region, config.s3_access_key, config.s3_secret_key)
