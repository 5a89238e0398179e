"""The audit log: what gets an entry, that the entry and the change are one, and who reads it."""

import asyncio
import hashlib
import json
from datetime import UTC

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf.field_mask_pb2 import FieldMask

from aiaas.identity.v1 import (
    api_key_service_pb2,
    audit_service_pb2,
    organization_service_pb2,
    service_account_service_pb2,
    user_service_pb2,
)
from aiaas.type.v1 import principal_pb2
from identity.audit_chain import AuditKeys
from mesh.errors import Reason, from_rpc_error
from tests.integration.identity.auditing import (
    ACCOUNTS,
    DENIED,
    FAILED,
    SUCCEEDED,
    Entry,
    Sql,
    entries,
    export,
    grown,
    recordable,
    verify,
)
from tests.integration.identity.harness import AUDIT_KEY, Identity

# What gets an entry.


async def test_mutation_is_recorded_with_who_what_and_the_id_that_it_made(
    identity: Identity, organization_id: str
) -> None:
    made = await identity.service_account(organization_id)
    (entry,) = await entries(identity, organization_id)
    assert entry.method == f"{ACCOUNTS}/CreateServiceAccount"
    assert entry.permission == "service_accounts.create"
    assert (entry.resource_type, entry.resource_id) == ("service_account", made.service_account_id)
    assert entry.outcome == SUCCEEDED
    assert entry.principal_kind == principal_pb2.PRINCIPAL_KIND_API_KEY
    assert entry.principal_id == entry.api_key_id == identity.platform.api_key_id
    assert entry.organization_id == organization_id
    assert entry.sequence == 1
    assert entry.request_id.startswith("req_")
    assert entry.audit_entry_id.startswith("aud_")
    got = await identity.call(
        identity.audit.GetAuditEntry,
        audit_service_pb2.GetAuditEntryRequest(organization_id=organization_id, audit_entry_id=entry.audit_entry_id),
    )
    assert got.audit_entry == entry


async def test_client_request_and_address_are_the_ones_that_the_edge_passed_on(
    identity: Identity, organization_id: str
) -> None:
    for address in ("203.0.113.7", "not an address"):
        wanted = service_account_service_pb2.ServiceAccount(display_name=f"Behind {address}")
        await identity.service_accounts.CreateServiceAccount(
            service_account_service_pb2.CreateServiceAccountRequest(
                organization_id=organization_id, service_account=wanted
            ),
            metadata=(
                ("authorization", f"Bearer {identity.admin}"),
                ("x-request-id", "req_mine"),
                ("x-client-address", address),
            ),
            timeout=10,
        )
    without, with_address = await entries(identity, organization_id)
    assert (with_address.client_address, without.client_address) == ("203.0.113.7", "")
    assert with_address.request_id == "req_mine"


async def test_update_names_the_fields_that_were_to_change_and_no_values(
    identity: Identity, organization_id: str
) -> None:
    account = await identity.service_account(organization_id)
    await identity.call(
        identity.service_accounts.UpdateServiceAccount,
        service_account_service_pb2.UpdateServiceAccountRequest(
            organization_id=organization_id,
            service_account_id=account.service_account_id,
            service_account=service_account_service_pb2.ServiceAccount(display_name="Hush-hush"),
            update_mask=FieldMask(paths=["display_name"]),
        ),
    )
    updated, _ = await entries(identity, organization_id)
    changes = {change.field: json.loads(change.after_json) for change in updated.changes}
    assert changes["update_mask"] == ["display_name"]
    assert changes["service_account_id"] == account.service_account_id
    assert "Hush-hush" not in str(updated)


async def test_reads_are_not_recorded(identity: Identity, organization_id: str) -> None:
    await identity.service_account(organization_id)
    request = service_account_service_pb2.ListServiceAccountsRequest(organization_id=organization_id)
    await identity.call(identity.service_accounts.ListServiceAccounts, request)
    assert len(await entries(identity, organization_id)) == 1


