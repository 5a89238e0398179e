"""Webhooks: what they may be, how they change, and what becomes of their deliveries; it never sends one itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import TYPE_CHECKING

from aiaas.type.v1.platform_event_pb2 import EventType, PlatformEvent
from analytics import platform_events, webhook_secrets
from mesh import addresses, fields
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.pages import TimePlace
from mesh.sealing import Seal
from mesh.updates import check_etag

if TYPE_CHECKING:
    from analytics.event_store import EventStore
    from analytics.webhook_store import WebhookRows, WebhookStore

CHANGEABLE = ("display_name", "url", "types", "disabled")
"""What an update may change."""

TRIED = timedelta(hours=24)
"""How long a delivery is tried before it is given up."""

LEASE = timedelta(seconds=30)
"""How long whoever sends a delivery has before another may take it to be lost; an attempt ends within a third of it."""

DELIVERIES_KEPT = timedelta(days=30)
"""How long a delivery is kept."""

_NEVER = datetime.fromtimestamp(0, UTC)
_OVERLAP = timedelta(days=7)
_WEBHOOKS_PER_ORGANIZATION = 50


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where events are sent: those of `types` (numbers of EventType), or all if there are none."""

    webhook_id: str
    organization_id: str
    display_name: str
    url: str
    types: tuple[int, ...] = ()
    disabled: bool = False
    success_time: datetime | None = None
    failure_time: datetime | None = None
    create_time: datetime = _NEVER
    update_time: datetime = _NEVER
    revision: int = field(default=1, compare=False)


@dataclass(frozen=True, slots=True)
class SealedSecrets:
    """The secret that signs deliveries, and the one before it, which does until its end; both are encrypted."""

    current: bytes = field(repr=False)
    previous: bytes | None = field(default=None, repr=False)
    previous_end_time: datetime | None = None

    def at(self, now: datetime) -> list[bytes]:
        """Those that sign at `now`."""
        if self.previous is None or self.previous_end_time is None or self.previous_end_time <= now:
            return [self.current]
        return [self.current, self.previous]


class DeliveryState(IntEnum):
    """Where a delivery is in its life, numbered as in the contract."""

    PENDING = 1
    SUCCEEDED = 2
    FAILED = 3


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event on its way to one webhook. It is tried since `start_time`, and next at `due_time` while pending."""

    webhook_delivery_id: str
    webhook_id: str
    event_id: str
    state: DeliveryState
    attempts: int
    http_status: int
    failure_reason: str
    create_time: datetime
    attempt_time: datetime | None
    start_time: datetime
    due_time: datetime


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A delivery and all that is needed to send it; `event` is the serialized PlatformEvent."""

    delivery: Delivery
    url: str
    secrets: SealedSecrets
    event: bytes


Send = Callable[[Outgoing], Awaitable[Delivery | None]]
"""Sends a delivery once and notes what came of it; returns it as noted, None if it is gone."""


