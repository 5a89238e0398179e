"""Deliveries: sent, signed, tried again, by one process or several, and to nobody that they must not reach."""

import asyncio
import base64
import contextlib
import json
import socket
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from google.protobuf import json_format
from prometheus_client import REGISTRY

from aiaas.analytics.v1 import webhook_service_pb2 as pb
from aiaas.type.v1.platform_event_pb2 import EventType, PlatformEvent
from analytics import webhook_sender
from analytics.platform_events import EventConsumer
from analytics.webhook_store import WebhookStore
from analytics.webhooks import LEASE, TRIED, Delivery
from mesh.broker import Broker
from mesh.database import Database
from mesh.errors import Reason
from mesh.topology import EVENTS
from tests.doubles.platform_events import platform_event
from tests.doubles.tcp_gate import TcpGate
from tests.doubles.webhook_receiver import WebhookReceiver
from tests.integration.analytics.harness import Hooks, arrived, serving, wait_until

PENDING, SUCCEEDED, FAILED = (
    pb.WEBHOOK_DELIVERY_STATE_PENDING,
    pb.WEBHOOK_DELIVERY_STATE_SUCCEEDED,
    pb.WEBHOOK_DELIVERY_STATE_FAILED,
)
DELAYED = EventType.EVENT_TYPE_INGESTION_DELAYED


def outcomes() -> dict[str, float]:
    name = "aiaas_webhook_deliveries_total"
    return {
        outcome: REGISTRY.get_sample_value(name, {"outcome": outcome}) or 0.0
        for outcome in ("succeeded", "retried", "failed")
    }


async def test_event_from_the_queue_is_delivered_once_with_a_valid_signature(
    hooks: Hooks, receiver: WebhookReceiver, broker: Broker
) -> None:
    webhook, secret = await hooks.create(receiver.url)
    event = platform_event()
    consumer = EventConsumer(hooks.event_store, broker, EVENTS, hooks.clock, hooks.sender.wake)
    consuming = asyncio.create_task(consumer.run())
    async with hooks.sending():
        for _ in range(3):
            await broker.publish(EVENTS.exchange, EVENTS.routing_key, event.SerializeToString(), timeout_s=10)
        delivery = await hooks.attempted(webhook, 1)
        last = platform_event("event_last")
        await broker.publish(EVENTS.exchange, EVENTS.routing_key, last.SerializeToString(), timeout_s=10)
        await arrived(receiver, 2)
    consuming.cancel()
    await asyncio.gather(consuming, return_exceptions=True)
    assert receiver.event_ids() == ["event_1", "event_last"]
    request = receiver.received[0]
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-timestamp"] == str(int(hooks.clock.now().timestamp()))
    assert len(request.signatures()) == 1
    assert request.is_signed_with(secret)
    assert json_format.Parse(request.body, PlatformEvent()) == event
    assert "budget_threshold_crossed" in json.loads(request.body)
    assert (delivery.event_id, delivery.state, delivery.http_status) == ("event_1", SUCCEEDED, 200)
    assert delivery.failure_reason == ""
    assert not delivery.HasField("next_attempt_time")
    now = await hooks.get(webhook)
    assert now.success_time.ToDatetime(UTC) == hooks.clock.now()
    assert not now.HasField("failure_time")
    assert now.etag == webhook.etag


async def test_event_goes_to_the_webhooks_of_its_organization_that_want_it(
    hooks: Hooks, receiver: WebhookReceiver
) -> None:
    wanting, _ = await hooks.create(f"{receiver.url}/delayed", types=[DELAYED])
    everything, _ = await hooks.create(f"{receiver.url}/all")
    disabled, _ = await hooks.create(f"{receiver.url}/disabled", disabled=True)
    other, _ = await hooks.create(f"{receiver.url}/other", "org_b")
    platform, _ = await hooks.create(f"{receiver.url}/platform", "platform")
    await hooks.publish(
        platform_event("event_1"),
        platform_event("event_2", type=DELAYED),
        platform_event("event_3", organization_id="", type=DELAYED),
    )
    async with hooks.sending():
        await arrived(receiver, 4)
    assert sorted((request.path.removeprefix("/hook/"), request.event_id) for request in receiver.received) == [
        ("all", "event_1"),
        ("all", "event_2"),
        ("delayed", "event_2"),
        ("platform", "event_3"),
    ]
    assert [len(await hooks.deliveries(one)) for one in (wanting, everything, disabled, other, platform)] == [
        1,
        2,
        0,
        0,
        1,
    ]


