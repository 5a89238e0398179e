"""From the queue to the sums: once for each event, whatever fails on the way, and poison in nobody's way."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from urllib.parse import urlsplit

import aio_pika

from aiaas.type.v1.usage_event_pb2 import TokenUsage, UsageEvent
from analytics.consumer import Consumer
from analytics.freshness import Marks
from analytics.store import UsageStore
from mesh.broker import Broker, Handler
from mesh.database import Database
from mesh.topology import USAGE
from tests.doubles.clock import ManualClock
from tests.doubles.tcp_gate import TcpGate
from tests.doubles.usage_events import NOW, usage_event
from tests.integration.analytics.conftest import wait_until

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


async def publish(broker: Broker, *bodies: bytes | UsageEvent) -> None:
    serialized = [body if isinstance(body, bytes) else body.SerializeToString() for body in bodies]
    await asyncio.gather(
        *(broker.publish(USAGE.exchange, USAGE.routing_key, body, message_id="", timeout_s=10) for body in serialized)
    )


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
    bodies = [event.SerializeToString() for event in events] * 3
    source.shuffle(bodies)
    async with consuming(broker, Consumer(store, CLOCK).take):
        await publish(broker, *bodies)
        await counted(database, 150)
        await publish(broker, usage_event("req_last"))
        await counted(database, 151)


async def test_what_is_counted_is_acknowledged(
    broker: Broker, store: UsageStore, database: Database, amqp_url: str
) -> None:
    async with consuming(broker, Consumer(store, CLOCK).take):
        await publish(broker, *(usage_event(f"req_{n}") for n in range(150)))
        await counted(database, 150)
        await publish(broker, usage_event("req_last"))
        await counted(database, 151)
    # A batch is taken only after the one before is acknowledged; the last one may have been about to be.
    assert await waiting(amqp_url, USAGE.name) <= 1


async def test_event_is_counted_within_a_second(broker: Broker, store: UsageStore, database: Database) -> None:
    async with consuming(broker, Consumer(store, CLOCK).take):
        await publish(broker, usage_event("req_first"))
        await counted(database, 1)
        await publish(broker, usage_event("req_second"))
        assert await counted(database, 2) < 1


async def test_poison_is_dead_after_five_deliveries_and_holds_up_nobody(
    broker: Broker, store: UsageStore, database: Database, amqp_url: str
) -> None:
    poison: list[bytes] = [
        b"\xff\xff",
        b"no protobuf at all",
        b"",
        b"\0" * (1 << 20),
        usage_event("req_future", schema_version=2).SerializeToString(),
        usage_event("req_nobody", organization_id="").SerializeToString(),
        usage_event("req_negative", usage=TokenUsage(completion_tokens=-1)).SerializeToString(),
        usage_event("req_tomorrow", NOW + timedelta(days=1)).SerializeToString(),
    ]
    deliveries = Counter[bytes]()
    consumer = Consumer(store, CLOCK)

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
        await Consumer(store, CLOCK).take(bodies)
        committed.set()
        await asyncio.Event().wait()
        return set()

    await publish(broker, *(usage_event(f"req_{n}") for n in range(30)))
    async with consuming(broker, take_and_die):
        async with asyncio.timeout(10):
            await committed.wait()
    before = await database.fetchrow(TOTALS)
    redelivered = Counter[bytes]()
    consumer = Consumer(store, CLOCK)

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
    async with consuming(broker, Consumer(store, CLOCK).take):
        await counted(database, 1)


async def test_postgres_away_loses_nothing_and_kills_no_event(
    broker: Broker, database: Database, database_url: str, amqp_url: str
) -> None:
    url = urlsplit(database_url)
    async with TcpGate(url.hostname or "", url.port or 0) as gate:
        gated = Database(url._replace(netloc=f"{url.username}:{url.password}@127.0.0.1:{gate.port}").geturl())
        tries = 0
        consumer = Consumer(UsageStore(gated), CLOCK)

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
        async with consuming(gated, Consumer(store, CLOCK).take):
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
    async with consuming(broker, Consumer(store, clock).take):
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

    async with consuming(broker, Consumer(store, CLOCK).take):
        await Marks(broker, USAGE.name, store, ahead).put()
        await wait_until(is_known, 10, "the mark got through")
    assert await store.complete_until() == NOW


async def test_good_events_beside_poison_are_counted_and_the_poison_is_named(
    store: UsageStore, database: Database
) -> None:
    bodies = [usage_event(f"req_{n}").SerializeToString() for n in range(50)]
    bodies[7:7] = [b"poison", b"more poison"]
    assert await Consumer(store, CLOCK).take(bodies) == {7, 8}
    assert await requests(database) == 50
