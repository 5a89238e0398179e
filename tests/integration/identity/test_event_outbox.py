"""Events on their way from a transaction to a real RabbitMQ."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import pytest

from aiaas.type.v1.platform_event_pb2 import EVENT_TYPE_BUDGET_THRESHOLD_CROSSED, PlatformEvent
from identity.event_outbox import EventOutbox
from identity.stores import Store
from mesh.broker import Broker
from mesh.errors import PlatformError, Reason
from mesh.topology import EVENTS
from tests.doubles.tcp_gate import TcpGate
from tests.integration.identity.budgeting import Ledger, create, get
from tests.integration.identity.harness import Identity, running_identity


async def no_announcement(_: object) -> None:
    """Nobody listens."""


async def leave(ledger: Ledger, count: int) -> set[str]:
    """Events that wait; their ids."""
    await ledger.execute(
        "INSERT INTO unpublished_events SELECT 'event_' || n, ('event ' || n)::bytea, clock_timestamp()"
        " FROM generate_series(1, $1) n",
        count,
    )
    return {f"event {number}" for number in range(1, count + 1)}


async def waiting(ledger: Ledger) -> int:
    return len(await ledger.fetch("SELECT FROM unpublished_events"))


async def published(amqp_url: str, count: int) -> Counter[bytes]:
    """The bodies in the queue, which something was published to, when it holds so many."""
    bodies: Counter[bytes] = Counter()
    async with await aio_pika.connect(amqp_url) as connection, asyncio.timeout(10):
        queue = await (await connection.channel()).get_queue(EVENTS.name)
        while bodies.total() < count:
            message = await queue.get(fail=False, no_ack=True)
            if message is None:
                await asyncio.sleep(0.05)
            else:
                bodies[message.body] += 1
        assert await queue.get(fail=False, no_ack=True) is None
    return bodies


@asynccontextmanager
async def outboxes(ledger: Ledger, amqp_url: str, count: int) -> AsyncIterator[list[EventOutbox]]:
    """Outboxes of as many processes on one database."""
    brokers = [Broker(amqp_url, EVENTS) for _ in range(count)]
    try:
        yield [EventOutbox(Store(ledger.database, no_announcement), broker) for broker in brokers]
    finally:
        for broker in brokers:
            await broker.close()


async def test_passed_threshold_is_published_once(
    database_url: str, ledger: Ledger, amqp_url: str, tmp_path: Path
) -> None:
    async with running_identity(database_url, tmp_path, amqp_url=amqp_url) as identity:
        made = await create(identity, await identity.organization(), alert_percents=[80])
        await ledger.set(made, spent=850)
        async with asyncio.timeout(10):
            while await waiting(ledger):
                await asyncio.sleep(0.05)
        bodies = await published(amqp_url, 1)
        period = (await get(identity, made)).current_period
    event = PlatformEvent.FromString(next(iter(bodies)))
    (alert,) = await ledger.fetch("SELECT budget_alert_id, cross_time FROM budget_alerts")
    assert (event.schema_version, event.type) == (1, EVENT_TYPE_BUDGET_THRESHOLD_CROSSED)
    assert (event.event_id, event.organization_id) == (alert["budget_alert_id"], made.organization_id)
    assert event.event_time.ToDatetime(UTC) == alert["cross_time"]
    assert "Research" in event.summary
    crossed = event.budget_threshold_crossed
    assert (crossed.budget_id, crossed.percent, crossed.spent, crossed.limit) == (made.budget_id, 80, 850, 1000)
    assert crossed.period_start == period.start_time


async def test_processes_at_the_same_time_publish_each_event_once(ledger: Ledger, amqp_url: str) -> None:
    expected = await leave(ledger, 250)
    async with outboxes(ledger, amqp_url, 3) as running, asyncio.timeout(60):
        while await waiting(ledger):
            await asyncio.gather(*(outbox.publish() for outbox in running))
    assert await published(amqp_url, 250) == Counter(body.encode() for body in expected)


async def test_event_waits_while_the_broker_is_away_and_is_published_when_it_is_back(
    ledger: Ledger, amqp_url: str
) -> None:
    address = urlsplit(amqp_url)
    assert address.hostname is not None
    assert address.port is not None
    await leave(ledger, 2)
    async with TcpGate(address.hostname, address.port) as gate:
        through_gate = address._replace(netloc=address.netloc.replace(f":{address.port}", f":{gate.port}"))
        async with outboxes(ledger, through_gate.geturl(), 1) as (outbox,):
            await gate.shut()
            with pytest.raises(PlatformError) as raised:
                await outbox.publish()
            assert raised.value.reason is Reason.UNAVAILABLE
            assert await waiting(ledger) == 2
            await gate.open()
            assert await outbox.publish() == 2
    assert await waiting(ledger) == 0
    assert (await published(amqp_url, 2)).total() == 2


class KilledBroker:
    """Confirms one event, and then the process is gone."""

    def __init__(self) -> None:
        self.confirmed = 0

    async def publish(self, exchange: str, routing_key: str, body: bytes, *, timeout_s: float) -> None:
        if self.confirmed:
            raise asyncio.CancelledError
        self.confirmed += 1


async def test_event_of_a_process_that_is_killed_before_it_removed_it_is_published_again(
    ledger: Ledger, amqp_url: str
) -> None:
    await leave(ledger, 2)
    killed = EventOutbox(Store(ledger.database, no_announcement), KilledBroker())
    with pytest.raises(asyncio.CancelledError):
        await killed.publish()
    assert await waiting(ledger) == 2
    async with outboxes(ledger, amqp_url, 1) as (outbox,):
        assert await outbox.publish() == 2


async def test_identity_serves_while_the_broker_is_away(identity: Identity, ledger: Ledger) -> None:
    made = await create(identity, await identity.organization())
    assert await ledger.set(made, spent=1000) == 3
    assert (await get(identity, made)).current_period.spent == 1000
    assert await waiting(ledger) == 3
