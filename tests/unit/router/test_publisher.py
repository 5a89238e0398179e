"""The queue of usage events and the task that empties it."""

import asyncio
import time
from random import Random

import pytest

from aiaas.type.v1.usage_event_pb2 import UsageEvent
from mesh.errors import PlatformError, Reason
from mesh.topology import USAGE
from router import metrics
from router.publisher import UsagePublisher


class BrokerDouble:
    """Takes events, unless it is away."""

    def __init__(self) -> None:
        self.away = False
        self.taken: list[str] = []
        self.refused = asyncio.Event()

    async def publish(self, exchange: str, routing_key: str, body: bytes, *, message_id: str, timeout_s: float) -> None:
        assert (exchange, routing_key) == (USAGE.exchange, USAGE.routing_key)
        assert UsageEvent.FromString(body).request_id == message_id
        await asyncio.sleep(0)
        if self.away:
            self.refused.set()
            raise PlatformError(Reason.UNAVAILABLE)
        self.taken.append(message_id)


def event(number: int) -> UsageEvent:
    return UsageEvent(request_id=f"req_{number}")


async def test_events_are_published_in_order_and_flushed() -> None:
    broker = BrokerDouble()
    publisher = UsagePublisher(broker, Random(1))
    task = asyncio.create_task(publisher.run())
    for number in range(200):
        publisher.record(event(number))
    await publisher.flush(2)
    assert broker.taken == [f"req_{number}" for number in range(200)]
    task.cancel()


async def test_events_wait_for_a_broker_that_is_away() -> None:
    broker = BrokerDouble()
    broker.away = True
    publisher = UsagePublisher(broker, Random(1))
    task = asyncio.create_task(publisher.run())
    publisher.record(event(1))
    publisher.record(event(2))
    await asyncio.wait_for(broker.refused.wait(), 2)
    broker.away = False
    await publisher.flush(2)
    assert broker.taken == ["req_1", "req_2"]
    task.cancel()


async def test_flush_gives_up_in_time() -> None:
    broker = BrokerDouble()
    broker.away = True
    publisher = UsagePublisher(broker, Random(1))
    task = asyncio.create_task(publisher.run())
    publisher.record(event(1))
    began = time.monotonic()
    await publisher.flush(0.05)
    assert time.monotonic() - began < 1
    task.cancel()


async def test_full_queue_drops_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    publisher = UsagePublisher(BrokerDouble(), Random(1), limit_events=2)
    dropped = metrics.USAGE_DROPPED._value.get()
    for number in range(3):
        publisher.record(event(number))
    assert metrics.USAGE_DROPPED._value.get() == dropped + 1
    assert [record.levelname for record in caplog.records] == ["ERROR"]
