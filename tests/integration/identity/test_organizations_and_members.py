"""Organizations, members, service accounts and roles over gRPC and a real database."""

import asyncio
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from aiaas.identity.v1 import api_key_service_pb2 as api_keys
from aiaas.identity.v1 import organization_service_pb2 as organizations
from aiaas.identity.v1 import role_service_pb2 as roles
from aiaas.identity.v1 import service_account_service_pb2 as service_accounts
from aiaas.identity.v1 import user_service_pb2 as users
from aiaas.identity.v1.auth_service_pb2 import GetCurrentPrincipalRequest
from aiaas.type.v1.limits_pb2 import RateLimits
from mesh.errors import Reason, from_rpc_error
from tests.integration.identity.harness import Identity


async def create_user(identity: Identity, organization_id: str, secret: str | None = None, **user: Any) -> users.User:
    request = users.CreateUserRequest(organization_id=organization_id, user=users.User(**user))
    return (await identity.call(identity.users.CreateUser, request, secret)).user


async def test_current_principal_is_the_callers_own(identity: Identity) -> None:
    member = await identity.member(await identity.organization(), "admin")
    answer = await identity.call(identity.auth.GetCurrentPrincipal, GetCurrentPrincipalRequest(), member.secret)
    assert answer.principal.user_id == member.user_id
    assert answer.principal.organization_id == member.organization_id


async def test_admin_of_another_organization_finds_nothing(identity: Identity) -> None:
    own, other = await identity.organization("Own"), await identity.organization("Other")
    owner = await identity.member(own, "owner")
    user = await create_user(identity, other, email="a@example.com")
    account = await identity.service_account(other)
    key = (await identity.key(other)).api_key
    ids: dict[str, Any] = {"organization_id": other}
    calls: list[tuple[Any, Any]] = [
        (identity.organizations.GetOrganization, organizations.GetOrganizationRequest(**ids)),
        (identity.users.ListUsers, users.ListUsersRequest(**ids)),
        (identity.api_keys.ListApiKeys, api_keys.ListApiKeysRequest(**ids)),
        (identity.roles.ListRoles, roles.ListRolesRequest(**ids)),
        (identity.service_accounts.ListServiceAccounts, service_accounts.ListServiceAccountsRequest(**ids)),
        (identity.users.CreateUser, users.CreateUserRequest(**ids, user=users.User(email="b@example.com"))),
        (
            identity.api_keys.CreateApiKey,
            api_keys.CreateApiKeyRequest(**ids, api_key=api_keys.ApiKey(display_name="x")),
        ),
    ]
    for organization_id in (other, own):
        ids = {"organization_id": organization_id}
        in_body = organizations.Organization(display_name="x", organization_id=other)
        calls += [
            (identity.users.GetUser, users.GetUserRequest(**ids, user_id=user.user_id)),
            (identity.users.RemoveUser, users.RemoveUserRequest(**ids, user_id=user.user_id)),
            (identity.api_keys.GetApiKey, api_keys.GetApiKeyRequest(**ids, api_key_id=key.api_key_id)),
            (identity.api_keys.RevokeApiKey, api_keys.RevokeApiKeyRequest(**ids, api_key_id=key.api_key_id)),
            (
                identity.service_accounts.GetServiceAccount,
                service_accounts.GetServiceAccountRequest(**ids, service_account_id=account.service_account_id),
            ),
            (
                identity.service_accounts.DeleteServiceAccount,
                service_accounts.DeleteServiceAccountRequest(**ids, service_account_id=account.service_account_id),
            ),
            (
                identity.organizations.UpdateOrganization,
                organizations.UpdateOrganizationRequest(**ids, organization=in_body),
            ),
        ]
    for method, request in calls:
        error = await identity.refused(method, request, owner.secret)
        assert error.reason is Reason.NOT_FOUND, type(request).__name__
    wanted = api_keys.ApiKey(display_name="x", service_account_id=account.service_account_id)
    request = api_keys.CreateApiKeyRequest(organization_id=own, api_key=wanted)
    error = await identity.refused(identity.api_keys.CreateApiKey, request, owner.secret)
    assert error.field == "api_key.service_account_id"
    assert (
        await identity.refused(
            identity.organizations.ListOrganizations, organizations.ListOrganizationsRequest(), owner.secret
        )
    ).reason is Reason.PERMISSION_DENIED


