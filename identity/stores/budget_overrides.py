"""The table of overrides; it never raises a limit."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from datetime import datetime

from identity.budget_overrides import BudgetOverride, BudgetOverrideState
from identity.stores.rows import Connection, Query, Row, found
from mesh.pages import TimePlace

_COLUMNS = (
    "budget_override_id, organization_id, budget_id, amount, expire_time, reason, state, requester_id, approver_id,"
    " period_start, create_time, decide_time, revision"
)
# Over by their own time, or with the period that they raise.
_DUE = (
    "o.state IN ('pending', 'active') AND (o.expire_time <= clock_timestamp() OR EXISTS (SELECT FROM budget_periods p"
    " WHERE p.budget_id = o.budget_id AND p.period_start = o.period_start AND p.period_end <= clock_timestamp()))"
)


class BudgetOverrideRows:
    """Overrides, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, override: BudgetOverride) -> None:
        """Store a new override."""
        await self._connection.execute(
            "INSERT INTO budget_overrides (budget_override_id, organization_id, budget_id, amount, expire_time, reason,"
            " requester_id, create_time) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            override.budget_override_id,
            override.organization_id,
            override.budget_id,
            override.amount,
            override.expire_time,
            override.reason,
            override.requester_id,
            override.create_time,
        )

    async def get(
        self, organization_id: str, budget_id: str, budget_override_id: str, *, lock: bool = False
    ) -> BudgetOverride | None:
        """One override, locked against other changes if asked."""
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS} FROM budget_overrides"
            " WHERE organization_id = $1 AND budget_id = $2 AND budget_override_id = $3"
            f"{' FOR NO KEY UPDATE' if lock else ''}",
            organization_id,
            budget_id,
            budget_override_id,
        )
        return None if row is None else _override_of(row)

    async def page(
        self,
        organization_id: str,
        budget_id: str,
        after: TimePlace | None,
        limit: int,
        state: BudgetOverrideState | None,
    ) -> list[BudgetOverride]:
        """Overrides of a budget newest first, only those in the state where given."""
        query = Query()
        query.where("organization_id = {} AND budget_id = {}", organization_id, budget_id)
        if after is not None:
            query.where("(create_time, budget_override_id) < ({}, {})", after.create_time, after.id)
        if state is not None:
            query.where("state = {}", state.value)
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM budget_overrides WHERE {query}"
            f" ORDER BY create_time DESC, budget_override_id DESC LIMIT {limit:d}",
            *query.values,
        )
        return [_override_of(row) for row in rows]

    async def change(self, override: BudgetOverride) -> BudgetOverride:
        """Store what changed of an override that is there; gives it with its new revision."""
        row = await self._connection.fetchrow(
            "UPDATE budget_overrides SET state = $4, approver_id = $5, period_start = $6, decide_time = $7,"
            " revision = revision + 1 WHERE organization_id = $1 AND budget_id = $2 AND budget_override_id = $3"
            f" RETURNING {_COLUMNS}",
            override.organization_id,
            override.budget_id,
            override.budget_override_id,
            override.state.value,
            override.approver_id,
            override.period_start,
            override.decide_time,
        )
        return _override_of(found(row))

    async def sum_active(self, budget_id: str, period_start: datetime) -> int:
        """By how much active overrides raise the limit of a period together."""
        total: int = await self._connection.fetchval(
            "SELECT coalesce(sum(amount), 0)::bigint FROM budget_overrides"
            " WHERE budget_id = $1 AND period_start = $2 AND state = 'active'",
            budget_id,
            period_start,
        )
        return total

    async def list_due(self, limit: int) -> list[BudgetOverride]:
        """Overrides whose time is over and that nobody has ended yet, the first to end first."""
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM budget_overrides o WHERE {_DUE} ORDER BY o.expire_time LIMIT {limit:d}"
        )
        return [_override_of(row) for row in rows]

    async def expire(self, budget_override_ids: list[str]) -> list[BudgetOverride]:
        """End those of these overrides that still wait or run; gives them as they are now."""
        rows = await self._connection.fetch(
            "UPDATE budget_overrides SET state = 'expired', revision = revision + 1"
            f" WHERE budget_override_id = ANY ($1::text[]) AND state IN ('pending', 'active') RETURNING {_COLUMNS}",
            budget_override_ids,
        )
        return [_override_of(row) for row in rows]

    async def claim_sweep(self) -> bool:
        """Whether this transaction is the only one that ends overrides; the claim goes with it."""
        claimed: bool = await self._connection.fetchval(
            "SELECT pg_try_advisory_xact_lock(hashtextextended('aiaas.identity.override_sweep', 0))"
        )
        return claimed


def _override_of(row: Row) -> BudgetOverride:
    return BudgetOverride(
        budget_override_id=row["budget_override_id"],
        organization_id=row["organization_id"],
        budget_id=row["budget_id"],
        amount=row["amount"],
        expire_time=row["expire_time"],
        reason=row["reason"],
        state=BudgetOverrideState(row["state"]),
        requester_id=row["requester_id"],
        approver_id=row["approver_id"],
        period_start=row["period_start"],
        create_time=row["create_time"],
        decide_time=row["decide_time"],
        revision=row["revision"],
    )
