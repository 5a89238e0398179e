"""The queue of usage events and the tasks that empty it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest

from aiaas.type.v1.usage_event_pb2 import UsageEvent, UsageEventBatch
from mesh.errors import PlatformError, Reason
from mesh.topology import USAGE
from router import metrics
from router.publisher import UsagePublisher


class BrokerDouble:
    """Takes batches, unless it is away; while it is `slow` it confirms none."""

    def __init__(self) -> None:
        self.away = False
        self.slow = False
        self.in_flight = 0
        self.most_in_flight = 0
        self.bodies: list[bytes] = []
        self.batches: list[list[str]] = []
        self.refused = asyncio.Event()

    @property
    def taken(self) -> list[str]:
        return sorted(request_id for batch in self.batches for request_id in batch)

    async def publish(self, exchange: str, routing_key: str, body: bytes, *, timeout_s: float) -> None:
        assert (exchange, routing_key) == (USAGE.exchange, USAGE.routing_key)
        assert 0 < timeout_s < 10
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0)
            while self.slow:
                await asyncio.sleep(0.001)
        finally:
            self.in_flight -= 1
        if self.away:
            self.refused.set()
            raise PlatformError(Reason.UNAVAILABLE)
        self.bodies.append(body)
        events = map(UsageEvent.FromString, UsageEventBatch.FromString(body).events)
        self.batches.append([event.request_id for event in events])


def event(number: int, reason: str = "") -> UsageEvent:
    return UsageEvent(request_id=f"req_{number:06}", reason=reason)


def ids(count: int) -> list[str]:
    return [f"req_{number:06}" for number in range(count)]


@asynccontextmanager
async def running(publisher: UsagePublisher) -> AsyncIterator[None]:
    task = asyncio.create_task(publisher.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_in_flight(broker: BrokerDouble, messages: int) -> None:
    async with asyncio.timeout(2):
        while broker.in_flight < messages:
            await asyncio.sleep(0.001)


async def test_every_event_is_published_once_and_flushed() -> None:
    broker = BrokerDouble()
    publisher = UsagePublisher(broker, Random(1))
    async with running(publisher):
        for number in range(1800):
            publisher.record(event(number))
        await publisher.flush(2)
        assert broker.taken == ids(1800)
        assert max(map(len, broker.batches)) == 500
        assert len(broker.batches) == 4
        publisher.record(event(1800))
        await publisher.flush(2)
    assert broker.taken == ids(1801)


async def test_event_that_comes_alone_is_published_within_a_tenth_of_a_second() -> None:
    broker = BrokerDouble()
    publisher = UsagePublisher(broker, Random(1))
    async with running(publisher):
        for number in range(2):
            began = time.monotonic()
            publisher.record(event(number))
            await publisher.flush(2)
            # Generous for a busy machine; the wait itself is half of a tenth.
            assert time.monotonic() - began < 0.5
    assert broker.batches == [["req_000000"], ["req_000001"]]


async def test_events_that_come_shortly_after_each_other_travel_together() -> None:
    broker = BrokerDouble()
    publisher = UsagePublisher(broker, Random(1))
    async with running(publisher):
        for number in range(5):
            publisher.record(event(number))
            await asyncio.sleep(0)
        await publisher.flush(2)
    assert broker.batches == [ids(5)]


async def test_message_of_large_events_is_bounded_by_bytes() -> None:
    broker = BrokerDouble()
    publisher = UsagePublisher(broker, Random(1))
    async with running(publisher):
        for number in range(60):
            publisher.record(event(number, reason="x" * 10_000))
        await publisher.flush(2)
    assert broker.taken == ids(60)
    assert max(map(len, broker.bodies)) < 256 * 1024 + 11_000


async def test_several_messages_are_in_flight_but_not_any_number() -> None:
    broker = BrokerDouble()
    broker.slow = True
    publisher = UsagePublisher(broker, Random(1))
    async with running(publisher):
        for number in range(5000):
            publisher.record(event(number))
        await until_in_flight(broker, 4)
        broker.slow = False
        await publisher.flush(2)
    assert broker.taken == ids(5000)
    assert broker.most_in_flight == 4


async def test_events_wait_for_a_broker_that_is_away() -> None:
    broker = BrokerDouble()
    broker.away = True
    publisher = UsagePublisher(broker, Random(1))
    async with running(publisher):
        publisher.record(event(0))
        publisher.record(event(1))
        await asyncio.wait_for(broker.refused.wait(), 2)
        broker.away = False
        await publisher.flush(2)
    assert broker.taken == ids(2)


async def test_flush_waits_for_what_is_in_flight_and_gives_up_in_time(caplog: pytest.LogCaptureFixture) -> None:
    broker = BrokerDouble()
    broker.slow = True
    publisher = UsagePublisher(broker, Random(1))
    async with running(publisher):
        publisher.record(event(0))
        await until_in_flight(broker, 1)
        publisher.record(event(1))
        began = time.monotonic()
        await publisher.flush(0.05)
        assert time.monotonic() - began < 1
        assert [record.message for record in caplog.records] == ["2 usage events could not be published before the end"]
        broker.slow = False
        await publisher.flush(2)
        assert broker.taken == ids(2)


def waiting_events() -> float:
    (metric,) = metrics.USAGE_QUEUE.collect()
    return metric.samples[0].value


async def test_full_queue_drops_and_says_so_once_until_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    broker = BrokerDouble()
    broker.away = True
    publisher = UsagePublisher(broker, Random(1), limit_events=2)
    dropped = metrics.USAGE_DROPPED._value.get()
    for number in range(4):
        publisher.record(event(number))
    assert metrics.USAGE_DROPPED._value.get() == dropped + 2
    assert waiting_events() == 2
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    async with running(publisher):
        # What is in flight takes room too.
        await asyncio.wait_for(broker.refused.wait(), 2)
        publisher.record(event(4))
        assert metrics.USAGE_DROPPED._value.get() == dropped + 3
        broker.away = False
        await publisher.flush(2)
        assert waiting_events() == 0
        publisher.record(event(5))
        publisher.record(event(6))
        publisher.record(event(7))
        assert metrics.USAGE_DROPPED._value.get() == dropped + 4
        await publisher.flush(2)
    assert broker.taken == ["req_000000", "req_000001", "req_000005", "req_000006"]
    assert [record.levelname for record in caplog.records].count("ERROR") == 2
