"""A whole local stack that tells all it can (DEBUG, every trace), with an engine, a mail server and a receiver of
webhooks in this process, and everything that it left behind, place by place; it never judges what it finds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aio_pika
import asyncpg
import httpx
from redis.asyncio import Redis

from deploy.local.engines import HOST
from deploy.local.ports import free_port
from deploy.local.stack import STORING_SERVICES, Stack, running
from deploy.local.state import State
from mesh.topology import EVENTS, USAGE
from tests.doubles.openid_issuer import OpenIdIssuer
from tests.doubles.scripted_backend import ScriptedBackend
from tests.doubles.trace_collector import collecting_into
from tests.doubles.webhook_receiver import WebhookReceiver
from tests.integration.identity.signing_in import Mailbox, mail_server

CHECKOUT = Path(__file__).resolve().parents[2]
_COPIES = "canaries"


@dataclass
class Platform:
    """A platform that runs, and who is around it."""

    stack: Stack
    state: State
    http: httpx.AsyncClient
    engine: ScriptedBackend
    mailbox: Mailbox
    webhooks: WebhookReceiver
    issuer: OpenIdIssuer
    errors: list[bytes] = field(default_factory=list)

    async def call(
        self,
        verb: str,
        path: str,
        body: object = None,
        *,
        token: str = "",
        status: int | None = 200,
        kept: bool = True,
        **options: Any,
    ) -> httpx.Response:
        """An answer, which must have this status, or be some error for None; an error is evidence, unless the caller
        looks at it."""
        headers = {**({"authorization": f"Bearer {token}"} if token else {}), **options.pop("headers", {})}
        if body is not None:
            options["json"] = body
        answer = await self.http.request(verb, path, headers=headers, **options)
        is_right = answer.status_code >= 400 if status is None else answer.status_code == status
        assert is_right, f"{verb} {path}: {answer.status_code} {answer.text}"
        if answer.status_code >= 400 and kept:
            self.errors += [answer.content, repr(answer.headers.raw).encode()]
        return answer

    async def mailed_to(self, email: str, before: int) -> str:
        """The token in the mail that comes after so many."""
        async with asyncio.timeout(10):
            while len(self.mailbox.messages) <= before:
                await asyncio.sleep(0.02)
        return self.mailbox.token_to(email)

    @contextlib.asynccontextmanager
    async def away(self, name: str) -> AsyncIterator[None]:
        """A program that has stopped, until the end of the block."""
        supervisor = self.stack.supervisor
        program = supervisor.program(name)
        await supervisor.stop(name)
        try:
            yield
        finally:
            await supervisor.start(program)

    async def evidence(self) -> dict[str, list[bytes]]:
        """All that is left behind while the platform runs, by place."""
        return {
            "metrics": await self._metrics(),
            "events": await self._events(),
            "databases": await self._databases(),
            "valkey": await self._valkey(),
            "errors": list(self.errors),
        }

    async def _metrics(self) -> list[bytes]:
        async with httpx.AsyncClient(trust_env=False) as http:
            answers = [await http.get(f"http://{address}/metrics") for address in self.stack.ops.values()]
        assert all(answer.status_code == 200 for answer in answers)
        return [answer.content for answer in answers]

    async def copy_events(self) -> None:
        """Have all that is published from now on copied."""
        async with await aio_pika.connect(self.stack.rabbitmq.url) as connection:
            channel = await connection.channel()
            copies = await channel.declare_queue(_COPIES, durable=True)
            for queue in (USAGE, EVENTS):
                await copies.bind(queue.exchange, queue.routing_key)

    async def _events(self) -> list[bytes]:
        bodies = []
        async with await aio_pika.connect(self.stack.rabbitmq.url) as connection:
            channel = await connection.channel()
            copies = await channel.get_queue(_COPIES)
            while message := await copies.get(no_ack=True, fail=False):
                bodies.append(message.body + repr(message.headers).encode())
            for queue in (USAGE, EVENTS):
                dead = await channel.get_queue(queue.dead_name)
                while message := await dead.get(no_ack=True, fail=False):
                    bodies.append(message.body + repr(message.headers).encode())
        return bodies

    async def _databases(self) -> list[bytes]:
        found = []
        async with asyncio.timeout(20):
            while not await self._count_usage():
                await asyncio.sleep(0.1)
        for name in STORING_SERVICES:
            # The superuser: no wall between organizations hides a row from it.
            connection = await asyncpg.connect(self.stack.postgres.admin_url.rpartition("/")[0] + f"/{name}")
            try:
                for table in await connection.fetch(_TABLES):
                    rows = await connection.fetch(f'SELECT * FROM "{table["schema"]}"."{table["name"]}"')
                    found += [_bytes_of(value) for row in rows for value in row.values()]
            finally:
                await connection.close()
        return found

    async def _count_usage(self) -> int:
        connection = await asyncpg.connect(self.stack.postgres.url("analytics"))
        try:
            count: int = await connection.fetchval("SELECT count(*) FROM usage_events")
        finally:
            await connection.close()
        return count

    async def _valkey(self) -> list[bytes]:
        found: list[bytes] = []
        async with Redis.from_url(self.stack.valkey.url) as redis:
            readers: dict[Any, Callable[[Any], Awaitable[Any]]] = {
                b"string": redis.get,
                b"hash": redis.hgetall,
                b"set": redis.smembers,
                b"zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
                b"list": lambda key: redis.lrange(key, 0, -1),
                b"stream": redis.xrange,
            }
            async for key in redis.scan_iter():
                value = await readers[await redis.type(key)](key)
                found += [key, *_parts(value)]
        return found


_TABLES = """
    SELECT schemaname AS schema, tablename AS name FROM pg_tables
    WHERE schemaname NOT IN ('pg_catalog', 'information_schema')
