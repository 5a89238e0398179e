"""The platform in two versions at once: replicas of services from this checkout and from another, on real data servers,
replaced one by one as the chart replaces them, and clients that go on meanwhile; it never knows why."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from aiaas.router.v1 import journal_service_pb2, journal_service_pb2_grpc
from deploy.local.certificates import issue
from deploy.local.ports import free_port
from deploy.local.servers import HOST
from deploy.local.stack import PEERS, STORING_SERVICES
from deploy.local.state import State
from mesh.channel import connect
from mesh.config import load
from mesh.tls import TlsConfig, opened
from tests.conftest import Servers
from tests.deploy.chart_platform import databases
from tests.deploy.release import KEY
from tests.load.host import LIMITS, call, register
from tests.load.native import CHECKOUT, FakeEngine, fake_engine
from tests.money.checker import Books, Finding, check, read_analytics, read_journal, read_ledger
from tests.money.client import Client, Seen

# What the chart has at most at a time: its replicas, and beside those of a Deployment the new one.
PLACES = {"identity": 3, "router": 2, "analytics": 3, "edge": 3}
CLIENTS = 8
TOKENS, PACE_MS = 25, 40
SETTLED_S = 30.0
_PAUSE_S = 0.1
_READY_S = 60.0
_POLL_S = 0.02


def previous_version() -> str:
    """The commit that deploy/previous_version names. Raises AssertionError if the history does not reach back to it."""
    commit = (CHECKOUT / "deploy" / "previous_version").read_text().strip()
    found = subprocess.run(
        ["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=CHECKOUT, capture_output=True, check=False
    )
    assert found.returncode == 0, (
        f"deploy/previous_version names {commit}, which this clone does not have: fetch the whole history"
        " (git fetch --unshallow)"
    )
    return commit


def code_of(tree: Path) -> str:
    """What PYTHONPATH has to be for a process to be of this tree, whatever is installed."""
    return f"{tree}:{tree / 'gen' / 'python'}"


@dataclass
class Replica:
    """A process of a service at one of its places."""

    service: str
    place: int
    process: asyncio.subprocess.Process
    log: Path


@dataclass
class Load:
    """Clients that ask again and again, one request each at a time, of the edges in turn."""

    platform: Platform
    client: Client
    organization_id: str
    over: asyncio.Event = field(default_factory=asyncio.Event)
    # How often each of them has been answered, and what went wrong with calls that are no inference.
    turns: list[int] = field(default_factory=lambda: [0] * (CLIENTS + 1))
    failures: list[str] = field(default_factory=list)
    running: int = CLIENTS + 1

    async def infer(self, number: int) -> None:
        """Streams of a second and whole answers, in turn."""
        while not self.over.is_set():
            self.client.port = self.platform.edge()
            if (self.turns[number] + number) % 2:
                stream = await self.client.open(tokens=TOKENS, pace_ms=PACE_MS)
                await stream.over
            else:
                await self.client.ask(tokens=TOKENS)
            self.turns[number] += 1
            await asyncio.sleep(_PAUSE_S)
        self.running -= 1

    async def administer(self) -> None:
        """Makes a key, lists keys, asks for usage."""
        path = f"/admin/v1/organizations/{self.organization_id}/api-keys"
        now = time.time()
        start, end = (time.strftime("%Y-%m-%dT%H:00:00Z", time.gmtime(now + hours * 3600)) for hours in (-24, 24))
        usage = f"/analytics/v1/organizations/{self.organization_id}/usage?start_time={start}&end_time={end}"
        headers = {"Authorization": f"Bearer {self.platform.key}"}
        while not self.over.is_set():
            async with aiohttp.ClientSession(f"http://{HOST}:{self.platform.edge()}", headers=headers) as session:
                for verb, there, body in (
                    ("POST", path, {"display_name": "more"}),
                    ("GET", path, None),
                    ("GET", usage, None),
                ):
                    try:
                        await call(session, verb, there, body)
                    except Exception as error:
                        self.failures.append(f"{verb} {there}: {error!r}")
            self.turns[-1] += 1
            await asyncio.sleep(_PAUSE_S)
        self.running -= 1

    async def turned(self) -> None:
        """Returns once each client was answered a request that it began after now."""
        wanted = [turns + 2 for turns in self.turns]
        async with asyncio.timeout(30):
            while any(turns < least for turns, least in zip(self.turns, wanted, strict=True)):
                await asyncio.sleep(_POLL_S)

    async def streaming(self) -> None:
        """Returns while streams run, half of them or more."""
        async with asyncio.timeout(30):
            while sum(0 < seen.tokens < TOKENS and not seen.ended for seen in self.client.seen) < CLIENTS // 2:
                await asyncio.sleep(_POLL_S)

    async def ended(self) -> None:
        """Nobody begins anything any more; returns once all have had their last answer."""
        self.over.set()
        async with asyncio.timeout(30):
            while self.running:
                await asyncio.sleep(_POLL_S)

    def faults(self) -> list[str]:
        """Of what has ended, whatever was refused, failed or not whole."""
        return self.failures + [_told(seen) for seen in self.client.seen if seen.ended and not _is_whole(seen)]


def _is_whole(seen: Seen) -> bool:
    return seen.status == 200 and seen.ended in ("done", "answered") and seen.tokens == TOKENS


def _told(seen: Seen) -> str:
    return f"{seen.request_id}: {seen.status} {seen.ended or 'runs'} after {seen.tokens} tokens {seen.body[:200]!r}"


@dataclass
class Platform:
    """The replicas that run, by service and in the order in which they began."""

    folder: Path
    urls: dict[str, str]
    redis_url: str
    amqp_url: str
    certificates: dict[str, dict[str, str]]
    grpc: dict[str, list[int]]
    ops: dict[str, list[int]]
    engine: FakeEngine
    replicas: dict[str, list[Replica]] = field(default_factory=lambda: {service: [] for service in PLACES})
    key: str = ""
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _everyone: list[Replica] = field(default_factory=list)
    # Edges that a load balancer has in turn.
    _edges: list[int] = field(default_factory=list)

    def edge(self) -> int:
        """The port of the edge whose turn it is."""
        self._edges.append(self._edges.pop(0))
        return self._edges[-1]

    async def run(self, tree: Path, service: str, *command: str) -> str:
        """A command of a service to its end; returns what it printed last."""
        replica = await self._spawn(tree, service, 0, *command)
        async with asyncio.timeout(_READY_S):
            status = await replica.process.wait()
        text = replica.log.read_text()
        assert status == 0, f"{service} {command} of {tree} ended with {status}:\n{text}"
        return text.splitlines()[-1] if text else ""

    async def migrate(self, tree: Path) -> None:
        """Migrations of a version, as the chart runs them before anything else."""
        await asyncio.gather(*(self.run(tree, service, "migrate") for service in STORING_SERVICES))

    async def start(self, tree: Path, service: str) -> None:
        """One more replica, at a place that is free; returns once it is ready."""
        taken = {replica.place for replica in self.replicas[service]}
        place = min(set(range(PLACES[service])) - taken)
        replica = await self._spawn(tree, service, place, "serve")
        port = self.ops[service][place]
        async with aiohttp.ClientSession() as session, asyncio.timeout(_READY_S):
            while True:
                assert replica.process.returncode is None, f"{service} of {tree} ended:\n{replica.log.read_text()}"
                with contextlib.suppress(OSError, aiohttp.ClientError):
                    async with session.get(f"http://{HOST}:{port}/ready") as answer:
                        if answer.status == 200:
                            break
                await asyncio.sleep(_POLL_S)
        self.replicas[service].append(replica)
        if service == "edge":
            self._edges.append(port)

    async def stop(self, service: str, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends the oldest replica; it may take as long as what it runs."""
        replica = self.replicas[service].pop(0)
        if service == "edge":
            self._edges.remove(self.ops["edge"][replica.place])
        replica.process.send_signal(number)
        async with asyncio.timeout(_READY_S):
            status = await replica.process.wait()
        wanted = 0 if number == signal.SIGTERM else -number
        assert status == wanted, f"{service} ended with {status}:\n{replica.log.read_text()[-3000:]}"

    async def replace(self, tree: Path, service: str) -> None:
        """All replicas of a service by those of a version, one by one: a Deployment has the new one ready before the
        old one is told to stop; a router gives its journal to the new one."""
        for _ in list(self.replicas[service]):
            if service == "router":
                await self.stop(service)
                await self.start(tree, service)
            else:
                await self.start(tree, service)
                await self.stop(service)

    async def loaded(self) -> Load:
        """Makes an organization with a hard budget that nothing exhausts, and a client of it."""
        headers = {"Authorization": f"Bearer {self.key}"}
        async with aiohttp.ClientSession(f"http://{HOST}:{self.edge()}", headers=headers) as admin:
            made = await call(admin, "POST", "/admin/v1/organizations", {"display_name": "Load", "rate_limits": LIMITS})
            organization_id = made["organization"]["organization_id"]
            path = f"/admin/v1/organizations/{organization_id}"
            budget = {
                "display_name": "all",
                "unit": "BUDGET_UNIT_TOKENS",
                "interval": "BUDGET_INTERVAL_TOTAL",
                "enforcement": "BUDGET_ENFORCEMENT_HARD",
                "limit": 1_000_000_000,
            }
            await call(admin, "POST", f"{path}/budgets", budget)
            key = await call(admin, "POST", f"{path}/api-keys", {"display_name": "load", "rate_limits": LIMITS})
        client = Client(0, organization_id, key["api_key"]["api_key_id"], key["secret"])
        return Load(self, client, organization_id)

    async def books(self) -> Books:
        """What all journals, the ledger and analytics have written down."""
        books = Books()
        tls = load(TlsConfig, self.certificates["analytics"])
        service = journal_service_pb2.DESCRIPTOR.services_by_name["JournalService"]
        async with opened(tls) as certificate:
            for port in self.grpc["router"]:
                one = Books()
                async with connect(f"{HOST}:{port}", service, tls=certificate) as channel:
                    await read_journal(journal_service_pb2_grpc.JournalServiceStub(channel), one)
                books.events += one.events
                books.open_entries += one.open_entries
                books.unpublished_entries += one.unpublished_entries
        await read_analytics(self.urls["analytics"], books)
        await read_ledger(self.urls["identity"], books)
        return books

    async def disagreements(self, seen: list[Seen]) -> list[Finding]:
        """What does not agree when everything has had the time to be written down."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + SETTLED_S
        while (found := check(await self.books(), seen)) and loop.time() < deadline:
            await asyncio.sleep(0.5)
        return found

    async def kill_all(self) -> None:
        """Ends what still runs, at once."""
        for replica in self._everyone:
            if replica.process.returncode is None:
                replica.process.kill()
                await replica.process.wait()

    async def _spawn(self, tree: Path, service: str, place: int, *command: str) -> Replica:
        folder = self.folder / f"{next(self._numbers)}-{service}"
        folder.mkdir()
        log = folder / "log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", service, *command),
                env={
                    "PATH": os.environ["PATH"],
                    "PYTHONPATH": code_of(tree),
                    "GRPC_ENABLE_FORK_SUPPORT": "0",
                    **self._environment(service, place),
                },
                cwd=folder,
                stdout=output,
                stderr=output,
            )
        replica = Replica(service, place, process, log)
        self._everyone.append(replica)
        return replica

    def _environment(self, service: str, place: int) -> dict[str, str]:
        """Variables that both versions know."""
        upper = service.upper()
        peers = (*PEERS[service], *(("router",) if service == "analytics" else ()))
        own = {f"AIAAS_{upper}_{peer.upper()}_TARGET": self._target(peer) for peer in peers}
        if service == "edge":
            own["AIAAS_EDGE_ADDRESS"] = f"{HOST}:{self.ops['edge'][place]}"
        else:
            own |= {
                f"AIAAS_{upper}_GRPC_ADDRESS": f"{HOST}:{self.grpc[service][place]}",
                f"AIAAS_{upper}_OPS_ADDRESS": f"{HOST}:{self.ops[service][place]}",
                f"AIAAS_{upper}_DATABASE_URL": self.urls[service],
                f"AIAAS_{upper}_REDIS_URL": self.redis_url,
                f"AIAAS_{upper}_AMQP_URL": self.amqp_url,
            }
        if service == "identity":
            own |= {
                "AIAAS_IDENTITY_AUDIT_KEY": KEY,
                "AIAAS_IDENTITY_SECRET_KEY": KEY,
                "AIAAS_IDENTITY_PUBLIC_URL": "http://localhost",
            }
        if service == "analytics":
            own["AIAAS_ANALYTICS_SECRET_KEY"] = KEY
        if service == "router":
            own["AIAAS_ROUTER_JOURNAL_PATH"] = str(self.folder / f"journal-{place}")
        return own | self.certificates[service]

    def _target(self, service: str) -> str:
        return "ipv4:" + ",".join(f"{HOST}:{port}" for port in self.grpc[service])


@asynccontextmanager
async def installed(servers: Servers, tree: Path, counts: dict[str, int], folder: Path) -> AsyncIterator[Platform]:
    """A version installed on empty data servers, so many replicas of each service, and one engine."""
    async with AsyncExitStack() as stack:
        redis_url, amqp_url = await servers.empty_redis(), await servers.empty_amqp()
        state = stack.enter_context(State.temporary())
        platform = Platform(
            folder,
            await databases(servers),
            redis_url,
            amqp_url,
            issue(state),
            {service: [free_port() for _ in range(PLACES[service])] for service in STORING_SERVICES},
            {service: [free_port() for _ in range(count)] for service, count in PLACES.items()},
            stack.enter_context(fake_engine()),
        )
        stack.push_async_callback(platform.kill_all)
        await platform.migrate(tree)
        platform.key = json.loads(await platform.run(tree, "identity", "bootstrap"))["secret"]
        await asyncio.gather(*(platform.start(tree, service) for service in counts))
        headers = {"Authorization": f"Bearer {platform.key}"}
        async with aiohttp.ClientSession(f"http://{HOST}:{platform.edge()}", headers=headers) as admin:
            await register(admin, platform.engine.port, tree)
        for service, count in counts.items():
            for _ in range(count - 1):
                await platform.start(tree, service)
        yield platform


@asynccontextmanager
async def under_load(platform: Platform) -> AsyncIterator[Load]:
    """Clients that ask until the end of the block, and then have their last answers."""
    load = await platform.loaded()
    async with asyncio.timeout(240), asyncio.TaskGroup() as tasks:
        for number in range(CLIENTS):
            tasks.create_task(load.infer(number))
        tasks.create_task(load.administer())
        try:
            await load.turned()
            yield load
        finally:
            load.over.set()
