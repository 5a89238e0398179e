"""analytics at the rate that is planned for, and its answers over very many requests; it never judges by one figure.

    DURATION_S=600 python -m tests.load.analytics            # ingestion
    ROWS=5000000 python -m tests.load.analytics load         # questions and an export

Ingestion: 3,000 events a second through a real RabbitMQ, then five times that for a minute; nothing may be lost, and
the backlog must end. tests/load/ingestion.py says what an event costs beside COPY.
Questions: 13 months of 250 organizations and 40 models, asked through gRPC. PostgreSQL makes events and sums of the
same 10,000 kinds by itself, and a day of them is summed anew by analytics, which must change nothing.
analytics has a core of its own; PostgreSQL, RabbitMQ and this load share the other.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import signal
import sys
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

from aiaas.analytics.v1 import export_service_pb2 as export_pb
from aiaas.analytics.v1 import (
    export_service_pb2_grpc,
    reliability_service_pb2_grpc,
    spend_service_pb2_grpc,
    usage_service_pb2_grpc,
)
from aiaas.analytics.v1 import reliability_service_pb2 as reliability_pb
from aiaas.analytics.v1 import spend_service_pb2 as spend_pb
from aiaas.analytics.v1 import usage_service_pb2 as pb
from aiaas.identity.v1.auth_service_pb2 import AuthenticateResponse
from aiaas.type.v1.principal_pb2 import PRINCIPAL_KIND_USER, Principal
from aiaas.type.v1.usage_event_pb2 import OUTCOME_FAILED, OUTCOME_SUCCEEDED, TokenUsage, UsageEvent
from analytics.events import read_event
from analytics.rollups import KEYS, SKETCHES, SUMS
from analytics.sketches import COUNT_BITS, bucket_of
from analytics.store import UsageStore
from analytics.usage_retention import Kept
from deploy.local.ports import free_port
from deploy.local.processes import family
from deploy.local.servers import HOST, Postgres, RabbitMQ, SeaweedFS, Valkey
from deploy.local.state import State
from deploy.local.supervisor import Supervisor
from mesh.broker import Broker
from mesh.database import Database
from mesh.topology import EVENTS, USAGE
from tests.doubles.peer import PeerDouble
from tests.doubles.usage_events import usage_batch, usage_event
from tests.load.identity import run
from tests.load.native import CHECKOUT, LoadError, pin
from tests.load.targets import TARGET_CORE, take_core
from tests.load.verdict import Verdict

EVENTS_PER_S, BURST, BURST_S = 3_000, 5, 60
MESSAGE = 500
ORGANIZATIONS, MODELS, API_KEYS = 250, 40, 3
DAYS = 395
RUNS = 60
MOST_P95_MS, MOST_ANSWER_MS = 300.0, 1000.0
EXPORT_DAYS, MOST_EXPORT_S, MOST_EXPORT_MB = 31, 60.0, 300.0
LONGEST_BACKLOG_S = 1800.0
_TICK_S = 0.1
_POLL_S = 0.5
_CLOCK_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_METADATA = (("authorization", "Bearer session"),)
_PERMISSIONS = ["usage.query", "spend.query", "spend.forecast", "reliability.query", "exports.create", "exports.get"]
# Minutes of a day.
_MINUTES = 1440

# All that the requests of a kind have in common: their columns, how their events begin, and their sums' histograms.
_KINDS = """
CREATE UNLOGGED TABLE kinds (LIKE usage_events, reason text, prompt_cost_micros bigint,
    cached_prompt_cost_micros bigint, completion_cost_micros bigint, latency bigint, ttft bigint, kind serial)
"""
# What a day has: each request's number, its kind and the minute of the day at which it was admitted.
_MADE = f"""
WITH made AS (
    SELECT number, 1 + (hashint8(number) & 2147483647) % {ORGANIZATIONS * MODELS} AS kind,
        (number - $1) * {_MINUTES} / ($2::bigint - $1) AS minute
    FROM generate_series($1::bigint, $2::bigint - 1) AS number
)
"""
_FILL_EVENTS = f"""
{_MADE}
INSERT INTO usage_events
SELECT 'req_' || lpad(number::text, 22, '0'), $3::timestamptz + minute * interval '1 minute', organization_id,
    api_key_id, user_id, service_account_id, model, backend_id, endpoint, outcome, prompt_tokens, cached_prompt_tokens,
    completion_tokens, cost_micros,
    event || '\\x121a'::bytea || convert_to('req_' || lpad(number::text, 22, '0'), 'UTF8') || told
