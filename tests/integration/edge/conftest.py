"""The doubles of the edge's peers and an edge in front of them, on the event loop that the edge runs on."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import Edge, running_edge


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def peers() -> AsyncIterator[dict[str, PeerDouble]]:
    """Doubles of all peers, by name."""
    with tempfile.TemporaryDirectory(prefix="edge-") as folder:
        doubles = {name: PeerDouble(f"unix:{Path(folder) / name}") for name in ("identity", "router", "analytics")}
        for double in doubles.values():
            await double.start()
        try:
            yield doubles
        finally:
            for double in doubles.values():
                await double.stop()


@pytest.fixture
def router(peers: dict[str, PeerDouble]) -> PeerDouble:
    return peers["router"]


@pytest.fixture
def identity(peers: dict[str, PeerDouble]) -> PeerDouble:
    return peers["identity"]


@pytest.fixture
def analytics(peers: dict[str, PeerDouble]) -> PeerDouble:
    return peers["analytics"]


@pytest.fixture
async def edge(peers: dict[str, PeerDouble]) -> AsyncIterator[Edge]:
    async with running_edge(peers) as running:
        yield running
