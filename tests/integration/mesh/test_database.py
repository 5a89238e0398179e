"""The pool of PostgreSQL connections: outages are UNAVAILABLE, and it heals."""

import asyncio
import os
import signal
import time

import asyncpg
import pytest

from mesh.database import Database
from mesh.errors import PlatformError, Reason
from tests.conftest import Servers


async def test_transaction_is_rolled_back_by_an_exception(postgres_url: str) -> None:
    database = Database(postgres_url)
    await database.execute("CREATE TABLE t (n int PRIMARY KEY)")
    with pytest.raises(RuntimeError, match="stop"):
        async with database.transaction() as connection:
            await connection.execute("INSERT INTO t VALUES (1)")
            raise RuntimeError("stop")
    assert await database.fetchval("SELECT count(*) FROM t") == 0
    await database.close()


async def test_what_postgresql_says_of_a_statement_stays_its_own_exception(postgres_url: str) -> None:
    database = Database(postgres_url)
    await database.execute("CREATE TABLE t (n int PRIMARY KEY)")
    await database.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(asyncpg.UniqueViolationError):
        await database.execute("INSERT INTO t VALUES (1)")
    await database.close()


async def test_absent_server_is_unavailable() -> None:
    database = Database("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(PlatformError) as error:
        await database.check()
    assert error.value.reason is Reason.UNAVAILABLE


async def test_pool_heals_within_five_seconds_of_a_crash(servers: Servers, postgres_url: str) -> None:
    database = Database(postgres_url)
    await asyncio.gather(*(database.check() for _ in range(5)))
    os.killpg(servers.pid(servers.postgres), signal.SIGKILL)
    with pytest.raises(PlatformError) as error:
        for _ in range(20):
            await database.check()
            await asyncio.sleep(0.01)
    assert error.value.reason is Reason.UNAVAILABLE
    await servers.ready(servers.postgres)
    started = time.monotonic()
    while True:
        try:
            await database.check()
            break
        except PlatformError:
            assert time.monotonic() - started < 5
            await asyncio.sleep(0.05)
    await database.close()


async def test_exhausted_pool_is_unavailable_and_recovers(postgres_url: str) -> None:
    database = Database(postgres_url, max_size=1)
    async with database.transaction():
        with pytest.raises(PlatformError) as error:
            await database.check()
    assert error.value.reason is Reason.UNAVAILABLE
    await database.check()
    await database.close()
