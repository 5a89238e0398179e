"""Sums of hours and days: the same whatever comes late, twice or in another order, closed in between, or made anew."""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiaas.type.v1.usage_event_pb2 import Outcome, PriceSnapshot, TokenUsage
from analytics import store as store_module
from analytics.charges import cost_micros
from analytics.events import Event, read_event
from analytics.partitions import make_partitions
from analytics.rebuild import rebuild
from analytics.sketches import COUNT_BITS, COUNT_MASK, bucket_of
from analytics.store import UsageStore
from analytics.usage_range import DAY
from analytics.usage_retention import Kept, close_days, remove_old
from mesh.database import Database
from mesh.errors import PlatformError, Reason
from tests.doubles.clock import ManualClock
from tests.doubles.usage_events import NOW, usage_event

KEPT = Kept()
TODAY = NOW.replace(hour=0, minute=0, second=0, microsecond=0)
PRICE = PriceSnapshot(
    price_id="price_1",
    prompt_micros_per_million=150_000,
    cached_prompt_micros_per_million=75_000,
    completion_micros_per_million=600_001,
)
REASONS = {Outcome.OUTCOME_SUCCEEDED: "", Outcome.OUTCOME_REFUSED: "rate_limit_exceeded"}
MEASURES = (
    "prompt_tokens",
    "cached_prompt_tokens",
    "completion_tokens",
    "cost_micros",
    "prompt_cost_micros",
    "cached_prompt_cost_micros",
    "completion_cost_micros",
)


def made(source: random.Random, number: float, admit_time: datetime) -> Event:
    outcome = source.choice([*[Outcome.OUTCOME_SUCCEEDED] * 4, *Outcome.values()[2:]])
    refused = outcome == Outcome.OUTCOME_REFUSED
    prompt = source.randrange(1, 5000)
    usage = TokenUsage(
        prompt_tokens=prompt, cached_prompt_tokens=source.randrange(prompt), completion_tokens=source.randrange(900)
    )
    event = usage_event(
        f"req_{number}",
        admit_time,
        organization_id=source.choice(["org_a", "org_b"]),
        api_key_id=source.choice(["", "key_a"]),
        model=source.choice(["m", "n"]),
        outcome=outcome,
        reason=REASONS.get(outcome, source.choice(["backend_timeout", "backend_refused"])),
        usage=None if refused else usage,
        price=PRICE,
        cost_micros=0 if refused else cost_micros(PRICE, usage),
        duration_micros=int(source.lognormvariate(13, 2)),
        ttft_micros=0 if refused else int(source.lognormvariate(10, 2)),
        streamed=source.random() < 0.5,
    )
    return read_event(event.SerializeToString(), NOW)


def many(count: int, days: float, seed: int = 1) -> list[Event]:
    source = random.Random(seed)
    return [made(source, number, NOW - timedelta(days=source.uniform(0, days))) for number in range(count)]


def expected(events: Iterable[Event], *, by_day: bool) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """What sums hold, reckoned as plainly as can be."""
    groups = defaultdict(list)
    for event in events:
        moment = event.admit_time.replace(minute=0, second=0, microsecond=0)
        groups[
            event.organization_id,
            moment.replace(hour=0) if by_day else moment,
            *event[3:10],
            event.reason,
        ].append(event)

    def sketch(durations: list[int]) -> dict[int, int]:
        return dict(Counter(bucket_of(duration) for duration in durations if duration))

    return {
        key: (
            len(members),
            *(sum(getattr(event, name) for event in members) for name in MEASURES),
            sketch([event.latency_micros for event in members]),
            sketch([event.ttft_micros for event in members]),
        )
        for key, members in groups.items()
    }


async def told(database: Database, table: str, period: str) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    rows = await database.fetch(f"""
        SELECT organization_id, {period}, api_key_id, user_id, service_account_id, model, backend_id, endpoint, outcome,
            reason, requests, {", ".join(MEASURES)}, latency, ttft FROM {table}
    """)
    for row in rows:
        assert row["cost_micros"] == sum(row[name] for name in MEASURES[4:])
    return {tuple(row[:10]): (*row[10:18], *map(sketch_of, row[18:])) for row in rows}


def sketch_of(cells: list[int]) -> dict[int, int]:
    sketch = Counter[int]()
    for cell in cells:
        sketch[cell >> COUNT_BITS] += cell & COUNT_MASK
    return dict(sketch)


async def assert_sums_are_those_of(database: Database, events: Iterable[Event], closed_until: datetime) -> None:
    events = list(events)
    assert await told(database, "usage_hourly", "hour") == expected(events, by_day=False)
    closed = [event for event in events if event.admit_time < closed_until]
    assert await told(database, "usage_daily", "day") == expected(closed, by_day=True)


