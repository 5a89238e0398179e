"""All SQL that writes events and their sums, and reads single events; it never judges one, and never reads a sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime

import asyncpg

from analytics.conditions import Conditions
from analytics.events import Event, read_event
from analytics.rollups import KEYS, SKETCHES, SUMS, Rollup, day_of
from analytics.sketches import COUNT_BITS, COUNT_MASK
from analytics.usage import Record, RecordQuery
from analytics.usage_range import DAY, HOUR
from mesh.database import Connection, Database
from mesh.errors import PlatformError, Reason

# Every table is written in the order of its keys: replicas that meet wait for each other and never both ways.
_INSERT_EVENTS = """
INSERT INTO usage_events (
    request_id, admit_time, organization_id, api_key_id, user_id, service_account_id, model, backend_id, endpoint,
    outcome, prompt_tokens, cached_prompt_tokens, completion_tokens, cost_micros, event
)
SELECT * FROM unnest(
    $1::text[], $2::timestamptz[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
    $9::smallint[], $10::smallint[], $11::bigint[], $12::bigint[], $13::bigint[], $14::bigint[], $15::bytea[]
)
ON CONFLICT DO NOTHING
RETURNING request_id, admit_time
"""
_EVENT_COLUMNS = 15

# Whoever adds to sums holds this together with others; whoever closes days or takes hours away, alone. Any number will
# do that nobody else uses.
_ROLLUPS_LOCK = 7_264_839_105_114
# How many requests come to a sum before its histograms are merged.
_MERGED_EACH = 32


def _keys(period: str) -> str:
    return f"organization_id, {period}, {', '.join(KEYS)}"


def _merged(name: str) -> str:
    """A histogram that is there and one that is added, as one. They are only laid one behind the other but for every
    so many requests: to merge them takes longer than all the rest of a sum. merge_cells is written out here, which
    takes two thirds of the time that calling it does."""
    return f"""
        CASE WHEN sums.requests / {_MERGED_EACH} = (sums.requests + excluded.requests) / {_MERGED_EACH}
        THEN sums.{name} || excluded.{name} ELSE (
            SELECT coalesce(array_agg((bucket << {COUNT_BITS}) + requests ORDER BY bucket), '{{}}') FROM (
                SELECT cell >> {COUNT_BITS} AS bucket, sum(cell & {COUNT_MASK})::bigint AS requests
                FROM unnest(sums.{name} || excluded.{name}) AS cell GROUP BY 1
            ) AS buckets
        ) END
    """  # noqa: S608


def _add_to(table: str, period: str) -> str:
    """The statement that adds rows of a Rollup to a table."""
    columns = ", ".join((*SUMS, *SKETCHES))
    changes = [f"{name} = sums.{name} + excluded.{name}" for name in SUMS]
    changes += [f"{name} = {_merged(name)}" for name in SKETCHES]
    return f"""
        INSERT INTO {table} AS sums ({_keys(period)}, {columns}) SELECT * FROM unnest($1::usage_sum[])
        ON CONFLICT ({_keys(period)}) DO UPDATE SET {", ".join(changes)}
    """  # noqa: S608


_ADD_TO_HOURS, _ADD_TO_DAYS = _add_to("usage_hourly", "hour"), _add_to("usage_daily", "day")

# In an order, so that questions, which are of one organization, find a day on few pages.
_CLOSE_DAY = f"""
INSERT INTO usage_daily ({_keys("day")}, {", ".join((*SUMS, *SKETCHES))})
SELECT organization_id, $1, {", ".join(KEYS)}, {", ".join(f"sum({name})::bigint" for name in SUMS)},
    {", ".join(f"sum_sketches({name})" for name in SKETCHES)}
FROM usage_hourly WHERE hour >= $1 AND hour < $2 GROUP BY organization_id, {", ".join(KEYS)}
ORDER BY organization_id
"""  # noqa: S608
# For what a whole day needs.
_LONG_S = 600.0
_EVENTS_AT_ONCE = 5000

# What says that a value is wrong, and nothing about the server.
_REFUSED_VALUES = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
)


class UnstorableEventsError(Exception):
    """PostgreSQL refuses the values of one event or more; trying again does not help."""


class UsageStore:
    """The tables of events and their sums. Every method raises PlatformError(UNAVAILABLE) when PostgreSQL is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert_events(self, events: Sequence[Event]) -> int:
        """Insert events and add them to the sums, in one transaction; returns how many were not there before.

        Raises UnstorableEventsError, and then has inserted none.
        """
        if not events:
            return 0
        first: dict[tuple[str, datetime], Event] = {}
        for event in sorted(events):
            first.setdefault((event.request_id, event.admit_time), event)
        try:
            async with self._database.transaction() as connection:
                await connection.execute(f"SELECT pg_advisory_xact_lock_shared({_ROLLUPS_LOCK})")
                inserted = await _insert(connection, first)
                await _sum(connection, inserted)
        except _REFUSED_VALUES as error:
            # Without the cause: PostgreSQL repeats the row in it.
            raise UnstorableEventsError(f"PostgreSQL refuses a value ({error.sqlstate})") from None
        return len(inserted)

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

    async def close_day(self, until: datetime) -> datetime | None:
        """Sum the first day with usage that is not closed and lies before `until`, a midnight in UTC; returns it, or
        None when there is none, and then all days before `until` are closed."""
        async with self._database.transaction() as connection:
            await _alone(connection)
            closed_until = await connection.fetchval("SELECT closed_until FROM usage_rollups")
            hour = await connection.fetchval(
                "SELECT min(hour) FROM usage_hourly WHERE hour >= $1 AND hour < $2", closed_until, until
            )
            day = None if hour is None else day_of(hour)
            if day is not None:
                await connection.execute(_CLOSE_DAY, day, day + DAY, timeout=_LONG_S)
            await connection.execute(
                "UPDATE usage_rollups SET closed_until = greatest(closed_until, $1)", day + DAY if day else until
            )
        return day

    async def forget_hours(self, since: datetime) -> datetime:
        """From now on keep sums of hours since a midnight in UTC only, or since the last closed day if that is earlier;
        returns since when. It never goes back."""
        async with self._database.transaction() as connection:
            await _alone(connection)
            moment: datetime = await connection.fetchval(
                "UPDATE usage_rollups SET hourly_since = greatest(hourly_since, least($1, closed_until))"
                " RETURNING hourly_since",
                since,
            )
        return moment

    async def remove_hours(self, since: datetime, limit: int) -> int:
        """Remove sums of hours before a moment, so many at most; returns how many."""
        return await self._remove("usage_hourly", "hour", since, limit)

    async def remove_days(self, since: datetime, limit: int) -> int:
        """Remove sums of days before a moment, so many at most; returns how many."""
        return await self._remove("usage_daily", "day", since, limit)

    async def remove_events(self, since: datetime, limit: int) -> int:
        """Remove events before a moment that have no partition of their own, so many at most; returns how many."""
        removed: int = await self._database.fetchval("SELECT remove_stray_usage_events($1, $2)", since, limit)
        return removed

    async def _remove(self, table: str, column: str, since: datetime, limit: int) -> int:
        found = f"SELECT ctid FROM {table} WHERE {column} < $1 LIMIT $2"  # noqa: S608
        tag = await self._database.execute(
            f"DELETE FROM {table} WHERE ctid = ANY(ARRAY({found}))",  # noqa: S608
            since,
            limit,
        )
        return int(tag.rpartition(" ")[2])

    async def drop_partitions(self, first_kept: date) -> int:
        """Drop the events of days before one; returns how many days that were. Raises PlatformError(UNAVAILABLE) while
        somebody reads them."""
        try:
            dropped: int = await self._database.fetchval("SELECT drop_usage_events_partitions($1)", first_kept)
        except asyncpg.LockNotAvailableError:
            raise PlatformError(Reason.UNAVAILABLE) from None
        return dropped

    async def rebuild_day(self, day: datetime) -> int:
        """Sum the events of one day in UTC anew, and wait with others until that is done; returns how many there were.
        A day without events is left as it is: they may be gone."""
        events = 0
        within = "admit_time >= $1 AND admit_time < $2"
        async with self._database.transaction() as connection:
            await _alone(connection)
            if not await connection.fetchval(
                f"SELECT EXISTS (SELECT FROM usage_events WHERE {within})",  # noqa: S608
                day,
                day + DAY,
            ):
                return 0
            closed_until, hourly_since = await _state(connection)
            by_hour = day >= hourly_since
            hours = [day + HOUR * number for number in range(24)]
            for old in ("usage_hourly WHERE hour = ANY($1)", "usage_daily WHERE day = ANY($1)"):
                await connection.execute(f"DELETE FROM {old}", hours, timeout=_LONG_S)  # noqa: S608
            for hour in hours:
                sums = Rollup(HOUR if by_hour else DAY)
                found = await connection.cursor(
                    f"SELECT admit_time, event FROM usage_events WHERE {within}",  # noqa: S608
                    hour,
                    hour + HOUR,
                )
                while rows := await found.fetch(_EVENTS_AT_ONCE):
                    events += len(rows)
                    sums.add(read_event(row["event"], row["admit_time"]) for row in rows)
                if added := sums.rows():
                    statement = _ADD_TO_HOURS if by_hour else _ADD_TO_DAYS
                    await connection.execute(statement, added, timeout=_LONG_S)
            if by_hour and day < closed_until:
                await connection.execute(_CLOSE_DAY, day, day + DAY, timeout=_LONG_S)
        return events


async def _insert(connection: Connection, events: Mapping[tuple[str, datetime], Event]) -> list[Event]:
    """Insert events, given by their keys and in the order of these; returns those that were not there before."""
    records = [event[:_EVENT_COLUMNS] for event in events.values()]
    try:
        # COPY takes half of the time, and it is rare that an event comes twice.
        async with connection.transaction():
            await connection.copy_records_to_table("usage_events", records=records)
    except (asyncpg.UniqueViolationError, OverflowError):
        # A number that is too large is refused by name below.
        rows = await connection.fetch(_INSERT_EVENTS, *zip(*records, strict=True))
        return [events[row[0], row[1]] for row in rows]
    return list(events.values())


async def _sum(connection: Connection, events: Sequence[Event]) -> None:
    """Add events to the sums of their hours, and of their days where these are closed."""
    closed_until, hourly_since = await _state(connection)
    hours, days = Rollup(HOUR), Rollup(DAY)
    hours.add(event for event in events if event.admit_time >= hourly_since)
    days.add(event for event in events if event.admit_time < closed_until)
    for statement, rollup in ((_ADD_TO_HOURS, hours), (_ADD_TO_DAYS, days)):
        if rows := rollup.rows():
            await connection.execute(statement, rows)


async def _state(connection: Connection) -> tuple[datetime, datetime]:
    """Until when days are closed, and since when there are sums of hours."""
    ((closed_until, hourly_since),) = await connection.fetch("SELECT closed_until, hourly_since FROM usage_rollups")
    return closed_until, hourly_since


async def _alone(connection: Connection) -> None:
    """Wait until nobody adds to sums, and let nobody until the end of the transaction."""
    await connection.execute(f"SELECT pg_advisory_xact_lock({_ROLLUPS_LOCK})", timeout=_LONG_S)
