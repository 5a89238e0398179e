"""From the queue to the sums: once for each event, whatever fails on the way, and poison in nobody's way."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from urllib.parse import urlsplit

import aio_pika
import pytest

from aiaas.type.v1.usage_event_pb2 import TokenUsage, UsageEvent
from analytics.consumer import Consumer
from analytics.events import Event
from analytics.freshness import Marks
from analytics.store import UnstorableEventsError, UsageStore
from mesh.broker import Broker, Handler
from mesh.database import Database
from mesh.errors import PlatformError, Reason
from mesh.topology import USAGE
from tests.doubles.clock import ManualClock
from tests.doubles.tcp_gate import TcpGate
from tests.doubles.usage_events import NOW, usage_batch, usage_event
from tests.integration.analytics.harness import wait_until

CLOCK = ManualClock(NOW)
BATCH = 100
TOTALS = (
    "SELECT coalesce(sum(requests), 0)::bigint AS requests, sum(cost_micros)::bigint AS cost_micros FROM usage_hourly"
)


@asynccontextmanager
async def consuming(broker: Broker, handle: Handler) -> AsyncIterator[None]:
    task = asyncio.create_task(broker.consume(USAGE, handle, batch_size=BATCH, wait_s=0.05))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def publish(broker: Broker, *messages: bytes | UsageEvent) -> None:
    """Each as a message of its own."""
    bodies = [message if isinstance(message, bytes) else usage_batch(message) for message in messages]
    await asyncio.gather(*(broker.publish(USAGE.exchange, USAGE.routing_key, body, timeout_s=10) for body in bodies))


async def requests(database: Database) -> int:
    row = await database.fetchrow(TOTALS)
    assert row is not None
    return int(row["requests"])


async def counted(database: Database, number: int, within_s: float = 10.0) -> float:
    async def are_counted() -> bool:
        return await requests(database) >= number

    took_s = await wait_until(are_counted, within_s, f"{number} requests are counted")
    assert await requests(database) == number
    return took_s


async def waiting(amqp_url: str, queue_name: str) -> int:
    """Messages in a queue that nobody has in hand."""
    connection = await aio_pika.connect(amqp_url)
    async with connection:
        channel = await connection.channel()
        declared = await channel.declare_queue(queue_name, passive=True)
        return declared.declaration_result.message_count or 0


async def test_three_deliveries_count_once_in_any_order(broker: Broker, store: UsageStore, database: Database) -> None:
    source = random.Random(1)
    events = [usage_event(f"req_{n}", NOW - timedelta(minutes=source.randrange(2880))) for n in range(150)]
    shuffled = events * 3
    source.shuffle(shuffled)
    bodies = [usage_batch(*shuffled[start : start + 7]) for start in range(0, len(shuffled), 7)]
    async with consuming(broker, Consumer(store, broker, USAGE, CLOCK, BATCH).take):
        await publish(broker, *bodies)
        await counted(database, 150)
        await publish(broker, usage_event("req_last"))
        await counted(database, 151)


async def test_what_is_counted_is_acknowledged(
    broker: Broker, store: UsageStore, database: Database, amqp_url: str
) -> None:
    async with consuming(broker, Consumer(store, broker, USAGE, CLOCK, BATCH).take):
        await publish(broker, *(usage_event(f"req_{n}") for n in range(150)))
        await counted(database, 150)
        await publish(broker, usage_event("req_last"))
        await counted(database, 151)
    # A batch is taken only after the one before is acknowledged; the last one may have been about to be.
    assert await waiting(amqp_url, USAGE.name) <= 1


async def test_event_is_counted_within_a_second(broker: Broker, store: UsageStore, database: Database) -> None:
    async with consuming(broker, Consumer(store, broker, USAGE, CLOCK, BATCH).take):
        await publish(broker, usage_event("req_first"))
        await counted(database, 1)
        await publish(broker, usage_event("req_second"))
        assert await counted(database, 2) < 1


async def test_poison_is_dead_after_five_deliveries_and_holds_up_nobody(
    broker: Broker, store: UsageStore, database: Database, amqp_url: str
) -> None:
    bad_events: list[UsageEvent | bytes] = [
        b"\xff\xff",
        usage_event("req_future", schema_version=2),
        usage_event("req_nobody", organization_id=""),
        usage_event("req_negative", usage=TokenUsage(completion_tokens=-1)),
        usage_event("req_tomorrow", NOW + timedelta(days=1)),
    ]
    poison: list[bytes] = [
        b"\xff\xff",
        b"no protobuf at all",
        b"",
        b"\0" * (1 << 20),
        usage_event("req_of_version_1").SerializeToString(),
        *map(usage_batch, bad_events),
        usage_batch(*bad_events),
    ]
    deliveries = Counter[bytes]()
    consumer = Consumer(store, broker, USAGE, CLOCK, BATCH)

    async def take(bodies: Sequence[bytes]) -> set[int]:
        deliveries.update(bodies)
        return await consumer.take(bodies)

    async with consuming(broker, take):
        await publish(broker, *(usage_event(f"req_{n}") for n in range(40)), *poison)
        await publish(broker, *(usage_event(f"req_{n}") for n in range(40, 80)))
        await counted(database, 80, within_s=5)

        async def are_dead() -> bool:
            return await waiting(amqp_url, USAGE.dead_name) == len(poison)

        await wait_until(are_dead, 10, "all poison is in the dead-letter queue")
    assert [deliveries[body] for body in poison] == [5] * len(poison)


async def test_crash_between_commit_and_acknowledgement_changes_nothing(
    broker: Broker, store: UsageStore, database: Database
) -> None:
    committed = asyncio.Event()

    async def take_and_die(bodies: Sequence[bytes]) -> set[int]:
        await Consumer(store, broker, USAGE, CLOCK, BATCH).take(bodies)
        committed.set()
        await asyncio.Event().wait()
        return set()

    await publish(broker, *(usage_event(f"req_{n}") for n in range(30)))
    async with consuming(broker, take_and_die):
        async with asyncio.timeout(10):
            await committed.wait()
    before = await database.fetchrow(TOTALS)
    redelivered = Counter[bytes]()
    consumer = Consumer(store, broker, USAGE, CLOCK, BATCH)

    async def take(bodies: Sequence[bytes]) -> set[int]:
        redelivered.update(bodies)
        return await consumer.take(bodies)

    async with consuming(broker, take):

        async def all_came_again() -> bool:
            return len(redelivered) == 30

        await wait_until(all_came_again, 10, "everything is delivered again")
    assert await database.fetchrow(TOTALS) == before


async def test_crash_before_commit_loses_nothing(broker: Broker, store: UsageStore, database: Database) -> None:
    taken = asyncio.Event()

    async def die(bodies: Sequence[bytes]) -> set[int]:
        taken.set()
        await asyncio.Event().wait()
        return set()

    await publish(broker, usage_event())
    async with consuming(broker, die):
        async with asyncio.timeout(10):
            await taken.wait()
    assert await requests(database) == 0
    async with consuming(broker, Consumer(store, broker, USAGE, CLOCK, BATCH).take):
        await counted(database, 1)


async def test_postgres_away_loses_nothing_and_kills_no_event(
    broker: Broker, database: Database, database_url: str, amqp_url: str
) -> None:
    url = urlsplit(database_url)
    async with TcpGate(url.hostname or "", url.port or 0) as gate:
        gated = Database(url._replace(netloc=f"{url.username}:{url.password}@127.0.0.1:{gate.port}").geturl())
        tries = 0
        consumer = Consumer(UsageStore(gated), broker, USAGE, CLOCK, BATCH)

        async def take(bodies: Sequence[bytes]) -> set[int]:
            nonlocal tries
            tries += 1
            return await consumer.take(bodies)

        async with consuming(broker, take):
            await publish(broker, usage_event("req_before"))
            await counted(database, 1)
            await gate.shut()
            tries = 0
            await publish(broker, *(usage_event(f"req_{n}") for n in range(250)))

            async def was_tried_often() -> bool:
                return tries >= 4

            await wait_until(was_tried_often, 15, "it is tried again")
            assert await requests(database) == 1
            await gate.open()
            await counted(database, 251)
        assert await waiting(amqp_url, USAGE.dead_name) == 0
        await gated.close()


async def test_broker_away_heals_by_itself(
    broker: Broker, store: UsageStore, database: Database, amqp_url: str
) -> None:
    url = urlsplit(amqp_url)
    gate = TcpGate(url.hostname or "", url.port or 0)
    async with gate:
        gated = Broker(url._replace(netloc=f"{url.username}:{url.password}@127.0.0.1:{gate.port}").geturl(), USAGE)
        await gate.shut()  # it starts without a broker
        async with consuming(gated, Consumer(store, broker, USAGE, CLOCK, BATCH).take):
            for number in range(1, 3):
                await publish(broker, usage_event(f"req_{number}"))
                await gate.open()
                await counted(database, number)
                await gate.shut()
        await gated.close()


async def test_counts_are_complete_until_the_last_mark_that_got_through(
    broker: Broker, store: UsageStore, database: Database
) -> None:
    clock = ManualClock(NOW)
    marks = Marks(broker, USAGE.name, store, clock)

    async def reached() -> bool:
        return await store.complete_until() == clock.now()

    await publish(broker, *(usage_event(f"req_{n}") for n in range(250)))
    await marks.put()
    assert await store.complete_until() is None
    async with consuming(broker, Consumer(store, broker, USAGE, clock, BATCH).take):
        await wait_until(reached, 10, "the mark got through")
        assert await requests(database) == 250
        clock.advance(7)
        await marks.put()
        await wait_until(reached, 10, "the next mark got through")
    clock.advance(400)
    await marks.put()
    assert await store.complete_until() == NOW + timedelta(seconds=7)


async def test_mark_from_a_clock_ahead_promises_nothing_beyond_now(broker: Broker, store: UsageStore) -> None:
    ahead = ManualClock(NOW + timedelta(seconds=90))

    async def is_known() -> bool:
        return await store.complete_until() is not None

    async with consuming(broker, Consumer(store, broker, USAGE, CLOCK, BATCH).take):
        await Marks(broker, USAGE.name, store, ahead).put()
        await wait_until(is_known, 10, "the mark got through")
    assert await store.complete_until() == NOW


async def dead_letters(amqp_url: str) -> list[bytes]:
    connection = await aio_pika.connect(amqp_url)
    async with connection:
        queue = await (await connection.channel()).get_queue(USAGE.dead_name)
        bodies = []
        while (message := await queue.get(fail=False)) is not None:
            bodies.append(message.body)
            await message.ack()
        return bodies


async def test_bad_events_of_a_batch_are_dead_without_the_good_ones_which_are_counted(
    broker: Broker, store: UsageStore, database: Database, amqp_url: str
) -> None:
    bad = [usage_event("req_future", schema_version=2).SerializeToString(), b"poison"]
    good = [usage_event(f"req_{n}") for n in range(250)]
    deliveries = Counter[bytes]()
    consumer = Consumer(store, broker, USAGE, CLOCK, BATCH)

    async def take(bodies: Sequence[bytes]) -> set[int]:
        deliveries.update(bodies)
        return await consumer.take(bodies)

    mixed = usage_batch(*good[:120], bad[0], *good[120:], bad[1])
    async with consuming(broker, take):
        await publish(broker, mixed)
        await counted(database, 250, within_s=5)

        async def is_dead() -> bool:
            return await waiting(amqp_url, USAGE.dead_name) == 1

        await wait_until(is_dead, 10, "the bad events are in the dead-letter queue")
    assert await dead_letters(amqp_url) == [usage_batch(*bad)]
    assert deliveries == {mixed: 1, usage_batch(*bad): 5}
    assert await waiting(amqp_url, USAGE.name) == 0


async def test_bad_event_that_becomes_good_in_time_is_counted(
    broker: Broker, store: UsageStore, database: Database, amqp_url: str
) -> None:
    clock = ManualClock(NOW)
    consumer = Consumer(store, broker, USAGE, clock, BATCH)
    early = usage_event("req_early", NOW + timedelta(hours=2))
    assert await consumer.take([usage_batch(usage_event(), early, b"poison")]) == set()
    clock.advance(7200)
    async with consuming(broker, consumer.take):
        await counted(database, 2)

        async def is_dead() -> bool:
            return await waiting(amqp_url, USAGE.dead_name) == 1

        await wait_until(is_dead, 10, "the bad event is in the dead-letter queue")
    assert await dead_letters(amqp_url) == [usage_batch(b"poison")]


async def test_bad_events_that_cannot_be_put_back_keep_their_batch_unacknowledged(
    store: UsageStore, database: Database, amqp_url: str
) -> None:
    url = urlsplit(amqp_url)
    async with TcpGate(url.hostname or "", url.port or 0) as gate:
        gated = Broker(url._replace(netloc=f"{url.username}:{url.password}@127.0.0.1:{gate.port}").geturl(), USAGE)
        consumer = Consumer(store, gated, USAGE, CLOCK, BATCH)
        mixed = usage_batch(usage_event(), b"poison")
        await gate.shut()
        with pytest.raises(PlatformError) as caught:
            await consumer.take([mixed])
        assert caught.value.reason is Reason.UNAVAILABLE
        await gate.open()
        assert await consumer.take([mixed]) == set()
        assert await requests(database) == 1
        assert await waiting(amqp_url, USAGE.name) == 1
        await gated.close()


class PickyStore(UsageStore):
    """Finds some events unstorable for reasons of its own, as PostgreSQL might; remembers the sizes of transactions."""

    sizes: tuple[int, ...] = ()
    unstorable: frozenset[str] = frozenset()

    async def insert_events(self, events: Sequence[Event]) -> int:
        self.sizes += (len(events),)
        if any(event.request_id in self.unstorable for event in events):
            raise UnstorableEventsError
        return await super().insert_events(events)


async def test_event_that_postgres_refuses_takes_no_other_along(
    broker: Broker, database: Database, amqp_url: str
) -> None:
    store = PickyStore(database)
    store.unstorable = frozenset({"req_3", "req_77"})
    events = [usage_event(f"req_{n}") for n in range(80)]
    async with consuming(broker, Consumer(store, broker, USAGE, CLOCK, BATCH).take):
        await publish(broker, usage_batch(*events[:40]), usage_batch(*events[40:]))
        await counted(database, 78)

        async def are_dead() -> bool:
            return await waiting(amqp_url, USAGE.dead_name) == 2

        await wait_until(are_dead, 10, "both are in the dead-letter queue")
    assert set(await dead_letters(amqp_url)) == {usage_batch(events[3]), usage_batch(events[77])}


async def test_transaction_takes_no_more_events_than_configured(broker: Broker, database: Database) -> None:
    store = PickyStore(database)
    events = [usage_event(f"req_{n}") for n in range(250)]
    consumer = Consumer(store, broker, USAGE, CLOCK, batch_size=100)
    assert await consumer.take([usage_batch(*events[:220]), usage_batch(*events[220:])]) == set()
    assert store.sizes == (100, 100, 50)
    assert await requests(database) == 250


async def test_consumer_runs_on_the_queue_it_is_given(broker: Broker, store: UsageStore, database: Database) -> None:
    task = asyncio.create_task(Consumer(store, broker, USAGE, CLOCK, BATCH).run())
    bodies = [usage_batch(*(usage_event(f"req_{m}_{n}") for n in range(100))) for m in range(20)]
    await publish(broker, *bodies)
    await counted(database, 2000)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