async def test_days_are_closed_an_hour_after_their_end_and_once(store: UsageStore, database: Database) -> None:
    events = many(60, 3)
    await store.insert_events(events)
    clock = ManualClock(TODAY + timedelta(minutes=59))
    assert await close_days(store, clock) == 2
    await assert_sums_are_those_of(database, events, TODAY - DAY)
    clock.advance(60)
    assert await close_days(store, clock) == 1
    assert await close_days(store, clock) == 0
    await assert_sums_are_those_of(database, events, TODAY)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 80),
    batch=st.integers(1, 90),
    repeats=st.integers(1, 3),
    closings=st.lists(st.integers(0, 6), max_size=4),
)
async def test_shuffled_repeated_and_late_streams_leave_the_sums_of_the_clean_one(
    store: UsageStore, database: Database, seed: int, count: int, batch: int, repeats: int, closings: list[int]
) -> None:
    await database.execute("TRUNCATE usage_events, usage_hourly, usage_daily")
    await database.execute("UPDATE usage_rollups SET closed_until = 'epoch'")
    events = many(count, 4, seed)
    stream = events * repeats
    source = random.Random(seed)
    source.shuffle(stream)
    for round_ in range(len(stream) // batch + 1):
        await store.insert_events(stream[round_ * batch : (round_ + 1) * batch])
        # Days are closed while most of their events are still to come.
        for ago in closings[round_ : round_ + 1]:
            while await store.close_day(TODAY - DAY * ago):
                pass
    await close_days(store, ManualClock(NOW))
    await assert_sums_are_those_of(database, events, TODAY)


async def test_events_two_days_late_correct_hours_and_days_that_are_closed(
    store: UsageStore, database: Database
) -> None:
    events = many(300, 5)
    late = [event for event in events if event.admit_time < NOW - timedelta(hours=48)]
    await store.insert_events([event for event in events if event not in late])
    await close_days(store, ManualClock(NOW))
    for _ in range(3):
        random.Random(5).shuffle(late)
        await store.insert_events(late)
    await assert_sums_are_those_of(database, events, TODAY)


async def test_event_from_before_hours_are_kept_counts_in_its_day(store: UsageStore, database: Database) -> None:
    events = many(50, 200)
    await store.insert_events(events)
    await close_days(store, ManualClock(NOW))
    await remove_old(store, ManualClock(NOW), KEPT, batch=7)
    late = [made(random.Random(9), 900 + ago, NOW - timedelta(days=ago)) for ago in (1, 89, 91, 150)]
    assert await store.insert_events(late) == 4
    assert await store.insert_events(late) == 0
    kept = [event for event in [*events, *late] if event.admit_time >= KEPT.hourly_since(NOW)]
    assert len(kept) < len(events)
    assert await told(database, "usage_hourly", "hour") == expected(kept, by_day=False)
    closed = [event for event in [*events, *late] if event.admit_time < TODAY]
    assert await told(database, "usage_daily", "day") == expected(closed, by_day=True)


async def test_hours_are_not_forgotten_before_their_day_is_closed(store: UsageStore, database: Database) -> None:
    events = many(50, 200)
    await store.insert_events(events)
    await remove_old(store, ManualClock(NOW), KEPT)
    assert await told(database, "usage_hourly", "hour") == expected(events, by_day=False)


async def test_what_is_too_old_goes(store: UsageStore, database: Database) -> None:
    ages = (0, 89, 91, 380, 399, 399.7)
    events = [made(random.Random(1), age, NOW - timedelta(days=age)) for age in ages]
    await store.ensure_partition((NOW - timedelta(days=399)).date())
    await store.insert_events(events)
    await make_partitions(store, ManualClock(NOW))
    await close_days(store, ManualClock(NOW))
    later = ManualClock(NOW + timedelta(days=2))
    await remove_old(store, later, KEPT, batch=1)
    rows = await database.fetch("SELECT request_id FROM usage_events")
    assert {row["request_id"] for row in rows} == {"req_0", "req_89", "req_91", "req_380"}
    assert await database.fetchval("SELECT to_regclass('usage_events_20251017')") is None
    assert await database.fetchval("SELECT to_regclass('usage_events_20261120')") is not None
    assert len(await told(database, "usage_hourly", "hour")) == 1
    assert await told(database, "usage_daily", "day") == expected(events[1:4], by_day=True)


def test_thirteen_months_are_those_of_the_calendar() -> None:
    assert KEPT.daily_since(datetime(2026, 11, 20, 5, tzinfo=UTC)) == datetime(2025, 10, 20, tzinfo=UTC)
    assert KEPT.daily_since(datetime(2027, 1, 31, tzinfo=UTC)) == datetime(2025, 12, 28, tzinfo=UTC)


async def test_partition_that_is_read_is_dropped_later(store: UsageStore, database_url: str) -> None:
    day = (NOW - timedelta(days=401)).date()
    await store.ensure_partition(day)
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT * FROM usage_events")
            with pytest.raises(PlatformError) as caught:
                await store.drop_partitions(NOW.date())
            assert caught.value.reason is Reason.UNAVAILABLE
    finally:
        await connection.close()
    assert await store.drop_partitions(NOW.date()) == 1


async def test_replicas_remove_what_is_too_old_at_once(store: UsageStore, database: Database) -> None:
    events = many(300, 120)
    await store.insert_events(events)
    await close_days(store, ManualClock(NOW))
    for ago in range(401, 406):
        await store.ensure_partition((NOW - timedelta(days=ago)).date())
    await asyncio.gather(*(remove_old(store, ManualClock(NOW), KEPT, batch=9) for _ in range(4)))
    await remove_old(store, ManualClock(NOW), KEPT)
    assert await store.drop_partitions((NOW - timedelta(days=400)).date()) == 0
    kept = [event for event in events if event.admit_time >= KEPT.hourly_since(NOW)]
    assert await told(database, "usage_hourly", "hour") == expected(kept, by_day=False)


async def _closed_while_an_event_is_inserted(store: UsageStore, database: Database, database_url: str) -> None:
    """A day is closed while an event of it is inserted and not committed."""
    first, second = many(2, 0.1)
    yesterday = [event._replace(admit_time=NOW - DAY) for event in (first, second)]
    await store.insert_events(yesterday[:1])
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            # Nobody can insert a row of this table now, so the insert stays halfway.
            await connection.execute("LOCK TABLE usage_hourly IN SHARE ROW EXCLUSIVE MODE")
            inserting = asyncio.create_task(store.insert_events(yesterday[1:]))
            await _until_somebody_waits(database, 1)
            closing = asyncio.create_task(close_days(store, ManualClock(NOW)))
            await asyncio.wait([closing], timeout=0.5)
    finally:
        await connection.close()
    await asyncio.gather(inserting, closing)
    await assert_sums_are_those_of(database, yesterday, TODAY)


async def _until_somebody_waits(database: Database, count: int) -> None:
    async with asyncio.timeout(10):
        while await database.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted") < count:
            await asyncio.sleep(0.01)


async def test_day_is_not_closed_over_an_event_that_is_being_inserted(
    store: UsageStore, database: Database, database_url: str
) -> None:
    await _closed_while_an_event_is_inserted(store, database, database_url)


async def test_without_the_lock_it_would_be(
    store: UsageStore, database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def not_alone(_: object) -> None:
        pass

    monkeypatch.setattr(store_module, "_alone", not_alone)
    with pytest.raises(AssertionError):
        await _closed_while_an_event_is_inserted(store, database, database_url)


async def test_days_are_closed_while_replicas_insert(store: UsageStore, database: Database) -> None:
    events = many(400, 3)
    await asyncio.gather(
        *(store.insert_events(events[start : start + 20]) for start in range(0, 400, 20)),
        close_days(store, ManualClock(NOW)),
        *(store.insert_events(events[start : start + 50]) for start in range(0, 400, 50)),
        close_days(store, ManualClock(NOW)),
    )
    await assert_sums_are_those_of(database, events, TODAY)


async def test_sums_made_anew_are_what_they_were(store: UsageStore, database: Database) -> None:
    events = many(100, 120)
    clock = ManualClock(NOW)
    await store.insert_events(events)
    await close_days(store, clock)
    await remove_old(store, clock, KEPT)
    for table, period in (("usage_hourly", "hour"), ("usage_daily", "day")):
        before = await told(database, table, period)
        # As rows are that were summed before sums knew all of it.
        await database.execute(
            f"UPDATE {table} SET prompt_cost_micros = 0, cached_prompt_cost_micros = 0, completion_cost_micros = 0,"
            " latency = '{}', ttft = '{}'"
        )
        await database.execute(f"DELETE FROM {table} WHERE reason <> ''")
        assert await rebuild(store, clock, KEPT) == 100
        assert await told(database, table, period) == before


async def test_day_whose_events_are_gone_keeps_its_sums(store: UsageStore, database: Database) -> None:
    events = many(20, 3)
    await store.insert_events(events)
    await close_days(store, ManualClock(NOW))
    await database.execute("TRUNCATE usage_events")
    assert await rebuild(store, ManualClock(NOW), KEPT) == 0
    await assert_sums_are_those_of(database, events, TODAY)


async def test_rebuild_takes_turns_with_what_arrives(store: UsageStore, database: Database) -> None:
    events = many(200, 3)
    await store.insert_events(events[:100])
    await close_days(store, ManualClock(NOW))
    await asyncio.gather(
        rebuild(store, ManualClock(NOW), Kept(events=timedelta(days=10))),
        *(store.insert_events(events[start : start + 10]) for start in range(100, 200, 10)),
    )
    await assert_sums_are_those_of(database, events, TODAY)


async def test_histogram_that_grows_by_single_events_stays_short(store: UsageStore, database: Database) -> None:
    for number in range(100):
        event = usage_event(f"req_{number}", duration_micros=5000)
        await store.insert_events([read_event(event.SerializeToString(), NOW)])
    cells = await database.fetchval("SELECT latency FROM usage_hourly")
    assert len(cells) < 32
    assert sketch_of(cells) == {bucket_of(5000): 100}


async def test_histogram_in_postgres_is_merged_as_in_the_code(database: Database) -> None:
    cells = [(5 << COUNT_BITS) + 2, (3 << COUNT_BITS) + COUNT_MASK // 4, (5 << COUNT_BITS) + 9]
    assert await database.fetchval("SELECT merge_cells($1)", cells) == [cells[1], (5 << COUNT_BITS) + 11]
    assert await database.fetchval("SELECT merge_cells('{}')") == []
