"""The table of periods: opened when they are first needed, and locked, by the database's clock."""

from __future__ import annotations

from collections.abc import Mapping

from identity.budgets import BudgetPeriod, PeriodKey
from identity.stores.rows import Connection, Row

# Waits for whoever changes the budget, so that no period begins with a limit that is being replaced.
_OPEN = """
    WITH budget AS (SELECT * FROM budgets WHERE budget_id = $1 FOR SHARE)
    INSERT INTO budget_periods (budget_id, period_start, period_end, is_hard, limit_amount)
    SELECT b.budget_id, now.period_start, now.period_end, b.is_hard, b.limit_amount
    FROM budget b CROSS JOIN LATERAL budget_period_at(b.period, b.create_time, clock_timestamp()) now
    ON CONFLICT DO NOTHING
"""
_LOCK_CURRENT = """
    SELECT p.*, p.limit_amount AS period_limit FROM budget_periods p
    WHERE p.budget_id = $1
        AND (p.period_end IS NULL OR p.period_start <= clock_timestamp() AND p.period_end > clock_timestamp())
    FOR UPDATE
"""
_MOVE = """
    UPDATE budget_periods p SET spent = p.spent + move.spent, leased = p.leased + move.leased
    FROM unnest($1::text[], $2::timestamptz[], $3::bigint[], $4::bigint[])
        AS move (budget_id, period_start, spent, leased)
    WHERE p.budget_id = move.budget_id AND p.period_start = move.period_start
    RETURNING p.budget_id, p.period_start, p.falling
"""


class BudgetPeriodRows:
    """Periods of budgets, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def lock_current(self, budget_id: str) -> BudgetPeriod:
        """The running period of a budget that is there, opened if it was not, and locked."""
        while (row := await self._connection.fetchrow(_LOCK_CURRENT, budget_id)) is None:
            await self._connection.execute(_OPEN, budget_id)
        return period_of(row)

    async def move(self, moves: Mapping[PeriodKey, tuple[int, int]]) -> list[PeriodKey]:
        """Add to what is spent and to what is leased of locked periods; gives those whose limit falls with it."""
        if not moves:
            return []
        rows = await self._connection.fetch(
            _MOVE,
            [budget_id for budget_id, _ in moves],
            [period_start for _, period_start in moves],
            [spent for spent, _ in moves.values()],
            [leased for _, leased in moves.values()],
        )
        return [(row["budget_id"], row["period_start"]) for row in rows if row["falling"]]


def period_of(row: Row) -> BudgetPeriod:
    """The period of a row that holds its limit as period_limit."""
    return BudgetPeriod(
        budget_id=row["budget_id"],
        start_time=row["period_start"],
        end_time=row["period_end"],
        limit=row["period_limit"],
        spent=row["spent"],
        leased=row["leased"],
        is_hard=row["is_hard"],
    )
