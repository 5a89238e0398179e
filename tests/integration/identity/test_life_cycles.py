"""How organizations end, and how everybody hears what became invalid."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from aiaas.identity.v1 import (
    api_key_service_pb2,
    auth_service_pb2,
    organization_service_pb2,
    role_service_pb2,
    service_account_service_pb2,
    user_service_pb2,
)
from identity.audit import Audit
from identity.audit_chain import AuditKeys
from identity.organization_purges import OrganizationPurges
from identity.organizations import DELETION_DELAY
from identity.revocation_feed import RevocationFeed
from identity.stores import Store, open_database
from mesh.clock import SystemClock
from mesh.database import Database
from mesh.errors import Reason
from tests.doubles.clock import ManualClock
from tests.integration.identity import budgeting
from tests.integration.identity.harness import AUDIT_KEY, Identity, running_identity
from tests.integration.identity.leasing import Router, report
from tests.integration.identity.test_row_level_security import TENANT_TABLES, announce_nothing

PLATFORM = "org_platform"


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The database as identity opens it."""
    database = open_database(database_url)
    yield database
    await database.close()


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database, announce_nothing, AuditKeys(AUDIT_KEY))


async def deleted(identity: Identity, organization_id: str, **fields: Any) -> organization_service_pb2.Organization:
    request = organization_service_pb2.DeleteOrganizationRequest(organization_id=organization_id, **fields)
    return (await identity.call(identity.organizations.DeleteOrganization, request)).organization


async def reactivated(identity: Identity, organization_id: str) -> organization_service_pb2.Organization:
    request = organization_service_pb2.ReactivateOrganizationRequest(organization_id=organization_id)
    return (await identity.call(identity.organizations.ReactivateOrganization, request)).organization


async def test_deleted_organizations_credentials_are_refused_at_once_until_it_is_taken_back(
    identity: Identity, organization_id: str
) -> None:
    owner = await identity.member(organization_id, "owner")
    key = await identity.key(organization_id)
    gone = await deleted(identity, organization_id)
    assert gone.state == organization_service_pb2.ORGANIZATION_STATE_DELETED
    assert gone.purge_time.ToDatetime() - gone.update_time.ToDatetime() == DELETION_DELAY
    assert await identity.is_refused(owner.secret)
    assert await identity.is_refused(key.secret)
    back = await reactivated(identity, organization_id)
    assert back.state == organization_service_pb2.ORGANIZATION_STATE_ACTIVE
    assert not back.HasField("purge_time")
    assert not await identity.is_refused(owner.secret)
    assert not await identity.is_refused(key.secret)


async def test_deleting_again_changes_nothing(identity: Identity, organization_id: str) -> None:
    first = await deleted(identity, organization_id)
    assert await deleted(identity, organization_id) == first


async def test_deletion_names_what_was_seen(identity: Identity, organization_id: str) -> None:
    request = organization_service_pb2.DeleteOrganizationRequest(organization_id=organization_id, etag="other")
    error = await identity.refused(identity.organizations.DeleteOrganization, request)
    assert error.reason is Reason.FAILED_PRECONDITION


async def test_platforms_own_organization_cannot_be_deleted_or_suspended(identity: Identity) -> None:
    delete = organization_service_pb2.DeleteOrganizationRequest(organization_id=PLATFORM)
    error = await identity.refused(identity.organizations.DeleteOrganization, delete)
    assert error.reason is Reason.FAILED_PRECONDITION
    suspend = organization_service_pb2.SuspendOrganizationRequest(organization_id=PLATFORM)
    error = await identity.refused(identity.organizations.SuspendOrganization, suspend)
    assert error.reason is Reason.FAILED_PRECONDITION


async def test_owner_cannot_delete_or_suspend_the_own_organization(identity: Identity, organization_id: str) -> None:
    owner = await identity.member(organization_id, "owner")
    delete = organization_service_pb2.DeleteOrganizationRequest(organization_id=organization_id)
    error = await identity.refused(identity.organizations.DeleteOrganization, delete, owner.secret)
    assert error.reason is Reason.PERMISSION_DENIED


async def test_deleted_organization_cannot_be_suspended(identity: Identity, organization_id: str) -> None:
    await deleted(identity, organization_id)
    suspend = organization_service_pb2.SuspendOrganizationRequest(organization_id=organization_id)
    error = await identity.refused(identity.organizations.SuspendOrganization, suspend)
    assert error.reason is Reason.FAILED_PRECONDITION


