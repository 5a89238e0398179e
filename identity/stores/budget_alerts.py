"""The table of thresholds that were passed, and the events that tell of them; it never sends one."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from aiaas.type.v1 import platform_event_pb2
from identity import metrics
from identity.budgets import BudgetAlert
from identity.stores.rows import Connection, Query, Row
from mesh.conversions import to_timestamp
from mesh.ids import new_id
from mesh.pages import TimePlace

_COLUMNS = "budget_alert_id, organization_id, budget_id, period_start, percent, spent, limit_amount, cross_time"
# numeric, since a hundred times an amount can be more than a bigint. A limit of 0 is passed by anything.
_PASSED = """
    SELECT b.organization_id, p.budget_id, p.period_start, threshold, p.spent, p.limit_amount, b.display_name
    FROM unnest($1::text[], $2::timestamptz[]) AS touched (budget_id, period_start)
    JOIN budget_periods p USING (budget_id, period_start)
    JOIN budgets b USING (budget_id)
    CROSS JOIN LATERAL unnest(b.alert_percents) AS threshold
    WHERE b.delete_time IS NULL AND p.spent > 0 AND p.spent::numeric * 100 >= threshold::numeric * p.limit_amount
        AND NOT EXISTS (SELECT FROM budget_alerts a
            WHERE a.budget_id = p.budget_id AND a.period_start = p.period_start AND a.percent = threshold)
    ORDER BY p.budget_id, threshold
"""


class BudgetAlertRows:
    """Thresholds that were passed, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def page(
        self, organization_id: str, after: TimePlace | None, limit: int, budget_id: str
    ) -> list[BudgetAlert]:
        """Alerts newest first, of one budget where given."""
        query = Query()
        query.where("organization_id = {}", organization_id)
        if after is not None:
            query.where("(cross_time, budget_alert_id) < ({}, {})", after.create_time, after.id)
        if budget_id:
            query.where("budget_id = {}", budget_id)
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM budget_alerts WHERE {query}"
            f" ORDER BY cross_time DESC, budget_alert_id DESC LIMIT {limit:d}",
            *query.values,
        )
        return [_alert_of(row) for row in rows]

    async def record_crossed(self, keys: Sequence[tuple[str, datetime]]) -> int:
        """Note which thresholds of these periods, each by budget and start, are passed; gives how many newly were."""
        return await record_crossed(self._connection, keys)


async def record_crossed(connection: Connection, keys: Sequence[tuple[str, datetime]]) -> int:
    """Note which thresholds of these periods, each by (budget_id, period_start), are passed, and leave an event for
    each that was not before; gives how many. To be called in the transaction that changed spending or a limit."""
    crossed = 0
    for row in await connection.fetch(_PASSED, [key[0] for key in keys], [key[1] for key in keys]):
        noted = await connection.fetchrow(
            f"INSERT INTO budget_alerts ({_COLUMNS}) VALUES ($1, $2, $3, $4, $5, $6, $7, clock_timestamp())"
            f" ON CONFLICT DO NOTHING RETURNING {_COLUMNS}",
            new_id("alert"),
            row["organization_id"],
            row["budget_id"],
            row["period_start"],
            row["threshold"],
            row["spent"],
            row["limit_amount"],
        )
        if noted is None:
            continue
        alert = _alert_of(noted)
        await connection.execute(
            "INSERT INTO unpublished_events (event_id, event, create_time) VALUES ($1, $2, $3)",
            alert.budget_alert_id,
            _event_of(alert, row["display_name"]).SerializeToString(),
            alert.cross_time,
        )
        metrics.count_crossed(alert.percent)
        crossed += 1
    return crossed


def _alert_of(row: Row) -> BudgetAlert:
    return BudgetAlert(
        budget_alert_id=row["budget_alert_id"],
        organization_id=row["organization_id"],
        budget_id=row["budget_id"],
        period_start=row["period_start"],
        percent=row["percent"],
        spent=row["spent"],
        limit=row["limit_amount"],
        cross_time=row["cross_time"],
    )


def _event_of(alert: BudgetAlert, display_name: str) -> platform_event_pb2.PlatformEvent:
    return platform_event_pb2.PlatformEvent(
        schema_version=1,
        event_id=alert.budget_alert_id,
        type=platform_event_pb2.EVENT_TYPE_BUDGET_THRESHOLD_CROSSED,
        organization_id=alert.organization_id,
        event_time=to_timestamp(alert.cross_time),
        summary=f"The budget '{display_name}' has reached {alert.percent} % of its limit.",
        budget_threshold_crossed=platform_event_pb2.BudgetThresholdCrossed(
            budget_id=alert.budget_id,
            period_start=to_timestamp(alert.period_start),
            percent=alert.percent,
            spent=alert.spent,
            limit=alert.limit,
        ),
    )
