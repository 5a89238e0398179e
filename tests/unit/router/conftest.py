"""On which event loops the tests of the router run."""

import asyncio
from collections.abc import Callable

import pytest
import uvloop


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """What touches transports runs on both kinds: services on uvloop, tests of others on asyncio's own."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.path.name == "test_upstream.py":
        loops["uvloop"] = uvloop.new_event_loop
    return loops
