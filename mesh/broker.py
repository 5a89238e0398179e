"""RabbitMQ: publish with confirms, consume in batches, come back after an outage; it never knows what a message means.

aio-pika's own recovery can hang a publish until the broker returns, so a connection here is plain: it is made when it
is needed, dropped when it fails, and every wait has a limit.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import aio_pika
import aio_pika.exceptions
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage, AbstractQueue
from aiormq.exceptions import AMQPError, ChannelInvalidStateError

from mesh.errors import PlatformError, Reason

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0)
_DELIVERIES = 5

# What says that the broker or the way to it is gone, or that it did not take a message.
_AWAY = (AMQPError, ChannelInvalidStateError, OSError, TimeoutError)


@dataclass(frozen=True)
class Queue:
    """A quorum queue bound to a durable direct exchange. A message that was delivered five times without being
    accepted goes to the queue `name`.dead."""

    name: str
    exchange: str
    routing_key: str

    @property
    def dead_name(self) -> str:
        """Where messages end that nobody can take."""
        return f"{self.name}.dead"


@dataclass(frozen=True)
class Depth:
    """Messages that wait in a queue and that were put aside, and how many consumers it has."""

    messages: int
    dead_messages: int
    consumers: int


class DeadLetters:
    """What was put aside, one message after the other. What was not accepted stays where it was."""

    def __init__(self, source: AbstractQueue) -> None:
        self._source = source
        self._in_hand: AbstractIncomingMessage | None = None

    async def next(self) -> bytes | None:
        """The body of the next message; None if there is none."""
        self._in_hand = await self._source.get(fail=False)
        return self._in_hand.body if self._in_hand else None

    async def accept(self) -> None:
        """Remove the message that came last."""
        if self._in_hand is not None:
            await self._in_hand.ack()


Handler = Callable[[Sequence[bytes]], Awaitable[Collection[int]]]


class Broker:
    """One RabbitMQ. `queues` are declared on every connection, so that no publisher depends on a consumer having
    been there first."""

    def __init__(self, url: str, *queues: Queue) -> None:
        self._url = url
        self._queues = queues
        self._connection: AbstractConnection | None = None
        self._publishing: AbstractChannel | None = None
        self._exchanges: dict[str, AbstractExchange] = {}
        self._opening = asyncio.Lock()

    async def publish(self, exchange: str, routing_key: str, body: bytes, *, timeout_s: float) -> None:
        """Returns when the broker has confirmed a persistent message and a queue has it.

        Raises PlatformError(UNAVAILABLE) when it has not within `timeout_s`; the message may be there all the same.
        """
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        channel: AbstractChannel | None = None
        try:
            async with asyncio.timeout(timeout_s):
                channel = await self._publishing_channel()
                if exchange not in self._exchanges:
                    self._exchanges[exchange] = await channel.get_exchange(exchange, ensure=False)
                await self._exchanges[exchange].publish(message, routing_key, mandatory=True)
        except _AWAY as error:
            # A plain DeliveryError is a queue that is full. One that was returned has no queue: it was deleted, and a
            # new connection declares it again.
            if type(error) is not aio_pika.exceptions.DeliveryError:
                await self._drop(channel)
            _heed_cancellation()
            raise PlatformError(Reason.UNAVAILABLE) from error
        _heed_cancellation()

    async def consume(self, queue: Queue, handle: Handler, *, batch_size: int, wait_s: float) -> None:
        """Hands batches of bodies to `handle` until cancelled: at most `batch_size`, and no later than `wait_s` after
        the first. `handle` returns the positions of bodies that nobody can take; those go back to the queue, the fifth
        time to the dead-letter queue, and all others are acknowledged.

        While it raises PlatformError(UNAVAILABLE) it is asked again, with pauses: what it needs is away, and no message
        is to blame. On any other exception each message of the batch is handed over alone, and those that fail alone
        are refused.
        """
        pause = 0
        while True:
            connection: AbstractConnection | None = None
            try:
                connection = await self._connect()
                channel = await connection.channel()
                await channel.set_qos(prefetch_count=2 * batch_size)
                await self._declare(channel)
                source = await channel.get_queue(queue.name, ensure=False)
                pause = 0
                await _Consumer(handle, batch_size, wait_s).run(connection, source)
            except _AWAY as error:
                logger.warning("the broker is away: %s", type(error).__name__)
            finally:
                if connection is not None:
                    await _close(connection)
            _heed_cancellation()
            await asyncio.sleep(_PAUSES_S[min(pause, len(_PAUSES_S) - 1)])
            pause += 1

    async def depth(self, queue: Queue, *, timeout_s: float) -> Depth:
        """How many messages wait, are put aside, and how many take them. Raises PlatformError(UNAVAILABLE)."""
        with _outages_as_unavailable():
            async with asyncio.timeout(timeout_s), self._channel() as channel:
                waiting = (await channel.declare_queue(queue.name, passive=True)).declaration_result
                dead = (await channel.declare_queue(queue.dead_name, passive=True)).declaration_result
        _heed_cancellation()
        return Depth(waiting.message_count or 0, dead.message_count or 0, waiting.consumer_count or 0)

    @contextlib.asynccontextmanager
    async def dead_letters(self, queue: Queue, *, timeout_s: float) -> AsyncIterator[DeadLetters]:
        """What was put aside from a queue, to be taken out within `timeout_s`. Raises PlatformError(UNAVAILABLE)."""
        with _outages_as_unavailable():
            async with asyncio.timeout(timeout_s), self._channel() as channel:
                yield DeadLetters(await channel.get_queue(queue.dead_name, ensure=False))

    async def close(self) -> None:
        """End the connection that publishes; a consumer ends with its task."""
        if self._connection is not None:
            await _close(self._connection)

    @contextlib.asynccontextmanager
    async def _channel(self) -> AsyncIterator[AbstractChannel]:
        """A channel on a connection of its own, so that what goes wrong on it stops no publisher."""
        connection = await self._connect()
        try:
            channel = await connection.channel()
            await self._declare(channel)
            yield channel
        finally:
            await _close(connection)

    async def _publishing_channel(self) -> AbstractChannel:
        async with self._opening:
            if self._publishing is None or self._publishing.is_closed:
                self._exchanges.clear()
                if self._connection is not None:
                    await _close(self._connection)
                self._connection = await self._connect()
                self._publishing = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
                await self._declare(self._publishing)
            return self._publishing

    async def _drop(self, channel: AbstractChannel | None) -> None:
        """Forget a channel that failed, so that the next call makes a new connection."""
        if channel is not None and channel is self._publishing:
            connection, self._connection, self._publishing = self._connection, None, None
            if connection is not None:
                await _close(connection)

    async def _connect(self) -> AbstractConnection:
        return await aio_pika.connect(self._url, timeout=_CONNECT_TIMEOUT_S, heartbeat=10)

    async def _declare(self, channel: AbstractChannel) -> None:
        for queue in self._queues:
            exchange = await channel.declare_exchange(queue.exchange, aio_pika.ExchangeType.DIRECT, durable=True)
            await channel.declare_queue(queue.dead_name, durable=True, arguments={"x-queue-type": "quorum"})
            declared = await channel.declare_queue(
                queue.name,
                durable=True,
                arguments={
                    "x-queue-type": "quorum",
                    # Redeliveries after the first delivery.
                    "x-delivery-limit": _DELIVERIES - 1,
                    "x-dead-letter-exchange": "",
                    "x-dead-letter-routing-key": queue.dead_name,
                    # A dead letter leaves only when the other queue has it; that needs this overflow behaviour.
                    "x-dead-letter-strategy": "at-least-once",
                    "x-overflow": "reject-publish",
                },
            )
            await declared.bind(exchange, queue.routing_key)


class _Consumer:
    """One life of a consumer: until its connection ends, which raises ConnectionError."""

    def __init__(self, handle: Handler, batch_size: int, wait_s: float) -> None:
        self._handle = handle
        self._batch_size = batch_size
        self._wait_s = wait_s
        # None says that the connection has ended.
        self._arrived: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()

    async def run(self, connection: AbstractConnection, source: AbstractQueue) -> None:
        connection.close_callbacks.add(self._ended)
        source.close_callbacks.add(self._ended)
        # The broker cancels a consumer whose queue is deleted.
        (await source.channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(self._ended)
        await source.consume(self._arrived.put)
        while True:
            await self._deal(await self._batch())

    def _ended(self, *_: object) -> None:
        self._arrived.put_nowait(None)

    async def _batch(self) -> list[AbstractIncomingMessage]:
        batch = [await self._next()]
        try:
            async with asyncio.timeout(self._wait_s):
                while len(batch) < self._batch_size:
                    batch.append(await self._next())
        except TimeoutError:
            pass
        return batch

    async def _next(self) -> AbstractIncomingMessage:
        message = await self._arrived.get()
        if message is None:
            raise ConnectionError("the connection to the broker has ended")
        return message

    async def _deal(self, batch: Sequence[AbstractIncomingMessage]) -> None:
        try:
            refused = await self._handle_patiently(batch)
        except Exception:
            logger.exception("%d messages could not be handled", len(batch))
            if len(batch) > 1:
                for message in batch:
                    await self._deal([message])
                return
            refused = (0,)
        for position in refused:
            await batch[position].reject(requeue=True)
        if taken := [message for position, message in enumerate(batch) if position not in refused]:
            # Whatever was delivered before the last is settled.
            await taken[-1].ack(multiple=True)

    async def _handle_patiently(self, batch: Sequence[AbstractIncomingMessage]) -> Collection[int]:
        bodies = [message.body for message in batch]
        attempt = 0
        while True:
            try:
                return await self._handle(bodies)
            except PlatformError as error:
                if error.reason is not Reason.UNAVAILABLE:
                    raise
            await asyncio.sleep(_PAUSES_S[min(attempt, len(_PAUSES_S) - 1)])
            attempt += 1


async def _close(connection: AbstractConnection) -> None:
    with contextlib.suppress(*_AWAY):
        await asyncio.wait_for(connection.close(), 1.0)


@contextlib.contextmanager
def _outages_as_unavailable() -> Iterator[None]:
    try:
        yield
    except _AWAY as error:
        _heed_cancellation()
        raise PlatformError(Reason.UNAVAILABLE) from error


def _heed_cancellation() -> None:
    """Raises CancelledError if that was asked for. asyncio.wait_for, by which aio-pika waits, forgets it (before Python
    3.12) when what it waits for ends in the same moment; whoever tries again and again would then go on for ever."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
