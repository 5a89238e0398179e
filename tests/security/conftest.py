"""One whole platform for all tests of its security, with the worlds that they look into."""

from collections.abc import Iterator

import pytest
from anyio.from_thread import start_blocking_portal

from deploy.local.stack import Stack, running
from deploy.local.state import State
from tests.security.world import World, built


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The local stack, on a state folder of its own."""
    with (
        State.temporary() as state,
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(running(state)) as stack,
    ):
        yield stack


@pytest.fixture(scope="session")
def world(stack: Stack) -> Iterator[World]:
    """Two organizations with one of everything in each, and everybody who may try to reach it."""
    with start_blocking_portal() as portal:
        yield portal.call(built, stack)
