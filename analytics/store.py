"""All SQL of analytics: events and their sums, read and written; it never judges an event or a question."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime

import asyncpg

from aiaas.analytics.v1.usage_service_pb2 import UsageDimension
from analytics.conditions import Conditions
from analytics.events import Event
from analytics.usage import Bucket, BucketPlace, Record, RecordQuery, Totals, UsageQuery
from mesh.database import Database

# One statement, so that an event and its share of the sums appear together or not at all. Only rows that were really
# inserted are summed. Both inserts go in the order of their keys: replicas that meet wait for each other and never
# both ways.
_INSERT_EVENTS = """
WITH inserted AS (
    INSERT INTO usage_events (
        request_id, admit_time, organization_id, api_key_id, user_id, service_account_id, model, backend_id, endpoint,
        outcome, prompt_tokens, cached_prompt_tokens, completion_tokens, cost_micros, event
    )
    SELECT * FROM unnest(
        $1::text[], $2::timestamptz[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
        $9::smallint[], $10::smallint[], $11::bigint[], $12::bigint[], $13::bigint[], $14::bigint[], $15::bytea[]
    )
    ON CONFLICT DO NOTHING
    RETURNING
        organization_id, date_trunc('hour', admit_time, 'UTC') AS hour, api_key_id, user_id, service_account_id, model,
        backend_id, endpoint, outcome, prompt_tokens, cached_prompt_tokens, completion_tokens, cost_micros
), summed AS (
    INSERT INTO usage_hourly AS sums (
        organization_id, hour, api_key_id, user_id, service_account_id, model, backend_id, endpoint, outcome,
        requests, prompt_tokens, cached_prompt_tokens, completion_tokens, cost_micros
    )
    SELECT
        organization_id, hour, api_key_id, user_id, service_account_id, model, backend_id, endpoint, outcome,
        count(*), sum(prompt_tokens), sum(cached_prompt_tokens), sum(completion_tokens), sum(cost_micros)
    FROM inserted
    GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9
    ORDER BY 1, 2, 3, 4, 5, 6, 7, 8, 9
    ON CONFLICT (organization_id, hour, api_key_id, user_id, service_account_id, model, backend_id, endpoint, outcome)
    DO UPDATE SET
        requests = sums.requests + excluded.requests,
        prompt_tokens = sums.prompt_tokens + excluded.prompt_tokens,
        cached_prompt_tokens = sums.cached_prompt_tokens + excluded.cached_prompt_tokens,
        completion_tokens = sums.completion_tokens + excluded.completion_tokens,
        cost_micros = sums.cost_micros + excluded.cost_micros
)
SELECT count(*) FROM inserted
"""

# Outcomes by their number in the contract: 1 succeeded, 2 refused.
_SUMS = """
    coalesce(sum(requests) FILTER (WHERE outcome <> 2), 0)::bigint AS requests,
    coalesce(sum(requests) FILTER (WHERE outcome NOT IN (1, 2)), 0)::bigint AS failed_requests,
    coalesce(sum(requests) FILTER (WHERE outcome = 2), 0)::bigint AS refused_requests,
    sum(prompt_tokens)::bigint AS prompt_tokens,
    sum(cached_prompt_tokens)::bigint AS cached_prompt_tokens,
    sum(completion_tokens)::bigint AS completion_tokens,
    sum(cost_micros)::bigint AS cost_micros
"""
# What says that a value is wrong, and nothing about the server.
_REFUSED_VALUES = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
)

_TOTALS = ", ".join(f"coalesce(sum({name}), 0)::bigint" for name in Totals._fields)

_GROUPS = {
    UsageDimension.USAGE_DIMENSION_API_KEY: "api_key_id",
    UsageDimension.USAGE_DIMENSION_USER: "user_id",
    UsageDimension.USAGE_DIMENSION_SERVICE_ACCOUNT: "service_account_id",
    UsageDimension.USAGE_DIMENSION_MODEL: "model",
    UsageDimension.USAGE_DIMENSION_BACKEND: "backend_id",
    UsageDimension.USAGE_DIMENSION_ENDPOINT: 'endpoint::text COLLATE "C"',
    UsageDimension.USAGE_DIMENSION_OUTCOME: 'outcome::text COLLATE "C"',
}


class UnstorableEventsError(Exception):
    """PostgreSQL refuses the values of one event or more; trying again does not help."""


class UsageStore:
    """The tables of analytics. Every method raises PlatformError(UNAVAILABLE) when PostgreSQL is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert_events(self, events: Sequence[Event]) -> int:
        """Insert events and add them to the sums, in one transaction; returns how many were not there before.

        Raises UnstorableEventsError, and then has inserted none.
        """
        if not events:
            return 0
        columns = zip(*sorted(events), strict=True)
        try:
            inserted: int = await self._database.fetchval(_INSERT_EVENTS, *columns)
        except _REFUSED_VALUES as error:
            # Without the cause: PostgreSQL repeats the row in it.
            raise UnstorableEventsError(f"PostgreSQL refuses a value ({error.sqlstate})") from None
        return inserted

    async def query_usage(self, query: UsageQuery) -> tuple[list[Bucket], Totals]:
        """Buckets in the order of time, then group, at most one more than the page holds, and the sums over all."""
        where = Conditions()
        edges = where.parameter(query.edges[:-1])
        where.add("organization_id = {}", query.organization_id)
        where.add("hour >= {}", query.edges[0])
        where.add("hour < {}", query.edges[-1])
        where.add_filter(query.filter)
        groups = [f"g{index}" for index in range(len(query.group_by))]
        selected = [f"{_GROUPS[dimension]} AS {group}" for group, dimension in zip(groups, query.group_by, strict=True)]
        place = ", ".join(["bucket", *groups])
        after = query.after or BucketPlace(0, ("",) * len(groups))
        start = ", ".join([f"{where.parameter(after.bucket)}::int", *(where.parameter(value) for value in after.group)])
        # Made of constants of this file; values are parameters.
        sql = f"""
            WITH buckets AS MATERIALIZED (
                SELECT {", ".join([f"width_bucket(hour, {edges}::timestamptz[]) AS bucket", *selected])}, {_SUMS}
                FROM usage_hourly WHERE {where} GROUP BY {place}
            ), page AS (
                SELECT * FROM buckets WHERE ({place}) > ({start})
                ORDER BY {place} LIMIT {where.parameter(query.page_size + 1)}
            )
            SELECT {", ".join(["0 AS bucket", *(f"'' AS {group}" for group in groups)])}, {_TOTALS} FROM buckets
            UNION ALL
            SELECT * FROM page ORDER BY {place}
        """  # noqa: S608
        totals, *rows = await self._database.fetch(sql, *where.parameters)
        width = 1 + len(groups)
        buckets = [Bucket(BucketPlace(row[0], tuple(row[1:width])), Totals(*row[width:])) for row in rows]
        return buckets, Totals(*totals[width:])

    async def list_records(self, query: RecordQuery) -> list[Record]:
        """Single requests, newest first, at most one more than the page holds."""
        where = Conditions()
        where.add("organization_id = {}", query.organization_id)
        where.add("admit_time >= {}", query.start_time)
        where.add("admit_time < {}", query.end_time)
        where.add_filter(query.filter)
        if query.request_id:
            where.add("request_id = {}", query.request_id)
        if query.after is not None:
            # The first of these lets PostgreSQL skip the partitions that lie behind.
            where.add("admit_time <= {}", query.after.admit_time)
            where.add("(admit_time, request_id) < ({}, {})", query.after.admit_time, query.after.request_id)
        sql = f"""
            SELECT admit_time, request_id, event FROM usage_events WHERE {where}
            ORDER BY admit_time DESC, request_id DESC LIMIT {where.parameter(query.page_size + 1)}
        """  # noqa: S608
        return [Record(*row) for row in await self._database.fetch(sql, *where.parameters)]

    async def find_record(self, organization_id: str, request_id: str) -> bytes | None:
        """The serialized UsageEvent of a request, the newest of those under this id; None if there is none."""
        event: bytes | None = await self._database.fetchval(
            "SELECT event FROM usage_events WHERE request_id = $1 AND organization_id = $2"
            " ORDER BY admit_time DESC LIMIT 1",
            request_id,
            organization_id,
        )
        return event

    async def complete_until(self) -> datetime | None:
        """Until when events are counted; None while that is unknown."""
        moment: datetime | None = await self._database.fetchval("SELECT complete_until FROM usage_freshness")
        return moment

    async def set_complete_until(self, moment: datetime) -> None:
        """Move forward until when events are counted; it never goes back."""
        await self._database.execute(
            "INSERT INTO usage_freshness AS known (complete_until) VALUES ($1) ON CONFLICT (only_row) "
            "DO UPDATE SET complete_until = excluded.complete_until "
            "WHERE known.complete_until < excluded.complete_until",
            moment,
        )

    async def ensure_partition(self, day: date) -> bool:
        """Make the partition of one day in UTC; returns whether it was missing."""
        missing: bool = await self._database.fetchval("SELECT ensure_usage_events_partition($1)", day)
        return missing
