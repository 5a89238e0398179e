"""A router's domain between a test and two engines whose every answer is scripted."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from aiaas.router.v1.backend_service_pb2 import ENGINE_KIND_VLLM
from aiaas.type.v1.usage_event_pb2 import (
    ENDPOINT_CHAT_COMPLETIONS,
    ENDPOINT_EMBEDDINGS,
    ENDPOINT_RESPONSES,
    UsageEvent,
)
from mesh.auth import Principal
from mesh.clock import SystemClock
from mesh.errors import PlatformError
from mesh.scripts import Scripts
from router.answers import Head, InferenceRequest, Tail
from router.backends import Backend, BackendModel, Registry, RegistryContent
from router.health import HealthProber
from router.idempotency import Idempotency
from router.inference import Engine, Inference, Treasury
from router.journal import Journal
from router.journal_log import Change
from router.models import Model
from router.prices import Price
from router.rate_limits import Defaults, RateLimiter
from router.routing import Routing
from router.upstream import HttpUpstream, Timeouts
from router.usage import abort_event
from tests.doubles.reader import Part, QueueReader
from tests.doubles.scripted_backend import (
    ScriptedBackend,
)

PRINCIPAL = Principal("api_key", "key_1", "org_1", api_key_id="key_1", user_id="user_1")
MODEL = Model("m", aliases=("alias",), endpoints=(ENDPOINT_CHAT_COMPLETIONS, ENDPOINT_EMBEDDINGS, ENDPOINT_RESPONSES))
_LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
PRICE = Price("price_1", "m", 1_000_000, 500_000, 2_000_000, valid_from=_LONG_AGO, create_time=_LONG_AGO)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
STREAM = CHAT | {"stream": True}
EVENTS = "text/event-stream"


class StaticStore:
    """A registry's content without a database."""

    def __init__(self) -> None:
        self.content = RegistryContent(1, (MODEL,), (), (PRICE,))

    async def revision(self) -> int:
        return self.content.revision

    async def load(self) -> RegistryContent:
        return self.content


class WatchedJournal(Journal):
    """A journal that shows terminal events before they are on the disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 64 << 20, SystemClock(), abort_event)
        self.events: list[UsageEvent] = []

    def _put(self, change: Change) -> None:
        super()._put(change)
        if change.ended:
            self.events.append(UsageEvent.FromString(change.event))


class NoBudgets:
    """Nobody counts what is used."""

    async def reserve(self, *_: object) -> None:
        """Every request passes."""


class World:
    """Two scripted engines, and a router's domain in front of them."""

    def __init__(
        self, upstream: HttpUpstream, engines: tuple[ScriptedBackend, ScriptedBackend], journal: WatchedJournal
    ) -> None:
        self.first, self.second = engines
        self.journal = journal
        self.treasury: Treasury = NoBudgets()
        self.store = StaticStore()
        self.registry = Registry(self.store)
        self.prober = HealthProber(self.registry, upstream)
        self.idempotency = Idempotency(Scripts("redis://127.0.0.1:1", SystemClock()), "router-1")
        self.timeouts = Timeouts(connect_s=2, first_byte_s=5, answer_s=5, idle_s=5)
        self.upstream = upstream
        self.routing = Routing(Random(1), SystemClock())
        self.limit(Defaults(1e6, 1_000_000, 1000))
        self.backends = {
            name: Backend(name, engine.base_url, ENGINE_KIND_VLLM, models=(BackendModel("m", "up"),))
            for name, engine in (("first", self.first), ("second", self.second))
        }

    def limit(self, limits: Defaults) -> None:
        """Have a limiter that judges by itself, as its Redis is away."""
        self.limiter = RateLimiter(Scripts("redis://127.0.0.1:1", SystemClock()), SystemClock(), "router-1", limits)

    async def use(self, *backends: Backend, **more: Any) -> None:
        """Register exactly these backends, and learn of their health; `more` is what else there is."""
        content = {"models": (MODEL,), "prices": (PRICE,)} | more
        self.store.content = RegistryContent(self.store.content.revision + 1, backends=backends, **content)
        await self.registry.refresh()
        await self.prober.probe_all()

    def begin(self, body: dict[str, Any], /, **changes: Any) -> tuple[Inference, AsyncGenerator[Part, None]]:
        """An inference, and its parts, which run it."""
        engine = Engine(
            self.registry,
            self.routing,
            self.limiter,
            self.treasury,
            self.upstream,
            self.journal,
            SystemClock(),
            self.timeouts,
            "router-1",
            self.idempotency,
        )
        request = InferenceRequest("req_1", ENDPOINT_CHAT_COMPLETIONS, json.dumps(body).encode(), PRINCIPAL)
        reader = QueueReader()
        inference = engine.begin(msgspec.structs.replace(request, **changes), reader)
        return inference, reader.parts(inference)

    def parts(self, body: dict[str, Any], /, **changes: Any) -> AsyncGenerator[Part, None]:
        return self.begin(body, **changes)[1]

    async def answer(self, body: dict[str, Any], /, **changes: Any) -> tuple[Head, bytes, Tail]:
        parts = [part async for part in self.parts(body, **changes)]
        head, *data, tail = parts
        assert isinstance(head, Head)
        assert isinstance(tail, Tail)
        return head, b"".join(part for part in data if isinstance(part, bytes)), tail

    async def refusal(self, body: dict[str, Any], /, **changes: Any) -> PlatformError:
        """The error that comes before anything else does."""
        async with aclosing(self.parts(body, **changes)) as parts:
            with pytest.raises(PlatformError) as caught:
                await anext(parts)
        return caught.value

    async def broken(self, body: dict[str, Any], /, **changes: Any) -> tuple[bytes, PlatformError]:
        """What came of an answer that broke off, and how it did."""
        received: list[Part] = []

        async def read() -> None:
            async with aclosing(self.parts(body, **changes)) as parts:
                async for part in parts:
                    received.append(part)  # noqa: PERF401 - what came before the error is wanted

        with pytest.raises(PlatformError) as caught:
            await read()
        assert isinstance(received[0], Head)
        return b"".join(part for part in received if isinstance(part, bytes)), caught.value

    @property
    def events(self) -> list[UsageEvent]:
        """The terminal events so far."""
        return self.journal.events

    def event(self) -> UsageEvent:
        """The one usage event there must be."""
        assert len(self.events) == 1
        assert all(state.in_flight == 0 for _, state in self.registry.probe_targets())
        return self.events[0]


async def until(condition: Callable[[], bool], within_s: float = 2.0) -> None:
    """Returns as soon as `condition` holds."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)