async def test_reason_that_the_caller_gave_is_kept(identity: Identity, organization_id: str) -> None:
    request = organization_service_pb2.SuspendOrganizationRequest(organization_id=organization_id, reason="unpaid")
    await identity.call(identity.organizations.SuspendOrganization, request)
    (entry,) = await entries(identity, organization_id)
    assert (entry.outcome, entry.reason, entry.resource_id) == (SUCCEEDED, "unpaid", organization_id)


async def test_denied_mutation_and_denied_read_are_recorded_in_the_callers_own_chain(
    identity: Identity, organization_id: str
) -> None:
    analyst = await identity.member(organization_id, "analyst")
    creation = service_account_service_pb2.CreateServiceAccountRequest(
        organization_id=organization_id,
        service_account=service_account_service_pb2.ServiceAccount(display_name="Worker"),
    )
    other = await identity.organization("Other")
    read = service_account_service_pb2.ListServiceAccountsRequest(organization_id=organization_id)
    assert (
        await identity.refused(identity.service_accounts.CreateServiceAccount, creation, analyst.secret)
    ).reason is Reason.PERMISSION_DENIED
    await identity.refused(identity.service_accounts.ListServiceAccounts, read, analyst.secret)
    abroad = organization_service_pb2.GetOrganizationRequest(organization_id=other)
    assert (
        await identity.refused(identity.organizations.GetOrganization, abroad, analyst.secret)
    ).reason is Reason.NOT_FOUND
    mismatch, listing, creating = await entries(identity, organization_id, outcome=DENIED)
    assert (creating.method, creating.reason) == (f"{ACCOUNTS}/CreateServiceAccount", "permission_denied")
    assert (listing.method, listing.reason) == (f"{ACCOUNTS}/ListServiceAccounts", "permission_denied")
    assert (mismatch.reason, mismatch.resource_id) == ("organization_mismatch", other)
    assert {entry.principal_id for entry in (mismatch, listing, creating)} == {creating.api_key_id}
    assert await entries(identity, other) == []


async def test_denial_by_the_domain_after_the_interceptors_is_a_denial(
    identity: Identity, organization_id: str
) -> None:
    owner = await identity.member(organization_id, "owner")
    request = organization_service_pb2.UpdateOrganizationRequest(
        organization_id=organization_id,
        organization=organization_service_pb2.Organization(allowed_models=["smollm2"]),
        update_mask=FieldMask(paths=["allowed_models"]),
    )
    await identity.refused(identity.organizations.UpdateOrganization, request, owner.secret)
    (entry,) = await entries(identity, organization_id, outcome=DENIED)
    assert entry.permission == "organizations.update"


async def test_failed_mutation_is_recorded_with_its_reason(identity: Identity, organization_id: str) -> None:
    request = service_account_service_pb2.DeleteServiceAccountRequest(
        organization_id=organization_id, service_account_id="sa_nobody"
    )
    await identity.refused(identity.service_accounts.DeleteServiceAccount, request)
    (entry,) = await entries(identity, organization_id)
    assert (entry.outcome, entry.reason, entry.resource_id) == (FAILED, "not_found", "sa_nobody")


async def test_refused_credential_is_nobodys_attempt(identity: Identity, organization_id: str) -> None:
    request = service_account_service_pb2.DeleteServiceAccountRequest(
        organization_id=organization_id, service_account_id="sa_1"
    )
    await identity.refused(identity.service_accounts.DeleteServiceAccount, request, "nonsense")
    assert await entries(identity, organization_id) == []
    assert all(entry.principal_id for entry in await entries(identity, "platform"))


