"""How ingestion stands, told by real RabbitMQ, and dead letters that are put back: each event counts once, whatever
fails on the way."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import grpc
import pytest

from aiaas.analytics.v1 import ingestion_service_pb2 as pb
from aiaas.analytics.v1 import ingestion_service_pb2_grpc
from aiaas.analytics.v1.usage_service_pb2 import FreshnessState
from analytics import metrics
from analytics.consumer import Consumer
from analytics.ingestion import REPLAY_S, Ingestion
from analytics.ingestion_service import IngestionService
from analytics.store import UsageStore
from mesh.auth import Principal
from mesh.broker import Broker
from mesh.database import Database
from mesh.errors import PlatformError, Reason, from_rpc_error
from mesh.interceptors import chain
from mesh.server import GrpcServer
from mesh.topology import EVENTS, USAGE
from tests.doubles.clock import ManualClock
from tests.doubles.tcp_gate import TcpGate
from tests.doubles.usage_events import NOW, usage_batch, usage_event
from tests.integration.analytics.harness import wait_until
from tests.integration.analytics.test_consumer import BATCH, consuming, counted, publish, requests, waiting

BROKEN = b"\xff\xff"
METADATA = (("authorization", "Bearer org_a"),)


class Authenticated:
    """Takes everybody for the platform's administrator."""

    async def authenticate(self, credential: str) -> Principal:
        return Principal("user", "user_a", "", permissions=frozenset(["ingestion.get", "ingestion.replay"]))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture
def consumer(broker: Broker, store: UsageStore, clock: ManualClock) -> Consumer:
    return Consumer(store, broker, USAGE, clock, BATCH)


@pytest.fixture
def ingestion(broker: Broker, consumer: Consumer, clock: ManualClock) -> Ingestion:
    return Ingestion(broker, USAGE, consumer, clock)


@asynccontextmanager
async def serving(
    ingestion: Ingestion, store: UsageStore, clock: ManualClock, folder: Path
) -> AsyncIterator[ingestion_service_pb2_grpc.IngestionServiceStub]:
    address = f"unix:{folder}/analytics"
    service = pb.DESCRIPTOR.services_by_name["IngestionService"]
    add = ingestion_service_pb2_grpc.add_IngestionServiceServicer_to_server
    servicer = IngestionService(ingestion, store, clock)
    server = GrpcServer(address, [(service, add, servicer)], chain(Authenticated()), drain_s=1)
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield ingestion_service_pb2_grpc.IngestionServiceStub(channel)
    await server.stop()


async def bury(broker: Broker, *bodies: bytes) -> None:
    """Put messages aside, as the broker does after five deliveries."""
    for body in bodies:
        await broker.publish("", USAGE.dead_name, body, timeout_s=10)


async def test_status_tells_what_waits_what_was_put_aside_and_who_takes_it(
    broker: Broker, store: UsageStore, consumer: Consumer, ingestion: Ingestion, clock: ManualClock, tmp_path: Path
) -> None:
    async with serving(ingestion, store, clock, tmp_path) as stub:
        await publish(broker, usage_event("req_1"), usage_event("req_2"))
        await bury(broker, BROKEN)
        await store.set_complete_until(NOW - timedelta(seconds=400))
        told = await stub.GetIngestionStatus(pb.GetIngestionStatusRequest(), metadata=METADATA, timeout=20)
        assert (told.queued_events, told.dead_lettered_events, told.consumers) == (2, 1, 0)
        assert told.freshness.state == FreshnessState.FRESHNESS_STATE_STALE
        assert told.freshness.lag.seconds == 400
        async with consuming(broker, consumer.take):

            async def are_taken() -> bool:
                return (await ingestion.standing())[::2] == (0, 1)

            await wait_until(are_taken, 10, "both are taken")


async def test_waiting_events_are_told_by_what_the_last_messages_held(
    broker: Broker, consumer: Consumer, ingestion: Ingestion
) -> None:
    bodies = [usage_batch(*(usage_event(f"req_{n}_{each}") for each in range(10))) for n in range(300)]
    await consumer.take(bodies)
    await publish(broker, *bodies[:20])
    assert 180 <= (await ingestion.standing()).queued_events <= 200


