"""Analytics on an empty database and an empty queue for each test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from analytics.store import UsageStore
from mesh.broker import Broker
from mesh.database import Database
from mesh.topology import EVENTS, USAGE
from tests.conftest import Servers, migrated_database
from tests.doubles.webhook_receiver import WebhookReceiver
from tests.integration.analytics.harness import Hooks, serving


@pytest.fixture
async def database_url(servers: Servers) -> AsyncIterator[str]:
    """A database of analytics, migrated and empty."""
    async with migrated_database(servers, "analytics.migrations") as url:
        yield url


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


@pytest.fixture
async def hooks(database: Database, tmp_path: Path) -> AsyncIterator[Hooks]:
    """A running analytics and a short way to its webhooks."""
    async with serving(database, tmp_path) as hooks:
        yield hooks


@pytest.fixture
async def receiver() -> AsyncIterator[WebhookReceiver]:
    """A server that takes deliveries."""
    async with WebhookReceiver() as receiver:
        yield receiver
