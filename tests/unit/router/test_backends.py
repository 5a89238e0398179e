"""The registry in memory, and what a router knows of a backend's health."""

import asyncio
from dataclasses import replace

import pytest

from aiaas.router.v1.backend_service_pb2 import ENGINE_KIND_VLLM
from aiaas.type.v1.usage_event_pb2 import ENDPOINT_CHAT_COMPLETIONS
from mesh.errors import PlatformError, Reason
from router.backends import Backend, BackendModel, BackendState, Registry, RegistryContent
from router.health import HealthProber
from router.http1 import UpstreamError
from router.models import Model

MODEL = Model("m", aliases=("alias",), endpoints=(ENDPOINT_CHAT_COMPLETIONS,))
BACKEND = Backend("b", "http://host", ENGINE_KIND_VLLM, models=(BackendModel("m"),))


class FlakyStore:
    """A store that can be away, and counts how often it was read."""

    def __init__(self) -> None:
        self.content = RegistryContent(1, (MODEL,), (BACKEND,))
        self.away = False
        self.loads = 0

    async def revision(self) -> int:
        if self.away:
            raise PlatformError(Reason.UNAVAILABLE)
        return self.content.revision

    async def load(self) -> RegistryContent:
        self.loads += 1
        return self.content

    def change(self, *backends: Backend) -> None:
        self.content = RegistryContent(self.content.revision + 1, (MODEL,), backends)


def test_backend_that_goes_on_answering_is_not_taken_out_by_probes_that_come_late() -> None:
    state = BackendState("busy")
    state.succeeded()
    for _ in range(5):
        state.failed("it was silent for too long")
        state.heard()
    assert state.healthy
    state.failed("it was silent for too long")
    state.failed("it was silent for too long")
    assert not state.healthy


async def test_content_is_read_once_for_each_revision() -> None:
    store = FlakyStore()
    registry = Registry(store)
    with pytest.raises(PlatformError):
        await registry.check_loaded()
    for _ in range(3):
        await registry.refresh()
    await registry.check_loaded()
    assert store.loads == 1
    assert registry.snapshot.find_model("alias", ()).model_id == "m"
    assert registry.snapshot.served["m"][0].upstream_model == "m"


async def test_last_known_content_serves_while_the_store_is_away() -> None:
    store = FlakyStore()
    registry = Registry(store, poll_s=0.01)
    task = asyncio.create_task(registry.run())
    await asyncio.wait_for(registry.changed.wait(), 2)
    store.away = True
    store.change(replace(BACKEND, backend_id="new"))
    with pytest.raises(PlatformError):
        await registry.refresh()
    assert list(registry.snapshot.backends) == ["b"]
    registry.changed.clear()
    store.away = False
    await asyncio.wait_for(registry.changed.wait(), 2)
    assert list(registry.snapshot.backends) == ["new"]
    assert registry.state("b") is None
    task.cancel()


async def test_health_outlasts_a_change_but_not_a_new_address() -> None:
    store = FlakyStore()
    registry = Registry(store)
    await registry.refresh()
    state = registry.state("b")
    assert state is not None
    state.succeeded()
    store.change(replace(BACKEND, weight=5))
    await registry.refresh()
    assert registry.state("b") is state
    store.change(replace(BACKEND, base_url="http://other"))
    await registry.refresh()
    moved = registry.state("b")
    assert moved is not None
    assert moved is not state
    assert not moved.healthy


def test_two_failures_take_a_backend_out_and_one_success_brings_it_back() -> None:
    state = BackendState("b")
    seen = []
    for reason in (None, "once", "twice", None, "once", None, "once again"):
        if reason is None:
            state.succeeded()
        else:
            state.failed(reason)
        seen.append((state.healthy, state.health_reason))
    assert seen == [(True, ""), (True, ""), (False, "twice"), (True, ""), (True, ""), (True, ""), (True, "")]


def test_backend_that_never_answered_is_unhealthy_at_once() -> None:
    state = BackendState("b")
    state.failed("it refused the connection")
    assert state.probed
    assert not state.healthy


async def test_prober_asks_new_backends_at_once_and_all_of_them_again() -> None:
    probed: asyncio.Queue[str] = asyncio.Queue()

    class Probe:
        async def probe(self, backend: Backend, timeout_s: float) -> None:
            probed.put_nowait(backend.backend_id)
            if backend.backend_id == "ill":
                raise UpstreamError("it answered /health with 503")

    store = FlakyStore()
    registry = Registry(store)
    await registry.refresh()
    prober = asyncio.create_task(HealthProber(registry, Probe(), interval_s=60).run())
    async with asyncio.timeout(2):
        assert await probed.get() == "b"
        store.change(BACKEND, replace(BACKEND, backend_id="ill"))
        await registry.refresh()
        assert {await probed.get(), await probed.get()} == {"b", "ill"}
    state = registry.state("ill")
    assert state is not None
    assert (state.healthy, state.health_reason) == (False, "it answered /health with 503")
    prober.cancel()
