"""Webhooks as people see them: made, changed, tested, removed; whose they are, and where their secrets are not."""

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from aiaas.analytics.v1 import event_service_pb2
from aiaas.analytics.v1 import webhook_service_pb2 as pb
from aiaas.type.v1.platform_event_pb2 import EventType, PlatformEvent
from analytics.event_retention import clean
from analytics.webhooks import DELIVERIES_KEPT, TRIED
from mesh.database import Database
from mesh.errors import Reason
from tests.doubles.platform_events import platform_event
from tests.doubles.webhook_receiver import WebhookReceiver
from tests.integration.analytics.harness import Hooks, arrived, wait_until

PENDING, SUCCEEDED, FAILED = (
    pb.WEBHOOK_DELIVERY_STATE_PENDING,
    pb.WEBHOOK_DELIVERY_STATE_SUCCEEDED,
    pb.WEBHOOK_DELIVERY_STATE_FAILED,
)
DELAYED = EventType.EVENT_TYPE_INGESTION_DELAYED


async def test_both_secrets_sign_while_they_overlap(hooks: Hooks, receiver: WebhookReceiver) -> None:
    webhook, first = await hooks.create(receiver.url)
    rotate = pb.RotateWebhookSecretRequest(organization_id="org_a", webhook_id=webhook.webhook_id)

    async def sent(event_id: str) -> list[bool]:
        number = len(receiver.received)
        await hooks.publish(platform_event(event_id))
        await arrived(receiver, number + 1)
        request = receiver.received[-1]
        signed = [request.is_signed_with(secret) for secret in secrets]
        assert len(request.signatures()) == sum(signed)
        return signed

    secrets = [first]
    async with hooks.sending():
        rotate.overlap.FromSeconds(3600)
        rotated = await hooks.call(hooks.webhooks.RotateWebhookSecret, rotate)
        secrets.append(rotated.secret)
        assert rotated.webhook.etag != webhook.etag
        assert await sent("event_1") == [True, True]
        hooks.clock.advance(3600)
        assert await sent("event_2") == [False, True]
        rotate.ClearField("overlap")
        secrets.append((await hooks.call(hooks.webhooks.RotateWebhookSecret, rotate)).secret)
        assert await sent("event_3") == [False, False, True]
    assert len(set(secrets)) == 3


