"""Measures what counting an event costs: the consumer of analytics on real PostgreSQL, beside a plain COPY.

    EVENTS=100000 ORGANIZATIONS=250 python -m tests.load.ingestion

Prints events a CPU second, of this process and all of PostgreSQL together, and events a second; once by single messages
of 500, and once by as many as one transaction takes when messages wait. Half of an organization's requests are for one
of 40 models, the others for any; it has three keys. COPY puts the same rows into a table without an index, so many at
once, and neither reads nor sums them. Inserted are rows that are read already, into the table and its indexes, but
summed nowhere: what is left if reading and summing cost nothing. The broker's part is in `tests.load.analytics`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import asyncpg

from aiaas.type.v1.usage_event_pb2 import Outcome, PriceSnapshot, TokenUsage
from analytics.consumer import Consumer
from analytics.events import read_batch, read_event
from analytics.partitions import make_partitions
from analytics.store import UsageStore
from deploy.local.servers import Postgres
from deploy.local.state import State
from deploy.local.supervisor import Supervisor
from mesh.broker import Broker
from mesh.clock import SystemClock
from mesh.database import Database
from mesh.migrate import migrate
from mesh.topology import USAGE
from tests.doubles.usage_events import usage_batch, usage_event

MESSAGE, BATCH = 500, 5000
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_ID = "0352lP6DQcO8XnfVqfS5y5"
_PRICE = PriceSnapshot(
    price_id=f"price_{_ID}",
    prompt_micros_per_million=150_000,
    cached_prompt_micros_per_million=75_000,
    completion_micros_per_million=600_000,
)
_COLUMNS = 15


async def measure(events: int, organizations: int) -> None:
    """Counts the same events by COPY and by the consumer."""
    with State.temporary() as state:
        async with Supervisor(state) as supervisor:
            postgres = Postgres(state)
            await postgres.start(supervisor)
            url = await postgres.database("analytics")
            await migrate(url, "analytics.migrations")
            admin = urlsplit(postgres.admin_url)._replace(path="/analytics").geturl()
            pid = supervisor.pid(postgres.name)
            assert pid is not None
            bodies = _messages(events, organizations)
            database, clock = Database(url), SystemClock()
            store = UsageStore(database)
            await make_partitions(store, clock)
            consumer = Consumer(store, cast(Broker, None), USAGE, clock, BATCH)
            rows = [read_event(event, clock.now())[:_COLUMNS] for body in bodies for event in read_batch(body)]
            connection = await asyncpg.connect(admin)
            await connection.execute("CREATE TABLE plain (LIKE usage_events)")

            async def copy(size: int, table: str) -> None:
                for start in range(0, events, size):
                    await connection.copy_records_to_table(table, records=rows[start : start + size])

            async def count(size: int) -> None:
                for start in range(0, len(bodies), size // MESSAGE):
                    assert not await consumer.take(bodies[start : start + size // MESSAGE])

            # As mesh.process has it.
            gc.freeze()
            gc.set_threshold(100_000, 50, 100)
            print(
                f"| {events:,} events of {organizations} organizations | events/CPU s | events/s | of it PostgreSQL |"
            )
            print("| --- | --- | --- | --- |")
            for size in (MESSAGE, BATCH):
                for name, work in (
                    ("COPY", copy(size, "plain")),
                    ("inserted", copy(size, "usage_events")),
                    ("counted", count(size)),
                    ("counted again", count(size)),
                ):
                    if name in ("inserted", "counted"):
                        await connection.execute("TRUNCATE usage_events, usage_hourly")
                    await connection.execute("CHECKPOINT")
                    await _report(f"{name}, {size:,} at once", work, events, pid)
            for table in ("usage_events", "usage_hourly", "usage_daily"):
                size = await connection.fetchval(
                    "SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree(to_regclass($1))", table
                ) or await connection.fetchval("SELECT pg_total_relation_size(to_regclass($1))", table)
                found = await connection.fetchval(f"SELECT count(*) FROM {table}") if size else 0
                print(f"{table}: {found:,} rows, {int(size or 0) / 1e6:.1f} MB")
            await connection.close()
            await database.close()


def _messages(events: int, organizations: int) -> list[bytes]:
    """What routers would send within the last half hour."""
    source = random.Random(1)
    now = datetime.now(UTC) - timedelta(seconds=1)
    messages = []
    for start in range(0, events, MESSAGE):
        made = []
        for number in range(start, min(start + MESSAGE, events)):
            organization = source.randrange(organizations)
            model = organization % 40 if source.random() < 0.5 else source.randrange(40)
            key = source.randrange(3)
            refused = source.random() < 0.02
            duration_micros = int(source.lognormvariate(14, 1))
            event = usage_event(
                f"req_{number:022}",
                now - timedelta(seconds=1800 * (1 - number / events)),
                organization_id=f"org_{organization:022}",
                api_key_id=f"key_{organization:020}_{key}",
                user_id=f"user_{organization:020}_{key}",
                model=f"model-{model:02}",
                backend_id="" if refused else f"backend-{model:02}",
                outcome=Outcome.OUTCOME_REFUSED if refused else Outcome.OUTCOME_SUCCEEDED,
                reason="rate_limit_exceeded" if refused else "",
                usage=None
                if refused
                else TokenUsage(prompt_tokens=900, cached_prompt_tokens=400, completion_tokens=120),
                cost_micros=0 if refused else 177,
                price=_PRICE,
                duration_micros=duration_micros,
                ttft_micros=0 if refused else duration_micros // 20,
                streamed=True,
            )
            made.append(event)
        messages.append(usage_batch(*made))
    return messages


async def _report(name: str, work: Awaitable[None], events: int, pid: int) -> None:
    own, server, began = time.process_time(), _postgres_s(pid), time.monotonic()
    await work
    seconds = time.monotonic() - began
    own, server = time.process_time() - own, _postgres_s(pid) - server
    print(
        f"| {name} | {events / (own + server):,.0f} | {events / seconds:,.0f} | {server / (own + server):.0%} |",
        flush=True,
    )


def _postgres_s(pid: int) -> float:
    """CPU seconds of a PostgreSQL and of everything that it started."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            ticks += int(fields[11]) + int(fields[12])
        elif stat.parent.name == str(pid):
            ticks += sum(map(int, fields[11:15]))
    return ticks * _TICK_S


if __name__ == "__main__":
    asyncio.run(measure(int(os.environ.get("EVENTS", "100000")), int(os.environ.get("ORGANIZATIONS", "250"))))