async def test_organization_that_does_not_exist_is_not_found_for_the_platform_either(identity: Identity) -> None:
    ids: dict[str, Any] = {"organization_id": "org_none"}
    for method, request in (
        (identity.organizations.GetOrganization, organizations.GetOrganizationRequest(**ids)),
        (identity.users.ListUsers, users.ListUsersRequest(**ids)),
        (identity.api_keys.ListApiKeys, api_keys.ListApiKeysRequest(**ids)),
        (
            identity.api_keys.CreateApiKey,
            api_keys.CreateApiKeyRequest(**ids, api_key=api_keys.ApiKey(display_name="x"), request_id="r"),
        ),
        (
            identity.users.CreateUser,
            users.CreateUserRequest(**ids, user=users.User(email="a@example.com"), request_id="r"),
        ),
        (identity.roles.ListRoles, roles.ListRolesRequest(**ids)),
        (identity.organizations.SuspendOrganization, organizations.SuspendOrganizationRequest(**ids)),
    ):
        assert (await identity.refused(method, request)).reason is Reason.NOT_FOUND, type(request).__name__


async def test_repeated_creations_give_the_first_answer(identity: Identity) -> None:
    create = organizations.CreateOrganizationRequest(
        organization=organizations.Organization(display_name="Once"), request_id="r"
    )
    first, second = await asyncio.gather(
        identity.call(identity.organizations.CreateOrganization, create),
        identity.call(identity.organizations.CreateOrganization, create),
    )
    assert first == second
    organization_id = first.organization.organization_id
    user = users.CreateUserRequest(
        organization_id=organization_id, user=users.User(email="a@example.com"), request_id="r"
    )
    assert await identity.call(identity.users.CreateUser, user) == await identity.call(identity.users.CreateUser, user)
    account = service_accounts.CreateServiceAccountRequest(
        organization_id=organization_id,
        service_account=service_accounts.ServiceAccount(display_name="Worker"),
        request_id="r",
    )
    made = await identity.call(identity.service_accounts.CreateServiceAccount, account)
    assert await identity.call(identity.service_accounts.CreateServiceAccount, account) == made
    listed = await identity.call(identity.organizations.ListOrganizations, organizations.ListOrganizationsRequest())
    assert [row.display_name for row in listed.organizations] == ["Platform", "Once"]


async def test_pages_hold_every_row_once_in_the_order_of_their_making(identity: Identity) -> None:
    organization_id = await identity.organization()
    made = [(await identity.key(organization_id)).api_key.api_key_id for _ in range(5)]
    seen: list[str] = []
    request = api_keys.ListApiKeysRequest(organization_id=organization_id, page_size=2)
    sizes = []
    while True:
        page = await identity.call(identity.api_keys.ListApiKeys, request)
        sizes.append(len(page.api_keys))
        seen += [key.api_key_id for key in page.api_keys]
        if not page.next_page_token:
            break
        assert all(identifier not in page.next_page_token for identifier in made)
        request.page_token = page.next_page_token
    assert (seen, sizes) == (made, [2, 2, 1])
    for size in (0, 501, 5):
        request = api_keys.ListApiKeysRequest(organization_id=organization_id, page_size=size)
        page = await identity.call(identity.api_keys.ListApiKeys, request)
        assert (len(page.api_keys), page.next_page_token) == (5, "")


async def test_tampered_page_token_is_refused_by_name(identity: Identity) -> None:
    organization_id = await identity.organization()
    for _ in range(2):
        await identity.key(organization_id)
    request = api_keys.ListApiKeysRequest(organization_id=organization_id, page_size=1)
    token = (await identity.call(identity.api_keys.ListApiKeys, request)).next_page_token
    changed = token[:20] + ("A" if token[20] != "A" else "B") + token[21:]
    for wrong in (changed, token[:-3], "x", "!", "ключ", token + "AAAA"):
        request.page_token = wrong
        error = await identity.refused(identity.api_keys.ListApiKeys, request)
        assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "page_token")
    request.page_token = token
    request.state = api_keys.API_KEY_STATE_ACTIVE
    assert (await identity.refused(identity.api_keys.ListApiKeys, request)).field == "page_token"
    request = api_keys.ListApiKeysRequest(organization_id=organization_id, page_size=-1)
    assert (await identity.refused(identity.api_keys.ListApiKeys, request)).field == "page_size"


