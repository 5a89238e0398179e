"""API keys from their making to their end, over gRPC and a real database."""

import asyncio
import hashlib
import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.identity.v1 import api_key_service_pb2 as pb
from aiaas.identity.v1 import organization_service_pb2, service_account_service_pb2, user_service_pb2
from aiaas.type.v1.limits_pb2 import RateLimits
from mesh import tokens
from mesh.errors import Reason
from tests.integration.identity.harness import Identity


def at(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


async def test_new_key_authenticates_as_its_organization_with_inference_alone(identity: Identity) -> None:
    organization_id = await identity.organization(rate_limits=RateLimits(limit_concurrent_requests=7))
    made = await identity.key(organization_id, rate_limits=RateLimits(limit_requests_per_second=2.5))
    principal = await identity.authenticate(made.secret)
    assert principal.organization_id == organization_id
    assert principal.api_key_id == principal.principal_id == made.api_key.api_key_id
    assert set(principal.permissions) == {"inference.create", "inference.list_models"}
    assert not principal.platform
    assert principal.organization_limits.limit_concurrent_requests == 7
    assert principal.principal_limits.limit_requests_per_second == 2.5
    assert made.api_key.state == pb.API_KEY_STATE_ACTIVE
    assert made.api_key.creator_id == identity.platform.api_key_id


async def test_key_of_a_service_account_holds_its_roles_within_its_scopes(identity: Identity) -> None:
    organization_id = await identity.organization()
    account = await identity.service_account(organization_id, role_ids=("finance",))
    made = await identity.key(organization_id, "usage.*", service_account_id=account.service_account_id)
    principal = await identity.authenticate(made.secret)
    assert principal.service_account_id == account.service_account_id
    assert set(principal.permissions) == {"usage.query", "usage.list_records", "usage.explain"}
    wanted = service_account_service_pb2.ServiceAccount(role_ids=["analyst"])
    request = service_account_service_pb2.UpdateServiceAccountRequest(
        organization_id=organization_id, service_account_id=account.service_account_id, service_account=wanted
    )
    await identity.call(identity.service_accounts.UpdateServiceAccount, request)
    assert set((await identity.authenticate(made.secret)).permissions) == {"usage.query", "usage.list_records"}


async def test_platform_administrators_key_is_of_the_platform(identity: Identity) -> None:
    principal = await identity.authenticate(identity.admin)
    assert principal.platform
    assert "organizations.create" in principal.permissions


async def test_key_without_an_owner_in_the_platforms_organization_is_not_of_the_platform(identity: Identity) -> None:
    made = await identity.key(identity.platform.organization_id, "api_keys.*")
    assert not (await identity.authenticate(made.secret)).platform


@pytest.mark.parametrize("end", ["revoked", "suspended organization", "disabled account", "deleted account"])
async def test_key_that_has_ended_is_refused(identity: Identity, end: str) -> None:
    organization_id = await identity.organization()
    account = await identity.service_account(organization_id, role_ids=("developer",))
    made = await identity.key(organization_id, service_account_id=account.service_account_id)
    assert not await identity.is_refused(made.secret)
    ids: dict[str, Any] = {"organization_id": organization_id, "service_account_id": account.service_account_id}
    if end == "revoked":
        request = pb.RevokeApiKeyRequest(organization_id=organization_id, api_key_id=made.api_key.api_key_id)
        revoked = await identity.call(identity.api_keys.RevokeApiKey, request)
        assert revoked.api_key.state == pb.API_KEY_STATE_REVOKED
        assert (await identity.call(identity.api_keys.RevokeApiKey, request)).api_key == revoked.api_key
    elif end == "suspended organization":
        suspend = organization_service_pb2.SuspendOrganizationRequest(organization_id=organization_id)
        await identity.call(identity.organizations.SuspendOrganization, suspend)
    elif end == "disabled account":
        wanted = service_account_service_pb2.ServiceAccount(disabled=True)
        disable = service_account_service_pb2.UpdateServiceAccountRequest(**ids, service_account=wanted)
        await identity.call(identity.service_accounts.UpdateServiceAccount, disable)
    else:
        delete = service_account_service_pb2.DeleteServiceAccountRequest(**ids)
        await identity.call(identity.service_accounts.DeleteServiceAccount, delete)
    assert await identity.is_refused(made.secret)
    refusal = await identity.refused(
        identity.organizations.GetOrganization,
        organization_service_pb2.GetOrganizationRequest(organization_id=organization_id),
        made.secret,
    )
    assert (refusal.reason, refusal.message) == (Reason.API_KEY_INVALID, "Incorrect API key provided.")


async def test_reactivated_organizations_keys_work_again(identity: Identity) -> None:
    organization_id = await identity.organization()
    made = await identity.key(organization_id)
    suspend = organization_service_pb2.SuspendOrganizationRequest(organization_id=organization_id)
    await identity.call(identity.organizations.SuspendOrganization, suspend)
    assert await identity.is_refused(made.secret)
    reactivate = organization_service_pb2.ReactivateOrganizationRequest(organization_id=organization_id)
    await identity.call(identity.organizations.ReactivateOrganization, reactivate)
    assert not await identity.is_refused(made.secret)


async def test_removed_members_key_is_refused_also_after_the_member_came_back(identity: Identity) -> None:
    organization_id = await identity.organization()
    member = await identity.member(organization_id, "developer")
    remove = user_service_pb2.RemoveUserRequest(organization_id=organization_id, user_id=member.user_id)
    await identity.call(identity.users.RemoveUser, remove)
    assert await identity.is_refused(member.secret)
    assert (await identity.member(organization_id, "developer")).user_id == member.user_id
    assert await identity.is_refused(member.secret)


async def test_suspended_users_key_is_refused(identity: Identity, database_url: str) -> None:
    member = await identity.member(await identity.organization(), "developer")
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE users SET state = 'suspended' WHERE user_id = $1", member.user_id)
    await connection.close()
    assert await identity.is_refused(member.secret)


async def test_expired_key_is_refused_and_listed_as_expired(identity: Identity, database_url: str) -> None:
    organization_id = await identity.organization()
    made = await identity.key(organization_id, expire_time=at(datetime.now(UTC) + timedelta(hours=1)))
    assert (await identity.authenticate(made.secret)).expire_time == made.api_key.expire_time
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE api_keys SET expire_time = now() WHERE organization_id = $1", organization_id)
    await connection.close()
    assert await identity.is_refused(made.secret)
    for state, count in ((pb.API_KEY_STATE_EXPIRED, 1), (pb.API_KEY_STATE_ACTIVE, 0), (pb.API_KEY_STATE_REVOKED, 0)):
        request = pb.ListApiKeysRequest(organization_id=organization_id, state=state)
        assert len((await identity.call(identity.api_keys.ListApiKeys, request)).api_keys) == count


async def test_what_is_no_key_is_refused(identity: Identity, database_url: str) -> None:
    made = await identity.key(await identity.organization())
    connection = await asyncpg.connect(database_url)
    digest: bytes = await connection.fetchval(
        "SELECT digest FROM api_keys WHERE api_key_id = $1", made.api_key.api_key_id
    )
    await connection.close()
    assert digest == hashlib.sha256(made.secret.encode()).digest()
    broken = made.secret[:-1] + ("a" if made.secret[-1] != "a" else "b")
    others_secret = tokens.API_KEY.generate().text.rpartition("_")[2]
    for presented in (broken, tokens.API_KEY.generate().text, f"aias_{made.api_key.api_key_id}_{others_secret}"):
        assert await identity.is_refused(presented)
    for presented in (digest.hex(), f"aias_{made.api_key.api_key_id}_{digest.hex()}", "", "x" * 9000, "\x00", "ключ"):
        assert await identity.is_refused(presented)


async def test_another_keys_secret_under_this_keys_id_is_refused(identity: Identity) -> None:
    organization_id = await identity.organization()
    one, other = await identity.key(organization_id), await identity.key(organization_id)
    body = f"aias_{one.api_key.api_key_id}_{other.secret.rpartition('_')[2][:32]}"
    forged = body + tokens._checksum(body)
    tokens.API_KEY.parse(forged)
    assert await identity.is_refused(forged)


async def test_text_of_a_key_is_in_one_answer_only(identity: Identity, database_url: str, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    organization_id = await identity.organization()
    made = await identity.key(organization_id, "api_keys.*")
    ids: dict[str, Any] = {"organization_id": organization_id, "api_key_id": made.api_key.api_key_id}
    answers = [
        await identity.call(identity.api_keys.GetApiKey, pb.GetApiKeyRequest(**ids), made.secret),
        await identity.call(
            identity.api_keys.ListApiKeys, pb.ListApiKeysRequest(organization_id=organization_id), made.secret
        ),
        await identity.call(
            identity.api_keys.UpdateApiKey,
            pb.UpdateApiKeyRequest(**ids, api_key=pb.ApiKey(display_name="New name")),
            made.secret,
        ),
        await identity.call(identity.api_keys.RevokeApiKey, pb.RevokeApiKeyRequest(**ids), made.secret),
    ]
    assert await identity.is_refused(made.secret)
    secret_part = made.secret.rpartition("_")[2]
    assert secret_part not in "".join(map(str, answers)) + str(made.api_key)
    assert secret_part not in caplog.text + str([vars(record) for record in caplog.records])
    assert "an API key was refused" in caplog.text
    connection = await asyncpg.connect(database_url)
    tables = await connection.fetch("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
    for table in tables:
        rows = await connection.fetch(f"SELECT * FROM {table['table_name']}")
        assert secret_part not in str([dict(row) for row in rows])
    await connection.close()


async def test_scopes_beyond_what_the_creator_holds_are_refused(identity: Identity) -> None:
    organization_id = await identity.organization()
    developer = await identity.member(organization_id, "developer")
    creator = (await identity.key(organization_id, "api_keys.*", "usage.query")).secret
    for secret, scopes in (
        (developer.secret, ("users.create",)),
        (developer.secret, ("usage.*",)),
        (creator, ("inference.create",)),
        (creator, ()),
        (creator, ("usage.query", "organizations.create")),
    ):
        wanted = pb.ApiKey(display_name="More", scopes=scopes)
        request = pb.CreateApiKeyRequest(organization_id=organization_id, api_key=wanted)
        error = await identity.refused(identity.api_keys.CreateApiKey, request, secret)
        assert (error.reason, error.field) == (Reason.PERMISSION_DENIED, "api_key.scopes")
    made = await identity.key(organization_id, "usage.query", secret=creator)
    update = pb.UpdateApiKeyRequest(
        organization_id=organization_id,
        api_key_id=made.api_key.api_key_id,
        api_key=pb.ApiKey(scopes=["inference.create"]),
    )
    error = await identity.refused(identity.api_keys.UpdateApiKey, update, creator)
    assert (error.reason, error.field) == (Reason.PERMISSION_DENIED, "api_key.scopes")


async def test_scopes_beyond_what_the_owner_holds_are_refused(identity: Identity) -> None:
    organization_id = await identity.organization()
    account = await identity.service_account(organization_id, role_ids=("analyst",))
    owners: list[tuple[dict[str, Any], str]] = [
        ({"service_account_id": account.service_account_id}, "inference.create"),
        ({"service_account_id": account.service_account_id}, "usage.*"),
        ({}, "organizations.create"),
        ({}, "models.*"),
    ]
    for owner, scope in owners:
        wanted = pb.ApiKey(display_name="More", scopes=[scope], **owner)
        request = pb.CreateApiKeyRequest(organization_id=organization_id, api_key=wanted)
        error = await identity.refused(identity.api_keys.CreateApiKey, request)
        assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "api_key.scopes")


async def test_key_of_an_organization_never_holds_more_than_its_creator_did(identity: Identity) -> None:
    organization_id = await identity.organization()
    creator = (await identity.key(organization_id, "api_keys.*", "usage.*")).secret
    made = await identity.key(organization_id, "usage.*", secret=creator)
    assert set((await identity.authenticate(made.secret)).permissions) == {
        "usage.query",
        "usage.list_records",
        "usage.explain",
    }


async def test_developer_deals_with_its_own_keys_only(identity: Identity) -> None:
    organization_id = await identity.organization()
    developer = await identity.member(organization_id, "developer")
    others = await identity.key(organization_id)
    made = await identity.key(organization_id, secret=developer.secret)
    assert made.api_key.user_id == developer.user_id
    listed = await identity.call(
        identity.api_keys.ListApiKeys, pb.ListApiKeysRequest(organization_id=organization_id), developer.secret
    )
    assert {key.user_id for key in listed.api_keys} == {developer.user_id}
    ids: dict[str, Any] = {"organization_id": organization_id, "api_key_id": others.api_key.api_key_id}
    for method, request in (
        (identity.api_keys.GetApiKey, pb.GetApiKeyRequest(**ids)),
        (identity.api_keys.RevokeApiKey, pb.RevokeApiKeyRequest(**ids)),
        (identity.api_keys.UpdateApiKey, pb.UpdateApiKeyRequest(**ids, api_key=pb.ApiKey(display_name="Mine"))),
    ):
        assert (await identity.refused(method, request, developer.secret)).reason is Reason.NOT_FOUND
    account = await identity.service_account(organization_id, role_ids=("developer",))
    wanted = pb.ApiKey(display_name="Its", service_account_id=account.service_account_id)
    create = pb.CreateApiKeyRequest(organization_id=organization_id, api_key=wanted)
    error = await identity.refused(identity.api_keys.CreateApiKey, create, developer.secret)
    assert (error.reason, error.field) == (Reason.PERMISSION_DENIED, "api_key.service_account_id")


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"display_name": ""}, "api_key.display_name"),
        ({"display_name": "  "}, "api_key.display_name"),
        ({"display_name": "x" * 201}, "api_key.display_name"),
        ({"display_name": "a\nb"}, "api_key.display_name"),
        ({"display_name": "a\x00b"}, "api_key.display_name"),
        ({"scopes": ["no_such.permission"]}, "api_key.scopes"),
        ({"scopes": ["*"]}, "api_key.scopes"),
        ({"scopes": [".*"]}, "api_key.scopes"),
        ({"scopes": ["inference.create", "inference.create"]}, "api_key.scopes"),
        ({"allowed_networks": ["10.0.0.0/33"]}, "api_key.allowed_networks"),
        ({"allowed_networks": ["10.0.0.1/8"]}, "api_key.allowed_networks"),
        ({"allowed_networks": ["everywhere"]}, "api_key.allowed_networks"),
        ({"allowed_models": [""]}, "api_key.allowed_models"),
        ({"allowed_models": ["a b"]}, "api_key.allowed_models"),
        ({"expire_time": at(datetime(2020, 1, 1, tzinfo=UTC))}, "api_key.expire_time"),
        ({"expire_time": Timestamp(seconds=1 << 60)}, "api_key.expire_time"),
        ({"rate_limits": RateLimits(burst_requests=-1)}, "api_key.rate_limits.burst_requests"),
        (
            {"rate_limits": RateLimits(limit_requests_per_second=float("nan"))},
            "api_key.rate_limits.limit_requests_per_second",
        ),
        ({"service_account_id": "sa_none"}, "api_key.service_account_id"),
        ({"service_account_id": "sa\x00"}, "api_key.service_account_id"),
        ({"user_id": "user_none"}, "api_key.user_id"),
        ({"user_id": "user_none", "service_account_id": "sa_none"}, "api_key.user_id"),
    ],
)
async def test_bad_field_is_named(identity: Identity, wanted: dict[str, Any], field: str) -> None:
    organization_id = await identity.organization()
    request = pb.CreateApiKeyRequest(
        organization_id=organization_id, api_key=pb.ApiKey(**{"display_name": "Key", **wanted})
    )
    error = await identity.refused(identity.api_keys.CreateApiKey, request)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)


