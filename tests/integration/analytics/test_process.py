"""Analytics as a whole: it starts without its peers, heals, counts and answers, and ends when told."""

import asyncio
import base64
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import httpx
import pytest

from aiaas.analytics.v1 import (
    event_service_pb2,
    event_service_pb2_grpc,
    usage_service_pb2_grpc,
    webhook_service_pb2,
    webhook_service_pb2_grpc,
)
from aiaas.analytics.v1 import usage_service_pb2 as pb
from aiaas.identity.v1.auth_service_pb2 import AuthenticateResponse
from aiaas.type.v1.platform_event_pb2 import EVENT_TYPE_SPEND_ANOMALY
from aiaas.type.v1.principal_pb2 import PRINCIPAL_KIND_USER, Principal
from analytics.config import AnalyticsConfig
from analytics.events import read_event
from analytics.reconciliations import HOUR, hours_due
from analytics.server import serve
from analytics.store import UsageStore
from mesh.broker import Broker
from mesh.config import load
from mesh.database import Database
from mesh.errors import PlatformError, Reason, from_rpc_error
from mesh.topology import EVENTS, USAGE
from tests.doubles.peer import PeerDouble
from tests.doubles.platform_events import platform_event
from tests.doubles.tcp_gate import TcpGate
from tests.doubles.usage_events import usage_batch, usage_event
from tests.doubles.webhook_receiver import WebhookReceiver
from tests.integration.analytics.harness import wait_until

SECRET_KEY = base64.b64encode(b"k" * 32).decode()
WIRES = {
    "AIAAS_ANALYTICS_REDIS_URL": "redis://nowhere",
    "AIAAS_ANALYTICS_AMQP_URL": "amqp://nowhere",
    "AIAAS_ANALYTICS_IDENTITY_TARGET": "unix:nowhere",
    "AIAAS_ANALYTICS_ROUTER_TARGET": "unix:nowhere",
    "AIAAS_ANALYTICS_SECRET_KEY": SECRET_KEY,
}
METADATA = (("authorization", "Bearer session"),)


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def running(environ: dict[str, str]) -> AsyncIterator[None]:
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(load(AnalyticsConfig, environ), stop))
    try:
        yield
        assert not serving.done()
    finally:
        stop.set()
        async with asyncio.timeout(10):
            await serving


async def test_starts_without_its_peers_and_counts_when_they_are_there(
    database_url: str, broker: Broker, amqp_url: str, tmp_path: Path
) -> None:
    rabbitmq = urlsplit(amqp_url)
    identity = PeerDouble(f"unix:{tmp_path}/identity")
    identity.answers["Authenticate"] = AuthenticateResponse(
        principal=Principal(
            kind=PRINCIPAL_KIND_USER, principal_id="user_a", organization_id="org_a", permissions=["usage.query"]
        )
    )
    now = datetime.now(UTC)
    request = pb.QueryUsageRequest(organization_id="org_a")
    request.start_time.FromDatetime(now - timedelta(hours=1))

    async with TcpGate(rabbitmq.hostname or "", rabbitmq.port or 0) as gate:
        await gate.shut()
        with_gate = rabbitmq._replace(netloc=f"{rabbitmq.username}:{rabbitmq.password}@127.0.0.1:{gate.port}")
        ops = f"127.0.0.1:{free_port()}"
        environ = {
            "AIAAS_ANALYTICS_DATABASE_URL": database_url,
            "AIAAS_ANALYTICS_REDIS_URL": "redis://127.0.0.1:1/",
            "AIAAS_ANALYTICS_AMQP_URL": with_gate.geturl(),
            "AIAAS_ANALYTICS_IDENTITY_TARGET": identity.address,
            "AIAAS_ANALYTICS_ROUTER_TARGET": "unix:nowhere",
            "AIAAS_ANALYTICS_SECRET_KEY": SECRET_KEY,
            "AIAAS_ANALYTICS_GRPC_ADDRESS": f"unix:{tmp_path}/analytics",
            "AIAAS_ANALYTICS_OPS_ADDRESS": ops,
            "AIAAS_ANALYTICS_DRAIN_S": "1",
        }
        async with (
            running(environ),
            grpc.aio.insecure_channel(f"unix:{tmp_path}/analytics") as channel,
            httpx.AsyncClient(base_url=f"http://{ops}", trust_env=False) as operator,
        ):
            stub = usage_service_pb2_grpc.UsageServiceStub(channel)

            async def is_ready() -> bool:
                try:
                    return (await operator.get("/ready")).status_code == 200
                except httpx.TransportError:
                    return False

            await wait_until(is_ready, 10, "it is ready without RabbitMQ and identity")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.QueryUsage(request, wait_for_ready=True, metadata=METADATA, timeout=10)
            assert from_rpc_error(caught.value).reason is Reason.AUTH_UNAVAILABLE

            await identity.start()
            body = usage_batch(usage_event(admit_time=now))
            await broker.publish(USAGE.exchange, USAGE.routing_key, body, timeout_s=10)
            await gate.open()

            async def is_counted_and_fresh() -> bool:
                try:
                    answer = await stub.QueryUsage(request, metadata=METADATA, timeout=10)
                except grpc.aio.AioRpcError:
                    return False
                return answer.totals.requests == 1 and answer.freshness.state == pb.FRESHNESS_STATE_FRESH

            await wait_until(is_counted_and_fresh, 20, "the event is counted and the answer is fresh")
            metrics = (await operator.get("/metrics")).text
            assert 'aiaas_analytics_events_total{result="inserted"}' in metrics
            assert "aiaas_analytics_batch_seconds_count" in metrics
            assert "aiaas_analytics_lag_seconds" in metrics
        await identity.stop()