async def test_secret_is_in_no_answer_log_or_table(
    hooks: Hooks, receiver: WebhookReceiver, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver.statuses = [500]
    webhook, first = await hooks.create(receiver.url)
    ids: dict[str, Any] = {"organization_id": "org_a", "webhook_id": webhook.webhook_id}
    rotate = pb.RotateWebhookSecretRequest(**ids, overlap=Duration(seconds=3600))
    second = (await hooks.call(hooks.webhooks.RotateWebhookSecret, rotate)).secret
    await hooks.publish(platform_event())
    async with hooks.sending():
        await hooks.attempted(webhook, 1)
        answers: list[Message] = [
            await hooks.call(hooks.webhooks.GetWebhook, pb.GetWebhookRequest(**ids)),
            await hooks.call(hooks.webhooks.ListWebhooks, pb.ListWebhooksRequest(organization_id="org_a")),
            await hooks.call(
                hooks.webhooks.UpdateWebhook, pb.UpdateWebhookRequest(**ids, webhook=pb.Webhook(display_name="New"))
            ),
            await hooks.call(hooks.webhooks.TestWebhook, pb.TestWebhookRequest(**ids)),
            *await hooks.deliveries(webhook),
        ]
    tables = [
        bytes(value) if isinstance(value, bytes) else str(value).encode()
        for table in ("webhooks", "webhook_deliveries", "platform_events")
        for row in await database.fetch(f"SELECT * FROM {table}")
        for value in row.values()
    ]
    told = [caplog.text.encode(), *tables, *(answer.SerializeToString() for answer in answers)]
    assert len(told) > 30
    for secret in (first, second):
        assert secret.startswith("whsec_")
        encoded = secret.removeprefix("whsec_")
        for form in (encoded.encode(), base64.b64decode(encoded), base64.b64decode(encoded).hex().encode()):
            assert not any(form in text for text in told)


async def test_webhooks_of_others_are_invisible(hooks: Hooks, receiver: WebhookReceiver) -> None:
    webhook, _ = await hooks.create(receiver.url)
    await hooks.publish(platform_event())
    (delivery,) = await hooks.deliveries(webhook)
    assert (
        await hooks.call(hooks.webhooks.ListWebhooks, pb.ListWebhooksRequest(organization_id="org_b"), "org_b")
    ).webhooks == []
    stub = hooks.webhooks
    for organization_id in ("org_a", "org_b"):
        ids: dict[str, Any] = {"organization_id": organization_id, "webhook_id": webhook.webhook_id}
        calls: list[tuple[Callable[..., Awaitable[Any]], Message]] = [
            (stub.GetWebhook, pb.GetWebhookRequest(**ids)),
            (stub.UpdateWebhook, pb.UpdateWebhookRequest(**ids, webhook=pb.Webhook(display_name="Mine"))),
            (stub.DeleteWebhook, pb.DeleteWebhookRequest(**ids)),
            (stub.RotateWebhookSecret, pb.RotateWebhookSecretRequest(**ids)),
            (stub.TestWebhook, pb.TestWebhookRequest(**ids)),
            (stub.ListWebhookDeliveries, pb.ListWebhookDeliveriesRequest(**ids)),
            (
                stub.RetryWebhookDelivery,
                pb.RetryWebhookDeliveryRequest(**ids, webhook_delivery_id=delivery.webhook_delivery_id),
            ),
        ]
        for method, request in calls:
            assert (await hooks.refused(method, request, "org_b")).reason is Reason.NOT_FOUND, request
    assert await hooks.get(webhook) == webhook


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"display_name": ""}, "webhook.display_name"),
        ({"display_name": " "}, "webhook.display_name"),
        ({"display_name": "a" * 201}, "webhook.display_name"),
        ({"display_name": "a\nb"}, "webhook.display_name"),
        ({"url": ""}, "webhook.url"),
        ({"url": "ftp://example.com"}, "webhook.url"),
        ({"types": [0]}, "webhook.types[0]"),
        ({"types": [DELAYED, 99]}, "webhook.types[1]"),
        ({"types": [DELAYED, 1, DELAYED]}, "webhook.types[2]"),
    ],
)
async def test_wrong_webhook_names_its_field(hooks: Hooks, fields: dict[str, Any], field: str) -> None:
    good, _ = await hooks.create("https://example.com")
    wrong = pb.Webhook(**{"display_name": "Hook", "url": "https://example.com", **fields})
    request = pb.CreateWebhookRequest(organization_id="org_a", webhook=wrong)
    error = await hooks.refused(hooks.webhooks.CreateWebhook, request)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)
    update = pb.UpdateWebhookRequest(
        organization_id="org_a",
        webhook_id=good.webhook_id,
        webhook=wrong,
        update_mask=FieldMask(paths=["display_name", "url", "types"]),
    )
    error = await hooks.refused(hooks.webhooks.UpdateWebhook, update)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)
    assert await hooks.get(good) == good


async def test_repeated_creation_is_refused_and_makes_nothing(hooks: Hooks) -> None:
    wanted = pb.Webhook(display_name="Hook", url="https://example.com")
    request = pb.CreateWebhookRequest(organization_id="org_a", webhook=wanted, request_id="once")
    await hooks.call(hooks.webhooks.CreateWebhook, request)
    error = await hooks.refused(hooks.webhooks.CreateWebhook, request)
    assert (error.reason, error.field) == (Reason.ALREADY_EXISTS, "request_id")
    listed = await hooks.call(hooks.webhooks.ListWebhooks, pb.ListWebhooksRequest(organization_id="org_a"))
    assert len(listed.webhooks) == 1
    request.organization_id = "org_b"
    await hooks.call(hooks.webhooks.CreateWebhook, request, "org_b")
    request.request_id = "\n"
    error = await hooks.refused(hooks.webhooks.CreateWebhook, request, "org_b")
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "request_id")


async def test_organization_has_a_bounded_number_of_webhooks(hooks: Hooks) -> None:
    made = await asyncio.gather(
        *(hooks.create(f"https://example.com/{number}") for number in range(60)), return_exceptions=True
    )
    assert sum(not isinstance(one, BaseException) for one in made) == 50
    await hooks.create("https://example.com", "org_b")


async def test_update_changes_what_the_mask_names_and_the_etag(hooks: Hooks) -> None:
    made, _ = await hooks.create("https://example.com", types=[DELAYED])
    hooks.clock.advance(60)
    wanted = pb.Webhook(display_name="New", url="https://example.org", disabled=True, etag=made.etag)
    request = pb.UpdateWebhookRequest(organization_id="org_a", webhook_id=made.webhook_id, webhook=wanted)
    request.update_mask.paths.append("types")
    changed = (await hooks.call(hooks.webhooks.UpdateWebhook, request)).webhook
    assert (changed.display_name, changed.url, list(changed.types)) == ("Hook", "https://example.com", [])
    assert changed.update_time.ToDatetime(UTC) == hooks.clock.now()
    assert changed.create_time == made.create_time
    error = await hooks.refused(hooks.webhooks.UpdateWebhook, request)
    assert (error.reason, error.field) == (Reason.FAILED_PRECONDITION, "webhook.etag")
    request.ClearField("update_mask")
    request.webhook.etag = changed.etag
    changed = (await hooks.call(hooks.webhooks.UpdateWebhook, request)).webhook
    assert (changed.display_name, changed.url, changed.disabled) == ("New", "https://example.org", True)
    assert await hooks.get(made) == changed
    request.update_mask.paths.append("organization_id")
    request.webhook.etag = ""
    assert (await hooks.refused(hooks.webhooks.UpdateWebhook, request)).field == "update_mask"


