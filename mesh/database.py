"""A pool of PostgreSQL connections that heals, with outages told as PlatformError; it never holds a query.

The pool is made on first use and connects when it is asked, so a process starts while PostgreSQL is away.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from mesh.errors import PlatformError, Reason

Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"

_ACQUIRE_TIMEOUT_S = 2.0

# What says that the server or the way to it is gone, and nothing about the statement.
_AWAY = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
)


class Database:
    """One database. Everything raises PlatformError(UNAVAILABLE) while PostgreSQL is away; what it says about a
    statement (a broken constraint, say) arrives as asyncpg's own exception.

    A statement must leave nothing on its connection that outlives its transaction: no SET, LISTEN or advisory lock of a
    session, since the next user has the connection as it is.
    """

    def __init__(
        self,
        url: str,
        *,
        max_size: int = 10,
        command_timeout_s: float = 10.0,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """`settings` hold for every connection from its first moment on, `role` for example."""
        self._url = url
        self._settings = dict(settings or {})
        self._max_size = max_size
        self._command_timeout_s = command_timeout_s
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._opening = asyncio.Lock()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection within a transaction, committed at the end of the block and rolled back by an exception."""
        async with self._connection() as connection, connection.transaction():
            yield connection

    async def fetch(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        """All rows."""
        async with self._connection() as connection:
            return await connection.fetch(query, *arguments)

    async def fetchrow(self, query: str, *arguments: Any) -> asyncpg.Record | None:
        """The first row, or None."""
        async with self._connection() as connection:
            return await connection.fetchrow(query, *arguments)

    async def fetchval(self, query: str, *arguments: Any) -> Any:
        """The first value of the first row, or None."""
        async with self._connection() as connection:
            return await connection.fetchval(query, *arguments)

    async def execute(self, query: str, *arguments: Any) -> str:
        """The command's tag, for example "UPDATE 1"."""
        async with self._connection() as connection:
            return await connection.execute(query, *arguments)

    async def check(self) -> None:
        """Returns if PostgreSQL answers."""
        await self.fetchval("SELECT 1")

    async def close(self) -> None:
        """Close all connections; those in use get two seconds."""
        if self._pool is not None:
            try:
                await asyncio.wait_for(self._pool.close(), _ACQUIRE_TIMEOUT_S)
            except TimeoutError:
                self._pool.terminate()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        with _outages_as_unavailable():
            pool = await self._opened()
            connection = await pool.acquire(timeout=_ACQUIRE_TIMEOUT_S)
        try:
            with _outages_as_unavailable():
                try:
                    yield connection
                except asyncpg.InterfaceError as error:
                    # asyncpg says so both of a connection that broke and of a call that is wrong.
                    if _is_lost(connection):
                        raise PlatformError(Reason.UNAVAILABLE) from error
                    raise
                except asyncpg.InternalClientError as error:
                    # A server that dies while it speaks leaves asyncpg in a state that it cannot go on from.
                    with suppress(asyncpg.InterfaceError):
                        connection.terminate()
                    raise PlatformError(Reason.UNAVAILABLE) from error
        finally:
            # One that broke cannot be reset for its next user; the pool has ended it by then.
            with suppress(asyncpg.InterfaceError, asyncpg.InternalClientError, *_AWAY):
                await pool.release(connection)

    async def _opened(self) -> "asyncpg.Pool[asyncpg.Record]":
        if self._pool is None:
            async with self._opening:
                if self._pool is None:
                    self._pool = await asyncpg.create_pool(
                        self._url,
                        min_size=0,
                        max_size=self._max_size,
                        command_timeout=self._command_timeout_s,
                        timeout=_ACQUIRE_TIMEOUT_S,
                        server_settings=self._settings,
                        reset=_leave_as_it_is,
                    )
        return self._pool


async def _leave_as_it_is(_: asyncpg.Connection) -> None:
    """asyncpg has rolled back by then, and nothing that outlives a transaction may be done on a connection; asking
    PostgreSQL to forget it all the same would double the round trips of a query."""


def _is_lost(connection: Connection) -> bool:
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:
        # The pool takes back a connection that breaks while it is in use.
        return True


@contextmanager
def _outages_as_unavailable() -> Iterator[None]:
    try:
        yield
    except _AWAY as error:
        raise PlatformError(Reason.UNAVAILABLE) from error
