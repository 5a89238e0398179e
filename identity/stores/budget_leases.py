"""The tables of leases, of where they were spent and of the ledger; it never decides what a lease may hold."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from identity.budget_leases import BudgetLease, BudgetLeaseState, LedgerLine, LedgerPlace, LedgerTotal, Run
from identity.budgets import BudgetPeriod, BudgetUnit
from identity.stores.rows import Connection, Query, Row
from mesh.pages import TimePlace

# The time is read once for all rows.
_LEASES = (
    "SELECT l.*, p.period_end, (SELECT clock_timestamp()) AS read_time FROM budget_leases l"
    " JOIN budget_periods p USING (budget_id, period_start) WHERE "
)
_IS_ACTIVE = "l.state = 'active' AND l.expire_time > clock_timestamp()"
_STATES = {
    BudgetLeaseState.ACTIVE: _IS_ACTIVE,
    BudgetLeaseState.EXPIRED: "(l.state = 'expired' OR l.state = 'active' AND l.expire_time <= clock_timestamp())",
    BudgetLeaseState.SETTLED: "l.state = 'settled'",
}
_BINDING = """
    SELECT
        coalesce((SELECT revision FROM organization_budgets WHERE organization_id = $1), 0) AS revision,
        ARRAY (
            SELECT budget_id FROM budgets WHERE organization_id = $1 AND budget_id = ANY ($2::text[])
                AND delete_time IS NULL AND NOT disabled ORDER BY budget_id
        ) AS budget_ids
"""
_LOCK_PERIODS = """
    SELECT FROM budget_periods p JOIN (
        SELECT DISTINCT budget_id, period_start FROM budget_leases
        WHERE router_id = $1 AND budget_lease_id = ANY ($2::text[])
    ) held USING (budget_id, period_start)
    ORDER BY budget_id, period_start FOR UPDATE OF p
"""
_ADD = """
    INSERT INTO budget_leases (budget_lease_id, organization_id, budget_id, period_start, router_id, router_instance_id,
        request_id, amount, expire_time, create_time)
    SELECT new.budget_lease_id, $5, new.budget_id, new.period_start, $6, $7, $8, new.amount, $9, $10
    FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::bigint[])
        AS new (budget_lease_id, budget_id, period_start, amount)
"""
_CHANGE = """
    UPDATE budget_leases l SET sequence = new.sequence, amount = new.amount, spent = new.spent,
        reserved = new.reserved, state = new.state, expire_time = new.expire_time
    FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[], $7::timestamptz[])
        AS new (budget_lease_id, sequence, amount, spent, reserved, state, expire_time)
    WHERE l.budget_lease_id = new.budget_lease_id
"""
_PUT_LINES = """
    INSERT INTO budget_lease_lines AS l (budget_lease_id, hour_start, api_key_id, model, spent, requests)
    SELECT * FROM unnest($1::text[], $2::timestamptz[], $3::text[], $4::text[], $5::bigint[], $6::bigint[])
    ON CONFLICT (budget_lease_id, hour_start, api_key_id, model) DO UPDATE
    SET spent = greatest(l.spent, excluded.spent), requests = greatest(l.requests, excluded.requests)
"""
_FIND_BEYOND = """
    SELECT lease.budget_lease_id FROM unnest($1::text[], $2::bigint[]) AS lease (budget_lease_id, spent)
    WHERE lease.spent < (SELECT sum(l.spent) FROM budget_lease_lines l
        WHERE l.budget_lease_id = lease.budget_lease_id) LIMIT 1
"""
# What no line tells of goes to the hour in which the lease was given. Rows are written in one order by everybody, since
# leases of two periods can have been spent in the same hour.
_FOLD = """
    WITH told AS (
        DELETE FROM budget_lease_lines WHERE budget_lease_id = ANY ($1::text[]) RETURNING *
    ), lines AS (
        SELECT l.organization_id, l.budget_id, told.hour_start, told.api_key_id, told.model, told.spent, told.requests
        FROM told JOIN budget_leases l USING (budget_lease_id)
        UNION ALL
        SELECT l.organization_id, l.budget_id, date_trunc('hour', l.create_time, 'UTC'), '', '',
            l.spent - coalesce((SELECT sum(spent) FROM told WHERE told.budget_lease_id = l.budget_lease_id), 0), 0
        FROM budget_leases l WHERE l.budget_lease_id = ANY ($1::text[])
    )
    INSERT INTO budget_ledger AS ledger (organization_id, budget_id, hour_start, api_key_id, model, spent, requests)
    SELECT organization_id, budget_id, hour_start, api_key_id, model, sum(spent), sum(requests) FROM lines
    GROUP BY organization_id, budget_id, hour_start, api_key_id, model HAVING sum(spent) > 0 OR sum(requests) > 0
    ORDER BY organization_id, budget_id, hour_start, api_key_id, model
    ON CONFLICT (organization_id, budget_id, hour_start, api_key_id, model) DO UPDATE
    SET spent = ledger.spent + excluded.spent, requests = ledger.requests + excluded.requests