async def test_list_is_oldest_first_in_pages(hooks: Hooks) -> None:
    made = []
    for number in range(5):
        made.append((await hooks.create(f"https://example.com/{number}"))[0])
        hooks.clock.advance(1)
    seen: list[pb.Webhook] = []
    request = pb.ListWebhooksRequest(organization_id="org_a", page_size=2)
    while True:
        answer = await hooks.call(hooks.webhooks.ListWebhooks, request)
        seen += answer.webhooks
        request.page_token = answer.next_page_token
        if not request.page_token:
            break
    assert seen == made


async def test_deliveries_are_listed_newest_first_in_pages_and_by_state(
    hooks: Hooks, receiver: WebhookReceiver
) -> None:
    webhook, _ = await hooks.create(receiver.url)
    receiver.statuses = [500]
    async with hooks.sending():
        for number in range(5):
            await hooks.publish(platform_event(f"event_{number}"))
            await arrived(receiver, number + 1)
            await hooks.later(0.5)

        async def are_over() -> bool:
            return len(await hooks.deliveries(webhook, SUCCEEDED)) == 4

        await wait_until(are_over, 10, "four are taken")
    request = pb.ListWebhookDeliveriesRequest(organization_id="org_a", webhook_id=webhook.webhook_id, page_size=2)
    seen: list[str] = []
    while True:
        answer = await hooks.call(hooks.webhooks.ListWebhookDeliveries, request)
        seen += [delivery.event_id for delivery in answer.webhook_deliveries]
        request.page_token = answer.next_page_token
        if not request.page_token:
            break
    assert seen == [f"event_{number}" for number in reversed(range(5))]
    assert [delivery.event_id for delivery in await hooks.deliveries(webhook, PENDING)] == ["event_0"]
    wrong = pb.ListWebhookDeliveriesRequest(organization_id="org_a", webhook_id=webhook.webhook_id, state=99)  # type: ignore[arg-type]
    error = await hooks.refused(hooks.webhooks.ListWebhookDeliveries, wrong)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "state")


async def test_test_tells_what_came_back_and_is_sent_once_and_to_nobody_else(
    hooks: Hooks, receiver: WebhookReceiver
) -> None:
    webhook, secret = await hooks.create(receiver.url)
    other, _ = await hooks.create(f"{receiver.url}/other")
    request = pb.TestWebhookRequest(organization_id="org_a", webhook_id=webhook.webhook_id)
    receiver.statuses = [204, 500]
    async with hooks.sending():
        good = (await hooks.call(hooks.webhooks.TestWebhook, request)).webhook_delivery
        bad = (await hooks.call(hooks.webhooks.TestWebhook, request)).webhook_delivery
        assert (good.state, good.http_status, good.attempts) == (SUCCEEDED, 204, 1)
        assert (bad.state, bad.http_status, bad.attempts) == (FAILED, 500, 1)
        await hooks.later(3600)
        # Whatever would be due is sent by the time that a new event is.
        await hooks.publish(platform_event("event_last", organization_id="org_a"))
        await arrived(receiver, 4)
    assert await hooks.deliveries(other) != []
    assert receiver.event_ids()[:2] == [good.event_id, bad.event_id]
    assert set(receiver.event_ids()[2:]) == {"event_last"}
    sent = json_format.Parse(receiver.received[0].body, PlatformEvent())
    assert (sent.type, sent.organization_id) == (EventType.EVENT_TYPE_WEBHOOK_TESTED, "org_a")
    assert receiver.received[0].is_signed_with(secret)
    get = event_service_pb2.GetEventRequest(organization_id="org_a", event_id=good.event_id)
    assert (await hooks.call(hooks.events.GetEvent, get)).event == sent


