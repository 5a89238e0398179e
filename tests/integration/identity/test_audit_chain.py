"""What somebody does to the audit log in the database, and what verification says of it; checkpoints."""

import base64
import json
from dataclasses import replace
from datetime import UTC

import asyncpg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aiaas.identity.v1 import audit_service_pb2
from identity.audit import Audit
from identity.audit_chain import AuditKeys
from identity.stores import Store, open_database
from mesh.clock import SystemClock
from mesh.database import Database
from mesh.errors import Reason
from tests.integration.identity.auditing import (
    Entry,
    Sql,
    announce_nothing,
    checkpoint,
    checkpoints,
    entries,
    export,
    grown,
    recordable,
    verify,
)
from tests.integration.identity.harness import AUDIT_KEY, Identity

# Nobody rewrites it unseen.

BREAKS: dict[str, tuple[str, int, str]] = {
    "edited": ("UPDATE audit_entries SET principal_id = 'key_x' WHERE sequence = 3", 3, "edited"),
    "reason": ("UPDATE audit_entries SET reason = 'x' WHERE sequence = 1", 1, "edited"),
    "time": ("UPDATE audit_entries SET event_time = event_time - interval '1 microsecond' WHERE sequence = 6", 6, ""),
    "outcome": ("UPDATE audit_entries SET outcome = 'denied' WHERE sequence = 2", 2, "edited"),
    "changes": ("UPDATE audit_entries SET changes = '[ ]' WHERE sequence = 2", 2, "edited"),
    "deleted": ("DELETE FROM audit_entries WHERE sequence = 3", 3, "missing"),
    "first": ("DELETE FROM audit_entries WHERE sequence = 1", 1, "missing"),
    "last": ("DELETE FROM audit_entries WHERE sequence = 6", 6, "missing"),
    "closed up": (
        "DELETE FROM audit_entries WHERE sequence = 3;"
        "UPDATE audit_entries SET sequence = sequence - 1 WHERE sequence > 3;"
        "UPDATE audit_chains SET sequence = sequence - 1",
        3,
        "not where it was written",
    ),
    "reordered": (
        "UPDATE audit_entries SET sequence = 100 WHERE sequence = 3;"
        "UPDATE audit_entries SET sequence = 3 WHERE sequence = 4;"
        "UPDATE audit_entries SET sequence = 4 WHERE sequence = 100",
        3,
        "not where it was written",
    ),
    "appended": (
        "CREATE TEMP TABLE copy AS SELECT * FROM audit_entries WHERE sequence = 6;"
        "UPDATE copy SET sequence = 7, audit_entry_id = 'aud_x', previous_hash = hash;"
        "INSERT INTO audit_entries SELECT * FROM copy",
        7,
        "not where it was written",
    ),
    "hash": ("UPDATE audit_entries SET hash = sha256('x') WHERE sequence = 4", 4, "edited"),
    "signature": ("UPDATE audit_entries SET signature = 'x' WHERE sequence = 4", 4, "not written by the platform"),
    "end": ("UPDATE audit_chains SET hash = sha256('x')", 6, "chain ended with"),
}


@pytest.mark.parametrize("broken", BREAKS)
async def test_verify_names_the_first_entry_that_is_wrong(
    identity: Identity, organization_id: str, sql: Sql, broken: str
) -> None:
    await grown(identity, organization_id)
    assert (await verify(identity, organization_id)).intact
    statements, sequence, problem = BREAKS[broken]
    # No other chain is there to be hit.
    await sql.execute("DELETE FROM audit_entries WHERE organization_id = 'platform'")
    await sql.execute("DELETE FROM audit_chains WHERE organization_id = 'platform'")
    await sql.execute(statements)
    found = await verify(identity, organization_id)
    assert (found.intact, found.first_broken_sequence) == (False, sequence)
    assert problem in found.problem
    assert found.entries == sequence - 1 or broken == "end"