"""


def _bytes_of(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _parts(value: Any) -> list[bytes]:
    if isinstance(value, dict):
        return [_bytes_of(part) for item in value.items() for part in item]
    if isinstance(value, list | set | tuple):
        return [part for item in value for part in _parts(item)]
    return [] if value is None else [_bytes_of(value)]


@contextlib.asynccontextmanager
async def running_platform(places: dict[str, list[bytes]], *, without_redaction: bool) -> AsyncIterator[Platform]:
    """Start a platform, with or without what keeps secrets from getting out (`tests.security.canaries_without`). What
    it wrote until its end is added to `places`."""
    otlp_port, mail_port = free_port(), free_port()
    with State.temporary() as state, collecting_into(otlp_port, state.root / "spans") as spans:
        state.write("switches/sitecustomize.py", "import tests.security.canaries_without\n")
        settings = {
            "PYTHONPATH": f"{state.folder('switches')}:{CHECKOUT}:{CHECKOUT / 'gen' / 'python'}",
            "CANARIES": "bare" if without_redaction else "kept",
            "AIAAS_LOG_LEVEL": "DEBUG",
            "AIAAS_OTLP_ENDPOINT": f"http://{HOST}:{otlp_port}",
            "AIAAS_TRACE_RATIO": "1.0",
            "AIAAS_IDENTITY_SMTP_URL": f"smtp://{HOST}:{mail_port}",
            "AIAAS_IDENTITY_ALLOW_PRIVATE_ISSUERS": "true",
            "AIAAS_EDGE_MAX_BODY_BYTES": "200000",
        }
        async with (
            mail_server(mail_port) as mailbox,
            ScriptedBackend() as engine,
            WebhookReceiver() as webhooks,
            OpenIdIssuer() as issuer,
            running(state, engine="llamacpp", chat_replicas=0, settings=settings) as stack,
            httpx.AsyncClient(base_url=stack.base_url, trust_env=False, timeout=20) as http,
        ):
            yield Platform(stack, state, http, engine, mailbox, webhooks, issuer)
        journal = state.root / "router" / "journal"
        places["logs"] = [path.read_bytes() for path in sorted((state.root / "logs").iterdir())]
        places["journal"] = [path.read_bytes() for path in sorted(journal.rglob("*")) if path.is_file()]
        places["spans"] = [spans.read_bytes()]