async def test_receiver_that_recovers_gets_what_it_failed_to_take(hooks: Hooks, receiver: WebhookReceiver) -> None:
    webhook, secret = await hooks.create(receiver.url)
    receiver.statuses = [500, 404, 301]
    before = outcomes()
    await hooks.publish(platform_event())
    pauses = []
    async with hooks.sending():
        for attempts, status in enumerate((500, 404, 301), start=1):
            delivery = await hooks.attempted(webhook, attempts)
            assert (delivery.state, delivery.http_status) == (PENDING, status)
            assert delivery.failure_reason == f"The answer was {status}."
            assert delivery.attempt_time.ToDatetime(UTC) == hooks.clock.now()
            pauses.append((delivery.next_attempt_time.ToDatetime(UTC) - hooks.clock.now()).total_seconds())
            await hooks.later(pauses[-1] - 0.01)
            assert await hooks.store.claim_due(hooks.clock.now(), hooks.clock.now() + LEASE, (), 1) == []
            assert len(receiver.received) == attempts
            await hooks.later(0.02)
        delivery = await hooks.attempted(webhook, 4)
    assert (delivery.state, delivery.http_status, delivery.failure_reason) == (SUCCEEDED, 200, "")
    assert receiver.event_ids() == ["event_1"] * 4
    assert all(request.is_signed_with(secret) for request in receiver.received)
    assert 4 <= pauses[0] <= 6
    assert pauses[1] > 3.9
    assert pauses[2] > 1.3 * pauses[1]
    now = await hooks.get(webhook)
    assert now.failure_time.ToDatetime() < now.success_time.ToDatetime()
    after = outcomes()
    assert {name: after[name] - before[name] for name in after} == {"succeeded": 1, "retried": 3, "failed": 0}


async def test_delivery_is_given_up_after_a_day_and_sent_again_when_somebody_asks(
    hooks: Hooks, receiver: WebhookReceiver
) -> None:
    webhook, _ = await hooks.create(receiver.url)
    receiver.statuses = [503] * 1000
    await hooks.publish(platform_event())
    attempts = 0
    async with hooks.sending():
        while True:
            attempts += 1
            delivery = await hooks.attempted(webhook, attempts)
            if delivery.state == FAILED:
                break
            pause = delivery.next_attempt_time.ToDatetime(UTC) - hooks.clock.now()
            assert pause <= timedelta(hours=1.2)
            await hooks.later(pause.total_seconds() + 0.001)
        tried = hooks.clock.now() - delivery.create_time.ToDatetime(UTC)
        assert TRIED - timedelta(hours=1.3) < tried < TRIED
        assert 20 < attempts < 50
        assert not delivery.HasField("next_attempt_time")

        retry = pb.RetryWebhookDeliveryRequest(
            organization_id="org_a",
            webhook_id=webhook.webhook_id,
            webhook_delivery_id=delivery.webhook_delivery_id,
        )
        await hooks.later(86_400)
        again = (await hooks.call(hooks.webhooks.RetryWebhookDelivery, retry)).webhook_delivery
        assert again.state == PENDING
        # It is tried for a day once more, beginning with short pauses.
        delivery = await hooks.attempted(webhook, attempts + 1)
        assert delivery.state == PENDING
        assert (await hooks.refused(hooks.webhooks.RetryWebhookDelivery, retry)).reason is Reason.FAILED_PRECONDITION
        receiver.statuses.clear()
        await hooks.later(6)
        assert (await hooks.attempted(webhook, attempts + 2)).state == SUCCEEDED
    assert (await hooks.refused(hooks.webhooks.RetryWebhookDelivery, retry)).reason is Reason.FAILED_PRECONDITION
    assert len(set(receiver.event_ids())) == 1


class UndecidedStore(WebhookStore):
    """Never gets to note what came of a delivery."""

    async def finish(self, delivery: Delivery) -> Delivery | None:
        await asyncio.Event().wait()
        return None


