"""Analytics on an empty database and an empty queue for each test."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from analytics.store import UsageStore
from mesh.broker import Broker
from mesh.database import Database
from mesh.migrate import migrate
from mesh.topology import EVENTS, USAGE


@pytest.fixture
async def database_url(postgres_url: str) -> str:
    """A database of analytics, migrated and empty."""
    await migrate(postgres_url, "analytics.migrations")
    return postgres_url


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The mesh's way to it."""
    database = Database(database_url)
    yield database
    await database.close()


@pytest.fixture
def store(database: Database) -> UsageStore:
    """The store on it."""
    return UsageStore(database)


@pytest.fixture
async def broker(amqp_url: str) -> AsyncIterator[Broker]:
    """The broker as a router has it."""
    broker = Broker(amqp_url, USAGE, EVENTS)
    yield broker
    await broker.close()


async def wait_until(condition: Callable[[], Awaitable[object]], within_s: float, what: str) -> float:
    """Polls until the condition holds, and returns the seconds that took."""
    start = time.monotonic()
    while time.monotonic() < start + within_s:
        if await condition():
            return time.monotonic() - start
        await asyncio.sleep(0.02)
    raise AssertionError(f"not within {within_s} s: {what}")
