"""analytics at the rate that is planned for, and its answers over very many requests; it never judges by one figure.

    DURATION_S=600 python -m tests.load.analytics            # ingestion
    ROWS=50000000 python -m tests.load.analytics load        # questions

Ingestion: 3,000 events a second through a real RabbitMQ, then five times that for a minute; nothing may be lost, and
the backlog must end. Beside it stands what PostgreSQL needs to COPY the same rows into a table without an index.
Questions: 13 months of 250 organizations and 40 models, copied into the partitions, summed, and asked through gRPC.
analytics has a core of its own; PostgreSQL, RabbitMQ and this load share the other.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import grpc

from aiaas.analytics.v1 import reliability_service_pb2 as reliability_pb
from aiaas.analytics.v1 import reliability_service_pb2_grpc, spend_service_pb2_grpc, usage_service_pb2_grpc
from aiaas.analytics.v1 import spend_service_pb2 as spend_pb
from aiaas.analytics.v1 import usage_service_pb2 as pb
from aiaas.identity.v1.auth_service_pb2 import AuthenticateResponse
from aiaas.type.v1.principal_pb2 import PRINCIPAL_KIND_USER, Principal
from aiaas.type.v1.usage_event_pb2 import OUTCOME_FAILED, OUTCOME_SUCCEEDED, TokenUsage, UsageEvent
from analytics.events import read_event
from deploy.local.ports import free_port
from deploy.local.processes import family
from deploy.local.servers import HOST, Postgres, RabbitMQ, Valkey
from deploy.local.state import State
from deploy.local.supervisor import Supervisor
from mesh.broker import Broker
from mesh.topology import EVENTS, USAGE
from tests.doubles.peer import PeerDouble
from tests.doubles.usage_events import usage_batch, usage_event
from tests.load.identity import run
from tests.load.native import CHECKOUT, LoadError, pin
from tests.load.targets import TARGET_CORE, take_core
from tests.load.verdict import Verdict

EVENTS_PER_S, BURST, BURST_S = 3_000, 5, 60
MESSAGE = 500
ORGANIZATIONS, MODELS, KEYS = 250, 40, 3
DAYS = 395
RUNS = 60
MOST_ANSWER_MS = 1000.0
LONGEST_BACKLOG_S = 1800.0
_TICK_S = 0.1
_POLL_S = 0.5
_CLOCK_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_METADATA = (("authorization", "Bearer session"),)
_COLUMNS = (
    "request_id, admit_time, organization_id, api_key_id, user_id, service_account_id, model, backend_id, endpoint,"
    " outcome, prompt_tokens, cached_prompt_tokens, completion_tokens, cost_micros, event"
)


@dataclass(frozen=True)
class World:
    """analytics as a process, and what it works with."""

    target: str
    analytics_pid: int
    postgres_pid: int
    environment: dict[str, str]
    sql: asyncpg.Connection[asyncpg.Record]
    broker: Broker

    def cpu_s(self) -> float:
        """CPU seconds of analytics and of PostgreSQL so far."""
        return _cpu_s(self.analytics_pid) + _cpu_s(self.postgres_pid)


@asynccontextmanager
async def running() -> AsyncIterator[World]:
    """Everything, on servers of its own."""
    with State.temporary() as state:
        postgres, valkey, rabbitmq = Postgres(state), Valkey(state), RabbitMQ(state)
        async with Supervisor(state) as supervisor:
            for server in (postgres, valkey, rabbitmq):
                await server.start(supervisor)
            identity = PeerDouble(f"{HOST}:{free_port()}")
            identity.answers["Authenticate"] = AuthenticateResponse(
                principal=Principal(
                    kind=PRINCIPAL_KIND_USER,
                    principal_id="user_a",
                    permissions=["usage.query", "spend.query", "reliability.query"],
                    platform=True,
                )
            )
            await identity.start()
            target = f"{HOST}:{free_port()}"
            environment = os.environ | {
                "AIAAS_ANALYTICS_DATABASE_URL": await postgres.database("analytics"),
                "AIAAS_ANALYTICS_REDIS_URL": valkey.url,
                "AIAAS_ANALYTICS_AMQP_URL": rabbitmq.url,
                "AIAAS_ANALYTICS_IDENTITY_TARGET": identity.address,
                "AIAAS_ANALYTICS_ROUTER_TARGET": "unix:nowhere",
                "AIAAS_ANALYTICS_SECRET_KEY": base64.b64encode(os.urandom(32)).decode(),
                "AIAAS_ANALYTICS_GRPC_ADDRESS": target,
                "AIAAS_ANALYTICS_OPS_ADDRESS": f"{HOST}:{free_port()}",
            }
            await asyncio.to_thread(run, environment, "migrate", service="analytics")
            sql = await asyncpg.connect(urlsplit(postgres.admin_url)._replace(path="/analytics").geturl())
            broker = Broker(rabbitmq.url, USAGE, EVENTS)
            postgres_pid = supervisor.pid(postgres.name)
            assert postgres_pid is not None
            with (state.root / "analytics.log").open("wb") as log:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "analytics"), env=environment, cwd=CHECKOUT, stderr=log
                )
            try:
                pin(process.pid, TARGET_CORE)
                await _until_fresh(sql, process)
                yield World(target, process.pid, postgres_pid, environment, sql, broker)
            finally:
                process.send_signal(signal.SIGTERM)
                await process.wait()
                await broker.close()
                await sql.close()
                await identity.stop()


async def _until_fresh(sql: asyncpg.Connection[asyncpg.Record], process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(60):
        while not await sql.fetchval("SELECT EXISTS (SELECT FROM usage_freshness)"):
            if process.returncode is not None:
                raise LoadError("analytics did not start.")
            await asyncio.sleep(_POLL_S)


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process and its children, those that have ended among them."""
    ticks = 0
    for process in family(pid):
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        # What ended within the family counts once, at its leader.
        ticks += sum(map(int, fields[11:15] if process.pid == pid else fields[11:13]))
    return ticks * _CLOCK_TICK_S