async def test_entry_with_a_right_hash_is_not_the_platforms_without_its_key(
    identity: Identity, organization_id: str, database_url: str
) -> None:
    await grown(identity, organization_id, 2)
    foreign = AuditKeys(base64.b64encode(bytes(32)).decode())
    database = Database(database_url)
    try:
        async with Store(database, announce_nothing).transaction() as stored:
            last = await stored.audit.at(organization_id, 2)
            assert last is not None
            await stored.audit.append(replace(last, audit_entry_id="aud_forged"), foreign)
    finally:
        await database.close()
    # What is added after it does not make it good.
    await identity.service_account(organization_id)
    found = await verify(identity, organization_id)
    assert found.first_broken_sequence == 3
    assert "not written by the platform" in found.problem


async def test_tail_that_is_cut_off_with_the_chains_end_is_found_by_a_checkpoint(
    identity: Identity, organization_id: str, sql: Sql
) -> None:
    await grown(identity, organization_id)
    made = await checkpoint(identity, organization_id)
    assert made.sequence == 6
    await cut_off(sql, organization_id, 4)
    found = await verify(identity, organization_id)
    assert (found.intact, found.first_broken_sequence) == (False, 5)
    assert "checkpoint" in found.problem
    # Nor can what comes later stand in for it.
    await grown(identity, organization_id)
    found = await verify(identity, organization_id)
    assert (found.intact, found.first_broken_sequence) == (False, 6)
    assert made.audit_checkpoint_id in found.problem


async def cut_off(sql: Sql, organization_id: str, sequence: int) -> None:
    """Remove what comes after an entry, and leave a chain that looks as if it had ended there."""
    await sql.execute(
        "DELETE FROM audit_entries WHERE organization_id = $1 AND sequence > $2", organization_id, sequence
    )
    await sql.execute(
        "UPDATE audit_chains SET sequence = $2, hash = (SELECT hash FROM audit_entries"
        " WHERE organization_id = $1 AND sequence = $2) WHERE organization_id = $1",
        organization_id,
        sequence,
    )


async def test_entry_that_the_platform_signed_for_a_past_that_was_cut_off_is_named(
    identity: Identity, organization_id: str, sql: Sql
) -> None:
    await grown(identity, organization_id, 4)
    await sql.execute("CREATE TEMP TABLE past AS SELECT * FROM audit_entries WHERE sequence = 4")
    await cut_off(sql, organization_id, 3)
    await grown(identity, organization_id, 2)
    assert (await verify(identity, organization_id)).intact
    await sql.execute("DELETE FROM audit_entries WHERE organization_id = $1 AND sequence = 4", organization_id)
    await sql.execute("INSERT INTO audit_entries SELECT * FROM past WHERE organization_id = $1", organization_id)
    found = await verify(identity, organization_id)
    assert (found.intact, found.first_broken_sequence) == (False, 4)
    assert "chained to" in found.problem


async def test_changed_checkpoint_is_named(identity: Identity, organization_id: str, sql: Sql) -> None:
    await grown(identity, organization_id, 2)
    made = await checkpoint(identity, organization_id)
    await sql.execute("UPDATE audit_checkpoints SET create_time = create_time - interval '1 day'")
    found = await verify(identity, organization_id)
    assert (found.intact, found.first_broken_sequence) == (False, 2)
    assert made.audit_checkpoint_id in found.problem


async def test_verification_goes_on_after_an_entry(identity: Identity, organization_id: str, sql: Sql) -> None:
    await grown(identity, organization_id)
    await sql.execute("UPDATE audit_entries SET reason = 'x' WHERE sequence = 2")
    assert (await verify(identity, organization_id)).first_broken_sequence == 2
    found = await verify(identity, organization_id, after=3)
    assert (found.intact, found.entries) == (True, 3)
    await sql.execute("DELETE FROM audit_entries WHERE sequence = 4")
    assert (await verify(identity, organization_id, after=4)).first_broken_sequence == 4
    for after in (7, -1):
        request = audit_service_pb2.VerifyAuditLogRequest(organization_id=organization_id, after_sequence=after)
        error = await identity.refused(identity.audit.VerifyAuditLog, request)
        assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "after_sequence")


