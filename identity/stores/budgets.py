"""The tables of budgets and of the revisions of their changes; it never decides what a limit may be."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from identity.budgets import SUBJECTS, Budget, BudgetInterval, BudgetPeriod, BudgetUnit
from identity.stores.budget_periods import period_of
from identity.stores.rows import Connection, Query, Row
from mesh.pages import TimePlace

# Each budget with its running period. One that nobody has used yet is not in the table, and is as it will be.
_BUDGETS = (
    "SELECT b.*, now.period_start, now.period_end, coalesce(p.limit_amount, b.limit_amount) AS period_limit,"
    " coalesce(p.spent, 0) AS spent, coalesce(p.leased, 0) AS leased FROM budgets b"
    " CROSS JOIN LATERAL budget_period_at(b.period, b.create_time, clock_timestamp()) now"
    " LEFT JOIN budget_periods p ON p.budget_id = b.budget_id AND p.period_start = now.period_start"
    " WHERE b.delete_time IS NULL AND "
)
_SCOPE = (*SUBJECTS, "model")


class BudgetRows:
    """Budgets, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def change_revision(self, organization_id: str) -> None:
        """Begin a change of an organization's budgets: from here to the transaction's end nobody else changes any."""
        await self._connection.execute(
            "WITH next AS (UPDATE budget_revision SET revision = revision + 1 RETURNING revision)"
            " INSERT INTO organization_budgets (organization_id, revision) SELECT $1, revision FROM next"
            " ON CONFLICT (organization_id) DO UPDATE SET revision = excluded.revision",
            organization_id,
        )

    async def revision(self, organization_id: str) -> int:
        """The revision of an organization's latest change; 0 if there was none."""
        revision: int | None = await self._connection.fetchval(
            "SELECT revision FROM organization_budgets WHERE organization_id = $1", organization_id
        )
        return revision or 0

    async def newest_revision(self) -> int:
        """The revision of the latest change of all organizations."""
        revision: int = await self._connection.fetchval("SELECT revision FROM budget_revision")
        return revision

    async def list_changes(self, after_revision: int, limit: int) -> list[tuple[int, str]]:
        """Revisions after this one, in their order, and the organizations whose latest they are."""
        rows = await self._connection.fetch(
            "SELECT revision, organization_id FROM organization_budgets WHERE revision > $1"
            f" ORDER BY revision LIMIT {limit:d}",
            after_revision,
        )
        return [(row["revision"], row["organization_id"]) for row in rows]

    async def add(self, budget: Budget) -> bool:
        """Store a new budget; False if one of the same scope is there."""
        row = await self._connection.fetchrow(
            "INSERT INTO budgets (budget_id, organization_id, display_name, user_id, service_account_id, api_key_id,"
            " model, unit, period, is_hard, limit_amount, alert_percents, disabled, create_time, update_time)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)"
            " ON CONFLICT DO NOTHING RETURNING budget_id",
            budget.budget_id,
            budget.organization_id,
            budget.display_name,
            budget.user_id,
            budget.service_account_id,
            budget.api_key_id,
            budget.model,
            budget.unit.value,
            budget.interval.value,
            budget.is_hard,
            budget.limit,
            budget.alert_percents,
            budget.disabled,
            budget.create_time,
            budget.update_time,
        )
        return row is not None

    async def find_same(self, budget: Budget) -> str | None:
        """The id of the budget of the same scope."""
        found: str | None = await self._connection.fetchval(
            "SELECT budget_id FROM budgets WHERE organization_id = $1 AND user_id = $2 AND service_account_id = $3"
            " AND api_key_id = $4 AND model = $5 AND unit = $6 AND period = $7 AND delete_time IS NULL",
            budget.organization_id,
            *(getattr(budget, name) for name in _SCOPE),
            budget.unit.value,
            budget.interval.value,
        )
        return found

    async def get(self, organization_id: str, budget_id: str, *, lock: bool = False) -> Budget | None:
        """One budget, locked against other changes if asked."""
        row = await self._connection.fetchrow(
            f"{_BUDGETS} b.organization_id = $1 AND b.budget_id = $2{' FOR NO KEY UPDATE OF b' if lock else ''}",
            organization_id,
            budget_id,
        )
        return None if row is None else _budget_of(row)

    async def page(
        self, organization_id: str, after: TimePlace | None, limit: int, only: Mapping[str, str]
    ) -> list[Budget]:
        """Budgets oldest first; `only` holds the columns of a scope that must have a value."""
        query = Query()
        query.where("b.organization_id = {}", organization_id)
        if after is not None:
            query.where("(b.create_time, b.budget_id) > ({}, {})", after.create_time, after.id)
        for name in _SCOPE:
            if name in only:
                query.where(f"b.{name} = {{}}", only[name])
        rows = await self._connection.fetch(
            f"{_BUDGETS} {query} ORDER BY b.create_time, b.budget_id LIMIT {limit:d}", *query.values
        )
        return [_budget_of(row) for row in rows]

    async def list_binding(self, organization_id: str) -> list[Budget]:
        """Every budget that is not disabled, by id."""
        rows = await self._connection.fetch(
            f"{_BUDGETS} b.organization_id = $1 AND NOT b.disabled ORDER BY b.budget_id", organization_id
        )
        return [_budget_of(row) for row in rows]

    async def change(self, budget: Budget) -> None:
        """Store what changed of a budget that is locked."""
        await self._connection.execute(
            "UPDATE budgets SET display_name = $3, is_hard = $4, limit_amount = $5, alert_percents = $6, disabled = $7,"
            " update_time = $8, revision = revision + 1 WHERE organization_id = $1 AND budget_id = $2",
            budget.organization_id,
            budget.budget_id,
            budget.display_name,
            budget.is_hard,
            budget.limit,
            budget.alert_percents,
            budget.disabled,
            budget.update_time,
        )

    async def remove(self, organization_id: str, budget_id: str, now: datetime) -> None:
        """Hide a budget; its row stays."""
        await self._connection.execute(
            "UPDATE budgets SET delete_time = $3, update_time = $3, revision = revision + 1"
            " WHERE organization_id = $1 AND budget_id = $2",
            organization_id,
            budget_id,
            now,
        )

    async def page_of_periods(self, budget_id: str, after: TimePlace | None, limit: int) -> list[BudgetPeriod]:
        """Periods of a budget that was found to be the organization's, newest first."""
        rows = await self._connection.fetch(
            "SELECT *, limit_amount AS period_limit FROM budget_periods"
            " WHERE budget_id = $1 AND ($2::timestamptz IS NULL OR period_start < $2)"
            f" ORDER BY period_start DESC LIMIT {limit:d}",
            budget_id,
            None if after is None else after.create_time,
        )
        return [period_of(row) for row in rows]

    async def fit(self, budget_id: str, period_start: datetime) -> None:
        """Give a locked period the limit and the enforcement that are its budget's, with its active overrides. A hard
        limit stays at what is spent and leased where that is more."""
        await self._connection.execute(
            """
            UPDATE budget_periods p
            SET is_hard = b.is_hard,
                limit_amount = CASE WHEN b.is_hard THEN greatest(due.amount, p.spent + p.leased) ELSE due.amount END,
                falling = b.is_hard AND p.leased > 0 AND p.spent + p.leased > due.amount
            FROM budgets b CROSS JOIN LATERAL (
                SELECT (b.limit_amount + coalesce(sum(o.amount), 0))::bigint AS amount FROM budget_overrides o
                WHERE o.budget_id = b.budget_id AND o.period_start = $2 AND o.state = 'active'
            ) due
            WHERE b.budget_id = $1 AND p.budget_id = $1 AND p.period_start = $2
            """,
            budget_id,
            period_start,
        )

    async def list_falling(self, limit: int) -> list[tuple[str, str, datetime]]:
        """Organization, budget and start of periods whose limit can fall now, since leases came back."""
        rows = await self._connection.fetch(
            "SELECT b.organization_id, budget_id, p.period_start FROM budget_periods p JOIN budgets b USING (budget_id)"
            f" WHERE p.falling AND (p.leased = 0 OR p.spent + p.leased < p.limit_amount) LIMIT {limit:d}"
        )
        return [(row["organization_id"], row["budget_id"], row["period_start"]) for row in rows]


def _budget_of(row: Row) -> Budget:
    return Budget(
        budget_id=row["budget_id"],
        organization_id=row["organization_id"],
        display_name=row["display_name"],
        unit=BudgetUnit(row["unit"]),
        interval=BudgetInterval(row["period"]),
        is_hard=row["is_hard"],
        limit=row["limit_amount"],
        alert_percents=tuple(row["alert_percents"]),
        user_id=row["user_id"],
        service_account_id=row["service_account_id"],
        api_key_id=row["api_key_id"],
        model=row["model"],
        disabled=row["disabled"],
        create_time=row["create_time"],
        update_time=row["update_time"],
        revision=row["revision"],
        current_period=period_of(row),
    )
