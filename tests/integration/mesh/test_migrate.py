"""Migrations: each once, in order, never marked when it failed, and unchanged ever after."""

import asyncio
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import asyncpg
import pytest

from mesh.migrate import MigrationError, migrate

Package = Callable[[Mapping[str, str]], str]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """Writes SQL files into a package and gives its name."""
    name = f"migrations_{tmp_path.name.replace('-', '_')}"
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(files: Mapping[str, str]) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
        for file, sql in files.items():
            (folder / file).write_text(sql)
        return name

    yield write
    sys.modules.pop(name, None)


async def rows(url: str, query: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(query)
    finally:
        await connection.close()


async def test_files_are_applied_in_order_and_once(postgres_url: str, package: Package) -> None:
    name = package({"0001_one.sql": "CREATE TABLE t (n int);", "0002_two.sql": "INSERT INTO t VALUES (2);"})
    assert await migrate(postgres_url, name) == ["0001_one.sql", "0002_two.sql"]
    assert await migrate(postgres_url, name) == []
    assert [row["n"] for row in await rows(postgres_url, "SELECT n FROM t")] == [2]


async def test_failed_file_leaves_nothing_and_can_be_repaired(postgres_url: str, package: Package) -> None:
    name = package({"0001_one.sql": "CREATE TABLE t (n int); SELECT 1/0;"})
    with pytest.raises(MigrationError, match=r"0001_one\.sql failed"):
        await migrate(postgres_url, name)
    assert await rows(postgres_url, "SELECT 1 FROM pg_tables WHERE tablename = 't'") == []
    assert await rows(postgres_url, "SELECT 1 FROM schema_migrations") == []
    package({"0001_one.sql": "CREATE TABLE t (n int);"})
    assert await migrate(postgres_url, name) == ["0001_one.sql"]


async def test_changed_file_is_noticed(postgres_url: str, package: Package) -> None:
    name = package({"0001_one.sql": "CREATE TABLE t (n int);"})
    await migrate(postgres_url, name)
    package({"0001_one.sql": "CREATE TABLE t (n bigint);"})
    with pytest.raises(MigrationError, match=r"0001_one\.sql was changed"):
        await migrate(postgres_url, name)


async def test_gap_and_odd_name_are_refused(postgres_url: str, package: Package) -> None:
    with pytest.raises(MigrationError, match=r"0003_three\.sql is out of order"):
        await migrate(postgres_url, package({"0001_one.sql": "SELECT 1;", "0003_three.sql": "SELECT 1;"}))


async def test_older_code_refuses_a_newer_database(postgres_url: str, package: Package, tmp_path: Path) -> None:
    name = package({"0001_one.sql": "SELECT 1;", "0002_two.sql": "SELECT 1;"})
    await migrate(postgres_url, name)
    (tmp_path / name / "0002_two.sql").unlink()
    with pytest.raises(MigrationError, match=r"0002_two\.sql was applied here"):
        await migrate(postgres_url, name)


async def test_several_at_once_take_turns(postgres_url: str, package: Package) -> None:
    name = package({"0001_one.sql": "CREATE TABLE t (n int); SELECT pg_sleep(0.1);"})
    applied = await asyncio.gather(*(migrate(postgres_url, name) for _ in range(4)))
    assert sorted(map(len, applied)) == [0, 0, 0, 1]


async def test_missing_database_is_made(postgres_url: str, package: Package) -> None:
    url = postgres_url + "_new"
    name = package({"0001_one.sql": "CREATE TABLE t (n int);"})
    assert await migrate(url, name) == ["0001_one.sql"]
