"""A whole local stack in front of the fake engine, organizations with budgets on it, and the hands that kill its parts;
it never judges what it sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import asyncpg
import grpc.aio
from redis.asyncio import Redis

from aiaas.router.v1 import journal_service_pb2, journal_service_pb2_grpc
from deploy.local import supervisor as local_supervisor
from deploy.local.processes import family
from deploy.local.stack import Stack, running
from deploy.local.state import State
from mesh.channel import connect
from mesh.config import load
from mesh.tls import TlsConfig, opened
from tests.load.host import LIMITS, MODEL, call, register
from tests.load.native import CHECKOUT, FakeEngine, fake_engine
from tests.money.checker import Books, Finding, check, read_analytics, read_journal, read_ledger
from tests.money.client import Client, Seen

SETTLED_S = 20.0
"""Until then everything is settled: a lease, and ten seconds."""

_SAMPLE_S = 0.05
_LOOK_AGAIN_S = 0.5


@dataclass
class Sampler:
    """Looks at every period of every hard budget, again and again. `least` is the least that one had left."""

    url: str
    looks: int = 0
    least: int | None = None
    worst: str = ""

    async def run(self) -> None:
        """Look until cancelled; while PostgreSQL is away nothing is seen."""
        while True:
            try:
                connection = await asyncpg.connect(self.url, timeout=2)
                try:
                    while True:
                        self._take(
                            await connection.fetch(
                                "SELECT budget_id, limit_amount, spent, leased FROM budget_periods WHERE is_hard",
                                timeout=2,
                            )
                        )
                        await asyncio.sleep(_SAMPLE_S)
                finally:
                    await connection.close(timeout=1)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await asyncio.sleep(_SAMPLE_S)

    def _take(self, rows: list[asyncpg.Record]) -> None:
        self.looks += bool(rows)
        for row in rows:
            left = row["limit_amount"] - row["spent"] - row["leased"]
            if self.least is None or left < self.least:
                self.least, self.worst = left, f"{row['budget_id']}: {dict(row)}"


@dataclass
class Platform:
    """A platform that runs. `clients` are all who ever asked anything of it."""

    stack: Stack
    state: State
    engine: FakeEngine
    admin: aiohttp.ClientSession
    sampler: Sampler
    clients: list[Client] = field(default_factory=list)

    @property
    def port(self) -> int:
        """The public one."""
        return int(self.stack.base_url.rpartition(":")[2])

    @property
    def seen(self) -> list[Seen]:
        """All requests that there were."""
        return [seen for client in self.clients for seen in client.seen]

    async def new_client(self, name: str, **limits: int) -> Client:
        """An organization, its one key, and a hard budget with each of the limits ("tokens" or "cost")."""
        answer = await call(
            self.admin, "POST", "/admin/v1/organizations", {"display_name": name, "rate_limits": LIMITS}
        )
        organization_id = answer["organization"]["organization_id"]
        path = f"/admin/v1/organizations/{organization_id}"
        for unit, limit in limits.items():
            budget = {
                "display_name": f"{name}, {unit}",
                "unit": f"BUDGET_UNIT_{unit.upper()}",
                "interval": "BUDGET_INTERVAL_TOTAL",
                "enforcement": "BUDGET_ENFORCEMENT_HARD",
                "limit": limit,
            }
            await call(self.admin, "POST", f"{path}/budgets", budget)
        key = await call(self.admin, "POST", f"{path}/api-keys", {"display_name": name, "rate_limits": LIMITS})
        client = Client(self.port, organization_id, key["api_key"]["api_key_id"], key["secret"])
        self.clients.append(client)
        return client

    async def kill(self, name: str) -> float:
        """kill -9 of a program and all that it started; it is started again. Returns the moment, in monotonic
        seconds."""
        pid = self._kill(name)
        killed = time.monotonic()
        while self.stack.supervisor.pid(name) == pid:
            await asyncio.sleep(0.005)
        return killed

    async def ready(self, name: str, within_s: float = 60.0) -> None:
        """Returns once a program serves."""
        async with asyncio.timeout(within_s):
            await self.stack.supervisor.ready(name)

    @contextlib.asynccontextmanager
    async def stopped(self, name: str) -> AsyncIterator[None]:
        """A program that hangs, until the end of the block or until it is killed."""
        pid = self.stack.supervisor.pid(name)
        assert pid is not None, f"{name} does not run"
        os.killpg(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGCONT)

    @contextlib.asynccontextmanager
    async def disk_full(self, name: str) -> AsyncIterator[None]:
        """A program that can write to no file, until the end of the block."""
        pid = self.stack.supervisor.pid(name)
        assert pid is not None, f"{name} does not run"
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        try:
            yield
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    @contextlib.asynccontextmanager
    async def away(self, *names: str) -> AsyncIterator[None]:
        """Programs killed as by a loss of power, and away until the end of the block; started again in this order."""
        supervisor = self.stack.supervisor
        programs = [supervisor.program(name) for name in names]
        for program in programs:
            self._kill(program.name)
            await supervisor.stop(program.name)
        try:
            yield
        finally:
            for program in programs:
                await supervisor.start(program)

    def _kill(self, name: str) -> int:
        pid = self.stack.supervisor.pid(name)
        assert pid is not None, f"{name} does not run"
        for process in family(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        return pid

    async def slots(self) -> int:
        """How many slots of concurrent requests are taken in Redis."""
        async with Redis.from_url(self.stack.valkey.url, socket_timeout=2) as redis:
            seconds, micros = await redis.time()
            now = seconds * 1_000_000 + micros
            keys = [key async for key in redis.scan_iter("limits:*:leases")]
            return sum([await redis.zcount(key, now, "+inf") for key in keys])

    async def books(self) -> Books:
        """All that is written down by now."""
        books = Books(slots=await self.slots())
        # Of the services, those that compare books may read a journal.
        tls = load(TlsConfig, self.stack.certificates["analytics"])
        async with (
            opened(tls) as certificate,
            connect(
                self.stack.grpc["router"],
                journal_service_pb2.DESCRIPTOR.services_by_name["JournalService"],
                tls=certificate,
            ) as channel,
        ):
            await read_journal(journal_service_pb2_grpc.JournalServiceStub(channel), books)
        await read_analytics(self.stack.postgres.url("analytics"), books)
        await read_ledger(self.stack.postgres.url("identity"), books)
        return books

    async def agreed(self, within_s: float = SETTLED_S) -> tuple[Books, list[Finding], float]:
        """The books, what does not agree, and after how many seconds: as soon as everything agrees, or else when the
        time is over."""
        began = time.monotonic()
        books, findings = Books(), [Finding("lost", "the books cannot be read")]
        while True:
            try:
                books = await self.books()
                findings = check(books, self.seen)
            except (OSError, TimeoutError, asyncpg.PostgresError, grpc.aio.AioRpcError) as error:
                findings = [Finding("lost", f"the books cannot be read: {error!r}"[:300])]
            passed_s = time.monotonic() - began
            if not findings or passed_s > within_s:
                return books, findings, passed_s
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def free_engine(self, since: float, within_s: float) -> tuple[int, float]:
        """How many streams the engine still has, and how many seconds after a moment: as soon as there are none, or
        else when the time is over."""
        while True:
            streams = (await asyncio.to_thread(self.engine.stats))["streams"]
            passed_s = time.monotonic() - since
            if not streams or passed_s > within_s:
                return streams, passed_s
            await asyncio.sleep(0.02)

    async def reconcile(self) -> int:
        """Have analytics compare itself with the journals of this hour and the last; returns how many requests were
        published again."""
        hour = int(time.time()) // 3600 * 3600
        start, end = (time.strftime("%Y-%m-%dT%H:00:00Z", time.gmtime(moment)) for moment in (hour - 3600, hour + 3600))
        path = "/analytics/v1/reconciliations"
        asked = {"kind": "RECONCILIATION_KIND_JOURNAL", "start_time": start, "end_time": end}
        made = (await call(self.admin, "POST", path, asked))["reconciliation"]
        async with asyncio.timeout(60):
            while made["state"] == "RECONCILIATION_STATE_RUNNING":
                await asyncio.sleep(0.2)
                answer = await call(self.admin, "GET", f"{path}/{made['reconciliation_id']}")
                made = answer["reconciliation"]
        return int(made.get("republished", 0))


@contextlib.asynccontextmanager
async def running_platform(without: str = "") -> AsyncIterator[Platform]:
    """Starts a platform, with the protection `without` switched off where one is named (see `tests.money.without`).

    Raises LocalError with what to do.
    """
    # Whoever is killed often is started again at once: how long that takes is not what is looked at here.
    local_supervisor.LAST_PAUSE_S = local_supervisor.FIRST_PAUSE_S
    with State.temporary() as state, fake_engine() as engine:
        # Its one model, which is not for chat, idles.
        async with running(state, engine="llamacpp", chat_replicas=0, settings=_settings(state, without)) as stack:
            headers = {"Authorization": f"Bearer {stack.platform_key}"}
            async with aiohttp.ClientSession(stack.base_url, headers=headers) as admin:
                await register(admin, engine.port, CHECKOUT)
                # So that a stream can be longer than all buffers on its way.
                await call(admin, "PATCH", f"/admin/v1/models/{MODEL}", {"context_tokens": 1_000_000})
                sampler = Sampler(stack.postgres.url("identity"))
                sampling = asyncio.create_task(sampler.run())
                try:
                    yield Platform(stack, state, engine, admin, sampler)
                finally:
                    sampling.cancel()
                    await asyncio.wait([sampling])


def deaths(state: State) -> Path:
    """The file that holds how often analytics shall still die between its commit and its acknowledgement."""
    return state.root / "analytics" / "deaths"


def _settings(state: State, without: str) -> Mapping[str, str]:
    """The environment that has every service read `tests.money.without` before anything else."""
    state.write("switches/sitecustomize.py", "import tests.money.without\n")
    state.folder("switches")
    return {
        "PYTHONPATH": f"{state.root / 'switches'}:{CHECKOUT}:{CHECKOUT / 'gen' / 'python'}",
        "WITHOUT": without,
        "DEATHS": str(deaths(state)),
    }