FROM made JOIN kinds USING (kind)
JOIN unnest($4::bytea[]) WITH ORDINALITY AS moments (told, place) ON place = minute + 1
"""
_FILL_SUMS = f"""
{_MADE}, counted AS (
    SELECT kind, minute / {{minutes}} AS part, count(*) AS n FROM made GROUP BY 1, 2
)
INSERT INTO {{table}} (organization_id, {{period}}, {", ".join((*KEYS, *SUMS, *SKETCHES))})
SELECT organization_id, $3::timestamptz + part * {{minutes}} * interval '1 minute', {", ".join(KEYS)},
    n, {", ".join(f"n * {name}" for name in SUMS[1:])},
    {", ".join(f"ARRAY[({name} << {COUNT_BITS}) + n]" for name in SKETCHES)}
FROM counted JOIN kinds USING (kind) ORDER BY organization_id
"""
_SUMS_OF_DAY = """
SELECT hashtextextended(string_agg(sums::text, '' ORDER BY sums::text COLLATE "C"), 0)
FROM {table} AS sums WHERE {period} >= $1 AND {period} < $2
"""


@dataclass(frozen=True)
class World:
    """analytics as a process, and what it works with."""

    target: str
    analytics_pid: int
    postgres_pid: int
    environment: dict[str, str]
    admin_url: str
    sql: asyncpg.Connection[asyncpg.Record]
    broker: Broker

    def cpu_s(self) -> float:
        """CPU seconds of analytics and of PostgreSQL so far."""
        return _cpu_s(self.analytics_pid) + _cpu_s(self.postgres_pid)


@asynccontextmanager
async def running() -> AsyncIterator[World]:
    """Everything, on servers of its own."""
    with State.temporary() as state:
        postgres, valkey, rabbitmq, seaweedfs = Postgres(state), Valkey(state), RabbitMQ(state), SeaweedFS(state)
        async with Supervisor(state) as supervisor:
            for server in (postgres, valkey, rabbitmq, seaweedfs):
                await server.start(supervisor)
            identity = PeerDouble(f"{HOST}:{free_port()}")
            identity.answers["Authenticate"] = AuthenticateResponse(
                principal=Principal(
                    kind=PRINCIPAL_KIND_USER,
                    principal_id="user_a",
                    permissions=_PERMISSIONS,
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
                "AIAAS_ANALYTICS_S3_URL": seaweedfs.url,
                "AIAAS_ANALYTICS_S3_ACCESS_KEY": seaweedfs.access_key,
                "AIAAS_ANALYTICS_S3_SECRET_KEY": seaweedfs.secret_key,
                "AIAAS_ANALYTICS_GRPC_ADDRESS": target,
                "AIAAS_ANALYTICS_OPS_ADDRESS": f"{HOST}:{free_port()}",
            }
            await asyncio.to_thread(run, environment, "migrate", service="analytics")
            admin_url = urlsplit(postgres.admin_url)._replace(path="/analytics").geturl()
            sql = await asyncpg.connect(admin_url)
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
                yield World(target, process.pid, postgres_pid, environment, admin_url, sql, broker)
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
            api_key_id=f"key_{organization:020}_{model % API_KEYS}",
            user_id=f"user_{organization:020}_{model % API_KEYS}",
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

    def kinds(self) -> Iterator[tuple[object, ...]]:
        """What the requests of each kind have in common, as _KINDS wants it."""
        now = datetime.now(UTC)
        own = UsageEvent(request_id="kind")
        own.admit_time.FromDatetime(now)
        for number, kind in enumerate(self._kinds, start=1):
            event = read_event(kind + own.SerializeToString(), now)._replace(body=kind)
            yield (*event[:-2], bucket_of(event.latency_micros), bucket_of(event.ttft_micros), number)


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


async def load(rows: int, runs: int, verdict: Verdict) -> None:
    """Fill 13 months with events and sums, ask what dashboards ask, and export a month."""
    async with running() as world:
        today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        began = time.monotonic()
        await _fill(world, today, rows)
        verdict.line("filled", f"{rows:,} events of {DAYS} days, and sums, in {time.monotonic() - began:,.0f} s")
        began = time.monotonic()
        await world.sql.execute("VACUUM ANALYZE", timeout=7200)
        verdict.line("vacuumed", f"in {time.monotonic() - began:,.0f} s")
        await _sum_anew(world, today - timedelta(days=1), verdict)
        for table in ("usage_events", "usage_hourly", "usage_daily"):
            size = await world.sql.fetchval(
                "SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree($1::text::regclass)", table
            )
            size = size or await world.sql.fetchval("SELECT pg_total_relation_size($1::text::regclass)", table)
            found = await world.sql.fetchval(f"SELECT count(*) FROM {table}", timeout=600)
            verdict.line(table, f"{found:,} rows, {int(size) / 1e6:,.0f} MB")
        async with grpc.aio.insecure_channel(world.target) as channel:
            random = Random(1)
            for name, method, request in _questions(channel, today):
                took = [await _ask(method, request, random) for _ in range(runs)]
                cuts = quantiles(took, n=20)
                text = f"p50 {cuts[9]:.0f} ms, p95 {cuts[18]:.0f} ms, worst {max(took):.0f} ms"
                verdict.line(name, text, cuts[18] < MOST_P95_MS and max(took) < MOST_ANSWER_MS)
            await _export(world, export_service_pb2_grpc.ExportServiceStub(channel), today, verdict)


async def _fill(world: World, today: datetime, rows: int) -> None:
    """Makes the events and sums of each day, on two connections by turns."""
    kept = Kept().hourly_since(today)
    await world.sql.execute("UPDATE usage_rollups SET closed_until = $1, hourly_since = $2", today, kept)
    await world.sql.execute(_KINDS)
    await world.sql.copy_records_to_table("kinds", records=Traffic(1).kinds())
    await world.sql.execute("ANALYZE kinds")
    days = iter(range(DAYS))

    async def fill() -> None:
        sql = await asyncpg.connect(world.admin_url, server_settings={"synchronous_commit": "off", "jit": "off"})
        try:
            for number in days:
                day = today - timedelta(days=DAYS - number)
                part = rows * number // DAYS, rows * (number + 1) // DAYS, day
                await sql.execute("SELECT ensure_usage_events_partition($1)", day.date())
                told = [_admitted(day, minute) for minute in range(_MINUTES)]
                await sql.execute(_FILL_EVENTS, *part, told, timeout=900)
                fills = [("usage_daily", "day", _MINUTES), ("usage_hourly", "hour", _MINUTES // 24)]
                for table, period, minutes in fills[: 1 + (day >= kept)]:
                    await sql.execute(
                        _FILL_SUMS.format(table=table, period=period, minutes=minutes), *part, timeout=900
                    )
        finally:
            await sql.close()

    async with asyncio.TaskGroup() as filling:
        for _ in range(2):
            filling.create_task(fill())


def _admitted(day: datetime, minute: int) -> bytes:
    event = UsageEvent()
    event.admit_time.FromDatetime(day + timedelta(minutes=minute))
    return event.SerializeToString()


async def _sum_anew(world: World, day: datetime, verdict: Verdict) -> None:
    """Has analytics sum a day from its events, and sees whether that is what was made."""
    tables = [("usage_daily", "day"), ("usage_hourly", "hour")]
    asked = [_SUMS_OF_DAY.format(table=table, period=period) for table, period in tables]
    before = [await world.sql.fetchval(query, day, day + timedelta(days=1)) for query in asked]
    database = Database(world.environment["AIAAS_ANALYTICS_DATABASE_URL"])
    began = time.monotonic()
    try:
        events = await UsageStore(database).rebuild_day(day)
    finally:
        await database.close()
    seconds = time.monotonic() - began
    after = [await world.sql.fetchval(query, day, day + timedelta(days=1)) for query in asked]
    verdict.line("a day summed anew", f"{events:,} events in {seconds:.1f} s, the same sums", before == after)


async def _export(
    world: World, exports: export_service_pb2_grpc.ExportServiceStub, today: datetime, verdict: Verdict
) -> None:
    """Exports single requests of one organization."""
    wanted = export_pb.Export(
        granularity=export_pb.EXPORT_GRANULARITY_RAW,
        format=export_pb.EXPORT_FORMAT_CSV,
        compression=export_pb.EXPORT_COMPRESSION_UNSPECIFIED,
    )
    wanted.start_time.FromDatetime(today - timedelta(days=EXPORT_DAYS))
    wanted.end_time.FromDatetime(today)
    organization_id, began = f"org_{1:022}", time.monotonic()
    created = export_pb.CreateExportRequest(organization_id=organization_id, export=wanted)
    made = (await exports.CreateExport(created, metadata=_METADATA, timeout=30)).export
    asked = export_pb.GetExportRequest(organization_id=organization_id, export_id=made.export_id)
    while made.state in (export_pb.EXPORT_STATE_PENDING, export_pb.EXPORT_STATE_RUNNING):
        await asyncio.sleep(_POLL_S)
        made = (await exports.GetExport(asked, metadata=_METADATA, timeout=30)).export
    seconds = time.monotonic() - began
    peak_mb = _peak_mb(world.analytics_pid)
    met = made.state == export_pb.EXPORT_STATE_SUCCEEDED and seconds <= MOST_EXPORT_S and peak_mb <= MOST_EXPORT_MB
    text = f"{made.rows:,} rows, {made.size_bytes / 1e6:.1f} MB in {seconds:.1f} s, peak RSS {peak_mb:.0f} MB"
    verdict.line(f"export of one organization, {EXPORT_DAYS} days", text, met)


def _peak_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


async def _ask(method: Any, request: Any, random: Random) -> float:
    """Milliseconds until the answer is there, of another organization each time."""
    request.organization_id = f"org_{random.randrange(ORGANIZATIONS):022}"
    began = time.perf_counter()
    await method(request, metadata=_METADATA, timeout=30)
    return (time.perf_counter() - began) * 1000


def _questions(channel: grpc.aio.Channel, today: datetime) -> Iterator[tuple[str, Any, Any]]:
    usage = usage_service_pb2_grpc.UsageServiceStub(channel)
    spend = spend_service_pb2_grpc.SpendServiceStub(channel)
    reliability = reliability_service_pb2_grpc.ReliabilityServiceStub(channel).QueryReliability
    day, month, hour = pb.USAGE_INTERVAL_DAY, pb.USAGE_INTERVAL_MONTH, pb.USAGE_INTERVAL_HOUR
    model, key = pb.USAGE_DIMENSION_MODEL, pb.USAGE_DIMENSION_API_KEY
    query, berlin = pb.QueryUsageRequest, "Europe/Berlin"
    ask_spend, ask_reliability = spend_pb.QuerySpendRequest, reliability_pb.QueryReliabilityRequest
    questions: list[tuple[str, Any, Any, int]] = [
        ("usage, 13 months, by day and model", usage.QueryUsage, query(interval=day, group_by=[model]), DAYS),
        ("usage, 13 months of Berlin", usage.QueryUsage, query(interval=month, time_zone=berlin), DAYS),
        (
            "usage, 89 days of Berlin, by key",
            usage.QueryUsage,
            query(interval=day, group_by=[key], time_zone=berlin),
            89,
        ),
        ("usage, a day, by hour and model", usage.QueryUsage, query(interval=hour, group_by=[model]), 1),
        (
            "spend, 6 months and the 6 before, by model",
            spend.QuerySpend,
            ask_spend(interval=month, group_by=[model], compare=True),
            182,
        ),
        ("costliest models of 13 months", spend.QueryTopSpend, spend_pb.QueryTopSpendRequest(dimension=model), DAYS),
        ("forecast of the month", spend.ForecastSpend, spend_pb.ForecastSpendRequest(), 0),
        ("reliability, a month, by day", reliability, ask_reliability(interval=day), 30),
        (
            "reliability, 13 months, by month and model",
            reliability,
            ask_reliability(interval=month, group_by=[model]),
            DAYS,
        ),
    ]
    for name, method, request, days in questions:
        if days:
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
            asyncio.run(load(int(os.environ.get("ROWS", "5000000")), int(os.environ.get("RUNS", str(RUNS))), verdict))
    except LoadError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if verdict.met else 1)


if __name__ == "__main__":
    main()
