"""Events and their sums in PostgreSQL: counted once, whatever comes twice, late or in which order."""

import asyncio
import random
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiaas.type.v1.usage_event_pb2 import Endpoint, Outcome, TokenUsage
from analytics.events import Event, read_event
from analytics.partitions import DAYS_AHEAD, DAYS_BEHIND, make_partitions
from analytics.store import UnstorableEventsError, UsageStore
from mesh.database import Database
from tests.doubles.clock import ManualClock
from tests.doubles.usage_events import NOW, usage_event

SUMS = """
SELECT organization_id, hour, api_key_id, user_id, service_account_id, model, backend_id, endpoint, outcome,
       requests, prompt_tokens, cached_prompt_tokens, completion_tokens, cost_micros
FROM usage_hourly ORDER BY 1, 2, 3, 4, 5, 6, 7, 8, 9
"""
SUMS_OF_RAW = """
SELECT organization_id, date_trunc('hour', admit_time, 'UTC'), api_key_id, user_id, service_account_id, model,
       backend_id, endpoint, outcome, count(*), sum(prompt_tokens)::bigint, sum(cached_prompt_tokens)::bigint,
       sum(completion_tokens)::bigint, sum(cost_micros)::bigint
FROM usage_events GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9 ORDER BY 1, 2, 3, 4, 5, 6, 7, 8, 9
"""


def stored(request_id: str = "req_1", admit_time: datetime = NOW, **fields: Any) -> Event:
    return read_event(usage_event(request_id, admit_time, **fields).SerializeToString(), NOW)


async def sums(database: Database) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await database.fetch(SUMS)]


async def assert_sums_are_those_of_the_raw_events(database: Database) -> None:
    assert await sums(database) == [tuple(row) for row in await database.fetch(SUMS_OF_RAW)]


async def test_event_that_comes_three_times_counts_once(store: UsageStore, database: Database) -> None:
    assert await store.insert_events([stored(), stored()]) == 1
    assert await store.insert_events([stored(), stored("req_2")]) == 1
    ((*_, requests, prompt, cached, completion, cost),) = await sums(database)
    assert (requests, prompt, cached, completion, cost) == (2, 20, 8, 10, 50)


async def test_same_request_id_at_another_time_is_another_event(store: UsageStore) -> None:
    assert await store.insert_events([stored(), stored(admit_time=NOW - timedelta(days=1))]) == 2


async def test_shuffled_and_late_events_give_the_same_sums_as_events_in_order(
    store: UsageStore, database: Database
) -> None:
    await make_partitions(store, ManualClock(NOW))
    source = random.Random(1)
    events = [
        stored(
            f"req_{number}",
            NOW - timedelta(seconds=source.uniform(0, 96 * 3600)),  # half of them later than any partition
            organization_id=f"org_{number % 3}",
            model=f"model-{number % 5}",
            cost_micros=number,
        )
        for number in range(300)
    ]
    expected = Counter[tuple[str, datetime, str]]()
    for event in events:
        hour = event.admit_time.replace(minute=0, second=0, microsecond=0)
        expected[event.organization_id, hour, event.model] += event.cost_micros
    deliveries = events * 3
    source.shuffle(deliveries)
    while deliveries:
        await store.insert_events([deliveries.pop() for _ in range(min(70, len(deliveries)))])
    got = {(row[0], row[1], row[5]): row[-1] for row in await sums(database)}
    assert got == dict(expected)
    await assert_sums_are_those_of_the_raw_events(database)


async def test_replicas_that_take_the_same_events_at_once_count_them_once(
    store: UsageStore, database: Database
) -> None:
    source = random.Random(2)
    events = [stored(f"req_{number}", model=f"model-{number % 40}") for number in range(400)]

    async def replica() -> int:
        own = events.copy()
        source.shuffle(own)
        return sum([await store.insert_events(own[start : start + 50]) for start in range(0, 400, 50)])

    assert sum(await asyncio.gather(*(replica() for _ in range(4)))) == 400
    await assert_sums_are_those_of_the_raw_events(database)