class Webhooks:
    """The operations on webhooks and deliveries. `allow_private` allows http and private networks; `wake` is told
    when there is something to send."""

    def __init__(
        self,
        store: WebhookStore,
        events: EventStore,
        seal: Seal,
        clock: Clock,
        *,
        allow_private: bool,
        send: Send,
        wake: Callable[[], None],
    ) -> None:
        self._store = store
        self._events = events
        self._seal = seal
        self._clock = clock
        self._allow_private = allow_private
        self._send = send
        self._wake = wake

    async def create(self, wanted: Webhook, request_id: str) -> tuple[Webhook, str]:
        """Make a webhook of `wanted.organization_id`; gives it and its secret's text, which is shown this once.

        Raises PlatformError: INVALID_ARGUMENT, ALREADY_EXISTS for a `request_id` that has made one,
        FAILED_PRECONDITION where there are enough.
        """
        fields.check_request_id(request_id)
        self._check(wanted)
        now = self._clock.now()
        webhook_id = new_id("webhook", clock=self._clock)
        new = replace(wanted, webhook_id=webhook_id, create_time=now, update_time=now)
        secret = webhook_secrets.new_secret()
        async with self._store.transaction() as stored:
            # Whoever repeats a request hears of that first.
            number = await stored.count(new.organization_id)
            if not await stored.add(new, self._seal.close(secret, webhook_id), request_id):
                raise PlatformError(
                    Reason.ALREADY_EXISTS,
                    field="request_id",
                    description="'request_id' has made a webhook already, and a secret cannot be shown twice.",
                )
            if number >= _WEBHOOKS_PER_ORGANIZATION:
                raise PlatformError(
                    Reason.FAILED_PRECONDITION,
                    description=f"An organization has at most {_WEBHOOKS_PER_ORGANIZATION} webhooks.",
                )
        return new, webhook_secrets.as_text(secret)

    async def get(self, organization_id: str, webhook_id: str) -> Webhook:
        """One webhook. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            return await _existing(stored, organization_id, webhook_id)

    async def list(self, organization_id: str, after: TimePlace | None, limit: int) -> Sequence[Webhook]:
        """Up to `limit` webhooks that come after `after`, oldest first."""
        async with self._store.transaction() as stored:
            return await stored.page(organization_id, after, limit)

    async def update(self, wanted: Webhook, changed: Collection[str], etag: str) -> Webhook:
        """Change the fields `changed` of a webhook to the values of `wanted`.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, FAILED_PRECONDITION for another etag.
        """
        async with self._store.transaction() as stored:
            current = await _existing(stored, wanted.organization_id, wanted.webhook_id, lock=True)
            check_etag(etag, current.revision, "webhook.etag")
            new = replace(current, **{name: getattr(wanted, name) for name in changed})
            self._check(new)
            if new == current:
                return current
            updated = await stored.change(replace(new, update_time=self._clock.now()))
        # What waited for it to be enabled may be due.
        self._wake()
        return updated

    async def delete(self, organization_id: str, webhook_id: str, etag: str) -> None:
        """Remove a webhook and what waits to be sent there. Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION."""
        async with self._store.transaction() as stored:
            current = await _existing(stored, organization_id, webhook_id, lock=True)
            check_etag(etag, current.revision, "etag")
            await stored.remove(organization_id, webhook_id)

    async def rotate(self, organization_id: str, webhook_id: str, overlap: timedelta) -> tuple[Webhook, str]:
        """Make a new secret; the one before signs too for the overlap. Gives the webhook and the new secret's text.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT.
        """
        if not timedelta() <= overlap <= _OVERLAP:
            raise fields.invalid("overlap", f"must be 0 to {_OVERLAP.days} days")
        now = self._clock.now()
        secret = webhook_secrets.new_secret()
        async with self._store.transaction() as stored:
            current = await _existing(stored, organization_id, webhook_id, lock=True)
            sealed = self._seal.close(secret, webhook_id)
            end_time = now + overlap if overlap else None
            rotated = await stored.change_secret(replace(current, update_time=now), sealed, end_time)
        return rotated, webhook_secrets.as_text(secret)

    async def test(self, organization_id: str, webhook_id: str) -> Delivery:
        """Send a WEBHOOK_TESTED event at once, and once; gives the delivery with what came back.

        Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION for a webhook that is disabled.
        """
        webhook = await self.get(organization_id, webhook_id)
        if webhook.disabled:
            raise PlatformError(Reason.FAILED_PRECONDITION, description="The webhook is disabled.")
        now = self._clock.now()
        event = _test_event(webhook, now, new_id("event", clock=self._clock))
        # Its time is over with the first attempt; one that dies with this process is made up for after the lease.
        delivery_id = await self._events.add_for(event, webhook_id, now, start_time=now - TRIED, due_time=now + LEASE)
        outgoing = None if delivery_id is None else await self._store.claim(delivery_id, now, now + LEASE)
        delivery = None if outgoing is None else await self._send(outgoing)
        if delivery is None:
            raise PlatformError(Reason.NOT_FOUND)
        return delivery

    async def list_deliveries(
        self,
        organization_id: str,
        webhook_id: str,
        before: TimePlace | None,
        limit: int,
        *,
        state: DeliveryState | None,
    ) -> Sequence[Delivery]:
        """Up to `limit` deliveries that come before `before`, newest first. Raises PlatformError(NOT_FOUND)."""
        since = self._clock.now() - DELIVERIES_KEPT
        async with self._store.transaction() as stored:
            await _existing(stored, organization_id, webhook_id)
            return await stored.deliveries(webhook_id, since, before, limit, state=state)

    async def retry(self, organization_id: str, webhook_id: str, delivery_id: str) -> Delivery:
        """Send a failed delivery again, for as long as a new one is tried.

        Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION for one that has not failed.
        """
        async with self._store.transaction() as stored:
            await _existing(stored, organization_id, webhook_id)
            state = await stored.delivery_state(webhook_id, delivery_id)
            if state is None:
                raise PlatformError(Reason.NOT_FOUND)
            if state is not DeliveryState.FAILED:
                raise PlatformError(Reason.FAILED_PRECONDITION, description="Only a failed delivery can be sent again.")
            delivery = await stored.start_again(webhook_id, delivery_id, self._clock.now())
        self._wake()
        return delivery

    def _check(self, webhook: Webhook) -> None:
        fields.check_display_name(webhook.display_name, "webhook.display_name")
        if wrong := addresses.wrong_with(webhook.url, allow_private=self._allow_private):
            raise fields.invalid("webhook.url", wrong)
        platform_events.check_types(webhook.types, "webhook.types")


async def _existing(stored: WebhookRows, organization_id: str, webhook_id: str, *, lock: bool = False) -> Webhook:
    webhook = await stored.get(organization_id, webhook_id, lock=lock)
    if webhook is None:
        raise PlatformError(Reason.NOT_FOUND)
    return webhook


def _test_event(webhook: Webhook, now: datetime, event_id: str) -> platform_events.Event:
    message = PlatformEvent(
        schema_version=platform_events.SCHEMA_VERSION,
        event_id=event_id,
        type=EventType.EVENT_TYPE_WEBHOOK_TESTED,
        organization_id="" if webhook.organization_id == platform_events.PLATFORM else webhook.organization_id,
        summary=f"Somebody tests the webhook {webhook.display_name}.",
    )
    message.event_time.FromDatetime(now)
    return platform_events.read_event(message.SerializeToString(), now)
