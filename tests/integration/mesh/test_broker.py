"""RabbitMQ through the mesh: confirmed, batched, healed after every kind of loss."""

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import aio_pika
import pytest

from mesh.broker import Broker, Handler, Queue
from mesh.errors import PlatformError, Reason
from tests.conftest import Servers


@pytest.fixture
def queue() -> Queue:
    name = uuid.uuid4().hex
    return Queue(f"test.{name}", exchange=f"test.{name}", routing_key="key")


@pytest.fixture
async def broker(amqp_url: str, queue: Queue) -> AsyncIterator[Broker]:
    broker = Broker(amqp_url, queue)
    yield broker
    await broker.close()


async def publish(broker: Broker, queue: Queue, *bodies: bytes) -> None:
    for body in bodies:
        await broker.publish(queue.exchange, queue.routing_key, body, timeout_s=5)


async def depth(url: str, name: str) -> int:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        declared = await channel.declare_queue(name, passive=True)
        return declared.declaration_result.message_count or 0


@asynccontextmanager
async def consuming(broker: Broker, queue: Queue, handle: Handler) -> AsyncIterator[None]:
    task = asyncio.create_task(broker.consume(queue, handle, batch_size=10, wait_s=0.05))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool], within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.02)


class Taker:
    """Takes everything, and remembers it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.batches: list[int] = []

    async def __call__(self, bodies: Sequence[bytes]) -> tuple[int, ...]:
        self.bodies += bodies
        self.batches.append(len(bodies))
        return ()


async def test_published_messages_arrive_in_batches_and_once(amqp_url: str, broker: Broker, queue: Queue) -> None:
    sent = [str(number).encode() for number in range(25)]
    await publish(broker, queue, *sent)
    taker = Taker()
    async with consuming(broker, queue, taker):
        await until(lambda: len(taker.bodies) == 25)
    assert taker.bodies == sent
    assert max(taker.batches) == 10
    assert await depth(amqp_url, queue.name) == 0


async def test_unroutable_message_is_a_failure(broker: Broker, queue: Queue) -> None:
    await publish(broker, queue, b"known")
    with pytest.raises(PlatformError) as error:
        await broker.publish(queue.exchange, "nobody", b"lost", timeout_s=5)
    assert error.value.reason is Reason.UNAVAILABLE


async def test_absent_broker_is_unavailable_within_the_timeout() -> None:
    with pytest.raises(PlatformError) as error:
        await Broker("amqp://127.0.0.1:1/").publish("e", "k", b"x", timeout_s=1)
    assert error.value.reason is Reason.UNAVAILABLE


async def test_refused_message_is_dead_after_five_deliveries_and_holds_up_nobody(
    amqp_url: str, broker: Broker, queue: Queue
) -> None:
    deliveries = 0
    taken: set[bytes] = set()

    async def handle(bodies: Sequence[bytes]) -> set[int]:
        nonlocal deliveries
        refused = {position for position, body in enumerate(bodies) if body == b"poison"}
        deliveries += len(refused)
        taken.update(body for position, body in enumerate(bodies) if position not in refused)
        return refused

    await publish(broker, queue, b"a", b"poison", b"b", b"c")
    async with consuming(broker, queue, handle):
        await until(lambda: taken == {b"a", b"b", b"c"}, 5)
        async with asyncio.timeout(10):
            while await depth(amqp_url, queue.dead_name) == 0:
                await asyncio.sleep(0.05)
    assert deliveries == 5
    assert await depth(amqp_url, queue.name) == 0


async def test_one_that_makes_the_handler_fail_does_not_take_its_batch_along(
    amqp_url: str, broker: Broker, queue: Queue
) -> None:
    taken: set[bytes] = set()

    async def handle(bodies: Sequence[bytes]) -> tuple[int, ...]:
        if b"bug" in bodies:
            raise ValueError("of the handler")
        taken.update(bodies)
        return ()

    await publish(broker, queue, b"a", b"bug", b"b")
    async with consuming(broker, queue, handle):
        await until(lambda: taken == {b"a", b"b"})
        async with asyncio.timeout(10):
            while await depth(amqp_url, queue.dead_name) == 0:
                await asyncio.sleep(0.05)


async def test_batch_waits_while_what_the_handler_needs_is_away(amqp_url: str, broker: Broker, queue: Queue) -> None:
    attempts: list[list[bytes]] = []

    async def handle(bodies: Sequence[bytes]) -> tuple[int, ...]:
        attempts.append(list(bodies))
        if len(attempts) <= 3:
            raise PlatformError(Reason.UNAVAILABLE)
        return ()

    await publish(broker, queue, b"a", b"b")
    async with consuming(broker, queue, handle):
        await until(lambda: len(attempts) == 4)
    assert attempts == [[b"a", b"b"]] * 4
    assert await depth(amqp_url, queue.dead_name) == 0


async def test_deleted_queue_is_declared_again_by_publisher_and_consumer(
    amqp_url: str, broker: Broker, queue: Queue
) -> None:
    await publish(broker, queue, b"before")
    taker = Taker()
    async with consuming(broker, queue, taker):
        await until(lambda: taker.bodies == [b"before"])
        async with await aio_pika.connect(amqp_url) as connection:
            await (await connection.channel()).queue_delete(queue.name)

        async def published() -> None:
            while True:
                try:
                    return await publish(broker, queue, b"after")
                except PlatformError:
                    await asyncio.sleep(0.05)

        await asyncio.wait_for(published(), 10)
        await until(lambda: b"after" in taker.bodies)


async def test_both_sides_heal_after_the_broker_was_restarted(servers: Servers, broker: Broker, queue: Queue) -> None:
    taker = Taker()
    async with consuming(broker, queue, taker):
        await publish(broker, queue, b"before")
        await until(lambda: taker.bodies == [b"before"])
        # Not SIGKILL: a quorum queue this young may come back without a leader, which is not ours to heal.
        os.killpg(servers.pid(servers.rabbitmq), signal.SIGTERM)
        with pytest.raises(PlatformError):
            while True:
                await broker.publish(queue.exchange, queue.routing_key, b"while away", timeout_s=1)
        await servers.ready(servers.rabbitmq)
        async with asyncio.timeout(20):
            while True:
                try:
                    await publish(broker, queue, b"after")
                    break
                except PlatformError:
                    await asyncio.sleep(0.1)
        await until(lambda: b"after" in taker.bodies)


@pytest.mark.parametrize("work", ["publish", "consume"])
async def test_cancelling_ends_it_at_any_moment_while_the_broker_is_away(queue: Queue, work: str) -> None:
    async def publish_again_and_again(broker: Broker) -> None:
        while True:
            with contextlib.suppress(PlatformError):
                await broker.publish("x", "y", b"", timeout_s=5)

    async def consume(broker: Broker) -> None:
        await broker.consume(queue, Taker(), batch_size=1, wait_s=0.05)

    for turns in range(60):
        # Nobody listens there.
        broker = Broker("amqp://guest:guest@127.0.0.1:1/")
        task = asyncio.create_task(publish_again_and_again(broker) if work == "publish" else consume(broker))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        _, left = await asyncio.wait({task}, timeout=2)
        while not task.done():
            # Not to leave it running for ever.
            task.cancel()
            await asyncio.sleep(0)
        assert not left, f"cancelled after {turns} turns of the loop, it went on"
