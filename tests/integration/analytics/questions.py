"""Two organizations' usage, and stubs of the services that answer questions about it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.analytics.v1 import (
    reliability_service_pb2,
    reliability_service_pb2_grpc,
    spend_service_pb2,
    spend_service_pb2_grpc,
    usage_service_pb2_grpc,
)
from aiaas.analytics.v1 import usage_service_pb2 as pb
from aiaas.type.v1.usage_event_pb2 import Endpoint, Outcome, PriceSnapshot, TokenUsage, UsageEvent
from analytics.charges import cost_micros
from analytics.events import read_event
from analytics.reliability_service import ReliabilityService
from analytics.spend_service import SpendService
from analytics.store import UsageStore
from analytics.sums_store import SumsStore
from analytics.usage_service import UsageService
from mesh.auth import Principal
from mesh.database import Database
from mesh.errors import PlatformError, from_rpc_error
from mesh.interceptors import chain
from mesh.server import GrpcServer
from tests.doubles.clock import ManualClock
from tests.doubles.usage_events import NOW, usage_event

START = NOW - timedelta(days=60)
DIMENSIONS: dict[pb.UsageDimension.ValueType, Callable[[UsageEvent], str]] = {
    pb.USAGE_DIMENSION_API_KEY: lambda event: event.api_key_id,
    pb.USAGE_DIMENSION_USER: lambda event: event.user_id,
    pb.USAGE_DIMENSION_SERVICE_ACCOUNT: lambda event: event.service_account_id,
    pb.USAGE_DIMENSION_MODEL: lambda event: event.model,
    pb.USAGE_DIMENSION_BACKEND: lambda event: event.backend_id,
    pb.USAGE_DIMENSION_ENDPOINT: lambda event: Endpoint.Name(event.endpoint),
    pb.USAGE_DIMENSION_OUTCOME: lambda event: Outcome.Name(event.outcome),
}
FILTERS: list[tuple[dict[str, Any], Callable[[UsageEvent], bool]]] = [
    ({"api_key_ids": ["key_0", "key_1"]}, lambda event: event.api_key_id in ("key_0", "key_1")),
    ({"user_ids": [""]}, lambda event: event.user_id == ""),
    ({"service_account_ids": ["sa_1"]}, lambda event: event.service_account_id == "sa_1"),
    ({"models": ["model-2"]}, lambda event: event.model == "model-2"),
    ({"backend_ids": ["backend-1"]}, lambda event: event.backend_id == "backend-1"),
    ({"endpoints": [Endpoint.ENDPOINT_EMBEDDINGS]}, lambda event: event.endpoint == Endpoint.ENDPOINT_EMBEDDINGS),
    ({"outcomes": [Outcome.OUTCOME_FAILED]}, lambda event: event.outcome == Outcome.OUTCOME_FAILED),
    (
        {"models": ["model-1"], "outcomes": [Outcome.OUTCOME_SUCCEEDED]},
        lambda event: event.model == "model-1" and event.outcome == Outcome.OUTCOME_SUCCEEDED,
    ),
    ({"models": ["'; DROP TABLE usage_hourly; --"]}, lambda event: False),
]
PRICE = PriceSnapshot(
    price_id="price_1",
    prompt_micros_per_million=150_000,
    cached_prompt_micros_per_million=75_000,
    completion_micros_per_million=600_001,
)
_PERMISSIONS = (
    "usage.query",
    "usage.list_records",
    "usage.explain",
    "spend.query",
    "spend.forecast",
    "reliability.query",
)


class Authenticated:
    """Takes a credential for the id of its organization."""

    async def authenticate(self, credential: str) -> Principal:
        permissions = frozenset(() if credential == "nothing" else _PERMISSIONS)
        return Principal("user", "user_a", credential, user_id="user_a", permissions=permissions)


@dataclass
class Asked:
    """Stubs, and what is behind them."""

    usage: usage_service_pb2_grpc.UsageServiceStub
    spend: spend_service_pb2_grpc.SpendServiceStub
    reliability: reliability_service_pb2_grpc.ReliabilityServiceStub
    store: UsageStore
    clock: ManualClock

    async def insert(self, *events: UsageEvent) -> None:
        """Count events."""
        await self.store.insert_events([read_event(event.SerializeToString(), NOW) for event in events])

    @staticmethod
    async def answer(rpc: Any, request: Any, credential: str = "org_a") -> Any:
        """The answer to a call with the credential of an organization."""
        return await rpc(request, metadata=(("authorization", f"Bearer {credential}"),), timeout=10)

    async def refusal(self, rpc: Any, request: Any, credential: str = "org_a") -> PlatformError:
        """The error of a call that must fail."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.answer(rpc, request, credential)
        return from_rpc_error(caught.value)

    async def pages(self, rpc: Any, request: Any, page_size: int) -> tuple[list[Any], list[Any]]:
        """All buckets of all pages, and the pages."""
        buckets, pages = [], []
        while True:
            page = await self.answer(rpc, request.__class__.FromString(request.SerializeToString()))
            pages.append(page)
            buckets += page.buckets
            if not page.next_page_token:
                return buckets, pages
            assert len(page.buckets) == page_size
            request.page_token = page.next_page_token