async def fill(identity: Identity, organization_id: str) -> None:
    """One row of many kinds, referring to each other."""
    owner = await identity.member(organization_id, "owner", f"{organization_id.lower()}@example.com")
    account = await identity.service_account(organization_id, role_ids=("developer",))
    await identity.key(organization_id, service_account_id=account.service_account_id)
    role = role_service_pb2.Role(display_name="Reader", permissions=["usage.query"])
    create = role_service_pb2.CreateRoleRequest(organization_id=organization_id, role=role, request_id="once")
    await identity.call(identity.roles.CreateRole, create)
    made = await budgeting.create(identity, organization_id, user_id=owner.user_id)
    router = Router(identity)
    await router.renew(report(await router.lease(made, 10), 1, spent=5))


async def test_data_goes_after_the_delay_and_nobody_elses(identity: Identity, database: Database, store: Store) -> None:
    going, staying = await identity.organization("Going"), await identity.organization("Staying")
    for organization_id in (going, staying):
        await fill(identity, organization_id)
    tables = [row[0] for row in await database.fetch(TENANT_TABLES)]

    async def rows(organization_id: str) -> dict[str, int]:
        return {
            table: await database.fetchval(
                f"SELECT count(*) FROM {table} WHERE organization_id = $1",
                organization_id,
            )
            for table in tables
            if not table.startswith("audit")
        }

    before = await rows(staying)
    assert sum(before.values()) > 6
    await deleted(identity, going)
    clock = ManualClock(SystemClock().now())
    purges = OrganizationPurges(store, clock, Audit(store, clock, AuditKeys(AUDIT_KEY)))
    clock.advance((DELETION_DELAY - timedelta(minutes=1)).total_seconds())
    assert await purges.purge_due() == []
    clock.advance(120)
    assert await purges.purge_due() == [going]
    assert not any((await rows(going)).values())
    assert await rows(staying) == before
    get = organization_service_pb2.GetOrganizationRequest(organization_id=going)
    assert (await identity.refused(identity.organizations.GetOrganization, get)).reason is Reason.NOT_FOUND
    assert await purges.purge_due() == []


async def test_deletion_that_is_due_is_not_taken_back(
    identity: Identity, organization_id: str, database: Database, store: Store
) -> None:
    await deleted(identity, organization_id)
    await database.execute("UPDATE organizations SET purge_time = now() WHERE organization_id = $1", organization_id)
    request = organization_service_pb2.ReactivateOrganizationRequest(organization_id=organization_id)
    error = await identity.refused(identity.organizations.ReactivateOrganization, request)
    assert error.reason is Reason.FAILED_PRECONDITION


Watch: TypeAlias = Any


@pytest.fixture
async def watch(identity: Identity) -> AsyncIterator[Watch]:
    """A watch of what becomes invalid, from now on."""
    call = identity.auth.WatchRevocations(auth_service_pb2.WatchRevocationsRequest())
    await call.read()
    yield call
    call.cancel()


async def told(watch: Watch) -> tuple[str, str]:
    """What was told next: the kind of subject and its id. Within a second, as it was promised."""
    async with asyncio.timeout(1):
        message = await watch.read()
    subject = message.WhichOneof("subject")
    return subject, getattr(message, subject)


async def test_whatever_changes_somebodys_standing_is_told_to_watchers(
    identity: Identity, watch: Watch, organization_id: str
) -> None:
    member = await identity.member(organization_id, "finance")
    account = await identity.service_account(organization_id)
    update = user_service_pb2.UpdateUserRequest(organization_id=organization_id, user_id=member.user_id)
    update.user.role_ids.append("analyst")
    await identity.call(identity.users.UpdateUser, update)
    assert await told(watch) == ("user_id", member.user_id)
    change = service_account_service_pb2.UpdateServiceAccountRequest(
        organization_id=organization_id, service_account_id=account.service_account_id
    )
    change.service_account.disabled = True
    await identity.call(identity.service_accounts.UpdateServiceAccount, change)
    assert await told(watch) == ("service_account_id", account.service_account_id)
    remove = user_service_pb2.RemoveUserRequest(organization_id=organization_id, user_id=member.user_id)
    await identity.call(identity.users.RemoveUser, remove)
    assert await told(watch) == ("user_id", member.user_id)
    role = role_service_pb2.Role(display_name="Reader", permissions=["usage.query", "users.get"])
    create = role_service_pb2.CreateRoleRequest(organization_id=organization_id, role=role)
    made = (await identity.call(identity.roles.CreateRole, create)).role
    narrowed = role_service_pb2.UpdateRoleRequest(organization_id=organization_id, role_id=made.role_id)
    narrowed.role.permissions.append("users.get")
    await identity.call(identity.roles.UpdateRole, narrowed)
    assert await told(watch) == ("organization_id", organization_id)
    suspend = organization_service_pb2.SuspendOrganizationRequest(organization_id=organization_id)
    await identity.call(identity.organizations.SuspendOrganization, suspend)
    assert await told(watch) == ("organization_id", organization_id)
    await reactivated(identity, organization_id)
    assert await told(watch) == ("organization_id", organization_id)
    await deleted(identity, organization_id)
    assert await told(watch) == ("organization_id", organization_id)