async def test_what_names_no_organization_or_none_that_is_there_is_in_the_platforms_chain(
    identity: Identity, sql: Sql
) -> None:
    made = await identity.organization("New")
    request = service_account_service_pb2.DeleteServiceAccountRequest(
        organization_id="org_nowhere", service_account_id="sa_1"
    )
    await identity.refused(identity.service_accounts.DeleteServiceAccount, request)
    nowhere, creation = (await entries(identity, "platform"))[:2]
    assert (creation.method, creation.resource_id) == (
        "/aiaas.identity.v1.OrganizationService/CreateOrganization",
        made,
    )
    assert nowhere.outcome == FAILED
    assert await sql.fetchval("SELECT count(*) FROM audit_chains WHERE organization_id = 'org_nowhere'") == 0


async def test_secrets_and_personal_data_are_in_no_row(identity: Identity, organization_id: str, sql: Sql) -> None:
    key = await identity.key(organization_id)
    await identity.call(
        identity.users.CreateUser,
        user_service_pb2.CreateUserRequest(
            organization_id=organization_id,
            user=user_service_pb2.User(email="canary@example.com", display_name="Canary", role_ids=["developer"]),
        ),
    )
    rows = await sql.fetch("SELECT entry::text FROM audit_entries AS entry")
    written = "\n".join(row[0] for row in rows)
    assert key.api_key.api_key_id in written
    for secret in (key.secret, key.secret[-20:], identity.admin, "canary@example.com", "Canary"):
        assert secret not in written


# The entry and the change are one.


async def test_change_whose_entry_cannot_be_written_is_refused_and_not_made(
    identity: Identity, organization_id: str, sql: Sql
) -> None:
    await sql.execute("REVOKE INSERT ON audit_entries FROM aiaas_identity")
    request = service_account_service_pb2.CreateServiceAccountRequest(
        organization_id=organization_id,
        service_account=service_account_service_pb2.ServiceAccount(display_name="Worker"),
    )
    error = await identity.refused(identity.service_accounts.CreateServiceAccount, request)
    assert error.reason is Reason.UNAVAILABLE
    assert await sql.fetchval("SELECT count(*) FROM service_accounts WHERE organization_id = $1", organization_id) == 0
    await sql.execute("GRANT INSERT ON audit_entries TO aiaas_identity")
    await identity.service_account(organization_id)
    assert len(await entries(identity, organization_id)) == 1
    assert (await verify(identity, organization_id)).intact


async def test_change_that_cannot_be_committed_leaves_no_entry_that_says_it_was_made(
    identity: Identity, organization_id: str, sql: Sql
) -> None:
    await sql.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$;"
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON service_accounts DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    request = service_account_service_pb2.CreateServiceAccountRequest(
        organization_id=organization_id,
        service_account=service_account_service_pb2.ServiceAccount(display_name="Worker"),
    )
    await identity.refused(identity.service_accounts.CreateServiceAccount, request)
    assert await sql.fetchval("SELECT count(*) FROM service_accounts WHERE organization_id = $1", organization_id) == 0
    (entry,) = await entries(identity, organization_id)
    assert (entry.outcome, entry.resource_id) == (FAILED, "")


async def test_mutation_whose_caller_had_no_time_left_is_not_made_and_recorded_as_failed(
    identity: Identity, organization_id: str, sql: Sql
) -> None:
    transaction = sql.transaction()
    await transaction.start()
    await sql.execute("SELECT FROM organizations WHERE organization_id = $1 FOR UPDATE", organization_id)
    request = organization_service_pb2.SuspendOrganizationRequest(organization_id=organization_id, reason="unpaid")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await identity.organizations.SuspendOrganization(
            request, metadata=(("authorization", f"Bearer {identity.admin}"),), timeout=0.3
        )
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(10):
        while not (found := await entries(identity, organization_id)):
            await asyncio.sleep(0.02)
    await transaction.rollback()
    assert [(entry.outcome, entry.reason) for entry in found] == [(FAILED, "deadline_exceeded")]
    got = await identity.call(
        identity.organizations.GetOrganization,
        organization_service_pb2.GetOrganizationRequest(organization_id=organization_id),
    )
    assert got.organization.state == organization_service_pb2.ORGANIZATION_STATE_ACTIVE