async def test_every_bad_field_is_named_at_once(identity: Identity) -> None:
    wanted = pb.ApiKey(display_name="", scopes=["no_such.permission"], allowed_networks=["nowhere"])
    wanted.rate_limits.burst_requests = -1
    request = pb.CreateApiKeyRequest(organization_id=await identity.organization(), api_key=wanted)
    error = await identity.refused(identity.api_keys.CreateApiKey, request)
    assert [violation.field for violation in error.violations] == [
        "api_key.display_name",
        "api_key.rate_limits.burst_requests",
        "api_key.scopes",
        "api_key.allowed_networks",
    ]


async def test_key_has_the_narrower_of_two_lists_of_models(identity: Identity) -> None:
    organization_id = await identity.organization(allowed_models=["a", "b"])
    for models, allowed in ((["b", "c"], ["b"]), ([], ["a", "b"]), (["c"], [""])):
        made = await identity.key(organization_id, allowed_models=models)
        assert list((await identity.authenticate(made.secret)).allowed_models) == allowed


async def test_networks_are_kept_in_their_usual_spelling(identity: Identity) -> None:
    made = await identity.key(
        await identity.organization(), allowed_networks=["10.0.0.0/8", "192.0.2.1", "2001:DB8::/32"]
    )
    assert list((await identity.authenticate(made.secret)).allowed_networks) == [
        "10.0.0.0/8",
        "192.0.2.1/32",
        "2001:db8::/32",
    ]