async def test_owner_renames_its_organization_but_does_not_set_its_limits(identity: Identity) -> None:
    organization_id = await identity.organization("Old")
    owner = await identity.member(organization_id, "owner")
    ids: dict[str, Any] = {"organization_id": organization_id}
    rename = organizations.UpdateOrganizationRequest(**ids, organization=organizations.Organization(display_name="New"))
    renamed = (await identity.call(identity.organizations.UpdateOrganization, rename, owner.secret)).organization
    assert renamed.display_name == "New"
    for wanted, field in (
        (organizations.Organization(rate_limits=RateLimits(burst_requests=9)), "organization.rate_limits"),
        (organizations.Organization(allowed_models=["a"]), "organization.allowed_models"),
    ):
        request = organizations.UpdateOrganizationRequest(**ids, organization=wanted)
        error = await identity.refused(identity.organizations.UpdateOrganization, request, owner.secret)
        assert (error.reason, error.field) == (Reason.PERMISSION_DENIED, field)
        changed = (await identity.call(identity.organizations.UpdateOrganization, request)).organization
    assert changed.rate_limits.burst_requests == 9
    assert list(changed.allowed_models) == ["a"]
    cleared = organizations.UpdateOrganizationRequest(**ids, update_mask=FieldMask(paths=["allowed_models"]))
    assert not (await identity.call(identity.organizations.UpdateOrganization, cleared)).organization.allowed_models


async def test_platforms_own_organization_cannot_be_suspended(identity: Identity) -> None:
    request = organizations.SuspendOrganizationRequest(organization_id=identity.platform.organization_id)
    error = await identity.refused(identity.organizations.SuspendOrganization, request)
    assert error.reason is Reason.FAILED_PRECONDITION


async def test_last_owner_stays(identity: Identity) -> None:
    organization_id = await identity.organization()
    one = await identity.member(organization_id, "owner", "one@example.com")
    ids: dict[str, Any] = {"organization_id": organization_id, "user_id": one.user_id}
    remove = users.RemoveUserRequest(**ids)
    demote = users.UpdateUserRequest(**ids, user=users.User(role_ids=["admin"]))
    for method, request in ((identity.users.RemoveUser, remove), (identity.users.UpdateUser, demote)):
        for secret in (one.secret, None):
            assert (await identity.refused(method, request, secret)).reason is Reason.FAILED_PRECONDITION


async def test_two_owners_who_leave_at_the_same_time_do_not_both_leave(identity: Identity, database_url: str) -> None:
    organization_id = await identity.organization()
    owners = [await identity.member(organization_id, "owner", f"{name}@example.com") for name in ("one", "other")]
    connection = await asyncpg.connect(database_url)
    async with connection.transaction():
        # Both have to wait here for their turn, so neither can judge by what the other is about to change.
        await connection.execute("SELECT FROM organizations WHERE organization_id = $1 FOR UPDATE", organization_id)
        removals = [
            asyncio.create_task(
                identity.call(
                    identity.users.RemoveUser,
                    users.RemoveUserRequest(organization_id=organization_id, user_id=owner.user_id),
                )
            )
            for owner in owners
        ]
        async with asyncio.timeout(5):
            while True:
                waiting = await connection.fetchval("SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted")
                if waiting == len(removals):
                    break
                await asyncio.sleep(0.02)
    await connection.close()
    outcomes = await asyncio.gather(*removals, return_exceptions=True)
    (failed,) = (outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError))
    assert from_rpc_error(failed).reason is Reason.FAILED_PRECONDITION
    listed = await identity.call(
        identity.users.ListUsers, users.ListUsersRequest(organization_id=organization_id, role_id="owner")
    )
    assert len(listed.users) == 1


