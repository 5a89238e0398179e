"""What Grafana may read, read as its role, and everything else refused to it."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import TypeAlias
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from aiaas.analytics.v1.reconciliation_service_pb2 import ReconciliationKind, ReconciliationState
from aiaas.analytics.v1.webhook_service_pb2 import WebhookDeliveryState
from aiaas.type.v1.usage_event_pb2 import OUTCOME_CANCELLED, OUTCOME_FAILED, OUTCOME_REFUSED, Outcome
from analytics.events import read_event
from analytics.store import UsageStore
from mesh.migrate import migrate
from tests.conftest import Servers
from tests.doubles.platform_events import platform_event
from tests.doubles.usage_events import NOW, usage_event
from tests.integration.analytics.harness import Hooks

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
VIEWS = {
    "anomalies",
    "freshness",
    "reconciliations",
    "reliability",
    "usage_daily",
    "usage_hourly",
    "webhook_deliveries",
}


def of(url: str, name: str, password: str) -> str:
    """The same database for another role."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{name}:{password}@{parts.hostname}:{parts.port}").geturl()


@pytest.fixture
async def admin(database_url: str) -> AsyncIterator[Connection]:
    """The superuser."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def grafana(database_url: str, admin: Connection) -> AsyncIterator[Connection]:
    """The role as Grafana has it, once an administrator has given it a password."""
    await admin.execute("ALTER ROLE aiaas_grafana LOGIN PASSWORD 'let-me-look'")
    connection = await asyncpg.connect(of(database_url, "aiaas_grafana", "let-me-look"))
    yield connection
    await connection.close()


async def test_role_reads_every_view_briefly_and_changes_nothing(grafana: Connection) -> None:
    names = await grafana.fetch("SELECT viewname FROM pg_views WHERE schemaname = 'grafana'")
    assert {name for (name,) in names} == VIEWS
    for view in VIEWS:
        assert await grafana.fetch(f"SELECT * FROM {view}") == []
    assert await grafana.fetchval("SHOW statement_timeout") == "30s"
    assert await grafana.fetchval("SHOW default_transaction_read_only") == "on"


async def test_role_is_refused_elsewhere_even_when_it_may_write(grafana: Connection, admin: Connection) -> None:
    await grafana.execute("SET default_transaction_read_only = off")
    await grafana.execute("SET search_path = public")
    tables = await admin.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'S', 'v')"
    )
    assert {"webhooks", "usage_events", "platform_events"} <= {name for (name,) in tables}
    for statement in (
        *(f"SELECT FROM {name}" for (name,) in tables),
        "INSERT INTO grafana.freshness VALUES (now())",
        "DELETE FROM grafana.usage_hourly",
        "CREATE TABLE public.own (a int)",
        "CREATE TABLE grafana.own (a int)",
        "SELECT ensure_usage_events_partition('2026-11-20')",
        "SET ROLE aiaas",
        "SELECT pg_read_file('/etc/hostname')",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await grafana.execute(statement)


async def test_role_writes_nothing_unless_it_asks_to(grafana: Connection) -> None:
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await grafana.execute("CREATE TABLE grafana.own (a int)")


async def test_usage_is_told_in_words_and_dollars(grafana: Connection, store: UsageStore, admin: Connection) -> None:
    events = [
        usage_event("req_1", cost_micros=1_500_000, duration_micros=2_000_000, ttft_micros=100_000, streamed=True),
        usage_event("req_2", outcome=OUTCOME_FAILED, duration_micros=1_000_000),
        usage_event("req_3", outcome=OUTCOME_CANCELLED, duration_micros=1_000_000),
        usage_event("req_4", outcome=OUTCOME_REFUSED, usage=None, cost_micros=0),
    ]
    await store.insert_events([read_event(event.SerializeToString(), NOW) for event in events])
    rows = await grafana.fetch("SELECT * FROM usage_hourly ORDER BY cost_dollars DESC")
    assert {row["outcome"] for row in rows} == {"succeeded", "failed", "cancelled", "refused"}
    assert (rows[0]["time"], float(rows[0]["cost_dollars"])) == (NOW.replace(minute=0, second=0, microsecond=0), 1.5)
    (found,) = await grafana.fetch("SELECT * FROM reliability")
    assert (found["requests"], found["failed_requests"], found["refused_requests"]) == (3, 1, 1)
    assert found["latency_p50_seconds"] == pytest.approx(1, rel=0.01)
    assert found["latency_p99_seconds"] == pytest.approx(2, rel=0.01)
    assert found["ttft_p50_seconds"] == pytest.approx(0.1, rel=0.01)
    await store.set_complete_until(NOW)
    assert await grafana.fetchval("SELECT complete_until FROM freshness") == NOW


async def test_every_number_of_the_contracts_has_its_word(grafana: Connection, admin: Connection) -> None:
    for name, number in Outcome.items():
        if number:
            told = await admin.fetchval("SELECT grafana.outcome($1)", number)
            assert told == name.removeprefix("OUTCOME_").lower()
    definition = {
        view: await admin.fetchval("SELECT pg_get_viewdef($1::text::regclass)", f"grafana.{view}")
        for view in ("webhook_deliveries", "reconciliations")
    }
    for view, enum, prefix in (
        ("webhook_deliveries", WebhookDeliveryState, "WEBHOOK_DELIVERY_STATE_"),
        ("reconciliations", ReconciliationKind, "RECONCILIATION_KIND_"),
        ("reconciliations", ReconciliationState, "RECONCILIATION_STATE_"),
    ):
        words = [name.removeprefix(prefix).lower() for name, number in sorted(enum.items(), key=lambda item: item[1])]
        assert "ARRAY[" + ", ".join(f"'{word}'::text" for word in words[1:]) + "]" in definition[view]


async def test_deliveries_are_told_without_addresses(grafana: Connection, hooks: Hooks) -> None:
    webhook, _ = await hooks.create("http://127.0.0.1:1/secret-path")
    await hooks.publish(platform_event())
    (row,) = await grafana.fetch("SELECT * FROM webhook_deliveries")
    assert (row["webhook_id"], row["organization_id"], row["state"]) == (webhook.webhook_id, "org_a", "pending")
    assert row["time"] - NOW == timedelta(seconds=1)
    assert "secret-path" not in str(row)


async def test_owner_that_may_make_no_roles_migrates_with_and_without_the_role(
    servers: Servers, admin: Connection
) -> None:
    owner = f"owner_{uuid4().hex}"
    await admin.execute(f"CREATE ROLE {owner} LOGIN PASSWORD 'owner'")
    for rename in ("", "aiaas_grafana_aside"):
        name = f"test_{uuid4().hex}"
        url = await servers.database(name)
        await admin.execute(f"ALTER DATABASE {name} OWNER TO {owner}")
        if rename:
            await admin.execute(f"ALTER ROLE aiaas_grafana RENAME TO {rename}")
        try:
            await migrate(of(url, owner, "owner"), "analytics.migrations")
            connection = await asyncpg.connect(url)
            granted = await connection.fetchval(
                "SELECT EXISTS (SELECT FROM information_schema.role_table_grants WHERE table_schema = 'grafana'"
                " AND grantee = 'aiaas_grafana')"
            )
            await connection.close()
            assert granted == (not rename)
        finally:
            if rename:
                await admin.execute(f"ALTER ROLE {rename} RENAME TO aiaas_grafana")
            await servers.drop_database(name)
    await admin.execute(f"DROP ROLE {owner}")
