"""Backup and restore with the chart's own scripts on a real PostgreSQL: backed up, destroyed, restored, counted."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aio_pika
import asyncpg
import pytest

from deploy.local.ports import free_port
from deploy.local.servers import HOST, Postgres, RabbitMQ
from deploy.local.state import State
from deploy.local.supervisor import Program, Supervisor
from mesh.migrate import migrate
from tests.deploy.tools import CHART

SCRIPTS = CHART / "files" / "backup"
WRITES_S = 2.0
# What docs/deployment.md promises.
RPO_S = 5.0
RTO_S = 60.0


class Archive:
    """The scripts in the environment that the chart gives them, as the servers' user."""

    def __init__(self, state: State, postgres: Postgres) -> None:
        self.folder = state.folder("backup")
        self._account = state.account
        binaries = postgres._binary("pg_ctl").parent
        self._environment = {
            "PATH": f"{binaries}:/usr/bin:/bin",
            "BACKUP_DIR": str(self.folder),
            "KEEP_BASES": "2",
            "PGHOST": "127.0.0.1",
            "PGPORT": str(postgres.port),
            "PGUSER": "aiaas",
            "PGPASSWORD": state.secret("postgres"),
        }

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        account = self._account
        with (SCRIPTS / script).open() as source:
            return subprocess.Popen(
                ["/bin/sh", "-s", *arguments],
                stdin=source,
                env={**self._environment, **environment},
                cwd=self.folder,
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    async def run(self, script: str, *arguments: str, **environment: str) -> str:
        process = self.start(script, *arguments, **environment)
        output, _ = await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode == 0, output
        return output

    def bases(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "base").iterdir())


@pytest.fixture
def state() -> Iterator[State]:
    with State.temporary() as state:
        yield state


async def test_what_was_committed_is_there_after_everything_was_destroyed(
    state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Supervisor(state) as supervisor:
        postgres = Postgres(state)
        await postgres.start(supervisor)
        await migrate(await postgres.database("router"), "router.migrations")
        archive = Archive(state, postgres)
        receiver = archive.start("postgres-wal.sh")
        try:
            await archive.run("postgres-base.sh")
            connection = await asyncpg.connect(postgres.url("router"))
            await connection.execute("CREATE TABLE drill (n integer PRIMARY KEY, at double precision NOT NULL)")
            confirmed: dict[int, float] = {}
            deadline = time.monotonic() + WRITES_S
            while time.monotonic() < deadline:
                n = len(confirmed)
                await connection.execute("INSERT INTO drill VALUES ($1, $2)", n, time.monotonic())
                confirmed[n] = time.monotonic()
            # The disk is gone, and whoever wrote to it.
            pid = supervisor.pid("postgres")
            assert pid is not None
            program = supervisor.program("postgres")
            os.kill(pid, signal.SIGKILL)
            destroyed = time.monotonic()
            connection.terminate()
            await supervisor.stop("postgres")
            data = Path(program.command[program.command.index("-D") + 1])
            shutil.rmtree(data)
        finally:
            os.killpg(receiver.pid, signal.SIGTERM)
            await asyncio.to_thread(receiver.communicate, timeout=30)
        await archive.run("postgres-restore.sh", str(data))
    async with Supervisor(state) as supervisor:
        await postgres.start(supervisor)
        connection = await asyncpg.connect(postgres.url("router"))
        async with asyncio.timeout(RTO_S):
            while await connection.fetchval("SELECT pg_is_in_recovery()"):
                await asyncio.sleep(0.05)
        rto_s = time.monotonic() - destroyed
        restored = {row["n"] for row in await connection.fetch("SELECT n FROM drill")}
        # Whole up to a moment: nothing is missing before what is there.
        assert restored == set(range(len(restored)))
        rpo_s = max(confirmed.values()) - max(at for n, at in confirmed.items() if n in restored)
        assert len(confirmed) > 100
        assert rpo_s < RPO_S
        assert rto_s < RTO_S
        # It is the platform's database again: of this version, and writable.
        await connection.close()
        assert await migrate(postgres.url("router"), "router.migrations") == []
    with capsys.disabled():
        print(f"\nrestore drill: {len(restored)} of {len(confirmed)} commits, RPO {rpo_s:.3f} s, RTO {rto_s:.1f} s")


async def test_old_bases_go_and_nothing_is_restored_over_data(state: State) -> None:
    async with Supervisor(state) as supervisor:
        postgres = Postgres(state)
        await postgres.start(supervisor)
        archive = Archive(state, postgres)
        for _ in range(3):
            await archive.run("postgres-base.sh")
            newest = archive.bases()[-1]
            while time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) == newest:
                await asyncio.sleep(0.05)
        assert len(archive.bases()) == 2
        (archive.folder / "full").mkdir()
        (archive.folder / "full" / "file").touch()
        process = archive.start("postgres-restore.sh", str(archive.folder / "full"))
        output, _ = await asyncio.to_thread(process.communicate, timeout=30)
        assert process.returncode == 1
        assert "nothing is overwritten" in output