@asynccontextmanager
async def asking(database: Database, folder: Path) -> AsyncIterator[Asked]:
    """The services on a socket, behind the interceptors of production."""
    store, sums, clock = UsageStore(database), SumsStore(database), ManualClock(NOW)
    address = f"unix:{folder}/analytics"
    services: list[tuple[Any, Any, Any]] = [
        (
            pb.DESCRIPTOR.services_by_name["UsageService"],
            usage_service_pb2_grpc.add_UsageServiceServicer_to_server,
            UsageService(store, sums, clock),
        ),
        (
            spend_service_pb2.DESCRIPTOR.services_by_name["SpendService"],
            spend_service_pb2_grpc.add_SpendServiceServicer_to_server,
            SpendService(store, sums, clock),
        ),
        (
            reliability_service_pb2.DESCRIPTOR.services_by_name["ReliabilityService"],
            reliability_service_pb2_grpc.add_ReliabilityServiceServicer_to_server,
            ReliabilityService(store, sums, clock),
        ),
    ]
    server = GrpcServer(address, services, chain(Authenticated()), drain_s=1)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield Asked(
                usage_service_pb2_grpc.UsageServiceStub(channel),
                spend_service_pb2_grpc.SpendServiceStub(channel),
                reliability_service_pb2_grpc.ReliabilityServiceStub(channel),
                store,
                clock,
            )
    finally:
        await server.stop()


def stamp(moment: datetime) -> Timestamp:
    """A moment as it travels."""
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


def moment(timestamp: Timestamp) -> datetime:
    """A moment that travelled."""
    return timestamp.ToDatetime(UTC)


def many_events(count: int = 500, days: int = 60) -> list[UsageEvent]:
    """Two organizations' usage of the last days, of every kind."""
    source = random.Random(3)
    events = []
    for number in range(count):
        outcome = source.choice([*[Outcome.OUTCOME_SUCCEEDED] * 3, *Outcome.values()[2:]])
        succeeded, refused = outcome == Outcome.OUTCOME_SUCCEEDED, outcome == Outcome.OUTCOME_REFUSED
        usage = TokenUsage(
            prompt_tokens=number, cached_prompt_tokens=number // 3, completion_tokens=source.randrange(90)
        )
        events.append(
            usage_event(
                f"req_{number:03}",
                NOW - timedelta(days=days) + timedelta(seconds=source.randrange(days * 86_400)),
                organization_id=source.choice(["org_a", "org_a", "org_b"]),
                api_key_id=f"key_{source.randrange(3)}",
                user_id=source.choice(["", "user_a", "user_b"]),
                service_account_id=source.choice(["", "sa_1"]),
                model=f"model-{source.randrange(4)}",
                backend_id=source.choice(["", "backend-1", "backend-2"]),
                endpoint=source.choice([Endpoint.ENDPOINT_CHAT_COMPLETIONS, Endpoint.ENDPOINT_EMBEDDINGS]),
                outcome=outcome,
                reason="" if succeeded else source.choice(["backend_timeout", "rate_limit_exceeded"]),
                usage=None if refused else usage,
                price=PRICE,
                cost_micros=0 if refused else cost_micros(PRICE, usage),
                duration_micros=int(source.lognormvariate(13, 2)),
                ttft_micros=int(source.lognormvariate(10, 2)),
                streamed=source.random() < 0.5,
            )
        )
    return events


def own(events: Sequence[UsageEvent]) -> list[UsageEvent]:
    """Those of the organization that asks."""
    return [event for event in events if event.organization_id == "org_a"]


def within(events: Sequence[UsageEvent], start: datetime, end: datetime) -> list[UsageEvent]:
    """Those of a range."""
    return [event for event in events if start <= moment(event.admit_time) < end]