async def test_metrics_tell_it_until_the_broker_is_away(
    amqp_url: str, store: UsageStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analytics.ingestion._INTERVAL_S", 0.05)
    url = urlsplit(amqp_url)
    gauges = (metrics.QUEUED_EVENTS, metrics.DEAD_LETTERED_EVENTS, metrics.CONSUMERS)
    async with TcpGate(url.hostname or "", url.port or 0) as gate:
        broker = Broker(
            url._replace(netloc=f"{url.username}:{url.password}@127.0.0.1:{gate.port}").geturl(), USAGE, EVENTS
        )
        await bury(broker, BROKEN, BROKEN)
        running = asyncio.create_task(Ingestion(broker, USAGE, Consumer(store, broker, USAGE, clock, 1), clock).run())
        try:

            async def told() -> bool:
                return [gauge._value.get() for gauge in gauges] == [0, 2, 0]

            await wait_until(told, 10, "the gauges tell it")
            await gate.shut()

            async def unknown() -> bool:
                return all(math.isnan(gauge._value.get()) for gauge in gauges)

            await wait_until(unknown, 20, "the gauges tell nothing")
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await broker.close()


async def test_replayed_dead_letters_count_once(
    broker: Broker,
    store: UsageStore,
    database: Database,
    consumer: Consumer,
    ingestion: Ingestion,
    clock: ManualClock,
    amqp_url: str,
    tmp_path: Path,
) -> None:
    counted_before = usage_event("req_0")
    await consumer.take([usage_batch(counted_before)])
    await bury(broker, usage_batch(counted_before, usage_event("req_1")), usage_batch(usage_event("req_2")), BROKEN)
    async with serving(ingestion, store, clock, tmp_path) as stub, consuming(broker, consumer.take):
        answer = await stub.ReplayDeadLetters(pb.ReplayDeadLettersRequest(), metadata=METADATA, timeout=30)
        assert answer.replayed == 4
        await counted(database, 3)

        async def is_back() -> bool:
            return await waiting(amqp_url, USAGE.dead_name) == 1

        await wait_until(is_back, 20, "what cannot be read is put aside again")
        assert await waiting(amqp_url, USAGE.name) == 0
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.ReplayDeadLetters(pb.ReplayDeadLettersRequest(limit=-1), metadata=METADATA, timeout=30)
        assert from_rpc_error(raised.value).reason is Reason.INVALID_ARGUMENT


async def test_replay_moves_no_more_events_than_asked_for(
    broker: Broker, database: Database, consumer: Consumer, ingestion: Ingestion, amqp_url: str
) -> None:
    await bury(broker, usage_batch(*(usage_event(f"req_{n}") for n in range(5))), BROKEN)
    assert await ingestion.replay(3) == 3
    assert (await waiting(amqp_url, USAGE.name), await waiting(amqp_url, USAGE.dead_name)) == (1, 2)
    async with consuming(broker, consumer.take):
        await counted(database, 3)
        # The unreadable one comes next, then the rest of the first.
        assert await ingestion.replay(2) == 2
        await counted(database, 4)
        assert await ingestion.replay(1) == 1
        await counted(database, 5)


async def test_replay_leaves_what_comes_back_meanwhile_and_ends(
    broker: Broker, ingestion: Ingestion, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bury(broker, BROKEN, BROKEN)
    whole = broker.publish

    async def publish_and_fail_again(exchange: str, routing_key: str, body: bytes, *, timeout_s: float) -> None:
        await whole(exchange, USAGE.dead_name, body, timeout_s=timeout_s)

    monkeypatch.setattr(broker, "publish", publish_and_fail_again)
    assert await ingestion.replay(0) == 2
    assert await waiting(amqp_url, USAGE.dead_name) == 2


async def test_replay_ends_when_its_time_is_over(
    broker: Broker, ingestion: Ingestion, clock: ManualClock, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bury(broker, *(usage_batch(usage_event(f"req_{n}")) for n in range(4)))
    whole = broker.publish

    async def slow(exchange: str, routing_key: str, body: bytes, *, timeout_s: float) -> None:
        clock.advance(REPLAY_S / 2)
        await whole(exchange, routing_key, body, timeout_s=timeout_s)

    monkeypatch.setattr(broker, "publish", slow)
    assert await ingestion.replay(0) == 2
    assert await waiting(amqp_url, USAGE.dead_name) == 2


async def test_replay_that_dies_between_copy_and_removal_counts_once(
    broker: Broker,
    database: Database,
    consumer: Consumer,
    ingestion: Ingestion,
    amqp_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await bury(broker, usage_batch(usage_event("req_1"), usage_event("req_2")))
    whole = broker.publish

    async def confirmed_and_dead(exchange: str, routing_key: str, body: bytes, *, timeout_s: float) -> None:
        await whole(exchange, routing_key, body, timeout_s=timeout_s)
        raise PlatformError(Reason.UNAVAILABLE)

    monkeypatch.setattr(broker, "publish", confirmed_and_dead)
    with pytest.raises(PlatformError):
        await ingestion.replay(0)
    monkeypatch.undo()

    async def is_returned() -> bool:
        return await waiting(amqp_url, USAGE.dead_name) == 1

    await wait_until(is_returned, 10, "what was not accepted is where it was")
    assert await ingestion.replay(0) == 2
    assert await waiting(amqp_url, USAGE.name) == 2
    async with consuming(broker, consumer.take):
        await counted(database, 2)
        await publish(broker, usage_event("req_last"))
        await counted(database, 3)
    assert await requests(database) == 3


async def test_replay_loses_nothing_when_the_queue_takes_no_copy(
    broker: Broker, ingestion: Ingestion, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bury(broker, usage_batch(usage_event("req_1")))

    async def refused(*_: object, **__: object) -> None:
        raise PlatformError(Reason.UNAVAILABLE)

    monkeypatch.setattr(broker, "publish", refused)
    with pytest.raises(PlatformError) as raised:
        await ingestion.replay(0)
    assert raised.value.reason is Reason.UNAVAILABLE

    async def is_returned() -> bool:
        return await waiting(amqp_url, USAGE.dead_name) == 1

    await wait_until(is_returned, 10, "it is where it was")
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        assert (await (await channel.get_queue(USAGE.dead_name)).get()).body == usage_batch(usage_event("req_1"))
