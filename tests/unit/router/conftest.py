"""On which event loops the tests of the router run, and a router's domain before scripted engines."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop

from router.upstream import HttpUpstream
from tests.doubles.scripted_backend import ScriptedBackend
from tests.unit.router.world import WatchedJournal, World


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """What touches transports runs on both kinds: services on uvloop, tests of others on asyncio's own."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.path.name == "test_upstream.py":
        loops["uvloop"] = uvloop.new_event_loop
    return loops


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    credentials = {"AIAAS_ENGINE_KEY": "engine-secret"}
    journal = WatchedJournal(tmp_path / "journal")
    async with HttpUpstream(credentials) as upstream, ScriptedBackend() as first, ScriptedBackend() as second:
        made = World(upstream, (first, second), journal)
        await made.use(made.backends["first"])
        yield made
    await journal.close()