async def test_disabled_webhook_gets_nothing_until_it_is_enabled(hooks: Hooks, receiver: WebhookReceiver) -> None:
    webhook, _ = await hooks.create(receiver.url)
    other, _ = await hooks.create(f"{receiver.url}/other", "org_b")
    ids: dict[str, Any] = {"organization_id": "org_a", "webhook_id": webhook.webhook_id}
    update = pb.UpdateWebhookRequest(
        **ids, webhook=pb.Webhook(disabled=True), update_mask=FieldMask(paths=["disabled"])
    )
    await hooks.publish(platform_event("event_before"))
    await hooks.call(hooks.webhooks.UpdateWebhook, update)
    async with hooks.sending():
        await hooks.publish(platform_event("event_meanwhile"), platform_event("event_b", organization_id="org_b"))
        await hooks.attempted(other, 1)
        assert receiver.event_ids() == ["event_b"]
        error = await hooks.refused(hooks.webhooks.TestWebhook, pb.TestWebhookRequest(**ids))
        assert error.reason is Reason.FAILED_PRECONDITION
        update.webhook.disabled = False
        await hooks.call(hooks.webhooks.UpdateWebhook, update)
        await hooks.attempted(webhook, 1)
    assert receiver.event_ids() == ["event_b", "event_before"]


async def test_what_waits_for_a_disabled_webhook_is_given_up_after_a_day(hooks: Hooks) -> None:
    webhook, _ = await hooks.create("https://example.com")
    enabled, _ = await hooks.create("https://example.com")
    await hooks.publish(*(platform_event(f"event_{number}") for number in range(5)))
    update = pb.UpdateWebhookRequest(
        organization_id="org_a", webhook_id=webhook.webhook_id, webhook=pb.Webhook(disabled=True)
    )
    await hooks.call(hooks.webhooks.UpdateWebhook, update)
    hooks.clock.advance(TRIED.total_seconds())
    await clean(hooks.event_store, hooks.store, hooks.clock, batch=2)
    assert len(await hooks.deliveries(webhook, PENDING)) == 5
    hooks.clock.advance(1)
    await clean(hooks.event_store, hooks.store, hooks.clock, batch=2)
    assert len(await hooks.deliveries(webhook, FAILED)) == 5
    assert len(await hooks.deliveries(enabled, PENDING)) == 5


async def test_removed_webhook_gets_nothing_of_what_waited(hooks: Hooks, receiver: WebhookReceiver) -> None:
    webhook, _ = await hooks.create(receiver.url)
    other, _ = await hooks.create(f"{receiver.url}/other", "org_b")
    await hooks.publish(platform_event(), platform_event("event_b", organization_id="org_b"))
    delete = pb.DeleteWebhookRequest(organization_id="org_a", webhook_id=webhook.webhook_id, etag="99")
    error = await hooks.refused(hooks.webhooks.DeleteWebhook, delete)
    assert (error.reason, error.field) == (Reason.FAILED_PRECONDITION, "etag")
    delete.etag = webhook.etag
    await hooks.call(hooks.webhooks.DeleteWebhook, delete)
    async with hooks.sending():
        await hooks.attempted(other, 1)
    assert receiver.event_ids() == ["event_b"]
    get = pb.GetWebhookRequest(organization_id="org_a", webhook_id=webhook.webhook_id)
    assert (await hooks.refused(hooks.webhooks.GetWebhook, get)).reason is Reason.NOT_FOUND


async def test_webhook_that_is_removed_while_it_is_sent_to_ends_quietly(
    hooks: Hooks, receiver: WebhookReceiver
) -> None:
    webhook, _ = await hooks.create(receiver.url)
    delete = pb.DeleteWebhookRequest(organization_id="org_a", webhook_id=webhook.webhook_id)

    async def remove() -> None:
        await hooks.call(hooks.webhooks.DeleteWebhook, delete)

    receiver.before = remove
    test = pb.TestWebhookRequest(organization_id="org_a", webhook_id=webhook.webhook_id)
    assert (await hooks.refused(hooks.webhooks.TestWebhook, test)).reason is Reason.NOT_FOUND
    assert len(receiver.received) == 1


async def test_deliveries_are_removed_after_30_days_unless_they_are_pending(
    hooks: Hooks, receiver: WebhookReceiver, database: Database
) -> None:
    webhook, _ = await hooks.create(receiver.url)
    await hooks.publish(*(platform_event(f"event_{number}") for number in range(5)))
    async with hooks.sending():
        await arrived(receiver, 5)

        async def are_noted() -> bool:
            return len(await hooks.deliveries(webhook, SUCCEEDED)) == 5

        await wait_until(are_noted, 10, "all are noted")
    await hooks.publish(platform_event("event_pending"))
    hooks.clock.advance(DELIVERIES_KEPT.total_seconds())
    await clean(hooks.event_store, hooks.store, hooks.clock, batch=2)
    assert len(await hooks.deliveries(webhook)) == 6
    hooks.clock.advance(1)
    await clean(hooks.event_store, hooks.store, hooks.clock, batch=2)
    rows = await database.fetch("SELECT event_id FROM webhook_deliveries")
    assert [row["event_id"] for row in rows] == ["event_pending"]
