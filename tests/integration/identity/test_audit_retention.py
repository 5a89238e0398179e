"""Entries that are kept no longer, and what the platform does by itself."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from identity.audit import KEPT, Audit
from identity.audit_chain import AuditEntry, AuditKeys, AuditOutcome
from identity.organization_purges import OrganizationPurges
from identity.organizations import DELETION_DELAY
from identity.stores import Store, open_database
from mesh.clock import SystemClock
from mesh.errors import PlatformError, Reason
from tests.doubles.clock import ManualClock
from tests.integration.identity.auditing import Sql, announce_nothing, entries, export, grown, verify
from tests.integration.identity.harness import AUDIT_KEY, Identity
from tests.integration.identity.test_life_cycles import deleted


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    database = open_database(database_url)
    yield Store(database, announce_nothing, AuditKeys(AUDIT_KEY))
    await database.close()


async def aged(store: Store, organization_id: str, age: timedelta, count: int = 3) -> Audit:
    """So many entries and a checkpoint over them, all of that age."""
    clock = ManualClock(SystemClock().now() - age)
    audit = Audit(store, clock, AuditKeys(AUDIT_KEY))
    for number in range(count):
        entry = AuditEntry(f"aud_{age.days}_{number}", organization_id, clock.now(), "/old", AuditOutcome.SUCCEEDED)
        await audit.record(entry)
    await audit.checkpoint(organization_id)
    return Audit(store, SystemClock(), AuditKeys(AUDIT_KEY))


async def sequences(identity: Identity, organization_id: str) -> list[int]:
    return [entry.sequence for entry in await export(identity, organization_id)]


async def test_old_entries_go_and_the_chain_stays_intact(
    identity: Identity, organization_id: str, store: Store
) -> None:
    await aged(store, organization_id, KEPT + timedelta(days=2))
    audit = await aged(store, organization_id, KEPT + timedelta(days=1))
    await grown(identity, organization_id, 2)
    await audit.forget_old()
    assert await sequences(identity, organization_id) == [6, 7, 8]
    found = await verify(identity, organization_id)
    assert (found.intact, found.entries, found.checkpoints) == (True, 3, 1)
    assert (await verify(identity, organization_id, after=3)).intact
    await audit.forget_old()
    assert await sequences(identity, organization_id) == [6, 7, 8]


async def test_entries_that_are_not_old_stay(identity: Identity, organization_id: str, store: Store) -> None:
    audit = await aged(store, organization_id, KEPT - timedelta(days=1))
    await audit.forget_old()
    assert await sequences(identity, organization_id) == [1, 2, 3]


async def test_very_many_old_entries_go_from_checkpoint_to_checkpoint(
    identity: Identity, organization_id: str, store: Store
) -> None:
    for days in range(5, 0, -1):
        await aged(store, organization_id, KEPT + timedelta(days=days))
    gone = []
    for _ in range(4):
        async with store.transaction() as stored:
            gone.append(await stored.audit.forget_old(6))
        assert (await verify(identity, organization_id)).intact
    assert gone == [5, 6, 3, 0]
    assert await sequences(identity, organization_id) == [15]


@pytest.mark.parametrize("removed", [3, 4])
async def test_newer_entries_that_somebody_removed_are_missed_although_old_ones_may_go(
    identity: Identity, organization_id: str, store: Store, sql: Sql, removed: int
) -> None:
    await aged(store, organization_id, KEPT + timedelta(days=1))
    await aged(store, organization_id, KEPT - timedelta(days=1))
    await grown(identity, organization_id, 1)
    await sql.execute("DELETE FROM audit_entries WHERE organization_id = $1 AND sequence <= $2", organization_id, 3)
    await sql.execute(
        "DELETE FROM audit_entries WHERE organization_id = $1 AND sequence = $2", organization_id, removed
    )
    found = await verify(identity, organization_id)
    assert (found.intact, found.problem) == (False, "It is missing.")


async def test_what_the_platform_does_by_itself_is_recorded(identity: Identity, store: Store) -> None:
    organization_id = await identity.organization()
    await deleted(identity, organization_id)
    clock = ManualClock(SystemClock().now() + DELETION_DELAY)
    purges = OrganizationPurges(store, clock, Audit(store, clock, AuditKeys(AUDIT_KEY)))
    for purged in ([organization_id], []):
        assert await purges.purge_due() == purged
    newest = (await entries(identity, organization_id))[0]
    assert (newest.method, newest.principal_id, newest.resource_id) == ("OrganizationPurges", "", organization_id)
    assert (await verify(identity, organization_id)).intact


async def test_what_changes_nothing_or_fails_by_itself_leaves_no_entry(
    identity: Identity, organization_id: str, store: Store
) -> None:
    audit = Audit(store, SystemClock(), AuditKeys(AUDIT_KEY))
    async with audit.own("looking", organization_id), store.transaction():
        pass
    with pytest.raises(PlatformError):
        async with audit.own("failing", organization_id), store.transaction() as stored:
            await stored.revoke("organization_id", organization_id)
            raise PlatformError(Reason.FAILED_PRECONDITION)
    assert await sequences(identity, organization_id) == []