async def test_entry_and_change_are_of_one_transaction(identity: Identity, organization_id: str, sql: Sql) -> None:
    await identity.service_account(organization_id)
    row = await sql.fetchrow(
        "SELECT a.xmin = s.xmin AS together FROM audit_entries a JOIN service_accounts s USING (organization_id)"
        " WHERE organization_id = $1",
        organization_id,
    )
    assert row is not None
    assert row["together"]


async def test_revocation_is_announced_only_after_entry_and_change(identity: Identity, organization_id: str) -> None:
    key = await identity.key(organization_id)
    request = api_key_service_pb2.RevokeApiKeyRequest(
        organization_id=organization_id, api_key_id=key.api_key.api_key_id
    )
    await identity.call(identity.api_keys.RevokeApiKey, request)
    assert await identity.is_refused(key.secret)
    (entry,) = await entries(identity, organization_id, permission="api_keys.revoke")
    assert (entry.resource_type, entry.resource_id) == ("api_key", key.api_key.api_key_id)


async def test_concurrent_mutations_make_one_chain_each(identity: Identity, organization_id: str) -> None:
    other = await identity.organization("Other")
    async with asyncio.TaskGroup() as tasks:
        for number in range(20):
            for owner in (organization_id, other):
                tasks.create_task(identity.service_account(owner, f"Worker {number}"))
    for owner in (organization_id, other):
        assert [entry.sequence for entry in await entries(identity, owner)] == list(range(20, 0, -1))
        found = await verify(identity, owner)
        assert (found.intact, found.entries) == (True, 20)


async def test_chain_that_somebody_holds_up_stalls_no_other(identity: Identity, organization_id: str, sql: Sql) -> None:
    other = await identity.organization("Other")
    for owner in (organization_id, other):
        await identity.service_account(owner)
    transaction = sql.transaction()
    await transaction.start()
    await sql.execute("SELECT FROM audit_chains WHERE organization_id = $1 FOR UPDATE", organization_id)
    waiting = asyncio.create_task(identity.service_account(organization_id, "Waits"))
    await identity.service_account(other, "Goes on")
    assert not waiting.done()
    await transaction.rollback()
    await waiting
    assert len(await entries(identity, organization_id)) == 2


# Reading.


async def test_entries_come_in_pages_newest_first_and_filtered(identity: Identity, organization_id: str) -> None:
    await grown(identity, organization_id, 5)
    seen: list[int] = []
    request = audit_service_pb2.ListAuditEntriesRequest(organization_id=organization_id, page_size=2)
    while True:
        answer = await identity.call(identity.audit.ListAuditEntries, request)
        seen += [entry.sequence for entry in answer.audit_entries]
        assert len(answer.audit_entries) <= 2
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token
    assert seen == [5, 4, 3, 2, 1]
    third = (await entries(identity, organization_id))[2]
    key_id = identity.platform.api_key_id
    for filters, expected in (
        ({"start_time": third.event_time}, [5, 4, 3]),
        ({"end_time": third.event_time}, [2, 1]),
        ({"resource_id": third.resource_id}, [3]),
        ({"resource_type": "service_account", "principal_id": key_id}, [5, 4, 3, 2, 1]),
        ({"resource_type": "api_key"}, []),
        ({"permission": "service_accounts.create", "outcome": SUCCEEDED}, [5, 4, 3, 2, 1]),
        ({"outcome": DENIED}, []),
        ({"principal_id": "key_other"}, []),
    ):
        found = await entries(identity, organization_id, **filters)
        assert [entry.sequence for entry in found] == expected, filters