async def test_nobody_gives_a_role_that_holds_more_than_they_do(identity: Identity) -> None:
    organization_id = await identity.organization()
    owner = await identity.member(organization_id, "owner")
    admin = await identity.member(organization_id, "admin")
    manager = await identity.member(organization_id, "manager")
    for secret, role_id in ((admin.secret, "owner"), (manager.secret, "admin")):
        request = users.CreateUserRequest(
            organization_id=organization_id, user=users.User(email="new@example.com", role_ids=[role_id])
        )
        error = await identity.refused(identity.users.CreateUser, request, secret)
        assert (error.reason, error.field) == (Reason.PERMISSION_DENIED, "user.role_ids")
    promote_itself = users.UpdateUserRequest(
        organization_id=organization_id, user_id=admin.user_id, user=users.User(role_ids=["owner"])
    )
    error = await identity.refused(identity.users.UpdateUser, promote_itself, admin.secret)
    assert error.reason is Reason.PERMISSION_DENIED
    remove_owner = users.RemoveUserRequest(organization_id=organization_id, user_id=owner.user_id)
    error = await identity.refused(identity.users.RemoveUser, remove_owner, admin.secret)
    assert error.reason is Reason.PERMISSION_DENIED
    await create_user(identity, organization_id, manager.secret, email="dev@example.com", role_ids=["developer"])
    account = service_accounts.CreateServiceAccountRequest(
        organization_id=organization_id,
        service_account=service_accounts.ServiceAccount(display_name="Root", role_ids=["owner"]),
    )
    error = await identity.refused(identity.service_accounts.CreateServiceAccount, account, admin.secret)
    assert (error.reason, error.field) == (Reason.PERMISSION_DENIED, "service_account.role_ids")


@pytest.mark.parametrize(
    ("user", "field"),
    [
        ({"email": ""}, "user.email"),
        ({"email": "nobody"}, "user.email"),
        ({"email": "a@b"}, "user.email"),
        ({"email": "a b@example.com"}, "user.email"),
        ({"email": f"{'a' * 65}@example.com"}, "user.email"),
        ({"email": f"a@{'b' * 60}.{'c' * 60}.{'d' * 60}.{'e' * 60}.{'f' * 60}"}, "user.email"),
        ({"display_name": "x" * 201}, "user.display_name"),
        ({"display_name": "a\u2028b"}, "user.display_name"),
        ({"role_ids": ["no_such_role"]}, "user.role_ids"),
        ({"role_ids": ["platform_admin"]}, "user.role_ids"),
        ({"role_ids": ["\x00"]}, "user.role_ids"),
        ({"role_ids": ["analyst", "analyst"]}, "user.role_ids"),
    ],
)
async def test_bad_field_of_a_user_is_named(identity: Identity, user: dict[str, Any], field: str) -> None:
    organization_id = await identity.organization()
    wanted = users.User(**{"email": "a@example.com", **user})
    request = users.CreateUserRequest(organization_id=organization_id, user=wanted)
    error = await identity.refused(identity.users.CreateUser, request)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)


async def test_person_is_one_user_in_two_organizations_with_names_and_roles_of_each(identity: Identity) -> None:
    one, other = await identity.organization("One"), await identity.organization("Other")
    first = await create_user(identity, one, email="Ann@Example.com", display_name="Ann", role_ids=["owner"])
    second = await create_user(identity, other, email="ann@example.com", display_name="A.", role_ids=["analyst"])
    assert first.user_id == second.user_id
    request = users.GetUserRequest(organization_id=one, user_id=first.user_id)
    assert (await identity.call(identity.users.GetUser, request)).user == first
    again = users.CreateUserRequest(organization_id=one, user=users.User(email="ANN@example.com"))
    error = await identity.refused(identity.users.CreateUser, again)
    assert (error.reason, error.field) == (Reason.ALREADY_EXISTS, "user.email")
    found = await identity.call(
        identity.users.ListUsers, users.ListUsersRequest(organization_id=one, email="ann@EXAMPLE.com")
    )
    assert [user.user_id for user in found.users] == [first.user_id]
    none = await identity.call(identity.users.ListUsers, users.ListUsersRequest(organization_id=one, role_id="analyst"))
    assert not none.users


async def test_names_of_service_accounts_are_unique_in_their_organization(identity: Identity) -> None:
    organization_id = await identity.organization()
    first = await identity.service_account(organization_id, "Worker")
    create = service_accounts.CreateServiceAccountRequest(
        organization_id=organization_id, service_account=service_accounts.ServiceAccount(display_name="Worker")
    )
    other = await identity.service_account(organization_id, "Other")
    rename = service_accounts.UpdateServiceAccountRequest(
        organization_id=organization_id,
        service_account_id=other.service_account_id,
        service_account=service_accounts.ServiceAccount(display_name="Worker"),
    )
    for method, request in (
        (identity.service_accounts.CreateServiceAccount, create),
        (identity.service_accounts.UpdateServiceAccount, rename),
    ):
        error = await identity.refused(method, request)
        assert (error.reason, error.field) == (Reason.ALREADY_EXISTS, "service_account.display_name")
    delete = service_accounts.DeleteServiceAccountRequest(
        organization_id=organization_id, service_account_id=first.service_account_id
    )
    await identity.call(identity.service_accounts.DeleteServiceAccount, delete)
    assert (await identity.refused(identity.service_accounts.DeleteServiceAccount, delete)).reason is Reason.NOT_FOUND
    await identity.call(identity.service_accounts.CreateServiceAccount, create)


