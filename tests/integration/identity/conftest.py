"""identity on a real PostgreSQL, one new database for each test."""

import functools
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from identity.passwords import Passwords
from tests.conftest import Servers, migrated_database
from tests.integration.identity.auditing import Sql
from tests.integration.identity.budgeting import Ledger, ledger_of
from tests.integration.identity.harness import Identity, running_identity
from tests.integration.identity.leasing import UNBALANCED, UNTOLD, Router


@pytest.fixture(autouse=True)
def passwords_cost_little(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes take no quarter of a second, but where it is looked at what they cost."""
    if "real_cost" not in request.fixturenames:
        monkeypatch.setattr("identity.server.Passwords", functools.partial(Passwords, cost=4))


@pytest.fixture
def real_cost() -> None:
    """For tests of what hashes cost."""


@pytest.fixture
async def database_url(servers: Servers) -> AsyncIterator[str]:
    """A database of identity, migrated and empty."""
    async with migrated_database(servers, "identity.migrations") as url:
        yield url


@pytest.fixture
async def sql(database_url: str) -> AsyncIterator[Sql]:
    """Somebody who may do anything in the database."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def identity(database_url: str, tmp_path: Path) -> AsyncIterator[Identity]:
    """A running identity."""
    async with running_identity(database_url, tmp_path) as running:
        yield running


@pytest.fixture
async def ledger(database_url: str) -> AsyncIterator[Ledger]:
    """The running periods of the budgets."""
    async with ledger_of(database_url) as ledger:
        yield ledger


@pytest.fixture
async def organization_id(identity: Identity) -> str:
    """A new organization."""
    return await identity.organization()


@pytest.fixture
async def router(identity: Identity, ledger: Ledger) -> AsyncIterator[Router]:
    """A router that leases. Whatever a test has it do, periods, leases and the ledger say the same afterwards."""
    yield Router(identity)
    assert await ledger.fetch(UNBALANCED) == []
    assert await ledger.fetch(UNTOLD) == []
