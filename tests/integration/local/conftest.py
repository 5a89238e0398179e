"""A state folder of its own and a supervisor for each test of the local stack."""

from collections.abc import AsyncIterator, Iterator

import pytest

from deploy.local.state import State
from deploy.local.supervisor import Event, Supervisor


@pytest.fixture
def state() -> Iterator[State]:
    with State.temporary() as state:
        yield state


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
async def supervisor(state: State, events: list[Event]) -> AsyncIterator[Supervisor]:
    async with Supervisor(state, events.append) as supervisor:
        yield supervisor