async def test_killed_between_sending_and_noting_delivers_again_with_the_same_id(
    hooks: Hooks, receiver: WebhookReceiver, database: Database
) -> None:
    webhook, secret = await hooks.create(receiver.url)
    await hooks.publish(platform_event())
    async with hooks.sending(hooks.another_sender(UndecidedStore(database))):
        await arrived(receiver, 1)
    async with hooks.sending():
        await hooks.later(LEASE.total_seconds() - 1)
        await hooks.publish(platform_event("event_2"))
        await arrived(receiver, 2)
        await hooks.later(1.1)
        await arrived(receiver, 3)
    assert receiver.event_ids() == ["event_1", "event_2", "event_1"]
    assert all(request.is_signed_with(secret) for request in receiver.received)
    states = [(delivery.event_id, delivery.state, delivery.attempts) for delivery in await hooks.deliveries(webhook)]
    assert sorted(states) == [("event_1", SUCCEEDED, 2), ("event_2", SUCCEEDED, 1)]


async def test_late_answer_changes_nothing_once_another_took_over(hooks: Hooks, receiver: WebhookReceiver) -> None:
    webhook, _ = await hooks.create(receiver.url)
    await hooks.publish(platform_event())
    now = hooks.clock.now()
    (late,) = await hooks.store.claim_due(now, now + LEASE, (), 10)
    hooks.clock.advance(31)
    now = hooks.clock.now()
    (taken_over,) = await hooks.store.claim_due(now, now + LEASE, (), 10)
    receiver.statuses = [500]
    assert await hooks.sender.send(late) is None
    (delivery,) = await hooks.deliveries(webhook)
    assert (delivery.attempts, delivery.http_status) == (2, 0)
    noted = await hooks.sender.send(taken_over)
    assert noted is not None
    (delivery,) = await hooks.deliveries(webhook)
    assert (delivery.state, delivery.http_status) == (SUCCEEDED, 200)


async def test_replicas_send_each_delivery_once(hooks: Hooks, receiver: WebhookReceiver) -> None:
    for number in range(8):
        await hooks.create(f"{receiver.url}/{number}")
    await hooks.publish(*(platform_event(f"event_{number}") for number in range(10)))
    async with hooks.sending(hooks.sender, *(hooks.another_sender() for _ in range(3))):
        await arrived(receiver, 80, within_s=30)
        # Whatever is due is under way or done by the time that a new event has been sent.
        await hooks.publish(platform_event("event_last"))
        await arrived(receiver, 88)
    assert len({(request.path, request.event_id) for request in receiver.received}) == 88


async def test_slow_receiver_holds_up_nobody_else(hooks: Hooks, receiver: WebhookReceiver) -> None:
    open_again = asyncio.Event()
    async with WebhookReceiver(before=open_again.wait) as slow:
        await hooks.create(slow.url)
        await hooks.publish(*(platform_event(f"event_{number}") for number in range(100)))
        await hooks.create(receiver.url)
        await hooks.publish(*(platform_event(f"event_new_{number}") for number in range(20)))
        async with hooks.sending():
            await arrived(receiver, 20)
            assert len(slow.received) == 1
            open_again.set()


async def test_no_more_are_under_way_than_may_be(
    hooks: Hooks, receiver: WebhookReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_sender, "IN_FLIGHT", 3)
    running = most = 0

    async def note() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1

    receiver.before = note
    for number in range(12):
        await hooks.create(f"{receiver.url}/{number}")
    await hooks.publish(platform_event())
    async with hooks.sending():
        await arrived(receiver, 12)
    assert most == 3


async def test_receiver_that_never_answers_is_left(
    database: Database, tmp_path: Path, receiver: WebhookReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_sender, "TIMEOUT_S", 0.3)
    open_again = asyncio.Event()
    receiver.before = open_again.wait
    async with serving(database, tmp_path) as hooks:
        webhook, _ = await hooks.create(receiver.url)
        await hooks.publish(platform_event())
        async with hooks.sending():
            delivery = await hooks.attempted(webhook, 1)
        open_again.set()
    assert (delivery.state, delivery.http_status) == (PENDING, 0)
    assert "No answer came" in delivery.failure_reason


