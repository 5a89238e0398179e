"""The pool of PostgreSQL connections: outages are UNAVAILABLE, and it heals."""

import asyncio
import os
import signal
import time
from contextlib import suppress

import asyncpg
import pytest

from mesh.database import Database
from mesh.errors import PlatformError, Reason
from tests.conftest import Servers


async def test_transaction_is_rolled_back_by_an_exception(postgres_url: str) -> None:
    database = Database(postgres_url)
    await database.execute("CREATE TABLE t (n int PRIMARY KEY)")

    async def insert_and_fail() -> None:
        async with database.transaction() as connection:
            await connection.execute("INSERT INTO t VALUES (1)")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        await insert_and_fail()
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


async def healed(database: Database) -> float:
    """Seconds until PostgreSQL answers again."""
    started = time.monotonic()
    while time.monotonic() - started < 10:
        with suppress(PlatformError):
            await database.check()
            return time.monotonic() - started
        await asyncio.sleep(0.05)
    raise AssertionError("it did not heal")


async def test_pool_heals_within_five_seconds_of_a_crash(servers: Servers, postgres_url: str) -> None:
    database = Database(postgres_url)
    await asyncio.gather(*(database.check() for _ in range(5)))
    os.killpg(servers.pid(servers.postgres), signal.SIGKILL)

    async def use() -> None:
        # A backend may live a moment longer than the server.
        while True:
            await database.check()
            await asyncio.sleep(0.01)

    with pytest.raises(PlatformError) as error:
        await asyncio.wait_for(use(), 5)
    assert error.value.reason is Reason.UNAVAILABLE
    await servers.ready(servers.postgres)
    assert await healed(database) < 5
    await database.close()


async def test_crash_within_a_transaction_is_unavailable_and_leaves_nothing(
    servers: Servers, postgres_url: str
) -> None:
    database = Database(postgres_url)
    await database.execute("CREATE TABLE t (n int)")

    async def insert_on_and_on() -> None:
        async with database.transaction() as connection:
            await connection.execute("INSERT INTO t VALUES (1)")
            os.killpg(servers.pid(servers.postgres), signal.SIGKILL)
            while True:
                await connection.execute("INSERT INTO t VALUES (2)")
                await asyncio.sleep(0.01)

    with pytest.raises(PlatformError) as error:
        await insert_on_and_on()
    assert error.value.reason is Reason.UNAVAILABLE
    await servers.ready(servers.postgres)
    await healed(database)
    assert await database.fetchval("SELECT count(*) FROM t") == 0
    await database.close()


async def test_connection_lost_in_the_middle_of_statements_is_unavailable(servers: Servers, postgres_url: str) -> None:
    database = Database(postgres_url)

    async def work(number: int) -> None:
        async with database.transaction() as connection:
            while True:
                await connection.fetchval("SELECT pg_sleep($1)", 0.01 * (number % 3))

    working = [asyncio.create_task(work(number)) for number in range(8)]
    await asyncio.sleep(0.3)
    os.killpg(servers.pid(servers.postgres), signal.SIGKILL)
    outcomes = await asyncio.gather(*working, return_exceptions=True)
    assert [getattr(outcome, "reason", outcome) for outcome in outcomes] == [Reason.UNAVAILABLE] * 8
    await servers.ready(servers.postgres)
    assert await healed(database) < 5
    await database.close()


async def test_terminated_connection_is_unavailable_once(postgres_url: str) -> None:
    database, other = Database(postgres_url, max_size=1), Database(postgres_url)
    backend = await database.fetchval("SELECT pg_backend_pid()")

    async def use() -> None:
        async with database.transaction() as connection:
            await other.fetchval("SELECT pg_terminate_backend($1)", backend)
            await connection.fetchval("SELECT 1")

    with pytest.raises(PlatformError) as error:
        await use()
    assert error.value.reason is Reason.UNAVAILABLE
    await database.check()
    await database.close()
    await other.close()


async def test_suspended_server_is_unavailable_within_the_command_timeout(servers: Servers, postgres_url: str) -> None:
    database = Database(postgres_url, max_size=2, command_timeout_s=0.5)
    await database.check()
    backend = await database.fetchval("SELECT pg_backend_pid()")
    os.kill(backend, signal.SIGSTOP)
    try:
        async with asyncio.timeout(5):
            with pytest.raises(PlatformError) as error:
                await database.check()
    finally:
        os.kill(backend, signal.SIGCONT)
    assert error.value.reason is Reason.UNAVAILABLE
    await healed(database)
    await database.close()


async def test_cancelled_statement_gives_its_connection_back(postgres_url: str) -> None:
    database = Database(postgres_url, max_size=1)
    for _ in range(5):
        task = asyncio.create_task(database.execute("SELECT pg_sleep(60)"))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await database.check()
    await database.close()


async def test_exhausted_pool_is_unavailable_and_recovers(postgres_url: str) -> None:
    database = Database(postgres_url, max_size=1)
    async with database.transaction():
        with pytest.raises(PlatformError) as error:
            await database.check()
    assert error.value.reason is Reason.UNAVAILABLE
    await database.check()
    await database.close()
