"""Measures exports: a month of one organization from real PostgreSQL into real object storage.

    ROWS=1000000 python -m tests.load.exports

Prints a table: seconds, rows a second, size, and the peak of the exporting process' memory.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

import asyncpg

from aiaas.analytics.v1.export_service_pb2 import ExportCompression, ExportFormat, ExportGranularity, ExportState
from aiaas.type.v1.usage_event_pb2 import TokenUsage
from analytics.export_store import ExportStore
from analytics.exporter import Exporter
from analytics.exports import Wanted
from analytics.object_storage import Storage
from analytics.usage import Filter
from deploy.local.servers import Postgres, SeaweedFS
from deploy.local.state import State
from deploy.local.supervisor import Supervisor
from mesh.clock import SystemClock
from mesh.database import Database
from mesh.migrate import migrate
from tests.doubles.usage_events import usage_event

DAYS = 31
_FORMS = (("CSV", "UNSPECIFIED"), ("CSV", "ZSTD"), ("PARQUET", "UNSPECIFIED"))
_ID = "0352lP6DQcO8XnfVqfS5y5"

# All rows are alike but for what a key or a clock makes of them: what costs is their number and their size.
_FILL = """
INSERT INTO usage_events
SELECT 'req_' || number, $1::timestamptz + number * ($2::interval / $3::bigint), 'org_a', 'key_' || number % 40,
    'user_a', '', 'model-' || number % 40, 'backend-1', 1, 1, 900, 400, 120, 30, $4::bytea
FROM generate_series(0, $3::bigint - 1) AS number
"""


async def measure(rows: int) -> None:
    """Fills a database and exports all of it in several forms."""
    with State.temporary() as state:
        async with Supervisor(state) as supervisor:
            postgres, seaweedfs = Postgres(state), SeaweedFS(state)
            await postgres.start(supervisor)
            await seaweedfs.start(supervisor)
            url = await postgres.database("analytics")
            await migrate(url, "analytics.migrations")
            end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
            start = end - timedelta(days=DAYS)
            await _fill(urlsplit(postgres.admin_url)._replace(path="/analytics").geturl(), start, rows)
            storage = (seaweedfs.url, seaweedfs.bucket, "us-east-1", seaweedfs.access_key, seaweedfs.secret_key)
            print(f"| {rows:,} requests of {DAYS} days | seconds | rows/s | MB | peak RSS, MB (before) |")
            print("| --- | --- | --- | --- | --- |", flush=True)
            for form in _FORMS:
                told, tell = get_context("spawn").Pipe(duplex=False)
                exporting = get_context("spawn").Process(target=_run, args=(tell, url, storage, start, end, form))
                exporting.start()
                seconds, size_bytes, before_mb, peak_mb = await asyncio.to_thread(told.recv)
                exporting.join()
                print(
                    f"| {' '.join(form)} | {seconds:.1f} | {rows / seconds:,.0f} | {size_bytes / 1e6:.1f} "
                    f"| {peak_mb:.0f} ({before_mb:.0f}) |",
                    flush=True,
                )


async def _fill(url: str, start: datetime, rows: int) -> None:
    usage = TokenUsage(prompt_tokens=900, cached_prompt_tokens=400, completion_tokens=120)
    event = usage_event(
        f"req_{_ID}", organization_id="org_a", api_key_id=f"key_{_ID}", user_id=f"user_{_ID}", usage=usage
    )
    connection = await asyncpg.connect(url)
    try:
        for day in range(DAYS + 1):
            await connection.execute("SELECT ensure_usage_events_partition($1)", (start + timedelta(days=day)).date())
        await connection.execute(_FILL, start, timedelta(days=DAYS), rows, event.SerializeToString(), timeout=900)
        await connection.execute("VACUUM ANALYZE usage_events", timeout=900)
    finally:
        await connection.close()


def _run(
    tell: Connection,
    url: str,
    storage: tuple[str, str, str, str, str],
    start: datetime,
    end: datetime,
    form: tuple[str, str],
) -> None:
    tell.send(asyncio.run(_export(url, storage, start, end, form)))


async def _export(
    url: str, storage: tuple[str, str, str, str, str], start: datetime, end: datetime, form: tuple[str, str]
) -> tuple[float, int, float, float]:
    """Seconds, bytes, and this process' memory before and at its peak, in MB."""
    clock, database = SystemClock(), Database(url)
    store = ExportStore(database)
    wanted = Wanted(
        ExportGranularity.EXPORT_GRANULARITY_RAW,
        ExportFormat.Value(f"EXPORT_FORMAT_{form[0]}"),
        ExportCompression.Value(f"EXPORT_COMPRESSION_{form[1]}"),
        start,
        end,
        Filter(),
    )
    made = await store.create("org_a", wanted, "", "", clock.now())
    before_mb, began = _peak_mb(), time.monotonic()
    await Exporter(store, Storage(*storage), clock).work()
    seconds = time.monotonic() - began
    stored = await store.get("org_a", made.export_id)
    await database.close()
    assert stored is not None
    assert stored.state == ExportState.EXPORT_STATE_SUCCEEDED, stored.failure_reason
    return seconds, stored.size_bytes, before_mb, _peak_mb()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    asyncio.run(measure(int(os.environ.get("ROWS", "1000000"))))