"""


class BudgetLeaseRows:
    """Leases and the ledger, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def now(self) -> datetime:
        """The database's clock at this moment, not at the transaction's begin."""
        now: datetime = await self._connection.fetchval("SELECT clock_timestamp()")
        return now

    async def binding(self, organization_id: str, budget_ids: Sequence[str]) -> tuple[int, list[str]]:
        """The revision of an organization's latest change, 0 if there was none, and those of these budgets that are its
        own, not removed and not disabled, by id."""
        row = await self._connection.fetchrow(_BINDING, organization_id, budget_ids)
        assert row is not None  # noqa: S101 - it has no FROM
        return row["revision"], row["budget_ids"]

    async def list_given(self, router_id: str, request_id: str) -> list[BudgetLease]:
        """What a router was given for one request."""
        rows = await self._connection.fetch(f"{_LEASES} l.router_id = $1 AND l.request_id = $2", router_id, request_id)
        return [_lease_of(row) for row in rows]

    async def find_idle(self, periods: Sequence[BudgetPeriod]) -> set[str]:
        """Those of these periods' budgets of which a router holds something that is neither spent nor reserved, as far
        as it has reported."""
        rows = await self._connection.fetch(
            "SELECT DISTINCT l.budget_id FROM budget_leases l JOIN unnest($1::text[], $2::timestamptz[])"
            " AS period (budget_id, period_start) USING (budget_id, period_start)"
            f" WHERE {_IS_ACTIVE} AND l.amount > l.spent + l.reserved",
            [period.budget_id for period in periods],
            [period.start_time for period in periods],
        )
        return {row["budget_id"] for row in rows}

    async def forget_settled(self, older_than: timedelta, limit: int) -> int:
        """Remove up to `limit` settled leases whose time was over so long ago; gives how many. Their spending stays in
        the ledger."""
        rows = await self._connection.fetch(
            "DELETE FROM budget_leases WHERE budget_lease_id IN (SELECT budget_lease_id FROM budget_leases"
            " WHERE state = 'settled' AND expire_time < clock_timestamp() - $1::interval"
            " ORDER BY expire_time LIMIT $2 FOR UPDATE SKIP LOCKED) RETURNING 1",
            older_than,
            limit,
        )
        return len(rows)

    async def add(self, leases: Sequence[BudgetLease], request_id: str) -> None:
        """Store what a request is given, in periods that are locked."""
        first = leases[0]
        await self._connection.execute(
            _ADD,
            [lease.budget_lease_id for lease in leases],
            [lease.budget_id for lease in leases],
            [lease.period_start for lease in leases],
            [lease.amount for lease in leases],
            first.organization_id,
            first.holder.router_id,
            first.holder.router_instance_id,
            request_id,
            first.expire_time,
            first.create_time,
        )

    async def lock(self, router_id: str, budget_lease_ids: Sequence[str]) -> dict[str, BudgetLease]:
        """Those of these leases that are of any run of the router, by id, locked as their periods are."""
        await self._connection.execute(_LOCK_PERIODS, router_id, budget_lease_ids)
        rows = await self._connection.fetch(
            f"{_LEASES} l.router_id = $1 AND l.budget_lease_id = ANY ($2::text[])"
            " ORDER BY l.budget_lease_id FOR UPDATE OF l",
            router_id,
            budget_lease_ids,
        )
        return {row["budget_lease_id"]: _lease_of(row) for row in rows}

    async def change(self, leases: Sequence[BudgetLease]) -> None:
        """Store what changed of locked leases."""
        if not leases:
            return
        await self._connection.execute(
            _CHANGE,
            [lease.budget_lease_id for lease in leases],
            [lease.sequence for lease in leases],
            [lease.amount for lease in leases],
            [lease.spent for lease in leases],
            [lease.reserved for lease in leases],
            [lease.state.value for lease in leases],
            [lease.expire_time for lease in leases],
        )

    async def put_lines(self, lines: Mapping[str, Sequence[LedgerLine]]) -> None:
        """Store where leases were spent, by their ids. Totals never fall."""
        rows = [(budget_lease_id, line) for budget_lease_id, told in lines.items() for line in told]
        if not rows:
            return
        await self._connection.execute(
            _PUT_LINES,
            [budget_lease_id for budget_lease_id, _ in rows],
            [line.hour_start for _, line in rows],
            [line.api_key_id for _, line in rows],
            [line.model for _, line in rows],
            [line.spent for _, line in rows],
            [line.requests for _, line in rows],
        )

    async def drop_lines(self, budget_lease_ids: Sequence[str]) -> None:
        """Forget where leases were spent."""
        await self._connection.execute(
            "DELETE FROM budget_lease_lines WHERE budget_lease_id = ANY ($1::text[])", budget_lease_ids
        )

    async def find_beyond(self, spent: Mapping[str, int]) -> str | None:
        """A lease whose lines are more together than was spent of it, which is given by its id."""
        if not spent:
            return None
        found: str | None = await self._connection.fetchval(_FIND_BEYOND, list(spent), list(spent.values()))
        return found

    async def fold(self, budget_lease_ids: Sequence[str]) -> None:
        """Add what was spent of settled leases to the ledger, and forget their lines."""
        if budget_lease_ids:
            await self._connection.execute(_FOLD, budget_lease_ids)

    async def find_router(self, organization_id: str, budget_id: str, budget_lease_id: str) -> str | None:
        """The router that a lease was given to."""
        router_id: str | None = await self._connection.fetchval(
            "SELECT router_id FROM budget_leases"
            " WHERE organization_id = $1 AND budget_id = $2 AND budget_lease_id = $3",
            organization_id,
            budget_id,
            budget_lease_id,
        )
        return router_id

    async def page_of_router(self, router_id: str, after: TimePlace | None, limit: int) -> list[BudgetLease]:
        """Leases of a router that are not settled, oldest first."""
        query = Query()
        query.where("l.router_id = {} AND l.state <> 'settled'", router_id)
        return await self._page(query, after, limit)

    async def page(
        self, organization_id: str, budget_id: str, after: TimePlace | None, limit: int, state: BudgetLeaseState | None
    ) -> list[BudgetLease]:
        """Leases of a budget oldest first, only those in the state where given."""
        query = Query()
        query.where("l.organization_id = {} AND l.budget_id = {}", organization_id, budget_id)
        if state is not None:
            query.where(_STATES[state])
        return await self._page(query, after, limit)

    async def total(
        self, organization_id: str, start_time: datetime, end_time: datetime, after: LedgerPlace | None, limit: int
    ) -> list[LedgerTotal]:
        """Sums of the ledger and of what leases tell that are not settled, in the order of LedgerPlace; of all
        organizations where none is given."""
        query = Query()
        query.where("hour_start >= {} AND hour_start < {}", start_time, end_time)
        if organization_id:
            query.where("organization_id = {}", organization_id)
        if after is not None:
            query.where(
                "(organization_id, budget_id, hour_start, api_key_id, model) > ({}, {}, {}, {}, {})",
                after.organization_id,
                after.budget_id,
                after.hour_start,
                after.api_key_id,
                after.model,
            )
        rows = await self._connection.fetch(
            "SELECT organization_id, budget_id, b.unit, hour_start, lines.api_key_id, lines.model,"
            " sum(spent)::bigint AS spent, sum(requests)::bigint AS requests FROM ("
            " SELECT organization_id, budget_id, hour_start, api_key_id, model, spent, requests FROM budget_ledger"
            f" WHERE {query} UNION ALL"
            " SELECT organization_id, budget_id, hour_start, api_key_id, model, l.spent, l.requests"
            f" FROM budget_lease_lines l JOIN budget_leases USING (budget_lease_id) WHERE {query}"
            " ) lines JOIN budgets b USING (organization_id, budget_id)"
            " GROUP BY organization_id, budget_id, b.unit, hour_start, lines.api_key_id, lines.model"
            f" ORDER BY organization_id, budget_id, hour_start, lines.api_key_id, lines.model LIMIT {limit:d}",
            *query.values,
        )
        return [
            LedgerTotal(
                organization_id=row["organization_id"],
                budget_id=row["budget_id"],
                unit=BudgetUnit(row["unit"]),
                hour_start=row["hour_start"],
                api_key_id=row["api_key_id"],
                model=row["model"],
                spent=row["spent"],
                requests=row["requests"],
            )
            for row in rows
        ]

    async def _page(self, query: Query, after: TimePlace | None, limit: int) -> list[BudgetLease]:
        if after is not None:
            query.where("(l.create_time, l.budget_lease_id) > ({}, {})", after.create_time, after.id)
        rows = await self._connection.fetch(
            f"{_LEASES} {query} ORDER BY l.create_time, l.budget_lease_id LIMIT {limit:d}", *query.values
        )
        return [_lease_of(row) for row in rows]


def _lease_of(row: Row) -> BudgetLease:
    """The lease of a row, expired if it is by now, whether or not anybody has written so."""
    state = BudgetLeaseState(row["state"])
    if state is BudgetLeaseState.ACTIVE and row["expire_time"] <= row["read_time"]:
        state = BudgetLeaseState.EXPIRED
    return BudgetLease(
        budget_lease_id=row["budget_lease_id"],
        organization_id=row["organization_id"],
        budget_id=row["budget_id"],
        period_start=row["period_start"],
        period_end=row["period_end"],
        holder=Run(row["router_id"], row["router_instance_id"]),
        amount=row["amount"],
        expire_time=row["expire_time"],
        create_time=row["create_time"],
        read_time=row["read_time"],
        sequence=row["sequence"],
        spent=row["spent"],
        reserved=row["reserved"],
        state=state,
    )