async def test_long_chain_is_verified_and_exported_whole(
    identity: Identity, organization_id: str, database_url: str
) -> None:
    await grown(identity, organization_id, 1)
    (first,) = await entries(identity, organization_id)
    recorded = [Entry(audit_entry_id=f"aud_{number}", **recordable(first)) for number in range(1200)]
    for begin in range(0, 1200, 500):
        await identity.audit.RecordAuditEntries(
            audit_service_pb2.RecordAuditEntriesRequest(audit_entries=recorded[begin : begin + 500]), timeout=30
        )
    found = await verify(identity, organization_id)
    assert (found.intact, found.entries) == (True, 1201)
    assert [entry.sequence for entry in await export(identity, organization_id)] == list(range(1, 1202))


async def test_service_itself_cannot_change_or_remove_entries(database_url: str) -> None:
    database = open_database(database_url)
    try:
        for statement in (
            "UPDATE audit_entries SET reason = ''",
            "DELETE FROM audit_entries",
            "TRUNCATE audit_entries",
            "UPDATE audit_checkpoints SET sequence = 0",
            "DELETE FROM audit_checkpoints",
            "DELETE FROM audit_chains",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await database.execute(statement)
    finally:
        await database.close()


# Checkpoints.


async def test_checkpoints_are_signed_when_asked_for_and_only_for_what_is_new(
    identity: Identity, organization_id: str
) -> None:
    empty = audit_service_pb2.CreateAuditCheckpointRequest(organization_id=organization_id)
    assert (await identity.refused(identity.audit.CreateAuditCheckpoint, empty)).reason is Reason.NOT_FOUND
    # Both requests have an entry of their own, written when they had been answered.
    first, second = [await checkpoint(identity, organization_id) for _ in range(2)]
    assert (first.sequence, second.sequence) == (1, 2)
    listed = await checkpoints(identity, organization_id)
    assert [made.sequence for made in listed] == [2, 1]
    key = Ed25519PublicKey.from_public_bytes(AuditKeys(AUDIT_KEY).public_keys()[second.key_id])
    when = second.create_time.ToDatetime(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    told = [organization_id, 2, second.hash.hex(), when]
    key.verify(second.signature, b"aiaas.audit.checkpoint.v1\n" + json.dumps(told, separators=(",", ":")).encode())
    found = await verify(identity, organization_id)
    assert (found.intact, found.checkpoints) == (True, 2)


async def test_all_chains_that_have_grown_are_signed_regularly(
    identity: Identity, organization_id: str, database_url: str
) -> None:
    other = await identity.organization("Other")
    for owner in (organization_id, other):
        await grown(identity, owner, 2)
    database = open_database(database_url)
    audit = Audit(Store(database, announce_nothing), SystemClock(), AuditKeys(AUDIT_KEY))
    try:
        for _ in range(2):
            await audit.sign_all()
        for owner in (organization_id, other, "platform"):
            made = await checkpoints(identity, owner)
            assert len(made) == 1
            assert (await verify(identity, owner)).intact
        await grown(identity, other, 1)
        await audit.sign_all()
        assert [made.sequence for made in await checkpoints(identity, other)] == [3, 2]
    finally:
        await database.close()


async def test_what_an_older_key_signed_holds_as_long_as_that_key_is_known(
    identity: Identity, organization_id: str, database_url: str
) -> None:
    await grown(identity, organization_id, 2)
    await checkpoint(identity, organization_id)
    new = base64.b64encode(bytes(32)).decode()
    database = open_database(database_url)
    try:
        store = Store(database, announce_nothing)
        assert (
            await Audit(store, SystemClock(), AuditKeys(f"{new},{AUDIT_KEY}")).verify(organization_id, 0)
        ).flaw is None
        flaw = (await Audit(store, SystemClock(), AuditKeys(new)).verify(organization_id, 0)).flaw
        assert flaw is not None
        assert flaw.sequence == 1
    finally:
        await database.close()
