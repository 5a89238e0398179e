"""All SQL of exports: the rows that they hold, who writes them and what becomes of them; it never writes a file."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import datetime, timedelta
from typing import Any

from aiaas.analytics.v1.export_service_pb2 import ExportGranularity, ExportState
from aiaas.analytics.v1.usage_service_pb2 import UsageFilter
from analytics.conditions import Conditions
from analytics.exports import AT_ONCE, CANCELLED, Row, Schedule, StoredExport, Wanted, raw_row, sum_row
from analytics.usage import filter_message, read_filter
from analytics.usage_range import spans_of
from mesh.database import Database
from mesh.errors import PlatformError, Reason
from mesh.fields import invalid
from mesh.ids import new_id
from mesh.pages import TimePlace

LEASE = timedelta(seconds=60)
"""How long an export belongs to whoever writes it, from its last sign of life."""

_ROWS_AT_ONCE = 5_000
_PENDING = ExportState.EXPORT_STATE_PENDING
_RUNNING = ExportState.EXPORT_STATE_RUNNING
_SUCCEEDED = ExportState.EXPORT_STATE_SUCCEEDED
_FAILED = ExportState.EXPORT_STATE_FAILED
_EXPIRED = ExportState.EXPORT_STATE_EXPIRED

_EXPORT = (
    "export_id, organization_id, granularity, format, compression, start_time, end_time, filter, state,"
    " progress_percent, rows, size_bytes, sha256, failure_reason, creator_id, create_time, finish_time, expire_time,"
    " attempts, claim"
)
_SCHEDULE = "organization_id, enabled, granularity, format, compression, next_run_time, last_export_id, revision"
_PERIODS = {
    ExportGranularity.EXPORT_GRANULARITY_HOURLY: "hour",
    ExportGranularity.EXPORT_GRANULARITY_DAILY: "day",
    ExportGranularity.EXPORT_GRANULARITY_MONTHLY: "month",
}


class HoursGoneError(Exception):
    """Sums of hours are wanted, or of parts of days, from before they are kept."""


class ExportStore:
    """Exports, schedules and the usage that goes into files. Every method raises PlatformError(UNAVAILABLE) when
    PostgreSQL is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self, organization_id: str, wanted: Wanted, creator_id: str, request_id: str, now: datetime
    ) -> StoredExport:
        """An export that waits; the first one, if its creator repeats a request.

        Raises PlatformError: INVALID_ARGUMENT if the creator used `request_id` for another export, FAILED_PRECONDITION
        while the organization has as many under way as it may.
        """
        async with self._database.transaction() as connection:
            # So that two who ask at once are counted one after the other.
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended('aiaas.analytics.exports', hashtext($1)))",
                organization_id,
            )
            known = await connection.fetchrow(
                f"SELECT {_EXPORT} FROM exports WHERE organization_id = $1 AND creator_id = $2 AND request_id = $3"
                " AND request_id <> ''",
                organization_id,
                creator_id,
                request_id,
            )
            if known is not None:
                stored = _export_of(known)
                if stored.wanted != wanted:
                    raise invalid("request_id", "was used before, for another export")
                return stored
            under_way = await connection.fetchval(
                "SELECT count(*) FROM exports WHERE organization_id = $1 AND state IN (1, 2)", organization_id
            )
            if under_way >= AT_ONCE:
                raise _too_many()
            row = await connection.fetchrow(
                "INSERT INTO exports (export_id, organization_id, granularity, format, compression, start_time,"
                " end_time, filter, creator_id, request_id, create_time, due_time)"
                f" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $11) RETURNING {_EXPORT}",
                new_id("export"),
                organization_id,
                wanted.granularity,
                wanted.format,
                wanted.compression,
                wanted.start_time,
                wanted.end_time,
                filter_message(wanted.filter).SerializeToString(deterministic=True),
                creator_id,
                request_id,
                now,
            )
        return _export_of(row)

    async def get(self, organization_id: str, export_id: str) -> StoredExport | None:
        """One export."""
        row = await self._database.fetchrow(
            f"SELECT {_EXPORT} FROM exports WHERE organization_id = $1 AND export_id = $2", organization_id, export_id
        )
        return None if row is None else _export_of(row)

    async def page(
        self, organization_id: str, state: ExportState.ValueType, before: TimePlace | None, limit: int
    ) -> list[StoredExport]:
        """Up to `limit` exports that come before `before`, newest first; of all states, if that is unspecified."""
        where = Conditions()
        where.add("organization_id = {}", organization_id)
        if state:
            where.add("state = {}", state)
        if before is not None:
            where.add("(create_time, export_id) < ({}, {})", before.create_time, before.id)
        rows = await self._database.fetch(
            f"SELECT {_EXPORT} FROM exports WHERE {where} ORDER BY create_time DESC, export_id DESC"
            f" LIMIT {where.parameter(limit)}",
            *where.parameters,
        )
        return [_export_of(row) for row in rows]

    async def cancel(self, organization_id: str, export_id: str, now: datetime) -> StoredExport | None:
        """Stop an export that waits or runs; one that has ended stays as it is. None if there is none."""
        await self._database.execute(
            "UPDATE exports SET state = $3, failure_reason = $4, finish_time = $5, claim = claim + 1,"
            " lease_end_time = NULL, is_leftover = state = 2, due_time = $5"
            " WHERE organization_id = $1 AND export_id = $2 AND state IN (1, 2)",
            organization_id,
            export_id,
            _FAILED,
            CANCELLED,
            now,
        )
        return await self.get(organization_id, export_id)

    async def start_again(self, organization_id: str, export_id: str, now: datetime) -> StoredExport | None:
        """Have an export that failed or expired made again; None if there is no such, or it has not ended.

        Raises PlatformError(FAILED_PRECONDITION) while the organization has as many under way as it may.
        """
        row = await self._database.fetchrow(
            "UPDATE exports SET state = $3, progress_percent = 0, rows = 0, size_bytes = 0, sha256 = '',"
            " failure_reason = '', finish_time = NULL, expire_time = NULL, attempts = 0, due_time = $4,"
            " is_leftover = false"
            " WHERE organization_id = $1 AND export_id = $2 AND state IN (4, 5)"
            " AND (SELECT count(*) FROM exports WHERE organization_id = $1 AND state IN (1, 2)) < $5"
            f" RETURNING {_EXPORT}",
            organization_id,
            export_id,
            _PENDING,
            now,
            AT_ONCE,
        )
        if row is not None:
            return _export_of(row)
        stored = await self.get(organization_id, export_id)
        if stored is not None and stored.state in (_FAILED, _EXPIRED):
            raise _too_many()
        return None

    async def claim(self, now: datetime) -> StoredExport | None:
        """An export for the caller alone to write: the oldest that waits, or one whose writer is gone."""
        row = await self._database.fetchrow(
            "UPDATE exports SET state = $1, claim = claim + 1, attempts = attempts + 1, lease_end_time = $3,"
            " progress_percent = 0, rows = 0 WHERE export_id = ("
            " SELECT export_id FROM exports WHERE (state = 1 AND due_time <= $2) OR (state = 2 AND lease_end_time < $2)"
            " ORDER BY due_time LIMIT 1 FOR UPDATE SKIP LOCKED"
            f") RETURNING {_EXPORT}",
            _RUNNING,
            now,
            now + LEASE,
        )
        return None if row is None else _export_of(row)

    async def keep(self, export: StoredExport, now: datetime, progress_percent: int, rows: int) -> bool:
        """Tell how far it is; whether it is still the caller's to write."""
        return await self._change(
            export,
            "progress_percent = $4, rows = $5, lease_end_time = $6",
            progress_percent,
            rows,
            now + LEASE,
        )

    async def succeed(
        self, export: StoredExport, rows: int, size_bytes: int, sha256: bytes, now: datetime, expire_time: datetime
    ) -> bool:
        """Its file is there; whether it was still the caller's to write."""
        return await self._change(
            export,
            "state = 3, progress_percent = 100, rows = $4, size_bytes = $5, sha256 = $6, finish_time = $7,"
            " expire_time = $8, lease_end_time = NULL",
            rows,
            size_bytes,
            sha256,
            now,
            expire_time,
        )

    async def fail(self, export: StoredExport, reason: str, now: datetime) -> None:
        """It ended without a file; what there may be of it in storage is to go."""
        await self._change(
            export,
            "state = 4, failure_reason = $4, finish_time = $5, lease_end_time = NULL, is_leftover = true,"
            " due_time = $5",
            reason,
            now,
        )

    async def postpone(self, export: StoredExport, due_time: datetime) -> None:
        """It waits again, until then at least."""
        await self._change(export, "state = 1, due_time = $4, lease_end_time = NULL", due_time)

    async def expire(self, now: datetime) -> list[StoredExport]:
        """The exports whose files are to go now: those that are too old, and what cancelled ones may have left."""
        rows = await self._database.fetch(
            "UPDATE exports SET state = CASE WHEN state = 3 THEN 5 ELSE state END, is_leftover = true,"
            " due_time = $2 WHERE export_id IN ("
            " SELECT export_id FROM exports WHERE (state = 3 AND expire_time <= $1) OR (is_leftover AND due_time <= $1)"
            " LIMIT 100 FOR UPDATE SKIP LOCKED"
            f") RETURNING {_EXPORT}",
            now,
            now + LEASE,
        )
        return [_export_of(row) for row in rows]

    async def cleared(self, export: StoredExport) -> None:
        """Nothing of it is in storage any more."""
        await self._database.execute("UPDATE exports SET is_leftover = false WHERE export_id = $1", export.export_id)

    async def batches(self, export: StoredExport) -> AsyncGenerator[list[Row], None]:
        """Its rows in the order of time, some thousand at a time, all of one moment. Raises HoursGoneError."""
        wanted = export.wanted
        is_raw = wanted.granularity == ExportGranularity.EXPORT_GRANULARITY_RAW
        where = Conditions()
        where.add("organization_id = {}", export.organization_id)
        where.add_filter(wanted.filter)
        async with self._database.transaction() as connection:
            if is_raw:
                where.add("admit_time >= {}", wanted.start_time)
                where.add("admit_time < {}", wanted.end_time)
                query = f"SELECT admit_time, event FROM usage_events WHERE {where} ORDER BY admit_time, request_id"
            else:
                ((closed_until, hourly_since),) = await connection.fetch(
                    "SELECT closed_until, hourly_since FROM usage_rollups"
                )
                if wanted.granularity == ExportGranularity.EXPORT_GRANULARITY_HOURLY:
                    closed_until = wanted.start_time
                days, hours = spans_of((wanted.start_time, wanted.end_time), closed_until)
                if hours and hours[0].start < hourly_since:
                    raise HoursGoneError
                period = where.parameter(_PERIODS[wanted.granularity])
                sums = where.sums(export.organization_id, days, hours)
                query = (
                    f"SELECT date_trunc({period}, start, 'UTC'), api_key_id, user_id, service_account_id, model,"
                    " outcome, sum(requests)::bigint, sum(prompt_tokens)::bigint, sum(cached_prompt_tokens)::bigint,"
                    f" sum(completion_tokens)::bigint, sum(cost_micros)::bigint FROM {sums}"
                    " GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 1, 2, 3, 4, 5, 6"
                )
            cursor = await connection.cursor(query, *where.parameters)
            while found := await cursor.fetch(_ROWS_AT_ONCE):
                yield [raw_row(*row) if is_raw else sum_row(tuple(row)) for row in found]

    async def schedule(self, organization_id: str) -> Schedule:
        """What an organization wants each month."""
        row = await self._database.fetchrow(
            f"SELECT {_SCHEDULE} FROM export_schedules WHERE organization_id = $1", organization_id
        )
        return Schedule(organization_id) if row is None else Schedule(*row)

    async def change_schedule(self, schedule: Schedule) -> Schedule | None:
        """Store a schedule in place of the one before, whose revision it tells; None if that was changed meanwhile."""
        row = await self._database.fetchrow(
            "INSERT INTO export_schedules AS known"
            " (organization_id, enabled, granularity, format, compression, next_run_time)"
            " VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (organization_id) DO UPDATE SET enabled = excluded.enabled,"
            " granularity = excluded.granularity, format = excluded.format, compression = excluded.compression,"
            " next_run_time = excluded.next_run_time, revision = known.revision + 1 WHERE known.revision = $7"
            f" RETURNING {_SCHEDULE}",
            schedule.organization_id,
            schedule.enabled,
            schedule.granularity,
            schedule.format,
            schedule.compression,
            schedule.next_run_time,
            schedule.revision,
        )
        return None if row is None else Schedule(*row)

    async def due_schedules(self, now: datetime) -> list[tuple[Schedule, datetime]]:
        """The schedules whose time has come, each with that time."""
        rows = await self._database.fetch(
            f"SELECT {_SCHEDULE} FROM export_schedules WHERE enabled AND next_run_time <= $1 LIMIT 100", now
        )
        return [(schedule, schedule.next_run_time) for row in rows if (schedule := Schedule(*row)).next_run_time]

    async def ran(self, schedule: Schedule, export_id: str, next_run_time: datetime) -> None:
        """A schedule's export is made."""
        await self._database.execute(
            "UPDATE export_schedules SET last_export_id = $3, next_run_time = $4"
            " WHERE organization_id = $1 AND next_run_time = $2",
            schedule.organization_id,
            schedule.next_run_time,
            export_id,
            next_run_time,
        )

    async def _change(self, export: StoredExport, changes: str, *values: object) -> bool:
        done = await self._database.fetchval(
            f"UPDATE exports SET {changes} WHERE export_id = $1 AND claim = $2 AND state = $3 RETURNING true",
            export.export_id,
            export.claim,
            _RUNNING,
            *values,
        )
        return done is not None


def _too_many() -> PlatformError:
    return PlatformError(
        Reason.FAILED_PRECONDITION,
        description=f"{AT_ONCE} exports of the organization are under way. Wait until one has ended, or cancel it.",
    )


def _export_of(row: Any) -> StoredExport:
    wanted = Wanted(
        granularity=row["granularity"],
        format=row["format"],
        compression=row["compression"],
        start_time=row["start_time"],
        end_time=row["end_time"],
        filter=read_filter(UsageFilter.FromString(row["filter"])),
    )
    same = {name: row[name] for name in ("export_id", "organization_id", "state", "progress_percent", "rows")}
    return StoredExport(
        wanted=wanted,
        size_bytes=row["size_bytes"],
        sha256=row["sha256"],
        failure_reason=row["failure_reason"],
        creator_id=row["creator_id"],
        create_time=row["create_time"],
        finish_time=row["finish_time"],
        expire_time=row["expire_time"],
        attempts=row["attempts"],
        claim=row["claim"],
        **same,
    )