async def test_repeated_creation_is_refused_since_the_text_cannot_be_shown_twice(identity: Identity) -> None:
    organization_id = await identity.organization()
    request = pb.CreateApiKeyRequest(
        organization_id=organization_id, api_key=pb.ApiKey(display_name="Once"), request_id="one"
    )
    await identity.call(identity.api_keys.CreateApiKey, request)
    error = await identity.refused(identity.api_keys.CreateApiKey, request)
    assert (error.reason, error.field) == (Reason.ALREADY_EXISTS, "request_id")
    request.organization_id = await identity.organization("Other")
    await identity.call(identity.api_keys.CreateApiKey, request)


async def test_update_changes_what_the_mask_names_and_nothing_else(identity: Identity) -> None:
    organization_id = await identity.organization()
    soon = at(datetime.now(UTC) + timedelta(hours=1))
    made = (await identity.key(organization_id, "inference.*", allowed_models=["a"], expire_time=soon)).api_key
    ids: dict[str, Any] = {"organization_id": organization_id, "api_key_id": made.api_key_id}
    wanted = pb.ApiKey(display_name="New", allowed_models=["b"])
    masked = pb.UpdateApiKeyRequest(**ids, api_key=wanted, update_mask=FieldMask(paths=["display_name", "expire_time"]))
    changed = (await identity.call(identity.api_keys.UpdateApiKey, masked)).api_key
    assert (changed.display_name, list(changed.allowed_models), changed.HasField("expire_time")) == (
        "New",
        ["a"],
        False,
    )
    assert changed.etag != made.etag
    unmasked = pb.UpdateApiKeyRequest(**ids, api_key=pb.ApiKey(allowed_models=["b"], etag=changed.etag))
    changed = (await identity.call(identity.api_keys.UpdateApiKey, unmasked)).api_key
    assert (changed.display_name, list(changed.allowed_models), list(changed.scopes)) == ("New", ["b"], ["inference.*"])
    stale = pb.UpdateApiKeyRequest(**ids, api_key=pb.ApiKey(display_name="Late", etag=made.etag))
    error = await identity.refused(identity.api_keys.UpdateApiKey, stale)
    assert (error.reason, error.field) == (Reason.FAILED_PRECONDITION, "api_key.etag")


