"""All of identity's SQL: one module a table, one transaction for all of them; it never decides what is allowed.

Every query that serves people names the organization, but for the two that find out which one it is: a user by its
address, and an API key by its id. Routers' leases are found by their router.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from identity.principals import Credential
from identity.revocations import Revocation, Subject
from identity.stores.api_keys import ApiKeyRows
from identity.stores.budget_alerts import BudgetAlertRows
from identity.stores.budget_leases import BudgetLeaseRows
from identity.stores.budget_overrides import BudgetOverrideRows
from identity.stores.budget_periods import BudgetPeriodRows
from identity.stores.budgets import BudgetRows
from identity.stores.configurations import ConfigurationRows
from identity.stores.creations import CreationRows
from identity.stores.credentials import HolderRows, find_credential
from identity.stores.organizations import OrganizationRows
from identity.stores.roles import RoleRows
from identity.stores.rows import Connection
from identity.stores.service_accounts import ServiceAccountRows
from identity.stores.unpublished_events import UnpublishedEventRows
from identity.stores.users import UserRows
from mesh import context
from mesh.database import Database

# The name in 0004_row_level_security.sql.
_SETTING = "app.organization_id"
_EVERY_ORGANIZATION = "*"


def open_database(url: str) -> Database:
    """Identity's database, as the role that owns nothing. What no principal asks for sees every organization."""
    return Database(url, settings={"role": "aiaas_identity", _SETTING: _EVERY_ORGANIZATION})


class Transaction:
    """The tables as one transaction sees them. All of it happens, or none."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.organizations = OrganizationRows(connection)
        self.users = UserRows(connection)
        self.service_accounts = ServiceAccountRows(connection)
        self.api_keys = ApiKeyRows(connection)
        self.roles = RoleRows(connection)
        self.holders = HolderRows(connection)
        self.creations = CreationRows(connection)
        self.budgets = BudgetRows(connection)
        self.budget_periods = BudgetPeriodRows(connection)
        self.budget_leases = BudgetLeaseRows(connection)
        self.budget_overrides = BudgetOverrideRows(connection)
        self.budget_alerts = BudgetAlertRows(connection)
        self.unpublished_events = UnpublishedEventRows(connection)
        self.configurations = ConfigurationRows(connection)
        self.revocations: list[Revocation] = []

    async def revoke(self, subject: Subject, subject_id: str) -> None:
        """Have it announced, once this transaction is committed, that caches must forget the subject."""
        revision = await self._connection.fetchval("SELECT nextval('revocations')")
        self.revocations.append(Revocation(revision, subject, subject_id))

    async def lock_bootstrap(self) -> None:
        """Wait for any other bootstrap to end; the lock goes with the transaction."""
        await self._connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('aiaas.identity.bootstrap', 0))")


class Store:
    """Identity's database. Every method raises PlatformError(UNAVAILABLE) while PostgreSQL is away."""

    def __init__(self, database: Database, announce: Callable[[Revocation], Awaitable[None]]) -> None:
        self._database = database
        self._announce = announce

    @asynccontextmanager
    async def transaction(self, *, across: bool = False) -> AsyncIterator[Transaction]:
        """A transaction, committed at the end of the block; only then are its revocations announced.

        It sees the organization of the principal that makes the call, whatever its statements say. It sees all of them
        for the platform, for what nobody calls, and `across` them, for what a person does beyond one.
        """
        principal = context.principal.get()
        async with self._database.transaction() as connection:
            if principal is not None and not principal.platform and not across:
                await connection.execute("SELECT set_config($1, $2, true)", _SETTING, principal.organization_id)
            stored = Transaction(connection)
            yield stored
        for revocation in stored.revocations:
            await self._announce(revocation)

    def joined(self, stored: Transaction) -> Store:
        """The same store, all of whose transactions are parts of one that has begun: nothing of them is committed
        before it is, and the failure of one is for it to answer."""
        return _JoinedStore(self._database, self._announce, stored)

    async def credential(self, api_key_id: str) -> Credential | None:
        """All that decides on an API key, in one query."""
        return await find_credential(self._database, api_key_id)


class _JoinedStore(Store):
    def __init__(
        self, database: Database, announce: Callable[[Revocation], Awaitable[None]], stored: Transaction
    ) -> None:
        super().__init__(database, announce)
        self._stored = stored

    @asynccontextmanager
    async def transaction(self, *, across: bool = False) -> AsyncIterator[Transaction]:
        yield self._stored
