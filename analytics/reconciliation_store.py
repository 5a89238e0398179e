"""The SQL of reconciliation: reports, their differences, and what analytics itself knows of a range of time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from aiaas.analytics.v1.reconciliation_service_pb2 import ReconciliationKind, ReconciliationState
from analytics.reconciliations import HOUR, Amounts, Finding, Line, Report
from mesh.database import Database
from mesh.fields import invalid
from mesh.ids import new_id
from mesh.pages import TimePlace

KEPT = timedelta(days=400)
"""How long reports are kept."""

LIMIT_S = 300.0
"""Seconds that a report may take."""

AGAIN = timedelta(hours=1)
"""When an incomplete report is made again."""

_LOST = timedelta(seconds=2 * LIMIT_S)
_INCOMPLETE_FOR = timedelta(hours=24)
_DIFFERENCES = 10_000
_EVENTS_AT_ONCE = 500

_RUNNING = ReconciliationState.RECONCILIATION_STATE_RUNNING
_DIFFERED = ReconciliationState.RECONCILIATION_STATE_DIFFERED
_INCOMPLETE = ReconciliationState.RECONCILIATION_STATE_INCOMPLETE

_REPORT = (
    "reconciliation_id, kind, start_time, end_time, state, compared, differences, republished, missing_sources,"
    " residual_prompt_tokens, residual_completion_tokens, create_time, finish_time, claim_time"
)


class ReconciliationStore:
    """Reports and what they compare with. Every method raises PlatformError(UNAVAILABLE) while PostgreSQL is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        kind: ReconciliationKind.ValueType,
        start_time: datetime,
        end_time: datetime,
        now: datetime,
        creator_id: str,
        request_id: str,
    ) -> Report:
        """A report that waits to be made; the first one, if its creator repeats a request.

        Raises PlatformError(INVALID_ARGUMENT) if the creator used `request_id` for another range or kind.
        """
        row = await self._database.fetchrow(
            "INSERT INTO reconciliations"  # noqa: S608
            " (reconciliation_id, kind, start_time, end_time, create_time, scheduled, creator_id, request_id)"
            " VALUES ($1, $2, $3, $4, $5, false, $6, $7)"
            # So that the row that is there already is returned.
            " ON CONFLICT (creator_id, request_id) WHERE request_id <> ''"
            " DO UPDATE SET request_id = excluded.request_id"
            f" RETURNING {_REPORT}",
            new_id("rec"),
            kind,
            start_time,
            end_time,
            now,
            creator_id,
            request_id,
        )
        report = _report(row)
        if (report.kind, report.start_time, report.end_time) != (kind, start_time, end_time):
            raise invalid("request_id", "was used before, for another reconciliation")
        return report

    async def schedule(self, kinds: Iterable[int], hours: Iterable[datetime], now: datetime) -> None:
        """A report that waits to be made for each kind and hour, where there is none; those that are old go."""
        await self._database.execute("DELETE FROM reconciliations WHERE create_time < $1", now - KEPT)
        for hour in hours:
            for kind in kinds:
                await self._database.execute(
                    "INSERT INTO reconciliations"
                    " (reconciliation_id, kind, start_time, end_time, create_time, scheduled)"
                    " VALUES ($1, $2, $3, $4, $5, true) ON CONFLICT (start_time, kind) WHERE scheduled DO NOTHING",
                    new_id("rec"),
                    kind,
                    hour,
                    hour + HOUR,
                    now,
                )

    async def last_scheduled(self) -> datetime | None:
        """The start of the last hour for which there are reports of every hour; None before the first."""
        hour: datetime | None = await self._database.fetchval(
            "SELECT max(start_time) FROM reconciliations WHERE scheduled"
        )
        return hour

    async def claim(self, now: datetime) -> Report | None:
        """A report for the caller alone to make, within `LIMIT_S`: a new one, one whose maker died, or one of the last
        day that was incomplete an hour ago. None if there is none."""
        row = await self._database.fetchrow(
            "UPDATE reconciliations SET state = $1, claim_time = $3 WHERE reconciliation_id = ("  # noqa: S608
            " SELECT reconciliation_id FROM reconciliations"
            " WHERE (state = $1 AND (claim_time IS NULL OR claim_time < $4))"
            " OR (state = $2 AND scheduled AND finish_time < $5 AND start_time >= $6)"
            " ORDER BY create_time, reconciliation_id LIMIT 1 FOR UPDATE SKIP LOCKED"
            f") RETURNING {_REPORT}",
            _RUNNING,
            _INCOMPLETE,
            now,
            now - _LOST,
            now - AGAIN,
            now - _INCOMPLETE_FOR,
        )
        return None if row is None else _report(row)

    async def finish(self, report: Report, finding: Finding, differences: Sequence[bytes], now: datetime) -> bool:
        """Keep what was found, the largest differences first; False if somebody else has claimed the report since, and
        then it does nothing."""
        async with self._database.transaction() as connection:
            mine = await connection.fetchval(
                "UPDATE reconciliations SET state = $3, compared = $4, differences = $5, republished = $6,"
                " missing_sources = $7, residual_prompt_tokens = $8, residual_completion_tokens = $9,"
                " finish_time = $10, announced = $11"
                " WHERE reconciliation_id = $1 AND claim_time = $2 AND state = $12 RETURNING true",
                report.reconciliation_id,
                report.claim_time,
                finding.state,
                finding.compared,
                len(finding.differences),
                report.republished + finding.republished,
                finding.missing_sources,
                finding.residual_prompt_tokens,
                finding.residual_completion_tokens,
                now,
                finding.state != _DIFFERED,
                _RUNNING,
            )
            if mine:
                await connection.execute(
                    "DELETE FROM reconciliation_differences WHERE reconciliation_id = $1", report.reconciliation_id
                )
                await connection.execute(
                    "INSERT INTO reconciliation_differences SELECT $1, position, difference"
                    " FROM unnest($2::bytea[]) WITH ORDINALITY AS found (difference, position)",
                    report.reconciliation_id,
                    differences[:_DIFFERENCES],
                )
            return bool(mine)

    async def get(self, reconciliation_id: str) -> Report | None:
        """One report; None if there is none of this id."""
        row = await self._database.fetchrow(
            f"SELECT {_REPORT} FROM reconciliations WHERE reconciliation_id = $1",  # noqa: S608
            reconciliation_id,
        )
        return None if row is None else _report(row)

    async def list_reports(self, kind: int, state: int, before: TimePlace | None, limit: int) -> list[Report]:
        """Up to `limit` reports, newest first; of any kind and state where these are 0."""
        rows = await self._database.fetch(
            f"SELECT {_REPORT} FROM reconciliations WHERE ($1 = 0 OR kind = $1) AND ($2 = 0 OR state = $2)"  # noqa: S608
            " AND (create_time, reconciliation_id) < (coalesce($3::timestamptz, 'infinity'), $4)"
            " ORDER BY create_time DESC, reconciliation_id DESC LIMIT $5",
            kind,
            state,
            before.create_time if before else None,
            before.id if before else "",
            limit,
        )
        return list(map(_report, rows))

    async def list_differences(self, reconciliation_id: str, after: int, limit: int) -> list[tuple[int, bytes]]:
        """Up to `limit` differences of a report beyond position `after`, each with its position, largest first."""
        rows = await self._database.fetch(
            "SELECT position, difference FROM reconciliation_differences"
            " WHERE reconciliation_id = $1 AND position > $2 ORDER BY position LIMIT $3",
            reconciliation_id,
            after,
            limit,
        )
        return [(row["position"], row["difference"]) for row in rows]

    async def unannounced(self) -> list[Report]:
        """Reports that differed and of which nobody was told."""
        rows = await self._database.fetch(
            f"SELECT {_REPORT} FROM reconciliations WHERE NOT announced ORDER BY create_time LIMIT 100"  # noqa: S608
        )
        return list(map(_report, rows))

    async def announced(self, reconciliation_id: str) -> None:
        """Somebody was told."""
        await self._database.execute(
            "UPDATE reconciliations SET announced = true WHERE reconciliation_id = $1", reconciliation_id
        )

    async def latest(self) -> list[Report]:
        """The last report of each kind that was made by itself and is finished."""
        rows = await self._database.fetch(
            f"SELECT DISTINCT ON (kind) {_REPORT} FROM reconciliations"  # noqa: S608
            " WHERE scheduled AND state <> $1 ORDER BY kind, start_time DESC",
            _RUNNING,
        )
        return list(map(_report, rows))

    async def usage_totals(self, start_time: datetime, end_time: datetime) -> dict[Line, Amounts]:
        """What analytics knows of all requests of some hours, refused ones included, as journals sum them."""
        rows = await self._database.fetch(
            "SELECT hour, organization_id, api_key_id, model, sum(requests)::bigint, sum(prompt_tokens)::bigint,"
            " sum(cached_prompt_tokens)::bigint, sum(completion_tokens)::bigint, sum(cost_micros)::bigint"
            " FROM usage_hourly WHERE hour >= $1 AND hour < $2 GROUP BY 1, 2, 3, 4",
            start_time,
            end_time,
        )
        return {
            Line(hour, hour + HOUR, organization_id, api_key_id, model): Amounts(*amounts)
            for hour, organization_id, api_key_id, model, *amounts in rows
        }

    async def events(self, start_time: datetime, end_time: datetime) -> AsyncGenerator[tuple[datetime, bytes], None]:
        """The times of admission and the serialized UsageEvents of requests of a range that were not refused."""
        async with self._database.transaction() as connection:
            found = connection.cursor(
                # 2 is OUTCOME_REFUSED, of which no engine and no budget knows.
                "SELECT admit_time, event FROM usage_events"
                " WHERE admit_time >= $1 AND admit_time < $2 AND outcome <> 2",
                start_time,
                end_time,
                prefetch=_EVENTS_AT_ONCE,
            )
            async for row in found:
                yield row["admit_time"], row["event"]


def _report(row: Any) -> Report:
    return Report(**{**row, "missing_sources": tuple(row["missing_sources"])})
