"""Events and webhooks of analytics behind gRPC, and their sender; the clock stands still until a test moves it."""

import asyncio
import base64
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from aiaas.analytics.v1 import event_service_pb2, event_service_pb2_grpc, webhook_service_pb2, webhook_service_pb2_grpc
from aiaas.analytics.v1 import webhook_service_pb2 as pb
from aiaas.type.v1.platform_event_pb2 import PlatformEvent
from analytics.event_service import EventService
from analytics.event_store import EventStore
from analytics.platform_events import read_event
from analytics.webhook_sender import Poster, Sender
from analytics.webhook_service import WebhookService
from analytics.webhook_store import WebhookStore
from analytics.webhooks import LEASE, Webhooks
from mesh.auth import Principal
from mesh.database import Database
from mesh.errors import PlatformError, from_rpc_error
from mesh.interceptors import chain
from mesh.sealing import Seal
from mesh.server import GrpcServer
from tests.doubles.clock import ManualClock
from tests.doubles.usage_events import NOW
from tests.doubles.webhook_receiver import WebhookReceiver

T = TypeVar("T")

SECRET_KEY = base64.b64encode(bytes(range(32))).decode()
PERMISSIONS = frozenset(
    f"{resource}.{verb}"
    for resource, verbs in {
        "events": ("list", "get"),
        "webhooks": ("create", "get", "list", "update", "delete", "rotate", "test"),
        "webhook_deliveries": ("list", "retry"),
    }.items()
    for verb in verbs
)


class Authenticated:
    """Takes a credential for the id of its organization; "platform" may act on all."""

    async def authenticate(self, credential: str) -> Principal:
        return Principal("user", "user_a", credential, permissions=PERMISSIONS, platform=credential == "platform")


@dataclass
class Hooks:
    """Stubs whose calls carry the credential of an organization, and what is behind them."""

    webhooks: webhook_service_pb2_grpc.WebhookServiceStub
    events: event_service_pb2_grpc.EventServiceStub
    event_store: EventStore
    store: WebhookStore
    sender: Sender
    poster: Poster
    clock: ManualClock

    async def call(self, method: Callable[..., Awaitable[T]], request: object, credential: str = "org_a") -> T:
        """The answer to a call."""
        return await method(request, metadata=(("authorization", f"Bearer {credential}"),), timeout=10)

    async def refused(
        self, method: Callable[..., Awaitable[Any]], request: object, credential: str = "org_a"
    ) -> PlatformError:
        """The error of a call that must fail."""
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.call(method, request, credential)
        return from_rpc_error(raised.value)

    async def create(self, url: str, organization_id: str = "org_a", **fields: Any) -> tuple[pb.Webhook, str]:
        """A new webhook and its secret."""
        wanted = pb.Webhook(**{"display_name": "Hook", "url": url, **fields})
        request = pb.CreateWebhookRequest(organization_id=organization_id, webhook=wanted)
        answer = await self.call(self.webhooks.CreateWebhook, request, organization_id)
        return answer.webhook, answer.secret

    async def publish(self, *events: PlatformEvent) -> None:
        """Keep events as the consumer does."""
        now = self.clock.now()
        await self.event_store.add([read_event(event.SerializeToString(), now) for event in events], now)
        self.sender.wake()

    async def deliveries(
        self, webhook: pb.Webhook, state: pb.WebhookDeliveryState.ValueType = pb.WEBHOOK_DELIVERY_STATE_UNSPECIFIED
    ) -> list[pb.WebhookDelivery]:
        """The deliveries of a webhook."""
        request = pb.ListWebhookDeliveriesRequest(
            organization_id=webhook.organization_id, webhook_id=webhook.webhook_id, page_size=500, state=state
        )
        answer = await self.call(self.webhooks.ListWebhookDeliveries, request, webhook.organization_id)
        return list(answer.webhook_deliveries)

    async def get(self, webhook: pb.Webhook) -> pb.Webhook:
        """A webhook as it is now."""
        request = pb.GetWebhookRequest(organization_id=webhook.organization_id, webhook_id=webhook.webhook_id)
        return (await self.call(self.webhooks.GetWebhook, request, webhook.organization_id)).webhook

    async def attempted(self, webhook: pb.Webhook, attempts: int) -> pb.WebhookDelivery:
        """The only delivery of a webhook, once so many attempts are over."""
        found: list[pb.WebhookDelivery] = []

        async def is_over() -> bool:
            found[:] = await self.deliveries(webhook)
            if len(found) != 1 or found[0].attempts != attempts:
                return False
            # While it is under way it is due again when the lease ends.
            lease_end = found[0].attempt_time.ToDatetime() + LEASE
            return found[0].next_attempt_time.ToDatetime() != lease_end

        await wait_until(is_over, 10, f"{attempts} attempts are over")
        return found[0]

    async def later(self, seconds: float) -> None:
        """Let time pass, and have the sender notice."""
        self.clock.advance(seconds)
        self.sender.wake()

    @asynccontextmanager
    async def sending(self, *senders: Sender) -> AsyncIterator[None]:
        """Senders that run, ours unless told, for the length of the block."""
        tasks = [asyncio.create_task(sender.run()) for sender in senders or [self.sender]]
        try:
            yield
            assert not any(task.done() for task in tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def another_sender(self, store: WebhookStore | None = None, key: str = SECRET_KEY) -> Sender:
        """A sender as another process has it."""
        return Sender(store or self.store, self.poster, Seal(key), self.clock, random.Random(2))


async def arrived(receiver: WebhookReceiver, number: int, within_s: float = 10) -> None:
    """Returns once so many requests are there, and no more."""

    async def have_arrived() -> bool:
        return len(receiver.received) >= number

    await wait_until(have_arrived, within_s, f"{number} requests arrive")
    assert len(receiver.received) == number


@asynccontextmanager
async def serving(database: Database, folder: Path, *, allow_private: bool = True) -> AsyncIterator[Hooks]:
    """Both services on a socket, behind the interceptors of production."""
    clock = ManualClock(NOW + timedelta(seconds=1))
    events, store, seal = EventStore(database), WebhookStore(database), Seal(SECRET_KEY)
    address = f"unix:{folder}/analytics"
    async with Poster(allow_private=allow_private) as poster:
        sender = Sender(store, poster, seal, clock, random.Random(1))
        webhooks = Webhooks(store, events, seal, clock, allow_private=allow_private, send=sender.send, wake=sender.wake)
        server = GrpcServer(
            address,
            [
                (
                    event_service_pb2.DESCRIPTOR.services_by_name["EventService"],
                    event_service_pb2_grpc.add_EventServiceServicer_to_server,
                    EventService(events, clock),
                ),
                (
                    webhook_service_pb2.DESCRIPTOR.services_by_name["WebhookService"],
                    webhook_service_pb2_grpc.add_WebhookServiceServicer_to_server,
                    WebhookService(webhooks),
                ),
            ],
            chain(Authenticated()),
            drain_s=1,
        )
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            yield Hooks(
                webhook_service_pb2_grpc.WebhookServiceStub(channel),
                event_service_pb2_grpc.EventServiceStub(channel),
                events,
                store,
                sender,
                poster,
                clock,
            )
        await server.stop()


async def wait_until(condition: Callable[[], Awaitable[object]], within_s: float, what: str) -> float:
    """Polls until the condition holds, and returns the seconds that took."""
    start = time.monotonic()
    while time.monotonic() < start + within_s:
        if await condition():
            return time.monotonic() - start
        await asyncio.sleep(0.02)
    raise AssertionError(f"not within {within_s} s: {what}")
