"""Brings a database to the version of the code: plain SQL files, once each, in order; it never goes back.

The files are 0001_what_it_is.sql and on. Each runs in a transaction with its own record, so that a failed one is never
marked applied; its SHA-256 is kept, so that a file changed afterwards is noticed. An advisory lock makes several
processes that start together take turns.
"""

import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from urllib.parse import urlsplit, urlunsplit

import asyncpg

_FILE = re.compile(r"(\d{4})_\w+\.sql")
# Any number will do, as long as everybody who migrates uses this one.
_LOCK = 7_264_839_105_113
_LOCK_TIMEOUT_S = 60

_RECORDS = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    version integer PRIMARY KEY,
    name text NOT NULL,
    sha256 text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""


class MigrationError(Exception):
    """A migration cannot be applied, or one that was applied is not what it was; the sentence names the file."""


@dataclass(frozen=True)
class _Migration:
    version: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


async def migrate(url: str, package: str) -> list[str]:
    """Applies what is missing of the SQL files in `package` ("router.migrations"), making the database if it is not
    there, and returns the names of the files it applied.

    Raises MigrationError, or OSError and asyncpg's errors when the server is away.
    """
    migrations = _read(package)
    await _ensure_database(url)
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(f"SET lock_timeout = '{_LOCK_TIMEOUT_S}s'")
        await connection.execute("SELECT pg_advisory_lock($1)", _LOCK)
        await connection.execute(_RECORDS)
        rows = await connection.fetch("SELECT version, name, sha256 FROM schema_migrations ORDER BY version")
        known = {migration.version: migration for migration in migrations}
        for row in rows:
            migration = known.get(row["version"])
            if migration is None:
                raise MigrationError(f"{row['name']} was applied here but is not in {package}: this code is older.")
            if migration.sha256 != row["sha256"]:
                raise MigrationError(f"{migration.name} was changed after it was applied: add a new file instead.")
        return [await _apply(connection, migration) for migration in migrations[len(rows) :]]
    finally:
        # The advisory lock goes with the connection.
        await connection.close()


async def _apply(connection: "asyncpg.Connection[asyncpg.Record]", migration: _Migration) -> str:
    try:
        async with connection.transaction():
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO schema_migrations (version, name, sha256) VALUES ($1, $2, $3)",
                migration.version,
                migration.name,
                migration.sha256,
            )
    except asyncpg.PostgresError as error:
        raise MigrationError(f"{migration.name} failed and was not applied: {error}") from error
    return migration.name


def _read(package: str) -> list[_Migration]:
    files = sorted(
        (file for file in resources.files(package).iterdir() if file.name.endswith(".sql")), key=lambda file: file.name
    )
    migrations = []
    for expected, file in enumerate(files, start=1):
        match = _FILE.fullmatch(file.name)
        if match is None or int(match[1]) != expected:
            raise MigrationError(f"{file.name} is out of order in {package}: expected {expected:04d}_name.sql.")
        migrations.append(_Migration(expected, file.name, file.read_text(encoding="utf-8")))
    return migrations


async def _ensure_database(url: str) -> None:
    try:
        await (await asyncpg.connect(url)).close()
    except asyncpg.InvalidCatalogNameError:
        parts = urlsplit(url)
        name = parts.path.lstrip("/").replace('"', '""')
        connection = await asyncpg.connect(urlunsplit(parts._replace(path="/postgres")))
        try:
            await connection.execute(f'CREATE DATABASE "{name}"')
        except (asyncpg.DuplicateDatabaseError, asyncpg.UniqueViolationError):
            pass  # another process was faster
        finally:
            await connection.close()