EVENTS = st.lists(
    st.builds(
        stored,
        request_id=st.sampled_from([f"req_{number}" for number in range(20)]),
        admit_time=st.timedeltas(timedelta(days=-10), timedelta()).map(lambda offset: NOW + offset),
        organization_id=st.sampled_from(["org_a", "org_b"]),
        api_key_id=st.sampled_from(["", "key_a"]),
        user_id=st.text("aä\U0001f600", max_size=2),
        service_account_id=st.sampled_from(["", "sa"]),
        model=st.sampled_from(["m", "n"]),
        backend_id=st.sampled_from(["", "b"]),
        endpoint=st.sampled_from([Endpoint.ENDPOINT_CHAT_COMPLETIONS, Endpoint.ENDPOINT_EMBEDDINGS]),
        outcome=st.sampled_from([Outcome.OUTCOME_SUCCEEDED, Outcome.OUTCOME_CANCELLED]),
        usage=st.builds(
            TokenUsage,
            prompt_tokens=st.integers(10, 10**9),
            cached_prompt_tokens=st.integers(0, 10),
            completion_tokens=st.integers(0, 10**9),
        ),
        cost_micros=st.integers(0, 10**12),
    ),
    max_size=30,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(EVENTS, max_size=3))
async def test_sums_are_always_those_of_the_raw_events(
    store: UsageStore, database: Database, batches: list[list[Event]]
) -> None:
    for batch in batches:
        await store.insert_events(batch)
    await assert_sums_are_those_of_the_raw_events(database)


async def test_no_events_are_no_work(store: UsageStore) -> None:
    assert await store.insert_events([]) == 0


async def test_batch_that_postgres_refuses_leaves_nothing(store: UsageStore, database: Database) -> None:
    with pytest.raises(UnstorableEventsError):
        await store.insert_events([stored(), stored("req_2")._replace(user_id="a\0")])
    with pytest.raises(UnstorableEventsError):
        await store.insert_events([stored(), stored("req_2")._replace(prompt_tokens=-1)])
    with pytest.raises(UnstorableEventsError):
        await store.insert_events([stored(), stored("req_2")._replace(prompt_tokens=2**70)])
    assert await sums(database) == []
    assert await database.fetchval("SELECT count(*) FROM usage_events") == 0


async def partitions(database: Database) -> set[str]:
    rows = await database.fetch("SELECT tableoid::regclass::text AS name FROM usage_events")
    return {row["name"] for row in rows}


async def test_partitions_are_made_ahead_and_once(store: UsageStore, database: Database) -> None:
    clock = ManualClock(NOW)
    assert await make_partitions(store, clock) == DAYS_BEHIND + 1 + DAYS_AHEAD
    assert await make_partitions(store, clock) == 0
    clock.advance(86_400)
    assert await make_partitions(store, clock) == 1
    await store.insert_events([stored(), stored("req_2", NOW - timedelta(days=300))])
    assert await partitions(database) == {"usage_events_20261120", "usage_events_default"}


async def test_events_move_from_the_default_partition_when_their_day_gets_one(
    store: UsageStore, database: Database
) -> None:
    first, last = datetime(2026, 11, 19, tzinfo=UTC), datetime(2026, 11, 19, 23, 59, 59, 999_999, tzinfo=UTC)
    await store.insert_events([stored("req_1", first), stored("req_2", last), stored("req_3")])
    assert await store.ensure_partition(date(2026, 11, 19))
    assert await store.ensure_partition(date(2026, 11, 20))
    assert await partitions(database) == {"usage_events_20261119", "usage_events_20261120"}
    assert await store.insert_events([stored("req_1", first)]) == 0
    await assert_sums_are_those_of_the_raw_events(database)


async def test_replicas_make_partitions_at_once_while_events_arrive(store: UsageStore, database: Database) -> None:
    await asyncio.gather(
        make_partitions(store, ManualClock(NOW)),
        make_partitions(store, ManualClock(NOW)),
        *(store.insert_events([stored(f"req_{number}")]) for number in range(20)),
    )
    assert await partitions(database) == {"usage_events_20261120"}
    await assert_sums_are_those_of_the_raw_events(database)


async def test_completeness_moves_forward_only(store: UsageStore) -> None:
    assert await store.complete_until() is None
    for moment in (NOW, NOW + timedelta(seconds=1), NOW - timedelta(hours=1)):
        await store.set_complete_until(moment)
    assert await store.complete_until() == NOW + timedelta(seconds=1)


async def test_schema_refuses_what_code_should_not_send(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute("INSERT INTO usage_freshness VALUES (false, now())")
    finally:
        await connection.close()