@pytest.mark.parametrize(
    "path", ["organization_id", "state", "user_id", "creator_id", "digest", "rate_limits.models", "*"]
)
async def test_mask_cannot_reach_other_fields(identity: Identity, path: str) -> None:
    organization_id = await identity.organization()
    made = await identity.key(organization_id)
    request = pb.UpdateApiKeyRequest(
        organization_id=organization_id,
        api_key_id=made.api_key.api_key_id,
        api_key=pb.ApiKey(display_name="New", user_id="user_1", organization_id="org_1"),
        update_mask=FieldMask(paths=["display_name", path]),
    )
    error = await identity.refused(identity.api_keys.UpdateApiKey, request)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "update_mask")


async def test_revoked_key_stays_as_it_is(identity: Identity) -> None:
    organization_id = await identity.organization()
    ids: dict[str, Any] = {
        "organization_id": organization_id,
        "api_key_id": (await identity.key(organization_id)).api_key.api_key_id,
    }
    await identity.call(identity.api_keys.RevokeApiKey, pb.RevokeApiKeyRequest(**ids))
    request = pb.UpdateApiKeyRequest(**ids, api_key=pb.ApiKey(display_name="New"))
    assert (await identity.refused(identity.api_keys.UpdateApiKey, request)).reason is Reason.FAILED_PRECONDITION


async def test_last_use_is_written_to_the_minute(identity: Identity) -> None:
    organization_id = await identity.organization()
    made = await identity.key(organization_id)
    assert not made.api_key.HasField("last_use_time")
    await identity.authenticate(made.secret)
    request = pb.GetApiKeyRequest(organization_id=organization_id, api_key_id=made.api_key.api_key_id)
    async with asyncio.timeout(10):
        while True:
            key = (await identity.call(identity.api_keys.GetApiKey, request)).api_key
            if key.HasField("last_use_time"):
                break
            await asyncio.sleep(0.1)
    assert key.last_use_time.seconds % 60 == 0
    assert key.etag == made.api_key.etag
