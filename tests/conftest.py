"""Real data servers for every test that asks for one: started on first use, shared within a worker, ended with it.

RabbitMQ takes seconds to start, so all tests that use it run in one worker; so do the end-to-end tests, on one stack,
and those that start whole stacks of their own.
"""

import asyncio
import contextlib
import itertools
import os
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import asyncpg
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, settings
from redis.asyncio import Redis

from deploy.local.servers import Postgres, RabbitMQ, SeaweedFS, Valkey
from deploy.local.state import State
from deploy.local.supervisor import Supervisor
from mesh.migrate import migrate
from mesh.topology import EVENTS, USAGE

# Servers that live for a minute need no disk: in memory a database is made in a tenth of the time.
_MEMORY = "/dev/shm"
_MEMORY_BYTES = 8 << 30


def _is_roomy(folder: str) -> bool:
    """Whether the servers fit into it, and programs may be run there."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return False
    return status.f_bavail * status.f_frsize >= _MEMORY_BYTES and not status.f_flag & os.ST_NOEXEC


if "TMPDIR" not in os.environ and _is_roomy(_MEMORY):
    os.environ["TMPDIR"] = tempfile.tempdir = _MEMORY

# How long an example takes is the machine's, and says nothing of the code.
settings.register_profile("tests", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# Of folders that this worker's tests have had.
_FOLDERS = itertools.count()
_GROUPS = {"amqp_url": "amqp", "ingress": "amqp", "platform": "e2e"}


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """A folder that no test before has had: for a while gRPC remembers of a socket that nobody answered there."""
    folder = tmp_path / str(next(_FOLDERS))
    folder.mkdir()
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps together what shares a slow server (with --dist loadgroup)."""
    for item in items:
        groups = {group for fixture, group in _GROUPS.items() if fixture in getattr(item, "fixturenames", ())}
        if item.path.parent.name in ("local", "security", "observability"):
            groups.add(item.path.parent.name)
        for group in groups:
            item.add_marker(pytest.mark.xdist_group(group))


@dataclass
class Servers:
    """The data servers of one worker, on an event loop of their own."""

    portal: BlockingPortal
    supervisor: Supervisor
    postgres: Postgres
    valkey: Valkey
    rabbitmq: RabbitMQ
    seaweedfs: SeaweedFS
    started: set[str] = field(default_factory=set)
    templates: set[str] = field(default_factory=set)

    def start(self, server: Postgres | Valkey | RabbitMQ | SeaweedFS) -> None:
        """Starts a server that nobody has asked for yet."""
        if server.name not in self.started:
            self.portal.call(server.start, self.supervisor)
            self.started.add(server.name)

    def pid(self, server: Postgres | Valkey | RabbitMQ | SeaweedFS) -> int:
        """The process of a server that runs; it is started again when a test kills it."""
        pid = self.supervisor.pid(server.name)
        assert pid is not None
        return pid

    async def database(self, name: str, template: str = "template1") -> str:
        """The address of a new database, a copy of `template`."""
        self.start(self.postgres)
        await self.ready(self.postgres)
        connection = await asyncpg.connect(self.postgres.admin_url)
        try:
            await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY file_copy')
        finally:
            await connection.close()
        return urlsplit(self.postgres.admin_url)._replace(path=f"/{name}").geturl()

    async def drop_database(self, name: str) -> None:
        """Remove a database, whoever is connected to it."""
        await self.ready(self.postgres)
        connection = await asyncpg.connect(self.postgres.admin_url)
        try:
            await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        finally:
            await connection.close()

    async def migrated(self, package: str) -> str:
        """The name of a database to copy, in which all migrations of a package are applied: a tenth of the time that
        applying them takes."""
        name = f"template_{package.replace('.', '_')}"
        if name not in self.templates:
            await migrate(await self.database(name), package)
            self.templates.add(name)
        return name

    async def empty_redis(self) -> str:
        """The address of a Valkey that is empty."""
        self.start(self.valkey)
        await self.ready(self.valkey)
        async with Redis.from_url(self.valkey.url) as redis:
            await redis.flushall()
        return self.valkey.url

    async def empty_amqp(self) -> str:
        """The address of a RabbitMQ without the queues of earlier tests."""
        self.start(self.rabbitmq)
        await self.ready(self.rabbitmq)
        async with await aio_pika.connect(self.rabbitmq.url) as connection:
            channel = await connection.channel()
            for queue in (USAGE, EVENTS):
                await channel.queue_delete(queue.name)
                await channel.queue_delete(queue.dead_name)
                await channel.exchange_delete(queue.exchange)
        return self.rabbitmq.url

    async def ready(self, server: Postgres | Valkey | RabbitMQ | SeaweedFS) -> None:
        """Returns once a server answers."""
        future = self.portal.start_task_soon(self.supervisor.ready, server.name)
        await asyncio.wrap_future(future)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with (
        State.temporary() as state,
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Supervisor(state)) as supervisor,
    ):
        yield Servers(portal, supervisor, Postgres(state), Valkey(state), RabbitMQ(state), SeaweedFS(state))


@pytest.fixture
async def postgres_url(servers: Servers) -> AsyncIterator[str]:
    """An empty database, dropped after the test."""
    name = f"test_{uuid.uuid4().hex}"
    yield await servers.database(name)
    await servers.drop_database(name)


@contextlib.asynccontextmanager
async def migrated_database(servers: Servers, package: str) -> AsyncIterator[str]:
    """The address of a database in which all migrations of a package are applied, dropped after the block."""
    name = f"test_{uuid.uuid4().hex}"
    try:
        yield await servers.database(name, await servers.migrated(package))
    finally:
        await servers.drop_database(name)


@pytest.fixture
async def redis_url(servers: Servers) -> str:
    """An empty Valkey."""
    return await servers.empty_redis()


@pytest.fixture
async def amqp_url(servers: Servers) -> str:
    """A RabbitMQ without the queues of earlier tests."""
    return await servers.empty_amqp()


@pytest.fixture
async def seaweedfs(servers: Servers) -> SeaweedFS:
    """Object storage with one bucket, which tests share."""
    servers.start(servers.seaweedfs)
    await servers.ready(servers.seaweedfs)
    return servers.seaweedfs
