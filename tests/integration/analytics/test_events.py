"""From the queue to the list of events: once for each, whatever fails on the way, and nobody else's."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import aio_pika
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.analytics.v1 import event_service_pb2 as pb
from aiaas.type.v1.platform_event_pb2 import EventType, PlatformEvent
from analytics.event_retention import clean
from analytics.platform_events import KEPT, EventConsumer, read_event
from mesh.broker import Broker, Handler
from mesh.errors import Reason
from mesh.topology import EVENTS
from tests.doubles.platform_events import platform_event
from tests.doubles.usage_events import NOW
from tests.integration.analytics.harness import Hooks, wait_until


@asynccontextmanager
async def consuming(broker: Broker, handle: Handler) -> AsyncIterator[None]:
    task = asyncio.create_task(broker.consume(EVENTS, handle, batch_size=50, wait_s=0.05))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def consumer(hooks: Hooks, broker: Broker) -> EventConsumer:
    return EventConsumer(hooks.event_store, broker, EVENTS, hooks.clock, hooks.sender.wake)


async def put(broker: Broker, *bodies: bytes | PlatformEvent) -> None:
    for body in bodies:
        serialized = body if isinstance(body, bytes) else body.SerializeToString()
        await broker.publish(EVENTS.exchange, EVENTS.routing_key, serialized, timeout_s=10)


async def listed(hooks: Hooks, organization_id: str = "org_a", credential: str = "", **fields: Any) -> list[str]:
    request = pb.ListEventsRequest(organization_id=organization_id, **fields)
    answer = await hooks.call(hooks.events.ListEvents, request, credential or organization_id)
    return [event.event_id for event in answer.events]


def stamp(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


async def test_event_is_kept_once_however_often_it_comes(hooks: Hooks, broker: Broker) -> None:
    event = platform_event()
    async with consuming(broker, consumer(hooks, broker).take):
        await put(broker, event, event, platform_event(summary="Another of the same id."))
        await put(broker, platform_event("event_2", NOW - timedelta(seconds=1)))

        async def are_kept() -> bool:
            return len(await listed(hooks)) == 2

        await wait_until(are_kept, 10, "both are kept")
    assert await listed(hooks) == ["event_1", "event_2"]
    request = pb.GetEventRequest(organization_id="org_a", event_id="event_1")
    assert (await hooks.call(hooks.events.GetEvent, request)).event == event


async def test_replicas_that_take_the_same_events_keep_each_once(hooks: Hooks) -> None:
    now = hooks.clock.now()
    for batch in range(5):
        events = [
            read_event(platform_event(f"event_{batch}_{number:03}").SerializeToString(), now) for number in range(500)
        ]
        kept = await asyncio.gather(
            *(hooks.event_store.add(events if index % 2 else events[::-1], now) for index in range(4))
        )
        assert sum(number for number, _ in kept) == 500


async def test_poison_is_dead_after_five_deliveries_and_holds_up_nobody(
    hooks: Hooks, broker: Broker, amqp_url: str
) -> None:
    poison = [
        b"\xff\xff",
        b"",
        platform_event("event_new", schema_version=2).SerializeToString(),
        platform_event("event_odd", type=99).SerializeToString(),
    ]
    deliveries = Counter[bytes]()
    taker = consumer(hooks, broker)

    async def take(bodies: Sequence[bytes]) -> set[int]:
        deliveries.update(bodies)
        return await taker.take(bodies)

    async def dead() -> list[bytes]:
        connection = await aio_pika.connect(amqp_url)
        async with connection:
            queue = await (await connection.channel()).declare_queue(EVENTS.dead_name, passive=True)
            if (queue.declaration_result.message_count or 0) < len(poison):
                return []
            messages = [await queue.get() for _ in poison]
            for message in messages:
                await message.ack()
            return [message.body for message in messages]

    async with consuming(broker, take):
        await put(broker, platform_event("event_1"), *poison, platform_event("event_2"))
        bodies: list[bytes] = []

        async def are_dead() -> bool:
            bodies[:] = await dead()
            return bool(bodies)

        await wait_until(are_dead, 10, "all poison is in the dead-letter queue")
    assert sorted(bodies) == sorted(poison)
    assert [deliveries[body] for body in poison] == [5] * len(poison)
    assert sorted(await listed(hooks)) == ["event_1", "event_2"]


async def test_list_is_newest_first_in_pages_of_a_range_and_of_types(hooks: Hooks) -> None:
    anomaly, delayed = EventType.EVENT_TYPE_SPEND_ANOMALY, EventType.EVENT_TYPE_INGESTION_DELAYED
    types = [EventType.EVENT_TYPE_BUDGET_THRESHOLD_CROSSED, anomaly, delayed]
    moments = [NOW - timedelta(hours=6 * number + 1) for number in range(9)]
    await hooks.publish(
        *(platform_event(f"event_{number}", moment, type=types[number % 3]) for number, moment in enumerate(moments))
    )
    assert await listed(hooks) == ["event_0", "event_1", "event_2", "event_3"]
    since = stamp(NOW - timedelta(days=9))
    assert await listed(hooks, start_time=since) == [f"event_{number}" for number in range(9)]
    assert await listed(hooks, start_time=since, types=[anomaly, delayed]) == [f"event_{n}" for n in (1, 2, 4, 5, 7, 8)]
    assert await listed(hooks, start_time=stamp(moments[5]), end_time=stamp(moments[3])) == ["event_4", "event_5"]
    seen, token = [], ""
    while True:
        request = pb.ListEventsRequest(organization_id="org_a", page_size=2, page_token=token)
        answer = await hooks.call(hooks.events.ListEvents, request)
        seen += [event.event_id for event in answer.events]
        token = answer.next_page_token
        if not token:
            break
        # The range stays where it began.
        hooks.clock.advance(3600)
    assert seen == ["event_0", "event_1", "event_2", "event_3"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"types": [99]}, "types[0]"),
        ({"types": [1, 1]}, "types[1]"),
        ({"start_time": stamp(NOW), "end_time": stamp(NOW)}, "start_time"),
        ({"end_time": Timestamp(seconds=1 << 60)}, "end_time"),
        ({"page_size": -1}, "page_size"),
        ({"page_token": "x"}, "page_token"),
        ({"organization_id": ""}, "organization_id"),
    ],
)
async def test_wrong_question_names_its_field(hooks: Hooks, fields: dict[str, Any], field: str) -> None:
    error = await hooks.refused(hooks.events.ListEvents, pb.ListEventsRequest(**{"organization_id": "org_a", **fields}))
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)


async def test_events_of_others_and_of_the_platform_are_invisible(hooks: Hooks) -> None:
    await hooks.publish(platform_event("event_a"), platform_event("event_p", organization_id=""))
    assert await listed(hooks, "org_a") == ["event_a"]
    assert await listed(hooks, "org_b") == []
    assert await listed(hooks, "platform", "platform") == ["event_p"]
    assert await listed(hooks, "org_a", "platform") == ["event_a"]
    for organization_id, event_id, credential in [
        ("org_a", "event_a", "org_b"),
        ("org_b", "event_a", "org_b"),
        ("platform", "event_p", "org_a"),
        ("org_a", "event_p", "org_a"),
        ("org_a", "event_none", "org_a"),
        ("org_a", "\0", "org_a"),
    ]:
        request = pb.GetEventRequest(organization_id=organization_id, event_id=event_id)
        assert (await hooks.refused(hooks.events.GetEvent, request, credential)).reason is Reason.NOT_FOUND


async def test_events_are_removed_after_400_days_and_not_before(hooks: Hooks) -> None:
    since: dict[str, Any] = {"start_time": stamp(NOW - timedelta(days=500)), "page_size": 500}
    await hooks.publish(*(platform_event(f"event_{number}", NOW - timedelta(days=number)) for number in range(10)))
    hooks.clock.advance((KEPT - timedelta(days=4, seconds=1)).total_seconds())
    await clean(hooks.event_store, hooks.store, hooks.clock, batch=2)
    assert await listed(hooks, **since) == [f"event_{number}" for number in range(5)]