async def test_export_is_oldest_first_and_can_be_verified_elsewhere(identity: Identity, organization_id: str) -> None:
    await grown(identity, organization_id, 3)
    exported = await export(identity, organization_id)
    key = Ed25519PublicKey.from_public_bytes(AuditKeys(AUDIT_KEY).public_keys()[exported[0].key_id])
    previous = bytes(32)
    for entry in exported:
        when = entry.event_time.ToDatetime(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        content = [
            *(entry.audit_entry_id, entry.organization_id, entry.sequence, when, "api_key", entry.principal_id),
            *(entry.api_key_id, entry.method, entry.permission, entry.resource_type, entry.resource_id, "succeeded"),
            *(entry.reason, [[change.field, change.before_json, change.after_json] for change in entry.changes]),
            *(entry.request_id, entry.client_address),
        ]
        told = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        assert entry.previous_hash == previous
        assert entry.hash == hashlib.sha256(previous + told).digest()
        key.verify(entry.signature, b"aiaas.audit.entry.v1\n" + entry.hash)
        previous = entry.hash
    assert [entry.sequence for entry in exported] == [1, 2, 3]


async def test_log_is_read_within_the_own_organization_by_those_who_may(
    identity: Identity, organization_id: str
) -> None:
    owner = await identity.member(organization_id, "owner")
    developer = await identity.member(organization_id, "developer")
    other = await identity.organization("Other")
    await identity.service_account(other)
    own = audit_service_pb2.ListAuditEntriesRequest(organization_id=organization_id)
    assert len((await identity.call(identity.audit.ListAuditEntries, own, owner.secret)).audit_entries) >= 4
    assert (
        await identity.refused(identity.audit.ListAuditEntries, own, developer.secret)
    ).reason is Reason.PERMISSION_DENIED
    for abroad in (other, "platform", "org_nowhere"):
        foreign = audit_service_pb2.ListAuditEntriesRequest(organization_id=abroad)
        assert (
            await identity.refused(identity.audit.ListAuditEntries, foreign, owner.secret)
        ).reason is Reason.NOT_FOUND
    (entry,) = await entries(identity, other)
    stolen = audit_service_pb2.GetAuditEntryRequest(
        organization_id=organization_id, audit_entry_id=entry.audit_entry_id
    )
    assert (await identity.refused(identity.audit.GetAuditEntry, stolen)).reason is Reason.NOT_FOUND


# Others' entries, and floods.


async def test_entries_of_other_services_are_chained_once(identity: Identity, organization_id: str) -> None:
    await grown(identity, organization_id, 1)
    (own,) = await entries(identity, organization_id)
    request = audit_service_pb2.RecordAuditEntriesRequest(
        audit_entries=[Entry(audit_entry_id=f"aud_{number}", **recordable(own)) for number in range(3)]
    )
    for _ in range(2):
        await identity.audit.RecordAuditEntries(request, timeout=10)
    listed = await entries(identity, organization_id)
    assert [entry.audit_entry_id for entry in listed] == ["aud_2", "aud_1", "aud_0", own.audit_entry_id]
    assert (await verify(identity, organization_id)).intact
    request.audit_entries[0].audit_entry_id = "not an id"
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await identity.audit.RecordAuditEntries(request, timeout=10)
    assert from_rpc_error(raised.value).field == "audit_entries[0].audit_entry_id"


async def test_flood_of_denials_leaves_a_bounded_number_of_rows(identity: Identity, organization_id: str) -> None:
    developer = await identity.member(organization_id, "developer")
    request = audit_service_pb2.ListAuditEntriesRequest(organization_id=organization_id)
    for _ in range(60):
        await identity.refused(identity.audit.ListAuditEntries, request, developer.secret)
    denied = await entries(identity, organization_id, outcome=DENIED)
    assert 20 <= len(denied) < 40
    # The one who floods does not keep others from being recorded.
    analyst = await identity.member(organization_id, "analyst")
    await identity.refused(identity.audit.ListAuditEntries, request, analyst.secret)
    assert len(await entries(identity, organization_id, outcome=DENIED)) == len(denied) + 1
