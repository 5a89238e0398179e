"""An organization with budgets, and a ledger that tests write to as leases would; it never asserts anything."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from aiaas.identity.v1 import budget_service_pb2 as pb
from identity.stores.budget_alerts import record_crossed
from identity.stores.budget_periods import BudgetPeriodRows
from mesh.database import Database
from tests.integration.identity.harness import Identity

HARD = pb.BUDGET_ENFORCEMENT_HARD
SOFT = pb.BUDGET_ENFORCEMENT_SOFT


def wanted(**fields: Any) -> pb.Budget:
    """A budget of 1000 micro-dollars a month for the whole organization, unless told."""
    return pb.Budget(
        **{
            "display_name": "Research",
            "unit": pb.BUDGET_UNIT_COST,
            "interval": pb.BUDGET_INTERVAL_MONTHLY,
            "enforcement": HARD,
            "limit": 1000,
            **fields,
        }
    )


async def create(identity: Identity, organization_id: str, **fields: Any) -> pb.Budget:
    """A new budget."""
    request = pb.CreateBudgetRequest(organization_id=organization_id, budget=wanted(**fields))
    return (await identity.call(identity.budgets.CreateBudget, request)).budget


async def get(identity: Identity, budget: pb.Budget) -> pb.Budget:
    """A budget as it is now."""
    request = pb.GetBudgetRequest(organization_id=budget.organization_id, budget_id=budget.budget_id)
    return (await identity.call(identity.budgets.GetBudget, request)).budget


async def update(identity: Identity, budget: pb.Budget, **fields: Any) -> pb.Budget:
    """A budget after a change."""
    return (await identity.call(identity.budgets.UpdateBudget, to_update(budget, **fields))).budget


def to_update(budget: pb.Budget, **fields: Any) -> pb.UpdateBudgetRequest:
    """A change of a budget's fields, which are all in the mask but for the etag."""
    request = pb.UpdateBudgetRequest(
        organization_id=budget.organization_id, budget_id=budget.budget_id, budget=pb.Budget(**fields)
    )
    request.update_mask.paths.extend(name for name in fields if name != "etag")
    return request


class Ledger:
    """The running periods of budgets, written to as leases and their reports would."""

    def __init__(self, database: Database) -> None:
        self.database = database

    async def set(self, budget: pb.Budget, *, spent: int = 0, leased: int = 0) -> int:
        """Have so much spent and leased in the running period; gives how many thresholds that newly passes."""
        async with self.database.transaction() as connection:
            period = await BudgetPeriodRows(connection).lock_current(budget.budget_id)
            key = (budget.budget_id, period.start_time)
            await connection.execute(
                "UPDATE budget_periods SET spent = $3, leased = $4 WHERE budget_id = $1 AND period_start = $2",
                *key,
                spent,
                leased,
            )
            return await record_crossed(connection, [key])

    async def limit(self, budget: pb.Budget) -> int:
        """The limit that PostgreSQL holds leases to."""
        async with self.database.transaction() as connection:
            return (await BudgetPeriodRows(connection).lock_current(budget.budget_id)).limit

    async def execute(self, statement: str, *values: object) -> None:
        """Change what no RPC can, such as the time."""
        async with self.database.transaction() as connection:
            await connection.execute(statement, *values)

    async def fetch(self, query: str, *values: object) -> list[asyncpg.Record]:
        """Rows."""
        return await self.database.fetch(query, *values)


@asynccontextmanager
async def ledger_of(database_url: str) -> AsyncIterator[Ledger]:
    """The ledger in a database."""
    database = Database(database_url)
    try:
        yield Ledger(database)
    finally:
        await database.close()