async def test_redirect_is_not_followed(hooks: Hooks, receiver: WebhookReceiver) -> None:
    webhook, _ = await hooks.create(receiver.url)
    async with WebhookReceiver(statuses=[307], headers={"location": receiver.url}) as redirecting:
        elsewhere, _ = await hooks.create(redirecting.url, "org_b")
        await hooks.publish(platform_event(organization_id="org_b"))
        async with hooks.sending():
            delivery = await hooks.attempted(elsewhere, 1)
    assert (delivery.http_status, delivery.failure_reason) == (307, "The answer was 307.")
    assert receiver.received == []
    assert await hooks.deliveries(webhook) == []


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close a connection, and be done only when it is closed."""
    with contextlib.suppress(OSError):
        await writer.drain()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def test_receiver_that_speaks_no_http_or_is_not_there_is_tried_again(hooks: Hooks) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp.example.com ESMTP\r\n")
        await hang_up(writer)

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    async with server:
        webhook, _ = await hooks.create(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        absent, _ = await hooks.create("http://127.0.0.1:1/")
        nameless, _ = await hooks.create("http://nowhere.invalid/")
        insecure, _ = await hooks.create(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        await hooks.publish(platform_event())
        async with hooks.sending():
            reasons = [(await hooks.attempted(one, 1)).failure_reason for one in (webhook, absent, nameless, insecure)]
    assert reasons == [
        "The answer was not HTTP.",
        "No connection could be made.",
        "The name of the address leads nowhere.",
        "No secure connection could be made.",
    ]


@pytest.mark.parametrize("allowed", [False, True])
async def test_name_that_leads_into_a_private_network_is_not_connected_to(
    hooks: Hooks, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    connections = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await hang_up(writer)

    resolve = socket.getaddrinfo

    def resolved(host: Any, *arguments: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if host == "hooks.example.com" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    (tmp_path / "guarded").mkdir()
    server = await asyncio.start_server(count, "127.0.0.1", 0)
    async with server, serving(database, tmp_path / "guarded", allow_private=allowed) as guarded:
        port = server.sockets[0].getsockname()[1]
        webhook, _ = await guarded.create(f"https://hooks.example.com:{port}/")
        await guarded.publish(platform_event())
        async with guarded.sending():
            delivery = await guarded.attempted(webhook, 1)
    assert connections == allowed
    if not allowed:
        assert delivery.failure_reason == "The address leads into a private network."


async def test_address_that_was_allowed_before_is_not_connected_to(
    hooks: Hooks, database: Database, tmp_path: Path, receiver: WebhookReceiver
) -> None:
    webhook, _ = await hooks.create(receiver.url)
    await hooks.publish(platform_event())
    (tmp_path / "guarded").mkdir()
    async with serving(database, tmp_path / "guarded", allow_private=False) as guarded:
        async with guarded.sending():
            delivery = await guarded.attempted(webhook, 1)
        for url in ("https://127.0.0.1/", "https://[::1]/", "https://169.254.169.254/", "http://example.com/"):
            request = pb.CreateWebhookRequest(organization_id="org_a", webhook=pb.Webhook(display_name="a", url=url))
            error = await guarded.refused(guarded.webhooks.CreateWebhook, request)
            assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "webhook.url")
    assert delivery.failure_reason == "The address must begin with https://."
    assert receiver.received == []


async def test_secret_sealed_with_another_key_fails_and_says_what_to_do(
    hooks: Hooks, receiver: WebhookReceiver
) -> None:
    webhook, _ = await hooks.create(receiver.url)
    await hooks.publish(platform_event())
    other = hooks.another_sender(key=base64.b64encode(bytes(32)).decode())
    async with hooks.sending(other):
        delivery = await hooks.attempted(webhook, 1)
    assert delivery.failure_reason == "The secret cannot be read. Rotate it."
    assert receiver.received == []


async def test_postgres_away_stops_sending_and_no_longer(
    hooks: Hooks, receiver: WebhookReceiver, database_url: str
) -> None:
    url = urlsplit(database_url)
    async with TcpGate(url.hostname or "", url.port or 0) as gate:
        gated = Database(url._replace(netloc=f"{url.username}:{url.password}@127.0.0.1:{gate.port}").geturl())
        webhook, _ = await hooks.create(receiver.url)
        await gate.shut()
        sender = hooks.another_sender(WebhookStore(gated))
        async with hooks.sending(sender):
            await hooks.publish(platform_event())
            sender.wake()
            await gate.open()
            await arrived(receiver, 1)

            async def is_noted() -> bool:
                return len(await hooks.deliveries(webhook, SUCCEEDED)) == 1

            await wait_until(is_noted, 10, "it is noted")
        await gated.close()


async def test_pending_deliveries_are_counted(hooks: Hooks) -> None:
    await hooks.create("http://127.0.0.1:1/")
    await hooks.publish(*(platform_event(f"event_{number}") for number in range(7)))

    async def are_counted() -> bool:
        return REGISTRY.get_sample_value("aiaas_webhook_pending") == 7

    async with hooks.sending():
        await wait_until(are_counted, 10, "seven are pending")
