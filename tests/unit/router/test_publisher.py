"""The tasks that empty a journal, on a real journal."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import lmdb
import pytest

from aiaas.type.v1.usage_event_pb2 import UsageEvent, UsageEventBatch
from mesh.errors import PlatformError, Reason
from mesh.topology import USAGE
from router import metrics
from router.journal import Journal
from router.journal_queries import Selection
from router.publisher import UsagePublisher
from tests.doubles.clock import ManualClock
from tests.doubles.trace_collector import recording

NOW = datetime(2026, 1, 1, tzinfo=UTC)


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


def event(number: int, reason: str = "") -> bytes:
    message = UsageEvent(request_id=f"req_{number:06}", reason=reason)
    message.admit_time.FromDatetime(NOW + timedelta(milliseconds=number))
    return message.SerializeToString()


def ids(count: int) -> list[str]:
    return [f"req_{number:06}" for number in range(count)]


def open_journal(folder: Path) -> Journal:
    return Journal(folder, 256 << 20, ManualClock(NOW), lambda _: None)


@asynccontextmanager
async def running(journal: Journal, publisher: UsagePublisher) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(journal.run()), asyncio.create_task(publisher.run())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = open_journal(tmp_path)
    yield journal
    await journal.close()


async def until_in_flight(broker: BrokerDouble, messages: int) -> None:
    async with asyncio.timeout(2):
        while broker.in_flight < messages:
            await asyncio.sleep(0.001)


async def test_every_event_is_published_once_and_flushed(journal: Journal) -> None:
    broker = BrokerDouble()
    publisher = UsagePublisher(broker, journal, Random(1))
    async with running(journal, publisher):
        for number in range(1800):
            journal.record(event(number))
        await publisher.flush(2)
        assert broker.taken == ids(1800)
        assert max(map(len, broker.batches)) == 500
        assert len(broker.batches) == 4
        journal.record(event(1800))
        await publisher.flush(2)
    assert broker.taken == ids(1801)
    await journal.sync()
    assert (journal.unpublished_entries, journal.published_entries) == (0, 1801)


async def test_event_that_comes_alone_is_published_soon(journal: Journal) -> None:
    broker = BrokerDouble()
    publisher = UsagePublisher(broker, journal, Random(1))
    async with running(journal, publisher):
        await publisher.flush(2)
        for number in range(2):
            began = time.monotonic()
            journal.record(event(number))
            while len(broker.batches) <= number:
                await asyncio.sleep(0.005)
            # Generous for a busy machine: a tenth of a second for the journal, and one for others to come along.
            assert time.monotonic() - began < 0.6
    assert broker.batches == [["req_000000"], ["req_000001"]]


async def test_events_that_come_shortly_after_each_other_travel_together(journal: Journal) -> None:
    broker = BrokerDouble()
    publisher = UsagePublisher(broker, journal, Random(1))
    async with running(journal, publisher):
        for number in range(5):
            journal.record(event(number))
            await asyncio.sleep(0)
        await publisher.flush(2)
    assert broker.batches == [ids(5)]


async def test_message_of_large_events_is_bounded_by_bytes(journal: Journal) -> None:
    broker = BrokerDouble()
    publisher = UsagePublisher(broker, journal, Random(1))
    async with running(journal, publisher):
        for number in range(60):
            journal.record(event(number, reason="x" * 10_000))
        await publisher.flush(2)
    assert broker.taken == ids(60)
    assert max(map(len, broker.bodies)) < 256 * 1024 + 11_000


async def test_several_messages_are_in_flight_but_not_any_number(journal: Journal) -> None:
    broker = BrokerDouble()
    broker.slow = True
    publisher = UsagePublisher(broker, journal, Random(1))
    async with running(journal, publisher):
        for number in range(5000):
            journal.record(event(number))
        await until_in_flight(broker, 4)
        broker.slow = False
        await publisher.flush(4)
    assert broker.taken == ids(5000)
    assert broker.most_in_flight == 4


async def test_outage_loses_nothing_and_costs_only_so_much_memory(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.publisher._FRESH_EVENTS", 3000)
    monkeypatch.setattr("router.publisher._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("router.publisher._LONGEST_PAUSE_S", 0.01)
    broker = BrokerDouble()
    broker.away = True
    publisher = UsagePublisher(broker, journal, Random(1))
    most = 0
    async with running(journal, publisher):
        await asyncio.sleep(0)
        for number in range(20_000):
            journal.record(event(number))
            if number % 500 == 0:
                await journal.sync()
                most = max(most, len(publisher._attempts))
        await journal.sync()
        assert broker.refused.is_set()
        assert publisher.failure_reason == "unavailable"
        assert 2000 < most <= 3000
        assert journal.unpublished_entries == 20_000
        broker.away = False
        await publisher.flush(20)
    assert broker.taken == ids(20_000)
    assert publisher.failure_reason == ""
    assert not publisher._attempts
    await journal.sync()
    assert journal.unpublished_entries == 0


async def test_what_an_earlier_run_left_is_published_first_then_what_comes(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    for number in range(5000):
        journal.record(event(number))
    await journal.close()
    journal = open_journal(tmp_path)
    broker = BrokerDouble()
    publisher = UsagePublisher(broker, journal, Random(1))
    async with running(journal, publisher):
        for number in range(5000, 6000):
            journal.record(event(number))
        await publisher.flush(5)
    assert broker.taken == ids(6000)
    assert [request_id for batch in broker.batches for request_id in batch][:5000] == ids(5000)
    await journal.close()


async def test_replayed_events_are_published_again(journal: Journal) -> None:
    broker = BrokerDouble()
    publisher = UsagePublisher(broker, journal, Random(1))
    async with running(journal, publisher):
        for number in range(10):
            journal.record(event(number))
        await publisher.flush(2)
        assert await journal.replay(Selection(request_ids=frozenset({"req_000003", "req_000007"}))) == 2
        await publisher.flush(2)
    assert broker.batches == [ids(10), ["req_000003", "req_000007"]]


async def test_events_are_tried_again_and_their_tries_are_counted(journal: Journal) -> None:
    broker = BrokerDouble()
    broker.away = True
    publisher = UsagePublisher(broker, journal, Random(1))
    failures = metrics.USAGE_PUBLISH_FAILURES._value.get()
    async with running(journal, publisher):
        journal.record(event(0))
        await asyncio.wait_for(broker.refused.wait(), 2)
        broker.away = False
        await publisher.flush(2)
    assert broker.taken == ids(1)
    tries = 1 + metrics.USAGE_PUBLISH_FAILURES._value.get() - failures
    await journal.sync()
    (stored,) = journal.store.read_ended(b"", b"\xff" * 17, 10)
    assert stored.attempts == tries > 1


async def test_flush_gives_up_in_time_and_the_journal_keeps_the_rest(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    broker = BrokerDouble()
    broker.slow = True
    publisher = UsagePublisher(broker, journal, Random(1))
    async with running(journal, publisher):
        journal.record(event(0))
        await until_in_flight(broker, 1)
        began = time.monotonic()
        await publisher.flush(0.05)
        assert time.monotonic() - began < 1
        assert [record.levelname for record in caplog.records] == ["WARNING"]
    await journal.sync()
    assert journal.unpublished_entries == 1


async def test_journal_that_cannot_be_read_for_a_while_is_read_later(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.publisher._LONGEST_PAUSE_S", 0.01)
    failed = asyncio.Event()

    def cannot_read(*_: object) -> None:
        failed.set()
        raise lmdb.Error("bad page")

    broker = BrokerDouble()
    journal.record(event(0))
    await journal.sync()
    publisher = UsagePublisher(broker, journal, Random(1))
    with monkeypatch.context() as patch:
        patch.setattr(journal.store, "read_unpublished", cannot_read)
        async with running(journal, publisher):
            await asyncio.wait_for(failed.wait(), 2)
            patch.undo()
            await publisher.flush(2)
    assert broker.taken == ids(1)


async def test_each_try_to_publish_is_a_step_of_every_sampled_request_in_the_batch(journal: Journal) -> None:
    broker = BrokerDouble()
    broker.away = True
    publisher = UsagePublisher(broker, journal, Random(1))
    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
    sampled = UsageEvent.FromString(event(1))
    sampled.traceparent = traceparent
    with recording() as spans:
        async with running(journal, publisher):
            journal.record(event(0))
            journal.record(sampled.SerializeToString())
            await broker.refused.wait()
            broker.away = False
            await publisher.flush(2)
        failed, *_, succeeded = spans.get_finished_spans()
    assert (failed.status.is_ok, succeeded.status.is_ok) == (False, True)
    assert failed.status.description == Reason.UNAVAILABLE.value
    for span in (failed, succeeded):
        assert span.parent is not None
        assert f"{span.parent.span_id:016x}" == "b" * 16
        assert (span.attributes or {})["messaging.batch.message_count"] == 2
