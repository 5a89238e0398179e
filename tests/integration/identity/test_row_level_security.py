"""The database's own wall between organizations, with the statements' own left out."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import asyncpg
import pytest

from identity.revocations import Revocation
from identity.stores import Store, open_database
from mesh import context
from mesh.auth import Principal
from mesh.database import Database
from tests.integration.identity.harness import Identity

ROLE = "aiaas_identity"
TENANT_TABLES = """
    SELECT c.oid::regclass::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
    WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace AND a.attname = 'organization_id'
    AND NOT a.attisdropped
"""


async def announce_nothing(_: Revocation) -> None:
    pass


@dataclass(frozen=True)
class Tenants:
    """Two organizations with an owner each, and the database as identity opens it."""

    one: str
    other: str
    database: Database

    async def seen(self, statement: str = "SELECT DISTINCT organization_id FROM memberships") -> set[str]:
        """The organizations of a statement that names none."""
        async with Store(self.database, announce_nothing).transaction() as stored:
            return {row[0] for row in await stored.roles._connection.fetch(statement)}


@pytest.fixture
async def tenants(identity: Identity, database_url: str) -> AsyncIterator[Tenants]:
    """Two organizations, by turns."""
    one, other = await identity.organization("One"), await identity.organization("Other")
    for organization_id in (one, other):
        await identity.member(organization_id, "owner", f"{organization_id.lower()}@example.com")
    database = open_database(database_url)
    yield Tenants(one, other, database)
    await database.close()


@pytest.fixture(autouse=True)
async def nobody_calls() -> AsyncIterator[None]:
    """What a test sets is not left to the next one."""
    token = context.principal.set(None)
    yield
    context.principal.reset(token)


def call_as(organization_id: str, *, platform: bool = False) -> None:
    context.principal.set(Principal("api_key", "key_1", organization_id, api_key_id="key_1", platform=platform))


async def test_statement_that_forgets_the_organization_sees_the_callers_only(tenants: Tenants) -> None:
    for organization_id in (tenants.one, tenants.other, tenants.one):
        call_as(organization_id)
        assert await tenants.seen() == {organization_id}
        assert await tenants.seen("SELECT organization_id FROM organizations") == {organization_id}


async def test_platform_and_what_nobody_calls_see_all(tenants: Tenants) -> None:
    assert {tenants.one, tenants.other} <= await tenants.seen()
    call_as("org_platform", platform=True)
    assert {tenants.one, tenants.other} <= await tenants.seen()


async def test_nothing_is_written_into_another_organization(tenants: Tenants) -> None:
    call_as(tenants.one)
    store = Store(tenants.database, announce_nothing)
    insert = (
        "INSERT INTO roles (role_id, organization_id, display_name, permissions, create_time, update_time)"
        " VALUES ($1, $2, 'R', '{users.list}', now(), now())"
    )
    async with store.transaction() as stored:
        await stored.roles._connection.execute(insert, "role_own", tenants.one)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with store.transaction() as stored:
            await stored.roles._connection.execute(insert, "role_others", tenants.other)
    async with store.transaction() as stored:
        changed = await stored.roles._connection.execute("UPDATE memberships SET display_name = 'mine'")
    assert changed == "UPDATE 1"


async def test_connection_that_says_nothing_sees_nothing(tenants: Tenants, database_url: str) -> None:
    connection = await asyncpg.connect(database_url, server_settings={"role": ROLE})
    try:
        tables = [row[0] for row in await connection.fetch(TENANT_TABLES)]
        assert {"organizations", "memberships", "api_keys", "budgets", "roles"} <= set(tables)
        for table in tables:
            assert await connection.fetchval(f"SELECT count(*) FROM {table}") == 0
    finally:
        await connection.close()


async def test_every_table_of_tenants_is_walled_and_the_service_cannot_take_it_down(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        walled = {
            row[0]
            for row in await connection.fetch(
                "SELECT oid::regclass::text FROM pg_class WHERE relrowsecurity AND relforcerowsecurity"
            )
        }
        assert {row[0] for row in await connection.fetch(TENANT_TABLES)} == walled
        role = await connection.fetchrow("SELECT rolsuper, rolbypassrls FROM pg_roles WHERE rolname = $1", ROLE)
        assert role is not None
        assert not any(role.values())
        assert not await connection.fetchval("SELECT count(*) FROM pg_tables WHERE tableowner = $1", ROLE)
        await connection.execute(f"SET ROLE {ROLE}")
        for statement in (
            "ALTER TABLE roles DISABLE ROW LEVEL SECURITY",
            "DROP POLICY organization ON roles",
            "DELETE FROM schema_migrations",
            "CREATE TABLE mine (organization_id text)",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
    finally:
        await connection.close()


async def test_calls_that_break_off_leave_no_organization_on_their_connection(tenants: Tenants) -> None:
    store = Store(tenants.database, announce_nothing)

    async def read(organization_id: str, broken_off: asyncio.Event) -> None:
        call_as(organization_id)
        async with store.transaction() as stored:
            broken_off.set()
            await stored.roles._connection.fetch("SELECT pg_sleep(10) FROM memberships")

    for _ in range(20):
        begun = asyncio.Event()
        task = asyncio.create_task(read(tenants.one, begun))
        await begun.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        call_as(tenants.other)
        assert await tenants.seen() == {tenants.other}
        context.principal.set(None)
        assert {tenants.one, tenants.other} <= await tenants.seen()