async def test_custom_role_from_its_making_to_its_end(identity: Identity) -> None:
    organization_id = await identity.organization()
    ids: dict[str, Any] = {"organization_id": organization_id}
    wanted = roles.Role(display_name="Reader", permissions=["usage.query", "users.get"])
    role = (await identity.call(identity.roles.CreateRole, roles.CreateRoleRequest(**ids, role=wanted))).role
    user = await create_user(identity, organization_id, email="a@example.com", role_ids=[role.role_id])
    key = await identity.key(organization_id, "usage.query", user_id=user.user_id)
    assert list((await identity.authenticate(key.secret)).permissions) == ["usage.query"]
    narrowed = roles.UpdateRoleRequest(**ids, role_id=role.role_id, role=roles.Role(permissions=["users.get"]))
    await identity.call(identity.roles.UpdateRole, narrowed)
    assert not (await identity.authenticate(key.secret)).permissions
    delete = roles.DeleteRoleRequest(**ids, role_id=role.role_id)
    assert (await identity.refused(identity.roles.DeleteRole, delete)).reason is Reason.FAILED_PRECONDITION
    await identity.call(identity.users.RemoveUser, users.RemoveUserRequest(**ids, user_id=user.user_id))
    await identity.call(identity.roles.DeleteRole, delete)
    assert (
        await identity.refused(identity.roles.GetRole, roles.GetRoleRequest(**ids, role_id=role.role_id))
    ).reason is Reason.NOT_FOUND


async def test_role_holds_nothing_that_its_creator_or_no_tenant_can_hold(identity: Identity) -> None:
    organization_id = await identity.organization()
    admin = await identity.member(organization_id, "admin")
    for permissions, secret, reason in (
        (["organizations.create"], None, Reason.INVALID_ARGUMENT),
        (["models.create"], None, Reason.INVALID_ARGUMENT),
        (["no_such.permission"], None, Reason.INVALID_ARGUMENT),
        ([], None, Reason.INVALID_ARGUMENT),
        (["organizations.update"], admin.secret, Reason.PERMISSION_DENIED),
    ):
        request = roles.CreateRoleRequest(
            organization_id=organization_id, role=roles.Role(display_name="More", permissions=permissions)
        )
        error = await identity.refused(identity.roles.CreateRole, request, secret)
        assert (error.reason, error.field) == (reason, "role.permissions")


async def test_roles_are_listed_built_in_first_over_pages(identity: Identity) -> None:
    organization_id = await identity.organization()
    for name in ("One", "Two"):
        wanted = roles.Role(display_name=name, permissions=["usage.query"])
        await identity.call(
            identity.roles.CreateRole, roles.CreateRoleRequest(organization_id=organization_id, role=wanted)
        )
    seen: list[str] = []
    request = roles.ListRolesRequest(organization_id=organization_id, page_size=3)
    while not seen or request.page_token:
        page = await identity.call(identity.roles.ListRoles, request)
        seen += [role.display_name for role in page.roles]
        request.page_token = page.next_page_token
    assert seen[:6] == ["Admin", "Analyst", "Developer", "Finance", "Manager", "Owner"]
    assert sorted(seen[6:]) == ["One", "Two"]


async def test_built_in_role_cannot_be_changed(identity: Identity) -> None:
    ids: dict[str, Any] = {"organization_id": await identity.organization(), "role_id": "developer"}
    update = roles.UpdateRoleRequest(**ids, role=roles.Role(display_name="x"))
    assert (await identity.refused(identity.roles.UpdateRole, update)).reason is Reason.FAILED_PRECONDITION
    delete = roles.DeleteRoleRequest(**ids)
    assert (await identity.refused(identity.roles.DeleteRole, delete)).reason is Reason.FAILED_PRECONDITION
    found = (await identity.call(identity.roles.GetRole, roles.GetRoleRequest(**ids))).role
    assert found.built_in
    assert "inference.create" in found.permissions