async def command(*arguments: str, **environ: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "analytics", *arguments),
        env={"PATH": os.environ["PATH"], **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_migrate_makes_the_schema_once(postgres_url: str) -> None:
    environ = {**WIRES, "AIAAS_ANALYTICS_DATABASE_URL": postgres_url}
    applied = (
        *("0001_analytics.sql", "0002_events.sql", "0003_reconciliations.sql", "0004_exports.sql"),
        *("0005_rollups.sql", "0006_statements.sql", "0007_timescaledb.sql", "0008_watching.sql"),
        "0009_faster_sums.sql",
    )
    assert await command("migrate", **environ) == (0, "".join(f"applied {name}\n" for name in applied))
    assert await command("migrate", **environ) == (0, "nothing to apply\n")


async def test_rebuild_sums_events_anew(database_url: str, store: UsageStore, database: Database) -> None:
    now = datetime.now(UTC)
    event = usage_event(admit_time=now, duration_micros=1000)
    await store.insert_events([read_event(event.SerializeToString(), now)])
    await database.execute("UPDATE usage_hourly SET latency = '{}'")
    status, output = await command("rebuild", **{**WIRES, "AIAAS_ANALYTICS_DATABASE_URL": database_url})
    assert (status, output.splitlines()[-1]) == (0, "1 events are summed anew")
    assert await database.fetchval("SELECT cardinality(latency) FROM usage_hourly") == 1
    away = {**WIRES, "AIAAS_ANALYTICS_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}
    status, output = await command("rebuild", **away)
    assert (status, output.splitlines()[-1]) == (
        1,
        f"analytics cannot rebuild: {PlatformError(Reason.UNAVAILABLE).message}",
    )
    assert (await command("rebuild"))[0] == 2


async def test_wrong_configuration_is_named() -> None:
    status, output = await command("check-config", AIAAS_ANALYTICS_BATCH_SIZE="0")
    assert status == 2
    targets = ("IDENTITY_TARGET", "ROUTER_TARGET")
    for variable in ("BATCH_SIZE", "DATABASE_URL", "REDIS_URL", "AMQP_URL", *targets, "SECRET_KEY"):
        assert f"AIAAS_ANALYTICS_{variable}" in output


async def test_postgres_away_is_not_ready_and_unavailable(tmp_path: Path) -> None:
    ops = f"127.0.0.1:{free_port()}"
    environ = {
        "AIAAS_ANALYTICS_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        "AIAAS_ANALYTICS_REDIS_URL": "redis://127.0.0.1:1/",
        "AIAAS_ANALYTICS_AMQP_URL": "amqp://127.0.0.1:1/",
        "AIAAS_ANALYTICS_IDENTITY_TARGET": f"unix:{tmp_path}/identity",
        "AIAAS_ANALYTICS_ROUTER_TARGET": "unix:nowhere",
        "AIAAS_ANALYTICS_SECRET_KEY": SECRET_KEY,
        "AIAAS_ANALYTICS_GRPC_ADDRESS": f"unix:{tmp_path}/analytics",
        "AIAAS_ANALYTICS_OPS_ADDRESS": ops,
    }
    async with running(environ), httpx.AsyncClient(base_url=f"http://{ops}", trust_env=False) as operator:

        async def is_healthy() -> bool:
            try:
                return (await operator.get("/health")).status_code == 200
            except httpx.TransportError:
                return False

        await wait_until(is_healthy, 10, "it runs")
        ready = await operator.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["checks"]["database"] == PlatformError(Reason.UNAVAILABLE).message


async def test_event_from_the_queue_is_sent_to_a_webhook(
    database_url: str, broker: Broker, amqp_url: str, tmp_path: Path
) -> None:
    identity = PeerDouble(f"unix:{tmp_path}/identity")
    identity.answers["Authenticate"] = AuthenticateResponse(
        principal=Principal(
            kind=PRINCIPAL_KIND_USER,
            principal_id="user_a",
            organization_id="org_a",
            permissions=["webhooks.create", "events.list"],
        )
    )
    await identity.start()
    environ = {
        "AIAAS_ANALYTICS_DATABASE_URL": database_url,
        "AIAAS_ANALYTICS_REDIS_URL": "redis://127.0.0.1:1/",
        "AIAAS_ANALYTICS_AMQP_URL": amqp_url,
        "AIAAS_ANALYTICS_IDENTITY_TARGET": identity.address,
        "AIAAS_ANALYTICS_ROUTER_TARGET": "unix:nowhere",
        "AIAAS_ANALYTICS_SECRET_KEY": SECRET_KEY,
        "AIAAS_ANALYTICS_WEBHOOK_ALLOW_PRIVATE": "true",
        "AIAAS_ANALYTICS_GRPC_ADDRESS": f"unix:{tmp_path}/analytics",
        "AIAAS_ANALYTICS_OPS_ADDRESS": f"127.0.0.1:{free_port()}",
        "AIAAS_ANALYTICS_DRAIN_S": "1",
    }
    async with (
        WebhookReceiver() as receiver,
        running(environ),
        grpc.aio.insecure_channel(f"unix:{tmp_path}/analytics") as channel,
    ):
        create = webhook_service_pb2.CreateWebhookRequest(
            organization_id="org_a", webhook=webhook_service_pb2.Webhook(display_name="Hook", url=receiver.url)
        )
        webhooks = webhook_service_pb2_grpc.WebhookServiceStub(channel)
        made = await webhooks.CreateWebhook(create, wait_for_ready=True, metadata=METADATA, timeout=10)
        event = platform_event(event_time=datetime.now(UTC)).SerializeToString()
        await broker.publish(EVENTS.exchange, EVENTS.routing_key, event, timeout_s=10)

        async def is_there() -> bool:
            return bool(receiver.received)

        await wait_until(is_there, 10, "the event is delivered")
        assert receiver.received[0].is_signed_with(made.secret)
        events = event_service_pb2_grpc.EventServiceStub(channel)
        listed = await events.ListEvents(
            event_service_pb2.ListEventsRequest(organization_id="org_a"), metadata=METADATA, timeout=10
        )
        assert [one.event_id for one in listed.events] == receiver.event_ids()
    await identity.stop()


async def test_hour_unlike_those_before_is_told(
    database: Database, store: UsageStore, database_url: str, amqp_url: str, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    # The next one, too: it may be due by the time that the process looks.
    (hour,) = hours_due(None, now)
    usage = [
        usage_event(
            f"req_{day}_{each}", hour + each * HOUR - timedelta(days=day), cost_micros=1_000_000 if day else 50_000_000
        )
        for day in range(15)
        for each in range(2)
        if hour + each * HOUR - timedelta(days=day) < now
    ]
    await store.insert_events([read_event(event.SerializeToString(), now) for event in usage])
    await store.set_complete_until(now)
    environ = {
        "AIAAS_ANALYTICS_DATABASE_URL": database_url,
        "AIAAS_ANALYTICS_REDIS_URL": "redis://127.0.0.1:1/",
        "AIAAS_ANALYTICS_AMQP_URL": amqp_url,
        "AIAAS_ANALYTICS_IDENTITY_TARGET": f"unix:{tmp_path}/identity",
        "AIAAS_ANALYTICS_ROUTER_TARGET": "unix:nowhere",
        "AIAAS_ANALYTICS_SECRET_KEY": SECRET_KEY,
        "AIAAS_ANALYTICS_GRPC_ADDRESS": f"unix:{tmp_path}/analytics",
        "AIAAS_ANALYTICS_OPS_ADDRESS": f"127.0.0.1:{free_port()}",
    }

    async def is_told() -> bool:
        types = await database.fetch("SELECT type FROM platform_events WHERE organization_id = 'org_a'")
        return [number for (number,) in types] == [EVENT_TYPE_SPEND_ANOMALY]

    async with running(environ):
        await wait_until(is_told, 20, "the anomaly is told")