class ManagedRabbitMQ(RabbitMQ):
    """With the plugin that definitions are asked of."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.management_port = free_port()

    @property
    def management_url(self) -> str:
        return self.url.replace("amqp://", "http://").replace(f":{self.port}/", f":{self.management_port}")

    def programs(self) -> list[Program]:
        programs = super().programs()
        self._state.write("rabbitmq/enabled_plugins", "[rabbitmq_management].\n")
        config = (self._state.root / "rabbitmq" / "rabbitmq.conf").read_text()
        listener = f"management.tcp.ip = {HOST}\nmanagement.tcp.port = {self.management_port}\n"
        self._state.write("rabbitmq/rabbitmq.conf", config + listener)
        return programs

    def _home(self, system: str) -> Path:
        home = super()._home(system)
        (installed,) = Path(f"{system}/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*")
        for plugin in (installed / "plugins").iterdir():
            if not (home / "plugins" / plugin.name).exists():
                (home / "plugins" / plugin.name).symlink_to(plugin)
        return home


async def definitions(broker: ManagedRabbitMQ, *arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.backup", *arguments),
        env={"AMQP_MANAGEMENT_URL": broker.management_url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, output.decode().strip()


async def test_a_broker_that_was_destroyed_has_its_queues_and_users_again(tmp_path: Path) -> None:
    with State.temporary() as state:
        async with Supervisor(state) as supervisor:
            broker = ManagedRabbitMQ(state)
            await broker.start(supervisor)
            async with await aio_pika.connect(broker.url) as connection:
                channel = await connection.channel()
                await channel.declare_queue("drill", durable=True, arguments={"x-queue-type": "quorum"})
            await served(broker)
            status, path = await definitions(broker, "export", str(tmp_path / "definitions"))
            assert status == 0, path
            password = state.secret("rabbitmq")
    assert os.stat(path).st_mode & 0o777 == 0o600
    # A new one: nothing of the former is left.
    with State.temporary() as state:
        async with Supervisor(state) as supervisor:
            broker = ManagedRabbitMQ(state)
            await broker.start(supervisor)
            await served(broker)
            status, output = await definitions(broker, "import", path)
            assert status == 0, output
            # Users have the passwords that they had there.
            former = broker.url.replace(state.secret("rabbitmq"), password)
            async with await aio_pika.connect(former) as connection:
                channel = await connection.channel()
                # Passive: it raises for a queue that is not there.
                await channel.declare_queue("drill", passive=True)


async def test_a_broker_that_is_away_is_told_without_its_password(tmp_path: Path) -> None:
    with State.temporary() as state:
        status, output = await definitions(ManagedRabbitMQ(state), "export", str(tmp_path))
        assert status == 1
        assert state.secret("rabbitmq") not in output
    assert os.listdir(tmp_path) == []


async def served(broker: ManagedRabbitMQ) -> None:
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(HOST, broker.management_port)
                writer.close()
                await writer.wait_closed()
                return
            await asyncio.sleep(0.1)
