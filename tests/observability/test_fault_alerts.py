"""Every fault that the runbooks know, caused in a platform that runs until its alert fires in a real Prometheus, by the
rules as they are but for seconds where they have minutes.

With WITHOUT=faults nothing is caused, and every test of a fault must fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import aio_pika
import aiohttp
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from deploy.local.engines import HOST
from deploy.local.ports import free_port
from deploy.local.processes import family
from deploy.local.stack import PRICE, Stack, running
from deploy.local.state import State
from mesh.tokens import API_KEY
from mesh.topology import USAGE
from tests.doubles.prometheus import ROOT, RULES, Prometheus, impatient, watching
from tests.doubles.scripted_backend import Answer, ScriptedBackend, chat_stream, failure
from tests.doubles.tcp_gate import TcpGate
from tests.load.host import call

MODEL = "scripted"
FIRED_WITHIN_S, SILENT_WITHIN_S = 40.0, 40.0
# Longer than every shortened window, and the time that an alert waits.
QUIET_S = 15.0
# How fast things are is a matter of the machine, and no fault.
OF_THE_MACHINE = {"time-to-first-byte", "platform-overhead", "management-latency"}
_AT_ONCE = 4
_PAUSE_S = 0.2


class Alert(NamedTuple):
    """An alert by its name, and the job that it is about, where it is about one."""

    name: str
    job: str = ""


@dataclass
class Faulty:
    """A platform under a little load, what watches it, and the hands that break it."""

    stack: Stack
    engine: ScriptedBackend
    # Between the router and identity.
    gate: TcpGate
    admin: aiohttp.ClientSession
    prometheus: Prometheus
    jobs: set[str]
    keys: list[str] = field(default_factory=list)

    async def prepare(self) -> None:
        """A model on two backends, which are one engine, and an organization without and one with a hard budget."""
        model = {"context_tokens": 2048, "endpoints": ["ENDPOINT_CHAT_COMPLETIONS"]}
        await call(self.admin, "PATCH", f"/admin/v1/models/{MODEL}?allow_missing=true", model)
        await call(self.admin, "POST", f"/admin/v1/models/{MODEL}/prices", PRICE)
        # What is broken heals within seconds.
        policy = {"breaker": {"open_millis": 1000}}
        await call(self.admin, "PATCH", f"/admin/v1/models/{MODEL}/routing-policy?allow_missing=true", policy)
        for number in (1, 2):
            backend = {
                "base_url": self.engine.base_url,
                "engine": "ENGINE_KIND_VLLM",
                "models": [{"model_id": MODEL}],
            }
            await call(self.admin, "PATCH", f"/admin/v1/backends/{MODEL}-{number}?allow_missing=true", backend)
        for name in ("Free", "Bound"):
            made = await call(self.admin, "POST", "/admin/v1/organizations", {"display_name": name})
            path = f"/admin/v1/organizations/{made['organization']['organization_id']}"
            if name == "Bound":
                budget = {
                    "display_name": "Ample",
                    "unit": "BUDGET_UNIT_TOKENS",
                    "interval": "BUDGET_INTERVAL_TOTAL",
                    "enforcement": "BUDGET_ENFORCEMENT_HARD",
                    "limit": 1_000_000_000,
                }
                await call(self.admin, "POST", f"{path}/budgets", budget)
            self.keys.append((await call(self.admin, "POST", f"{path}/api-keys", {"display_name": name}))["secret"])

    async def ask(self, key: str) -> int:
        """A streamed chat completion; returns its status, 0 where none came."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 16}
        headers = {"Authorization": f"Bearer {key}"}
        try:
            async with self.admin.post("/v1/chat/completions", json=body, headers=headers) as answer:
                await answer.read()
                return answer.status
        except (aiohttp.ClientError, TimeoutError):
            return 0

    async def serves(self) -> bool:
        """Whether both organizations are answered."""
        return {await self.ask(key) for key in self.keys} == {200}

    async def keep_asking(self) -> None:
        """Traffic of both organizations, until cancelled."""

        async def one(key: str) -> None:
            while True:
                await self.ask(key)
                await asyncio.sleep(_PAUSE_S)

        async with asyncio.TaskGroup() as group:
            for key in self.keys * _AT_ONCE:
                group.create_task(one(key))

    async def fires(self, alert: Alert) -> bool:
        """Whether an alert fires now."""
        return any(
            labels["alertname"] == alert.name and alert.job in ("", labels.get("job"))
            for labels in await self.prometheus.alerts()
        )

    async def firing(self) -> set[tuple[str, str]]:
        """The alerts that fire now, with what they are about, but for those that are the machine's."""
        return {
            (labels["alertname"], labels.get("slo", labels.get("job", "")))
            for labels in await self.prometheus.alerts()
            if labels.get("slo") not in OF_THE_MACHINE
        }

    @asynccontextmanager
    async def away(self, *names: str) -> AsyncIterator[None]:
        """Programs that are killed, and away."""
        supervisor = self.stack.supervisor
        programs = [supervisor.program(name) for name in names]
        for program in programs:
            pid = supervisor.pid(program.name)
            assert pid is not None
            for process in family(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            await supervisor.stop(program.name)
        try:
            yield
        finally:
            for program in programs:
                await supervisor.start(program)

    @asynccontextmanager
    async def cut_off(self) -> AsyncIterator[None]:
        """The router cannot reach identity; both live."""
        await self.gate.shut()
        try:
            yield
        finally:
            await self.gate.open()

    @asynccontextmanager
    async def disk_full(self) -> AsyncIterator[None]:
        """The router can write to no file."""
        pid = self.stack.supervisor.pid("router")
        assert pid is not None
        owner = os.stat(f"/proc/{pid}")

        def limit(size: str) -> None:
            # Its own user may do that, and root not always. What follows the colon is the hard limit, which stays.
            command = ["prlimit", f"--pid={pid}", f"--fsize={size}:"]
            subprocess.run(command, user=owner.st_uid, group=owner.st_gid, extra_groups=[], check=True)

        limit("0")
        try:
            yield
        finally:
            limit("unlimited")

    @asynccontextmanager
    async def engine_answers(self, answer: Answer) -> AsyncIterator[None]:
        """The engine answers this and nothing else."""
        before, self.engine.default = self.engine.default, answer
        try:
            yield
        finally:
            self.engine.default = before

    @asynccontextmanager
    async def poison(self) -> AsyncIterator[None]:
        """A message that nobody can read; afterwards it is thrown away."""
        async with await aio_pika.connect(self.stack.rabbitmq.url) as connection:
            channel = await connection.channel()
            exchange = await channel.get_exchange(USAGE.exchange)
            await exchange.publish(aio_pika.Message(b"\xff no usage"), USAGE.routing_key)
            try:
                yield
            finally:
                await (await channel.get_queue(USAGE.dead_name)).purge()

    @asynccontextmanager
    async def alarm(self) -> AsyncIterator[None]:
        """The broker has no memory left, and takes nothing."""
        await self._rabbitmqctl("set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            yield
        finally:
            await self._rabbitmqctl("set_vm_memory_high_watermark", "absolute", "512MB")

    async def _rabbitmqctl(self, *arguments: str) -> None:
        program = self.stack.supervisor.program("rabbitmq")
        process = await asyncio.create_subprocess_exec(
            Path(program.command[0]).with_name("rabbitmqctl"),
            *arguments,
            env={**program.environment, "HOME": str(program.folder)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        told, _ = await process.communicate()
        assert process.returncode == 0, told.decode()

    @asynccontextmanager
    async def meanwhile(self, one: Callable[[], Any]) -> AsyncIterator[None]:
        """Something that somebody does again and again, forty times a second."""

        async def keep_on() -> None:
            while True:
                await asyncio.gather(one(), one(), return_exceptions=True)
                await asyncio.sleep(0.05)

        task = asyncio.create_task(keep_on())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def unlike_http(self) -> None:
        """A connection that speaks something else."""
        host, _, port = self.stack.base_url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(b"\x16\x03\x01 hello\r\n\r\n")
            await reader.read()
        finally:
            writer.close()


Fault = Callable[[Faulty], AbstractAsyncContextManager[None]]

GARBAGE = Answer([b"data: \xff\xfe no JSON\n\n"], content_type="text/event-stream")

# By the title of its section: how a fault is caused, and what must fire. In this order an alert is seldom wanted again
# while it still fires for the fault before.
FAULTS: dict[str, tuple[Fault, tuple[Alert, ...]]] = {
    "A router is killed": (lambda to: to.away("router"), (Alert("TargetDown", "aiaas-router"),)),
    "Events that cannot be read": (lambda to: to.poison(), (Alert("DeadLetters"),)),
    "An edge is killed": (lambda to: to.away("edge"), (Alert("TargetDown", "aiaas-edge"),)),
    "Services cannot reach each other": (lambda to: to.cut_off(), (Alert("LeaseFailures"),)),
    "RabbitMQ is down": (lambda to: to.away("rabbitmq"), (Alert("JournalAge"),)),
    "An engine hangs before its first byte": (
        lambda to: to.engine_answers(Answer(before=[asyncio.Event()])),
        (Alert("BreakerOpen"),),
    ),
    "identity is away": (
        lambda to: to.away("identity"),
        (Alert("ServiceDown", "aiaas-identity"), Alert("LeaseFailures")),
    ),
    "An engine is slow or breaks off": (
        lambda to: to.engine_answers(failure(500)),
        (Alert("BreakerOpen"), Alert("ErrorBudgetBurnsFast")),
    ),
    "Redis is down, slow or empty": (lambda to: to.away("valkey"), (Alert("LimitsWithoutRedis"),)),
    "A disk is full": (lambda to: to.disk_full(), (Alert("JournalNotWritten"),)),
    "RabbitMQ raises an alarm or a queue is deleted": (lambda to: to.alarm(), (Alert("JournalAge"),)),
    "An engine answers garbage": (lambda to: to.engine_answers(GARBAGE), (Alert("BreakerOpen"),)),
    "analytics dies while it counts": (lambda to: to.away("analytics"), (Alert("ServiceDown", "aiaas-analytics"),)),
    "Oversized or endless requests": (lambda to: to.meanwhile(to.unlike_http), (Alert("ConnectionsRefused"),)),
    "PostgreSQL crashes or has no slots": (
        lambda to: to.away("postgres"),
        (Alert("LeaseFailures"), Alert("BudgetsUnavailable")),
    ),
    "Many unknown keys at once": (
        lambda to: to.meanwhile(lambda: to.ask(API_KEY.generate().text)),
        (Alert("UnknownKeys"),),
    ),
}


@asynccontextmanager
async def faulty_platform(folder: Path) -> AsyncIterator[Faulty]:
    """A whole platform with traffic, its router behind a gate to identity."""
    own = f"{HOST}:{free_port()}"
    host, _, port = own.partition(":")
    async with contextlib.AsyncExitStack() as entered:
        state = entered.enter_context(State.temporary())
        gate = await entered.enter_async_context(TcpGate(host, int(port)))
        engine = await entered.enter_async_context(ScriptedBackend(chat_stream("Hel", "lo")))
        settings = {
            "AIAAS_IDENTITY_GRPC_ADDRESS": own,
            "AIAAS_ANALYTICS_IDENTITY_TARGET": own,
            "AIAAS_EDGE_IDENTITY_TARGET": own,
            "AIAAS_ROUTER_IDENTITY_TARGET": f"{HOST}:{gate.port}",
            "AIAAS_ROUTER_FIRST_BYTE_TIMEOUT_S": "1",
        }
        stack = await entered.enter_async_context(running(state, chat_replicas=0, settings=settings))
        admin = await entered.enter_async_context(
            aiohttp.ClientSession(
                stack.base_url,
                headers={"Authorization": f"Bearer {stack.platform_key}"},
                timeout=aiohttp.ClientTimeout(10),
            )
        )
        jobs = {f"aiaas-{name}": address for name, address in stack.ops.items()}
        prometheus = await entered.enter_async_context(watching(impatient(folder), jobs, folder, every="1s"))
        faulty = Faulty(stack, engine, gate, admin, prometheus, set(jobs))
        await faulty.prepare()
        asking = asyncio.create_task(faulty.keep_asking())
        try:
            yield faulty
        finally:
            asking.cancel()
            await asyncio.wait([asking])


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:
        yield portal


@pytest.fixture(scope="module")
def faulty(portal: BlockingPortal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    with portal.wrap_async_context_manager(faulty_platform(tmp_path_factory.mktemp("prometheus"))) as faulty:
        yield faulty


async def until(condition: Callable[[], Any], within_s: float) -> bool:
    """Whether a condition holds within a time."""
    deadline = time.monotonic() + within_s
    while not await condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.2)
    return True


async def cause(faulty: Faulty, fault: Fault, alerts: tuple[Alert, ...]) -> str:
    """Cause a fault until its alerts fire; returns after how many seconds each did. Raises AssertionError."""
    for alert in alerts:
        silent = await until(partial(is_silent, faulty, alert), SILENT_WITHIN_S)
        assert silent, f"{alert} fires before"
    # Without traffic no lease is held, of which nobody could report.
    assert await until(faulty.serves, SILENT_WITHIN_S)
    causing = contextlib.nullcontext() if os.environ.get("WITHOUT") == "faults" else fault(faulty)
    async with causing:
        began = time.monotonic()
        told = []
        for alert in alerts:
            fired = await until(partial(faulty.fires, alert), FIRED_WITHIN_S)
            assert fired, f"{alert} does not fire within {FIRED_WITHIN_S} s; {await faulty.firing()} do"
            told.append(f"{alert.name} after {time.monotonic() - began:.1f} s")
    return ", ".join(told)


async def is_silent(faulty: Faulty, alert: Alert) -> bool:
    return not await faulty.fires(alert)


async def stays_silent(faulty: Faulty) -> None:
    """Raises AssertionError once anything fires."""
    deadline = time.monotonic() + QUIET_S
    while time.monotonic() < deadline:
        assert await faulty.firing() == set()
        await asyncio.sleep(0.5)


async def nothing_fires(faulty: Faulty) -> bool:
    return not await faulty.firing()


def test_nothing_fires_while_nothing_is_wrong(portal: BlockingPortal, faulty: Faulty) -> None:
    # Of what it has not looked at yet Prometheus thinks that it is away, and analytics of itself that it takes nothing.
    assert portal.call(until, partial(faulty.prometheus.sees, faulty.jobs), SILENT_WITHIN_S)
    taken = partial(faulty.prometheus.query, "aiaas_analytics_consumers > 0")
    assert portal.call(until, taken, SILENT_WITHIN_S)
    assert portal.call(until, partial(nothing_fires, faulty), SILENT_WITHIN_S)
    portal.call(stays_silent, faulty)


@pytest.mark.parametrize("title", FAULTS)
def test_fault_fires_its_alert(portal: BlockingPortal, faulty: Faulty, title: str) -> None:
    print(f"{title}: {portal.call(cause, faulty, *FAULTS[title])}")


def test_all_alerts_end_with_their_faults(portal: BlockingPortal, faulty: Faulty) -> None:
    assert portal.call(until, partial(nothing_fires, faulty), SILENT_WITHIN_S), portal.call(faulty.firing)
    assert portal.call(faulty.serves)


def test_runbooks_name_the_alerts_of_every_fault_or_say_why_there_is_none() -> None:
    page = (ROOT / "docs/runbooks.md").read_text().partition("\n## Faults\n")[2]
    sections = re.findall(r"^### (.+)$", page, re.MULTILINE)
    rows = dict(re.findall(r"^\| \[(.+?)\]\(.+?\) \| (.+) \|$", page, re.MULTILINE))
    assert list(rows) == sections
    names = set(re.findall(r"alert: (\w+)", "".join(path.read_text() for path in RULES)))
    for title, told in rows.items():
        named = {name for name in re.findall(r"\[(\w+)\]", told) if name in names}
        if told.startswith("none"):
            assert title not in FAULTS
        else:
            assert named == {alert.name for alert in FAULTS[title][1]}, title
