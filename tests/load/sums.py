"""Measures questions about usage, spend and reliability: 250 organizations, 40 models, 13 months, five million sums.

    RUNS=40 python -m tests.load.sums

Prints the 50th and 95th percentile of each question's time in milliseconds, each for another organization, through the
service but not through gRPC; then what a million sums take.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from aiaas.analytics.v1 import reliability_service_pb2 as reliability_pb
from aiaas.analytics.v1 import spend_service_pb2 as spend_pb
from aiaas.analytics.v1 import usage_service_pb2 as pb
from analytics.reliability_service import ReliabilityService
from analytics.spend_service import SpendService
from analytics.store import UsageStore
from analytics.sums_store import SumsStore
from analytics.usage_retention import Kept
from analytics.usage_service import UsageService
from deploy.local.servers import Postgres
from deploy.local.state import State
from deploy.local.supervisor import Supervisor
from mesh.clock import SystemClock
from mesh.database import Database
from mesh.migrate import migrate

ORGANIZATIONS = 250
DAYS = 395
KEPT = Kept()

# A day has some requests for each model, all in one hour, which is there too for the last 90 days.
_FILL = """
INSERT INTO {table}
SELECT 'org_' || lpad(organization::text, 22, '0'), moment, 'key_' || lpad((organization + model % 3)::text, 22, '0'),
    'user_' || lpad((organization + model % 3)::text, 22, '0'), '', 'model-' || model, 'backend-' || model, 1, 1,
    4, 3600, 1600, 480, 700, '', 300, 100, 300,
    ARRAY[(650::bigint << 40) + 1, (660::bigint << 40) + 1, (680::bigint << 40) + 1, (700::bigint << 40) + 1],
    ARRAY[(500::bigint << 40) + 2, (550::bigint << 40) + 2]
FROM generate_series(1, $1::int) AS organization, generate_series(1, 40) AS model,
    generate_series($2::timestamptz, $3::timestamptz - interval '1 hour', $4::interval) AS moment
"""


async def measure(runs: int) -> None:
    """Fills a database and asks."""
    with State.temporary() as state:
        async with Supervisor(state) as supervisor:
            postgres = Postgres(state)
            await postgres.start(supervisor)
            url = await postgres.database("analytics")
            await migrate(url, "analytics.migrations")
            connection = await asyncpg.connect(urlsplit(postgres.admin_url)._replace(path="/analytics").geturl())
            today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
            since, day = KEPT.hourly_since(today), timedelta(days=1)
            for table, start, step in (("usage_daily", today - DAYS * day, day), ("usage_hourly", since, day)):
                await connection.execute(_FILL.format(table=table), ORGANIZATIONS, start, today, step, timeout=900)
                await connection.execute(f"VACUUM ANALYZE {table}", timeout=900)
            await connection.execute("UPDATE usage_rollups SET closed_until = $1, hourly_since = $2", today, since)
            database = Database(url)
            store, sums = UsageStore(database), SumsStore(database)
            source = random.Random(1)
            print("| question | p50, ms | p95, ms |\n| --- | --- | --- |")
            for name, ask in _questions(store, sums, today).items():
                times = []
                for _ in range(runs):
                    organization_id = f"org_{source.randrange(1, ORGANIZATIONS + 1):022}"
                    began = time.monotonic()
                    await ask(organization_id)
                    times.append((time.monotonic() - began) * 1000)
                times.sort()
                print(f"| {name} | {times[runs // 2]:.0f} | {times[int(runs * 0.95)]:.0f} |", flush=True)
            for table in ("usage_daily", "usage_hourly"):
                rows = await connection.fetchval(f"SELECT count(*) FROM {table}", timeout=60)
                size = await connection.fetchval("SELECT pg_total_relation_size($1::text::regclass)", table)
                print(f"{table}: {rows:,} rows, {size / rows:.0f} MB a million")
            await database.close()
            await connection.close()


def _questions(store: UsageStore, sums: SumsStore, today: datetime) -> dict[str, Callable[[str], Any]]:
    clock = SystemClock()
    usage, spend = UsageService(store, sums, clock), SpendService(store, sums, clock)
    reliability = ReliabilityService(store, sums, clock)

    def asked(method: Any, request: Any, days: int, **fields: Any) -> Callable[[str], Any]:
        def ask(organization_id: str) -> Any:
            made = request(organization_id=organization_id, **fields)
            if days:
                made.start_time.FromDatetime(today - timedelta(days=days))
            return method(made, None)

        return ask

    model, key = pb.USAGE_DIMENSION_MODEL, pb.USAGE_DIMENSION_API_KEY
    month, day, hour = pb.USAGE_INTERVAL_MONTH, pb.USAGE_INTERVAL_DAY, pb.USAGE_INTERVAL_HOUR
    query, ask_spend = pb.QueryUsageRequest, spend_pb.QuerySpendRequest
    ask_reliability, top = reliability_pb.QueryReliabilityRequest, spend_pb.QueryTopSpendRequest
    berlin = {"time_zone": "Europe/Berlin"}
    return {
        "usage, 13 months, by day and model": asked(usage.QueryUsage, query, DAYS, interval=day, group_by=[model]),
        "usage, 13 months of Berlin": asked(usage.QueryUsage, query, DAYS, interval=month, **berlin),
        "usage, 89 days of Berlin, by key": asked(usage.QueryUsage, query, 89, interval=day, group_by=[key], **berlin),
        "usage, a day, by hour and model": asked(usage.QueryUsage, query, 1, interval=hour, group_by=[model]),
        "spend, 6 months and the 6 before, by model": asked(
            spend.QuerySpend, ask_spend, 182, interval=month, group_by=[model], compare=True
        ),
        "costliest models of 13 months": asked(spend.QueryTopSpend, top, DAYS, dimension=model),
        "forecast of the month": asked(spend.ForecastSpend, spend_pb.ForecastSpendRequest, 0),
        "reliability, a month, by day": asked(reliability.QueryReliability, ask_reliability, 30, interval=day),
        "reliability, 13 months, by month and model": asked(
            reliability.QueryReliability, ask_reliability, DAYS, interval=month, group_by=[model]
        ),
    }


if __name__ == "__main__":
    asyncio.run(measure(int(os.environ.get("RUNS", "40"))))
