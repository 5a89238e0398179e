"""Every real data server: starts, answers in its own protocol, keeps its data over a restart, leaves no process."""

import asyncio
import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from urllib.parse import urlsplit

import aio_pika
import aiohttp
import asyncpg
import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError

from deploy.local import processes
from deploy.local.servers import Postgres, RabbitMQ, SeaweedFS, Valkey
from deploy.local.state import State
from deploy.local.supervisor import Supervisor

Server = Postgres | Valkey | RabbitMQ | SeaweedFS


async def kept_over_a_restart(
    state: State,
    kind: Callable[[State], Server],
    write: Callable[[Server], Awaitable[object]],
    read: Callable[[Server], Awaitable[object]],
) -> None:
    """Writes with a first server, reads with a second one in the same folder, and sees that neither left a process."""
    for work in (write, read):
        server = kind(state)
        async with Supervisor(state) as supervisor:
            await server.start(supervisor)
            await work(server)
            family = set()
            for name in [program.name for program in server.programs()]:
                family |= processes.family(supervisor.pid(name) or 0)
            assert family
            if os.geteuid() == 0:
                assert all(
                    os.stat(f"/proc/{process.pid}").st_uid != 0 for process in family if processes.lives(process)
                )
        assert not any(processes.lives(process) for process in family)


async def test_postgres(state: State) -> None:
    async def write(server: Postgres) -> None:
        url = await server.database("identity")
        assert await server.database("identity") == url
        connection = await asyncpg.connect(url)
        await connection.execute("CREATE TABLE kept (word text); INSERT INTO kept VALUES ('grün')")
        assert await connection.fetchval("SHOW fsync") == "on"
        assert await connection.fetchval("SELECT current_user") == "identity"
        await connection.close()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(url.replace(":", ":x", 2).replace(":x//", "://"))

    async def read(server: Postgres) -> None:
        connection = await asyncpg.connect(server.url("identity"))
        assert await connection.fetchval("SELECT word FROM kept") == "grün"
        await connection.close()

    await kept_over_a_restart(state, Postgres, write, read)  # type: ignore[arg-type]


async def test_valkey(state: State) -> None:
    async def write(server: Valkey) -> None:
        async with Redis.from_url(server.url) as client:
            await client.set("kept", "1")
        async with Redis(port=server.port) as stranger:
            with pytest.raises(AuthenticationError):
                await stranger.get("kept")

    async def read(server: Valkey) -> None:
        async with Redis.from_url(server.url) as client:
            assert await client.get("kept") == b"1"

    await kept_over_a_restart(state, Valkey, write, read)  # type: ignore[arg-type]


async def test_rabbitmq(state: State) -> None:
    async def write(server: RabbitMQ) -> None:
        connection = await aio_pika.connect(server.url)
        channel = await connection.channel()
        await channel.declare_queue("kept", durable=True, arguments={"x-queue-type": "quorum"})
        message = aio_pika.Message(b"1", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, routing_key="kept")
        await connection.close()

    async def read(server: RabbitMQ) -> None:
        connection = await aio_pika.connect(server.url)
        channel = await connection.channel()
        queue = await channel.get_queue("kept")
        message = await queue.get(timeout=10, fail=True)
        assert message.body == b"1"
        await message.ack()
        await connection.close()

    await kept_over_a_restart(state, RabbitMQ, write, read)  # type: ignore[arg-type]


async def test_seaweedfs(state: State) -> None:
    async def write(server: SeaweedFS) -> None:
        assert await s3(server, "PUT", "kept", b"1" * 1000) == (200, b"")
        status, _ = await s3(server, "GET", "kept", secret_key="wrong")
        assert status == 403

    async def read(server: SeaweedFS) -> None:
        assert await s3(server, "GET", "kept") == (200, b"1" * 1000)

    await kept_over_a_restart(state, SeaweedFS, write, read)  # type: ignore[arg-type]


async def test_all_four_start_side_by_side_and_twice_at_once(state: State) -> None:
    with State.temporary() as other:
        async with Supervisor(state) as one, Supervisor(other) as two:
            await asyncio.gather(
                *(kind(state).start(one) for kind in (Postgres, Valkey, RabbitMQ, SeaweedFS)),
                *(kind(other).start(two) for kind in (Postgres, Valkey, RabbitMQ, SeaweedFS)),
            )


async def test_killed_postgres_comes_back_with_its_data(state: State) -> None:
    died = asyncio.Event()
    async with Supervisor(state, lambda event: died.set() if event.what == "died" else None) as supervisor:
        await killed_postgres_comes_back(state, supervisor, died)


async def killed_postgres_comes_back(state: State, supervisor: Supervisor, died: asyncio.Event) -> None:
    server = Postgres(state)
    await server.start(supervisor)
    url = await server.database("router")
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
    pid = supervisor.pid("postgres")
    assert pid
    os.kill(pid, 9)
    async with asyncio.timeout(30):
        await died.wait()
        await supervisor.ready("postgres")
    connection.terminate()
    connection = await asyncpg.connect(url)
    assert await connection.fetchval("SELECT number FROM kept") == 7
    await connection.close()


async def s3(
    server: SeaweedFS, verb: str, key: str, body: bytes = b"", secret_key: str | None = None
) -> tuple[int, bytes]:
    """One S3 request, signed as AWS signature version 4 has it; status and body."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    path = f"/{server.bucket}/{key}"
    digest = hashlib.sha256(body).hexdigest()
    headers = {"host": urlsplit(server.url).netloc, "x-amz-content-sha256": digest, "x-amz-date": now}
    names = ";".join(sorted(headers))
    canonical = "\n".join([verb, path, "", *(f"{name}:{headers[name]}" for name in sorted(headers)), "", names, digest])
    scope = f"{now[:8]}/us-east-1/s3/aws4_request"
    to_sign = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    signing_key = f"AWS4{secret_key or server.secret_key}".encode()
    for part in scope.split("/"):
        signing_key = hmac.digest(signing_key, part.encode(), "sha256")
    signature = hmac.digest(signing_key, to_sign.encode(), "sha256").hex()
    headers["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={server.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    async with (
        aiohttp.ClientSession() as session,
        session.request(verb, server.url + path, data=body or None, headers=headers) as answer,
    ):
        return answer.status, await answer.read()