async def revoke_keys(identity: Identity, organization_id: str, count: int) -> None:
    """So many revocations at the same time."""
    ids = [(await identity.key(organization_id)).api_key.api_key_id for _ in range(count)]
    await asyncio.gather(
        *(
            identity.call(
                identity.api_keys.RevokeApiKey,
                api_key_service_pb2.RevokeApiKeyRequest(organization_id=organization_id, api_key_id=api_key_id),
            )
            for api_key_id in ids
        )
    )


async def test_watch_that_broke_off_goes_on_where_it_was_and_misses_nothing(
    identity: Identity, organization_id: str, watch: Watch
) -> None:
    await revoke_keys(identity, organization_id, 8)
    revisions = [(await watch.read()).revision for _ in range(8)]
    assert revisions == list(range(revisions[0], revisions[0] + 8))
    again: Watch = identity.auth.WatchRevocations(auth_service_pb2.WatchRevocationsRequest(after_revision=revisions[2]))
    first = await again.read()
    assert (first.revision, first.WhichOneof("subject")) == (revisions[2], None)
    assert [(await again.read()).revision for _ in range(5)] == revisions[3:]
    again.cancel()


@pytest.mark.parametrize("beyond", ["before the log", "after the log"])
async def test_watcher_whose_place_the_log_does_not_have_is_told_where_it_begins(
    identity: Identity, organization_id: str, watch: Watch, store: Store, beyond: str
) -> None:
    await revoke_keys(identity, organization_id, 3)
    revisions = [(await watch.read()).revision for _ in range(3)]
    after = revisions[-1] + 10
    if beyond == "before the log":
        after = revisions[0]
        async with store.transaction() as stored:
            await stored.revocations.forget_older_than(timedelta(0))
    again: Watch = identity.auth.WatchRevocations(auth_service_pb2.WatchRevocationsRequest(after_revision=after))
    first = await again.read()
    assert first.WhichOneof("subject") is None
    assert first.revision == revisions[-1]
    again.cancel()


async def test_change_that_fails_is_not_told(identity: Identity, store: Store, watch: Watch) -> None:
    with pytest.raises(LookupError):
        async with store.transaction() as stored:
            await stored.revoke("user_id", "user_1")
            raise LookupError
    async with store.transaction() as stored:
        await stored.revoke("user_id", "user_2")
    assert await told(watch) == ("user_id", "user_2")


async def test_watches_end_when_the_process_does(database_url: str, tmp_path: Path) -> None:
    async with running_identity(database_url, tmp_path, drain_s=30.0) as identity:
        call: Watch = identity.auth.WatchRevocations(auth_service_pb2.WatchRevocationsRequest())
        await call.read()
        identity.stop()
        async with asyncio.timeout(5):
            assert not await call.read()


async def test_watch_that_ends_is_not_looked_for_any_longer(store: Store) -> None:
    feed = RevocationFeed(store)
    stop = asyncio.Event()
    running = asyncio.create_task(feed.run(stop))
    watching: Any = feed.watch(0)
    first = await anext(watching)
    async with store.transaction() as stored:
        await stored.revoke("role_id", "role_1")
    async with asyncio.timeout(1):
        revision, revocation = await anext(watching)
    assert revocation is not None
    assert (revision, revocation.id) == (first[0] + 1, "role_1")
    await watching.aclose()
    assert feed._watchers == 0
    stop.set()
    await running
