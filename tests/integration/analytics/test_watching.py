"""What analytics finds by itself: judged once, told once, whatever dies in between, and received by a webhook."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from google.protobuf import json_format
from prometheus_client import REGISTRY

from aiaas.analytics.v1.event_service_pb2 import ListEventsRequest
from aiaas.type.v1.platform_event_pb2 import (
    EVENT_TYPE_DEAD_LETTERED,
    EVENT_TYPE_ERROR_RATE_ANOMALY,
    EVENT_TYPE_INGESTION_DELAYED,
    EVENT_TYPE_SPEND_ANOMALY,
    PlatformEvent,
)
from aiaas.type.v1.usage_event_pb2 import (
    OUTCOME_CANCELLED,
    OUTCOME_FAILED,
    OUTCOME_REFUSED,
    OUTCOME_SUCCEEDED,
    UsageEvent,
)
from analytics import watch_store
from analytics.anomalies import DAYS
from analytics.consumer import Consumer
from analytics.events import read_event
from analytics.freshness import DELAYED, Marks
from analytics.platform_events import PLATFORM
from analytics.reconciliations import HOUR, hour_of
from analytics.store import UsageStore
from analytics.watch_store import WatchStore
from analytics.watcher import DEAD_LETTERS_INTERVAL, Watcher
from mesh.broker import Broker, Depth, Queue
from mesh.database import Database
from mesh.errors import PlatformError, Reason
from mesh.topology import USAGE
from tests.doubles.usage_events import NOW, usage_batch, usage_event
from tests.doubles.webhook_receiver import WebhookReceiver
from tests.integration.analytics.harness import Hooks, arrived, wait_until

JUDGED = hour_of(NOW) - HOUR
DOLLAR = 1_000_000
# WITHOUT=transaction commits each statement by itself; the test of what dies must fail then.
WITHOUT = os.environ.get("WITHOUT", "")


class Depths:
    """A broker of which only the messages that were put aside are known, or that is away."""

    def __init__(self, dead_messages: int | None = 0) -> None:
        self.dead_messages = dead_messages

    async def depth(self, queue: Queue, *, timeout_s: float) -> Depth:
        if self.dead_messages is None:
            raise PlatformError(Reason.UNAVAILABLE)
        return Depth(0, self.dead_messages, 1)


def spent(hour: datetime, cost_micros: int, organization_id: str = "org_a", **fields: Any) -> UsageEvent:
    """A request of an hour."""
    request_id = f"req_{organization_id}_{hour:%d%H}_{fields.pop('number', 0)}"
    return usage_event(request_id, hour + HOUR / 2, organization_id=organization_id, cost_micros=cost_micros, **fields)


def month(cost_micros: int, organization_id: str = "org_a") -> list[UsageEvent]:
    """A request in the same hour of each day before."""
    return [spent(JUDGED - timedelta(days=day), cost_micros, organization_id) for day in range(1, DAYS + 1)]


def failing(hour: datetime, requests: int, failed: int, organization_id: str = "org_a") -> list[UsageEvent]:
    """Requests of an hour: so many failed, one was cancelled, which is no failure, and one refused, which is none of
    them."""
    outcomes = [OUTCOME_FAILED] * failed + [OUTCOME_SUCCEEDED] * (requests - failed - 1) + [OUTCOME_CANCELLED]
    refused = spent(hour, 0, organization_id, outcome=OUTCOME_REFUSED, usage=None)
    return [refused] + [
        spent(hour, 0, organization_id, number=number, outcome=outcome)
        for number, outcome in enumerate(outcomes, start=1)
    ]


async def insert(store: UsageStore, *events: UsageEvent) -> None:
    await store.insert_events([read_event(event.SerializeToString(), NOW) for event in events])


def watcher_of(hooks: Hooks, database: Database, broker: Depths | Broker | None = None) -> Watcher:
    """A watcher as a process has it."""
    return Watcher(
        WatchStore(database), UsageStore(database), broker or Depths(), USAGE, hooks.clock, hooks.sender.wake
    )


async def told(hooks: Hooks, organization_id: str = "org_a") -> list[PlatformEvent]:
    """The events of an organization, oldest first."""
    request = ListEventsRequest(organization_id=organization_id, page_size=500)
    request.start_time.FromDatetime(NOW - timedelta(days=1))
    request.end_time.FromDatetime(NOW + timedelta(days=1))
    answer = await hooks.call(hooks.events.ListEvents, request, organization_id)
    return list(reversed(answer.events))


@pytest.fixture
async def watcher(hooks: Hooks, database: Database, store: UsageStore) -> Watcher:
    """A watcher of usage that is complete until now."""
    await store.set_complete_until(NOW)
    return watcher_of(hooks, database)


def raised(kind: str) -> float:
    return REGISTRY.get_sample_value("aiaas_anomalies_total", {"kind": kind}) or 0.0


async def test_spend_that_jumps_is_told_with_what_is_usual(hooks: Hooks, watcher: Watcher, store: UsageStore) -> None:
    await insert(store, *month(3 * DOLLAR), spent(JUDGED, 40 * DOLLAR), *month(3 * DOLLAR, "org_b"))
    await insert(store, spent(JUDGED, 12 * DOLLAR, "org_b"))
    before = raised("spend")
    await watcher.watch_hours()
    (event,) = await told(hooks)
    assert event.type == EVENT_TYPE_SPEND_ANOMALY
    assert event.organization_id == "org_a"
    assert event.summary == "$40.00 were spent from 2026-11-20 11:00 until 12:00 UTC, where $3.00 is usual."
    detected = event.anomaly_detected
    assert detected.hour_start.ToDatetime(JUDGED.tzinfo) == JUDGED
    # The least spread is an eighth of the floor of ten dollars.
    assert (detected.observed, detected.expected, detected.deviations) == (40e6, 3e6, 29.6)
    assert await told(hooks, "org_b") == []
    assert raised("spend") == before + 1


async def test_error_rate_that_jumps_is_told(hooks: Hooks, watcher: Watcher, store: UsageStore) -> None:
    for day in range(1, DAYS + 1):
        await insert(store, *failing(JUDGED - timedelta(days=day), 50, 1))
        await insert(store, *failing(JUDGED - timedelta(days=day), 50, 1, "org_b"))
    await insert(store, *failing(JUDGED, 60, 15), *failing(JUDGED, 49, 48, "org_b"))
    before = raised("error_rate")
    await watcher.watch_hours()
    (event,) = await told(hooks)
    assert event.type == EVENT_TYPE_ERROR_RATE_ANOMALY
    assert event.summary == "25.0% of requests failed from 2026-11-20 11:00 until 12:00 UTC, where 2.0% is usual."
    assert (event.anomaly_detected.observed, event.anomaly_detected.expected) == (0.25, 0.02)
    assert await told(hooks, "org_b") == []
    assert raised("error_rate") == before + 1


async def test_new_organization_is_not_told_of_its_first_weeks(
    hooks: Hooks, watcher: Watcher, store: UsageStore
) -> None:
    await insert(store, *month(3 * DOLLAR)[:13], spent(JUDGED, 1000 * DOLLAR))
    await watcher.watch_hours()
    assert await told(hooks) == []


async def test_hour_is_judged_once_its_usage_is_complete_and_never_again(
    hooks: Hooks, database: Database, store: UsageStore
) -> None:
    await insert(store, *month(3 * DOLLAR), spent(JUDGED, 40 * DOLLAR))
    watchers = [watcher_of(hooks, database) for _ in range(4)]
    await watchers[0].watch_hours()
    assert await told(hooks) == []
    await store.set_complete_until(JUDGED + HOUR + timedelta(minutes=9))
    await watchers[0].watch_hours()
    assert await told(hooks) == []
    await store.set_complete_until(JUDGED + HOUR + timedelta(minutes=10))
    async with asyncio.TaskGroup() as watching:
        for watcher in watchers:
            watching.create_task(watcher.watch_hours())
    await watchers[0].watch_hours()
    assert len(await told(hooks)) == 1


async def test_hours_that_nobody_judged_are_made_up_for(hooks: Hooks, watcher: Watcher, store: UsageStore) -> None:
    await watcher.watch_hours()
    for hours in (1, 2):
        moved = [spent(JUDGED + hours * HOUR - timedelta(days=day), 3 * DOLLAR) for day in range(1, DAYS + 1)]
        await insert(store, *moved, spent(JUDGED + hours * HOUR, 40 * DOLLAR))
    hooks.clock.advance(2 * HOUR.total_seconds())
    await store.set_complete_until(hooks.clock.now())
    await watcher.watch_hours()
    starts = [event.anomaly_detected.hour_start.ToDatetime(JUDGED.tzinfo) for event in await told(hooks)]
    assert sorted(starts) == [JUDGED + HOUR, JUDGED + 2 * HOUR]


async def test_what_dies_while_it_tells_forgets_nothing_and_tells_once(
    hooks: Hooks,
    watcher: Watcher,
    database: Database,
    store: UsageStore,
    receiver: WebhookReceiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await hooks.create(receiver.url, types=[EVENT_TYPE_SPEND_ANOMALY])
    await insert(store, *month(3 * DOLLAR), spent(JUDGED, 40 * DOLLAR))

    async def die(*_: object) -> None:
        raise asyncio.CancelledError

    with monkeypatch.context() as dying:
        dying.setattr(watch_store, "add_events", die)
        if WITHOUT == "transaction":
            dying.setattr(database, "transaction", database._connection)
        with pytest.raises(asyncio.CancelledError):
            await watcher.watch_hours()
    assert await told(hooks) == []
    async with hooks.sending():
        for _ in range(2):
            await watcher_of(hooks, database).watch_hours()
        await arrived(receiver, 1)
    assert len(await told(hooks)) == 1


async def test_odd_organization_stops_no_other(hooks: Hooks, watcher: Watcher, store: UsageStore) -> None:
    odd = "an organization that has no id"
    await insert(store, *month(3 * DOLLAR), spent(JUDGED, 40 * DOLLAR))
    await insert(store, *month(3 * DOLLAR, odd), spent(JUDGED, 40 * DOLLAR, odd))
    await watcher.watch_hours()
    assert len(await told(hooks)) == 1


async def test_late_usage_is_told_once_until_it_is_fresh_again(
    hooks: Hooks, watcher: Watcher, store: UsageStore, receiver: WebhookReceiver
) -> None:
    _, secret = await hooks.create(receiver.url, PLATFORM, types=[EVENT_TYPE_INGESTION_DELAYED])
    # The clock is a second ahead.
    hooks.clock.advance(DELAYED.total_seconds() - 2)
    await watcher.watch_ingestion()
    assert await told(hooks, PLATFORM) == []
    async with hooks.sending():
        for _ in range(3):
            hooks.clock.advance(1)
            await watcher.watch_ingestion()
        await arrived(receiver, 1)
    (event,) = await told(hooks, PLATFORM)
    assert event.ingestion_delayed.lag.ToTimedelta() == DELAYED
    assert event.summary == "Usage is counted until 2026-11-20 12:30 UTC and not further."
    assert receiver.received[0].is_signed_with(secret)

    # A little better is not well.
    await store.set_complete_until(hooks.clock.now() - DELAYED / 2)
    await watcher.watch_ingestion()
    hooks.clock.advance(DELAYED.total_seconds())
    await watcher.watch_ingestion()
    assert len(await told(hooks, PLATFORM)) == 1
    await store.set_complete_until(hooks.clock.now())
    await watcher.watch_ingestion()
    hooks.clock.advance(DELAYED.total_seconds())
    await watcher.watch_ingestion()
    assert len(await told(hooks, PLATFORM)) == 2


async def test_unknown_lag_is_not_told(hooks: Hooks, database: Database) -> None:
    await watcher_of(hooks, database).watch_ingestion()
    assert await told(hooks, PLATFORM) == []


async def test_late_usage_is_told_while_the_broker_is_away(hooks: Hooks, database: Database, store: UsageStore) -> None:
    await store.set_complete_until(NOW - DELAYED)
    await watcher_of(hooks, database, Depths(None)).watch_ingestion()
    assert [event.type for event in await told(hooks, PLATFORM)] == [EVENT_TYPE_INGESTION_DELAYED]


async def test_messages_put_aside_are_told_again_only_when_they_are_more_and_an_hour_has_passed(
    hooks: Hooks, watcher: Watcher, database: Database
) -> None:
    aside = Depths()
    watcher = watcher_of(hooks, database, aside)
    hour_s = DEAD_LETTERS_INTERVAL.total_seconds()
    for dead_messages, passed_s, expected in ((0, 0, []), (2, 0, [2]), (3, hour_s - 1, [2]), (3, 1, [2, 3])):
        hooks.clock.advance(passed_s)
        aside.dead_messages = dead_messages
        await watcher.watch_ingestion()
        counts = [e.dead_lettered.count for e in await told(hooks, PLATFORM) if e.type == EVENT_TYPE_DEAD_LETTERED]
        assert counts == expected
    # They were taken out again, and others come.
    for dead_messages in (3, 1, 2):
        hooks.clock.advance(hour_s)
        aside.dead_messages = dead_messages
        await watcher.watch_ingestion()
    counts = [e.dead_lettered.count for e in await told(hooks, PLATFORM) if e.type == EVENT_TYPE_DEAD_LETTERED]
    assert counts == [2, 3, 2]


@contextlib.asynccontextmanager
async def consuming(store: UsageStore, broker: Broker, hooks: Hooks) -> AsyncIterator[None]:
    task = asyncio.create_task(Consumer(store, broker, USAGE, hooks.clock, 500).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_usage_from_the_queue_becomes_an_anomaly_that_a_webhook_receives(
    hooks: Hooks, database: Database, store: UsageStore, broker: Broker, receiver: WebhookReceiver
) -> None:
    _, secret = await hooks.create(receiver.url)
    watcher = watcher_of(hooks, database, broker)

    async def is_complete() -> bool:
        return await store.complete_until() is not None

    async with consuming(store, broker, hooks), hooks.sending():
        body = usage_batch(*month(3 * DOLLAR), spent(JUDGED, 40 * DOLLAR))
        await broker.publish(USAGE.exchange, USAGE.routing_key, body, timeout_s=10)
        await Marks(broker, USAGE.name, store, hooks.clock).put()
        await wait_until(is_complete, 10, "the usage is counted")
        await watcher.watch_hours()
        await arrived(receiver, 1)
    request = receiver.received[0]
    assert request.is_signed_with(secret)
    event = json_format.Parse(request.body, PlatformEvent())
    assert (event.type, event.anomaly_detected.observed) == (EVENT_TYPE_SPEND_ANOMALY, 40e6)


async def test_message_that_nobody_can_read_is_told_to_the_platform(
    hooks: Hooks,
    database: Database,
    store: UsageStore,
    broker: Broker,
    receiver: WebhookReceiver,
) -> None:
    await hooks.create(receiver.url, PLATFORM)
    watcher = watcher_of(hooks, database, broker)

    async def is_aside() -> bool:
        return (await broker.depth(USAGE, timeout_s=5)).dead_messages == 1

    async with consuming(store, broker, hooks), hooks.sending():
        await broker.publish(USAGE.exchange, USAGE.routing_key, usage_batch(b"poison"), timeout_s=10)
        await wait_until(is_aside, 10, "the message is put aside")
        await watcher.watch_ingestion()
        await arrived(receiver, 1)
    event = json_format.Parse(receiver.received[0].body, PlatformEvent())
    assert (event.type, event.organization_id) == (EVENT_TYPE_DEAD_LETTERED, "")
    assert (event.dead_lettered.count, event.dead_lettered.reason) == (1, "delivery_limit")
