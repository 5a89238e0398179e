"""A key's new text, and how long the old one lasts."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from aiaas.identity.v1 import api_key_service_pb2 as pb
from aiaas.identity.v1 import service_account_service_pb2
from identity.api_keys import ApiKeys
from identity.last_uses import LastUses
from identity.principals import Principals
from identity.roles import ALL_PERMISSIONS
from identity.stores import Store, open_database
from mesh.auth import Principal, RemoteAuthenticator
from mesh.clock import SystemClock
from mesh.errors import PlatformError, Reason
from tests.doubles.clock import ManualClock
from tests.integration.identity.harness import Identity
from tests.integration.identity.test_row_level_security import announce_nothing

ADMIN = Principal("api_key", "key_admin", "org_platform", permissions=ALL_PERMISSIONS, platform=True)


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    database = open_database(database_url)
    yield Store(database, announce_nothing)
    await database.close()


def rotation(key: pb.ApiKey, overlap: timedelta | None = None) -> pb.RotateApiKeyRequest:
    request = pb.RotateApiKeyRequest(organization_id=key.organization_id, api_key_id=key.api_key_id)
    if overlap is not None:
        request.overlap.FromTimedelta(overlap)
    return request


async def rotated(
    identity: Identity, key: pb.ApiKey, overlap: timedelta | None = None, secret: str | None = None
) -> pb.RotateApiKeyResponse:
    return await identity.call(identity.api_keys.RotateApiKey, rotation(key, overlap), secret)


async def test_old_text_is_refused_at_once_without_an_overlap(identity: Identity, organization_id: str) -> None:
    made = await identity.key(organization_id)
    new = await rotated(identity, made.api_key)
    assert new.api_key.api_key_id == made.api_key.api_key_id
    assert new.api_key.etag != made.api_key.etag
    assert await identity.is_refused(made.secret)
    assert (await identity.authenticate(new.secret)).api_key_id == made.api_key.api_key_id


async def test_both_texts_are_accepted_for_the_overlap_and_only_the_latest_two(
    identity: Identity, organization_id: str
) -> None:
    first = await identity.key(organization_id)
    second = await rotated(identity, first.api_key, timedelta(hours=1))
    old, new = await identity.authenticate(first.secret), await identity.authenticate(second.secret)
    assert old.api_key_id == new.api_key_id
    assert old.HasField("expire_time")
    assert not new.HasField("expire_time")
    third = await rotated(identity, first.api_key, timedelta(hours=1))
    assert await identity.is_refused(first.secret)
    assert not await identity.is_refused(second.secret)
    assert not await identity.is_refused(third.secret)


async def test_old_text_ends_with_the_overlap_or_with_the_key(
    identity: Identity, organization_id: str, store: Store
) -> None:
    clock = ManualClock(SystemClock().now())
    remote = RemoteAuthenticator(identity.auth)
    keys, principals = ApiKeys(store, clock), Principals(store, clock, LastUses(store), remote, remote)
    made = await identity.key(organization_id)
    _, text = await keys.rotate(ADMIN, organization_id, made.api_key.api_key_id, timedelta(minutes=10))
    clock.advance(599)
    old = await principals.authenticate(made.secret)
    assert old.expire_time == clock.now() + timedelta(seconds=1)
    clock.advance(1)
    with pytest.raises(PlatformError) as refused:
        await principals.authenticate(made.secret)
    assert refused.value.reason is Reason.API_KEY_INVALID
    assert (await principals.authenticate(text)).expire_time is None


async def test_revoked_key_is_refused_by_both_texts_and_not_rotated(identity: Identity, organization_id: str) -> None:
    made = await identity.key(organization_id)
    new = await rotated(identity, made.api_key, timedelta(hours=1))
    ids = {"organization_id": organization_id, "api_key_id": made.api_key.api_key_id}
    await identity.call(identity.api_keys.RevokeApiKey, pb.RevokeApiKeyRequest(**ids))
    assert await identity.is_refused(made.secret)
    assert await identity.is_refused(new.secret)
    error = await identity.refused(identity.api_keys.RotateApiKey, rotation(made.api_key))
    assert error.reason is Reason.FAILED_PRECONDITION


@pytest.mark.parametrize("overlap", [timedelta(seconds=-1), timedelta(days=31)])
async def test_overlap_is_at_most_a_month(identity: Identity, organization_id: str, overlap: timedelta) -> None:
    made = await identity.key(organization_id)
    error = await identity.refused(identity.api_keys.RotateApiKey, rotation(made.api_key, overlap))
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "overlap")
    assert not await identity.is_refused(made.secret)


async def test_nobody_gets_the_text_of_a_key_that_may_do_more(identity: Identity, organization_id: str) -> None:
    account = await identity.service_account(organization_id, role_ids=("owner",))
    strong = await identity.key(organization_id, "organizations.update", service_account_id=account.service_account_id)
    admin = await identity.member(organization_id, "admin")
    error = await identity.refused(identity.api_keys.RotateApiKey, rotation(strong.api_key), admin.secret)
    assert (error.reason, error.field) == (Reason.PERMISSION_DENIED, "api_key_id")
    assert not await identity.is_refused(strong.secret)
    weak = await identity.key(organization_id, service_account_id=account.service_account_id)
    await rotated(identity, weak.api_key, secret=admin.secret)


async def test_key_of_a_platform_administrator_is_for_the_platform_alone(identity: Identity) -> None:
    admin = await identity.member("org_platform", "admin")
    account = service_account_service_pb2.ListServiceAccountsRequest(organization_id="org_platform")
    (platform,) = (await identity.call(identity.service_accounts.ListServiceAccounts, account)).service_accounts
    account_id = platform.service_account_id
    key = await identity.key("org_platform", "usage.query", service_account_id=account_id)
    error = await identity.refused(identity.api_keys.RotateApiKey, rotation(key.api_key), admin.secret)
    assert (error.reason, error.field) == (Reason.PERMISSION_DENIED, "api_key_id")
    wanted = pb.ApiKey(display_name="Key", scopes=["usage.query"], service_account_id=account_id)
    create = pb.CreateApiKeyRequest(organization_id="org_platform", api_key=wanted)
    error = await identity.refused(identity.api_keys.CreateApiKey, create, admin.secret)
    assert error.reason is Reason.PERMISSION_DENIED


async def test_developer_rotates_own_keys_only(identity: Identity, organization_id: str) -> None:
    one = await identity.member(organization_id, "developer", "one@example.com")
    other = await identity.member(organization_id, "developer", "other@example.com")
    theirs = await identity.key(organization_id, user_id=other.user_id)
    error = await identity.refused(identity.api_keys.RotateApiKey, rotation(theirs.api_key), one.secret)
    assert error.reason is Reason.NOT_FOUND
    own = await identity.key(organization_id, secret=one.secret)
    await rotated(identity, own.api_key, secret=one.secret)


async def test_another_organizations_key_is_not_found(identity: Identity, organization_id: str) -> None:
    made = await identity.key(organization_id)
    other = await identity.member(await identity.organization("Other"), "owner")
    request = rotation(made.api_key)
    request.organization_id = other.organization_id
    assert (await identity.refused(identity.api_keys.RotateApiKey, request, other.secret)).reason is Reason.NOT_FOUND
    assert not await identity.is_refused(made.secret)