class Traffic:
    """Requests as routers tell them: sparse, of any organization, key and model."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._made = 0
        self._kinds = [
            self._kind(organization, model) for organization in range(ORGANIZATIONS) for model in range(MODELS)
        ]

    def _kind(self, organization: int, model: int) -> bytes:
        failed = (organization + model) % 50 == 0
        event = usage_event(
            "",
            organization_id=f"org_{organization:022}",
            api_key_id=f"key_{organization:020}_{model % KEYS}",
            user_id=f"user_{organization:020}_{model % KEYS}",
            model=f"model-{model:02}",
            backend_id=f"backend-{model:02}",
            outcome=OUTCOME_FAILED if failed else OUTCOME_SUCCEEDED,
            usage=TokenUsage(prompt_tokens=900, cached_prompt_tokens=400, completion_tokens=120),
            cost_micros=0 if failed else 177,
            duration_micros=2_000_000 + 10_000 * model,
            ttft_micros=90_000 + 1_000 * model,
            streamed=True,
        )
        event.ClearField("admit_time")
        return event.SerializeToString()

    def event(self, admit_time: datetime) -> bytes:
        """One more, serialized: of serialized messages laid one behind the other, protobuf makes one."""
        self._made += 1
        own = UsageEvent(request_id=f"req_{self._made:022}")
        own.admit_time.FromDatetime(admit_time)
        return self._random.choice(self._kinds) + own.SerializeToString()

    def row(self, admit_time: datetime, now: datetime) -> tuple[object, ...]:
        """One more, as it is stored."""
        return tuple(read_event(self.event(admit_time), now))


async def publish(world: World, traffic: Traffic, per_s: int, seconds: float) -> int:
    """Publish on schedule, ten times a second, and return how many events that were once the broker has them all."""
    published, began = 0, time.monotonic()
    async with asyncio.TaskGroup() as publishing:
        for tick in range(round(seconds / _TICK_S)):
            await asyncio.sleep(max(0.0, began + tick * _TICK_S - time.monotonic()))
            now = datetime.now(UTC)
            events = [traffic.event(now) for _ in range(round(per_s * _TICK_S))]
            for start in range(0, len(events), MESSAGE):
                body = usage_batch(*events[start : start + MESSAGE])
                publishing.create_task(world.broker.publish(USAGE.exchange, USAGE.routing_key, body, timeout_s=60))
            published += len(events)
    return published


async def until_counted(world: World, published: int) -> float:
    """Seconds until everything is counted. Raises LoadError after half an hour."""
    began = time.monotonic()
    while await world.sql.fetchval("SELECT coalesce(sum(requests), 0) FROM usage_hourly") < published:
        if time.monotonic() > began + LONGEST_BACKLOG_S:
            raise LoadError(f"The backlog did not end within {LONGEST_BACKLOG_S:.0f} s.")
        await asyncio.sleep(_POLL_S)
    return time.monotonic() - began


async def ingest(duration_s: int, verdict: Verdict) -> None:
    """3,000 events a second, then five times that, then the same rows by COPY."""
    async with running() as world:
        traffic = Traffic(1)
        began, cpu_s = time.monotonic(), world.cpu_s()
        steady = await publish(world, traffic, EVENTS_PER_S, duration_s)
        seconds = time.monotonic() - began
        rest_s = await until_counted(world, steady)
        cpu_s = world.cpu_s() - cpu_s
        text = f"{steady:,} events, {steady / seconds:,.0f}/s, all counted {rest_s:.1f} s after the last"
        verdict.line(f"{EVENTS_PER_S:,} events/s for {duration_s} s", text, rest_s < LONGEST_BACKLOG_S)
        verdict.line("events per CPU second, analytics and PostgreSQL", f"{steady / cpu_s:,.0f}")

        began = time.monotonic()
        burst = await publish(world, traffic, BURST * EVENTS_PER_S, BURST_S)
        seconds = time.monotonic() - began
        waiting = (await world.broker.depth(USAGE, timeout_s=10)).messages
        rest_s = await until_counted(world, steady + burst)
        text = (
            f"{burst:,} events, {burst / seconds:,.0f}/s, {waiting:,} messages waited then, none {rest_s:.1f} s later"
        )
        left = await world.broker.depth(USAGE, timeout_s=10)
        verdict.line(f"{BURST} times that for {BURST_S} s", text, left.dead_messages == 0)
        rows = await world.sql.fetchval("SELECT count(*) FROM usage_events", timeout=600)
        summed = await world.sql.fetchval("SELECT sum(requests)::bigint FROM usage_hourly")
        text = f"{steady + burst:,} published, {rows:,} kept, {summed:,} summed"
        verdict.line("nothing lost", text, steady + burst == rows == summed)
        await _copy(world, rows, verdict)


async def _copy(world: World, rows: int, verdict: Verdict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        await world.sql.copy_from_query("SELECT * FROM usage_events", output=file, format="binary", timeout=900)
        await world.sql.execute("CREATE TABLE plain (LIKE usage_events)")
        await world.sql.execute("CHECKPOINT", timeout=900)
        cpu_s = _cpu_s(world.postgres_pid)
        await world.sql.copy_to_table("plain", source=file, format="binary", timeout=900)
        cpu_s = _cpu_s(world.postgres_pid) - cpu_s
    verdict.line("the same rows by COPY, no index: rows per CPU second of PostgreSQL", f"{rows / cpu_s:,.0f}")


async def load(rows: int, runs: int, verdict: Verdict) -> None:
    """Fill 13 months, sum them, and ask what dashboards ask."""
    async with running() as world:
        today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        began = time.monotonic()
        await _fill(world, today, rows)
        verdict.line("copied", f"{rows:,} events of {DAYS} days in {time.monotonic() - began:,.0f} s")
        began = time.monotonic()
        quiet = world.environment | {"AIAAS_LOG_LEVEL": "WARNING"}
        await asyncio.to_thread(run, quiet, "rebuild", service="analytics")
        verdict.line("summed", f"in {time.monotonic() - began:,.0f} s")
        await world.sql.execute("VACUUM ANALYZE", timeout=7200)
        for table in ("usage_events", "usage_hourly", "usage_daily"):
            size = await world.sql.fetchval(
                "SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree($1::text::regclass)", table
            )
            size = size or await world.sql.fetchval("SELECT pg_total_relation_size($1::text::regclass)", table)
            verdict.line(f"{table} on disk", f"{int(size) / rows:,.0f} MB per million events")
        async with grpc.aio.insecure_channel(world.target) as channel:
            random = Random(1)
            for name, method, request in _questions(channel, today):
                took = [await _ask(method, request, random) for _ in range(runs)]
                cuts = quantiles(took, n=20)
                text = f"p50 {cuts[9]:.0f} ms, p95 {cuts[18]:.0f} ms, worst {max(took):.0f} ms"
                verdict.line(name, text, cuts[18] < MOST_ANSWER_MS)


async def _fill(world: World, today: datetime, rows: int) -> None:
    traffic, random, now = Traffic(1), Random(2), datetime.now(UTC)
    for number in range(DAYS):
        day = today - timedelta(days=DAYS - number)
        await world.sql.execute("SELECT ensure_usage_events_partition($1)", day.date())
        wanted = rows * (number + 1) // DAYS - rows * number // DAYS
        times = sorted(random.random() for _ in range(wanted))
        records = (traffic.row(day + timedelta(days=share), now) for share in times)
        await world.sql.copy_records_to_table(f"usage_events_{day:%Y%m%d}", records=records, timeout=3600)


async def _ask(method: Any, request: Any, random: Random) -> float:
    """Milliseconds until the answer is there, of another organization each time."""
    request.organization_id = f"org_{random.randrange(ORGANIZATIONS):022}"
    began = time.perf_counter()
    await method(request, metadata=_METADATA, timeout=30)
    return (time.perf_counter() - began) * 1000


def _questions(channel: grpc.aio.Channel, today: datetime) -> Iterator[tuple[str, Any, Any]]:
    usage = usage_service_pb2_grpc.UsageServiceStub(channel)
    spend = spend_service_pb2_grpc.SpendServiceStub(channel)
    reliability = reliability_service_pb2_grpc.ReliabilityServiceStub(channel)
    day, month, model = pb.USAGE_INTERVAL_DAY, pb.USAGE_INTERVAL_MONTH, pb.USAGE_DIMENSION_MODEL
    for name, method, request, days in (
        ("usage by day, 30 days", usage.QueryUsage, pb.QueryUsageRequest(interval=day), 30),
        (
            "usage by month and model, 13 months",
            usage.QueryUsage,
            pb.QueryUsageRequest(interval=month, group_by=[model]),
            DAYS,
        ),
        ("costliest models, 30 days", spend.QueryTopSpend, spend_pb.QueryTopSpendRequest(dimension=model), 30),
        (
            "reliability by day, 30 days",
            reliability.QueryReliability,
            reliability_pb.QueryReliabilityRequest(interval=day),
            30,
        ),
    ):
        request.start_time.FromDatetime(today - timedelta(days=days))
        request.end_time.FromDatetime(today)
        yield name, method, request


def main() -> None:
    """Raises SystemExit: 0 when every line is met, 1 when one is missed, 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.analytics", description="analytics under load.")
    parser.add_argument("what", nargs="?", choices=("ingest", "load"), default="ingest")
    arguments = parser.parse_args()
    verdict = Verdict()
    try:
        take_core()
        print(f"| analytics: {arguments.what} | found | |\n| --- | --- | --- |", flush=True)
        if arguments.what == "ingest":
            asyncio.run(ingest(int(os.environ.get("DURATION_S", "600")), verdict))
        else:
            asyncio.run(load(int(os.environ.get("ROWS", "50000000")), int(os.environ.get("RUNS", str(RUNS))), verdict))
    except LoadError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if verdict.met else 1)


if __name__ == "__main__":
    main()
