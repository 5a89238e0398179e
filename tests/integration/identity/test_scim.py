"""What a directory keeps by SCIM: the life of users and groups, the roles that groups give, and how both are found."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from aiaas.identity.v1 import federation_service_pb2, scim_service_pb2_grpc, user_service_pb2
from aiaas.identity.v1 import scim_service_pb2 as pb
from identity.roles import BUILT_IN
from mesh.errors import PlatformError, Reason
from tests.integration.identity.harness import Identity, Member

USERS, GROUPS = pb.SCIM_RESOURCE_TYPE_USER, pb.SCIM_RESOURCE_TYPE_GROUP
PATCH = "urn:ietf:params:scim:api:messages:2.0:PatchOp"
ADA = {
    "schemas": ["urn:ietf:params:scim:schemas:core:2.0:User"],
    "userName": "ada@example.com",
    "externalId": "0042",
    "name": {"givenName": "Ada", "familyName": "Lovelace"},
    "emails": [{"value": "ada@example.com", "primary": True, "type": "work"}],
    "active": True,
    "title": "passed over",
}


@dataclass
class Directory:
    """A directory of one organization, which calls with a key of its own."""

    identity: Identity
    owner: Member
    secret: str

    def __post_init__(self) -> None:
        self.stub = scim_service_pb2_grpc.ScimServiceStub(self.identity.channel)

    @property
    def organization_id(self) -> str:
        return self.owner.organization_id

    async def create(self, document: dict[str, Any], kind: Any = USERS) -> dict[str, Any]:
        request = pb.CreateScimResourceRequest(resource_type=kind, resource_json=json.dumps(document).encode())
        return read((await self.identity.call(self.stub.CreateScimResource, request, self.secret)).resource)

    async def get(self, resource_id: str, kind: Any = USERS, **fields: Any) -> dict[str, Any]:
        request = pb.GetScimResourceRequest(resource_type=kind, scim_resource_id=resource_id, **fields)
        return read((await self.identity.call(self.stub.GetScimResource, request, self.secret)).resource)

    async def find(
        self, filter_text: str = "", kind: Any = USERS, start_index: int = 1, count: int = 100
    ) -> tuple[list[str], int]:
        request = pb.ListScimResourcesRequest(
            resource_type=kind, filter=filter_text, start_index=start_index, count=count
        )
        found = await self.identity.call(self.stub.ListScimResources, request, self.secret)
        return [resource.scim_resource_id for resource in found.resources], found.total_results

    async def replace(self, resource_id: str, document: dict[str, Any], kind: Any = USERS) -> dict[str, Any]:
        request = pb.ReplaceScimResourceRequest(
            resource_type=kind, scim_resource_id=resource_id, resource_json=json.dumps(document).encode()
        )
        return read((await self.identity.call(self.stub.ReplaceScimResource, request, self.secret)).resource)

    async def patch(
        self, resource_id: str, *operations: dict[str, Any], kind: Any = USERS, version: str = ""
    ) -> dict[str, Any]:
        request = self.patching(resource_id, *operations, kind=kind, version=version)
        return read((await self.identity.call(self.stub.PatchScimResource, request, self.secret)).resource)

    def patching(
        self, resource_id: str, *operations: dict[str, Any], kind: Any = USERS, version: str = ""
    ) -> pb.PatchScimResourceRequest:
        patch = json.dumps({"schemas": [PATCH], "Operations": operations}).encode()
        return pb.PatchScimResourceRequest(
            resource_type=kind, scim_resource_id=resource_id, patch_json=patch, version=version
        )

    async def delete(self, resource_id: str, kind: Any = USERS) -> None:
        request = pb.DeleteScimResourceRequest(resource_type=kind, scim_resource_id=resource_id)
        await self.identity.call(self.stub.DeleteScimResource, request, self.secret)

    async def update_settings(self, *mask: str, secret: str | None = None, **fields: Any) -> pb.ScimSettings:
        request = self.updating(*mask, **fields)
        answer = await self.identity.call(self.stub.UpdateScimSettings, request, secret or self.owner.secret)
        return answer.scim_settings

    def updating(self, *mask: str, **fields: Any) -> pb.UpdateScimSettingsRequest:
        return pb.UpdateScimSettingsRequest(
            organization_id=self.organization_id,
            scim_settings=pb.ScimSettings(**fields),
            update_mask=FieldMask(paths=mask),
        )

    async def member(self, user_id: str) -> user_service_pb2.User:
        request = user_service_pb2.GetUserRequest(organization_id=self.organization_id, user_id=user_id)
        return (await self.identity.call(self.identity.users.GetUser, request)).user

    async def roles(self, user_id: str) -> set[str]:
        return set((await self.member(user_id)).role_ids)


def read(resource: pb.ScimResource) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(resource.resource_json)
    assert document["id"] == resource.scim_resource_id
    return document


def gives(**group_roles: str) -> list[federation_service_pb2.GroupRoles]:
    return [federation_service_pb2.GroupRoles(group=group, role_ids=[role]) for group, role in group_roles.items()]


async def new_directory(identity: Identity, email: str) -> Directory:
    owner = await identity.member(await identity.organization(), "owner", email)
    key = await identity.key(owner.organization_id, "scim.*", secret=owner.secret, user_id=owner.user_id)
    directory = Directory(identity, owner, key.secret)
    await directory.update_settings(enabled=True)
    return directory


@pytest.fixture
async def directory(identity: Identity) -> Directory:
    return await new_directory(identity, "owner@example.com")


async def test_user_is_made_found_changed_and_removed(directory: Directory) -> None:
    made = await directory.create(ADA)
    user_id = made["id"]
    assert made["userName"] == "ada@example.com"
    assert made["displayName"] == "Ada Lovelace"
    assert made["externalId"] == "0042"
    assert made["active"] is True
    assert made["meta"]["resourceType"] == "User"
    assert "title" not in made
    assert (await directory.member(user_id)).display_name == "Ada Lovelace"
    changed = await directory.replace(user_id, {**ADA, "displayName": "Countess", "externalId": "0043"})
    assert changed["displayName"] == "Countess"
    assert changed["meta"]["version"] != made["meta"]["version"]
    assert (await directory.member(user_id)).display_name == "Countess"
    assert await directory.get(user_id) == changed
    await directory.delete(user_id)
    request = pb.GetScimResourceRequest(resource_type=USERS, scim_resource_id=user_id)
    error = await directory.identity.refused(directory.stub.GetScimResource, request, directory.secret)
    assert error.reason is Reason.NOT_FOUND
    assert (await directory.create(ADA))["id"] == user_id


async def test_deactivated_user_acts_no_more_and_gets_back_what_it_held(directory: Directory) -> None:
    user_id = (await directory.create(ADA))["id"]
    await directory.identity.call(
        directory.identity.users.UpdateUser,
        user_service_pb2.UpdateUserRequest(
            organization_id=directory.organization_id,
            user_id=user_id,
            user=user_service_pb2.User(role_ids=["developer"]),
        ),
    )
    key = await directory.identity.key(directory.organization_id, "inference.create", user_id=user_id)
    assert await directory.identity.authenticate(key.secret)
    # As one directory writes it, and as another does.
    off = await directory.patch(user_id, {"op": "Replace", "path": "active", "value": "False"})
    assert off["active"] is False
    assert await directory.identity.is_refused(key.secret)
    with pytest.raises(Exception, match="does not exist"):
        await directory.member(user_id)
    assert (await directory.find('userName eq "ADA@example.com" and active eq false'))[0] == [user_id]
    on = await directory.patch(user_id, {"op": "replace", "value": {"active": True}})
    assert on["active"] is True
    assert await directory.roles(user_id) == {"developer"}
    assert await directory.identity.authenticate(key.secret)
    await directory.delete(user_id)
    await directory.create(ADA)
    assert await directory.identity.is_refused(key.secret)


async def test_members_made_otherwise_are_there_too(directory: Directory) -> None:
    assert await directory.find('userName eq "owner@example.com"') == ([directory.owner.user_id], 1)
    changed = await directory.patch(
        directory.owner.user_id, {"op": "add", "path": "externalId", "value": "1"}, {"op": "remove", "path": "name"}
    )
    assert changed["externalId"] == "1"
    assert await directory.find('externalId eq "1"') == ([directory.owner.user_id], 1)


async def test_last_owner_stays(directory: Directory) -> None:
    owner_id = directory.owner.user_id
    request = pb.DeleteScimResourceRequest(resource_type=USERS, scim_resource_id=owner_id)
    error = await directory.identity.refused(directory.stub.DeleteScimResource, request, directory.secret)
    assert error.reason is Reason.FAILED_PRECONDITION
    off = directory.patching(owner_id, {"op": "replace", "path": "active", "value": False})
    error = await directory.identity.refused(directory.stub.PatchScimResource, off, directory.secret)
    assert error.reason is Reason.FAILED_PRECONDITION
    assert await directory.identity.authenticate(directory.owner.secret)


async def test_groups_give_roles_and_take_them_again(directory: Directory) -> None:
    ada = (await directory.create(ADA))["id"]
    bob = (await directory.create({"userName": "bob@example.com"}))["id"]
    await directory.update_settings(
        "group_roles", "default_role_ids", group_roles=gives(Eng="developer"), default_role_ids=["analyst"]
    )
    assert await directory.roles(ada) == {"analyst"}
    group = await directory.create({"displayName": "Eng", "externalId": "g1", "members": [{"value": ada}]}, GROUPS)
    assert [member["display"] for member in group["members"]] == ["Ada Lovelace"]
    assert await directory.roles(ada) == {"analyst", "developer"}
    assert (await directory.get(ada))["groups"][0]["display"] == "Eng"
    await directory.patch(group["id"], {"op": "add", "path": "members", "value": [{"value": bob}]}, kind=GROUPS)
    assert await directory.roles(bob) == {"analyst", "developer"}
    path = f'members[value eq "{ada}"]'
    left = await directory.patch(group["id"], {"op": "remove", "path": path}, kind=GROUPS)
    assert [member["value"] for member in left["members"]] == [bob]
    assert await directory.roles(ada) == {"analyst"}
    await directory.update_settings("group_roles", group_roles=gives(Eng="finance"))
    assert await directory.roles(bob) == {"analyst", "finance"}
    await directory.patch(group["id"], {"op": "replace", "value": {"displayName": "Others"}}, kind=GROUPS)
    assert await directory.roles(bob) == {"analyst"}
    await directory.update_settings("group_roles", group_roles=gives(Others="finance"))
    await directory.delete(group["id"], GROUPS)
    assert await directory.roles(bob) == {"analyst"}
    assert await directory.find(kind=GROUPS) == ([], 0)


async def test_settings_give_what_who_writes_them_holds(directory: Directory) -> None:
    admin = await directory.identity.member(directory.organization_id, "admin")
    for fields in ({"group_roles": gives(Eng="owner")}, {"default_role_ids": ["owner"]}):
        request = directory.updating(**fields)
        error = await directory.identity.refused(directory.stub.UpdateScimSettings, request, admin.secret)
        assert error.reason is Reason.PERMISSION_DENIED


async def test_users_are_found_by_filters_and_pages(directory: Directory) -> None:
    ada = (await directory.create(ADA))["id"]
    bob = (await directory.create({"userName": "bob@example.com", "displayName": 'B "Bob"'}))["id"]
    everybody = sorted([directory.owner.user_id, ada, bob])
    assert await directory.find() == (everybody, 3)
    assert await directory.find(start_index=2, count=1) == (everybody[1:2], 3)
    assert await directory.find(count=0) == ([], 3)
    assert await directory.find(start_index=-5, count=1) == (everybody[:1], 3)
    for text, found in (
        ('username EQ "BOB@example.com"', [bob]),
        ('externalId eq "0042"', [ada]),
        ('emails.value eq "ada@example.com"', [ada]),
        ('displayName eq "b \\"bob\\""', [bob]),
        ('userName eq "ada@example.com" AND externalId eq "0042"', [ada]),
        ('userName eq "ada@example.com" and externalId eq "1"', []),
        ('userName eq "\' OR 1=1 --"', []),
    ):
        assert (await directory.find(text))[0] == found, text


@pytest.mark.parametrize(
    "text",
    ["userName", 'userName co "a"', 'password eq "a"', 'userName eq "a" or id eq "b"', 'userName eq "a" and', "(" * 99],
)
async def test_filter_that_is_not_known_is_refused(directory: Directory, text: str) -> None:
    request = pb.ListScimResourcesRequest(resource_type=USERS, filter=text, count=1)
    error = await directory.identity.refused(directory.stub.ListScimResources, request, directory.secret)
    assert (error.reason, error.details["scim_type"]) == (Reason.INVALID_ARGUMENT, "invalidFilter")


@pytest.mark.parametrize(
    ("document", "scim_type"),
    [
        (ADA, "uniqueness"),
        ({"userName": "ADA@example.com"}, "uniqueness"),
        ({"userName": "ada", "emails": [{"value": "ada@example.com"}]}, "uniqueness"),
        ({"userName": "ada@example.com", "emails": [{"value": "other@example.com"}]}, "uniqueness"),
        ({"userName": "no address"}, "invalidValue"),
        ({}, "invalidValue"),
        ({"userName": 7}, "invalidValue"),
        ({"userName": "x@example.com", "active": "perhaps"}, "invalidValue"),
        ({"userName": "x@example.com", "emails": "x@example.com"}, "invalidValue"),
    ],
    ids=str,
)
async def test_document_that_is_wrong_is_refused(
    directory: Directory, document: dict[str, Any], scim_type: str
) -> None:
    await directory.create(ADA)
    request = pb.CreateScimResourceRequest(resource_type=USERS, resource_json=json.dumps(document).encode())
    error = await directory.identity.refused(directory.stub.CreateScimResource, request, directory.secret)
    assert error.details["scim_type"] == scim_type
    assert (await directory.find())[1] == 2


async def test_address_is_the_platforms(directory: Directory) -> None:
    user_id = (await directory.create(ADA))["id"]
    path = 'emails[type eq "work"].value'
    request = directory.patching(user_id, {"op": "replace", "path": path, "value": "mallory@example.com"})
    error = await directory.identity.refused(directory.stub.PatchScimResource, request, directory.secret)
    assert error.details["scim_type"] == "mutability"
    assert (await directory.member(user_id)).email == "ada@example.com"


async def test_patch_happens_as_a_whole_or_not_at_all(directory: Directory) -> None:
    user_id = (await directory.create(ADA))["id"]
    request = directory.patching(
        user_id, {"op": "replace", "path": "displayName", "value": "New"}, {"op": "replace", "path": "id", "value": "x"}
    )
    error = await directory.identity.refused(directory.stub.PatchScimResource, request, directory.secret)
    assert error.details["scim_type"] == "mutability"
    assert (await directory.get(user_id))["displayName"] == "Ada Lovelace"


async def test_change_of_another_version_is_refused(directory: Directory) -> None:
    made = await directory.create(ADA)
    version = made["meta"]["version"].strip('"')
    operation = {"op": "replace", "path": "name.givenName", "value": "Augusta"}
    assert (await directory.patch(made["id"], operation, version=version))["name"]["givenName"] == "Augusta"
    request = directory.patching(made["id"], operation, version=version)
    error = await directory.identity.refused(directory.stub.PatchScimResource, request, directory.secret)
    assert (error.reason, error.field) == (Reason.FAILED_PRECONDITION, "version")


async def test_only_the_attributes_that_are_asked_for(directory: Directory) -> None:
    user_id = (await directory.create(ADA))["id"]
    assert set(await directory.get(user_id, attributes=["USERNAME"])) == {"id", "schemas", "meta", "userName"}
    assert "groups" not in await directory.get(user_id, excluded_attributes=["groups"])


async def test_another_organizations_user_and_group_are_not_found(directory: Directory) -> None:
    identity = directory.identity
    other = await new_directory(identity, "other@example.com")
    user_id = (await other.create(ADA))["id"]
    group_id = (await other.create({"displayName": "Eng", "members": [{"value": user_id}]}, GROUPS))["id"]
    for kind, resource_id in ((USERS, user_id), (USERS, other.owner.user_id), (GROUPS, group_id), (USERS, group_id)):
        named: Any = {"resource_type": kind, "scim_resource_id": resource_id}
        requests: list[tuple[Any, Any]] = [
            (directory.stub.GetScimResource, pb.GetScimResourceRequest(**named)),
            (directory.stub.ReplaceScimResource, pb.ReplaceScimResourceRequest(**named, resource_json=b"{}")),
            (directory.stub.PatchScimResource, directory.patching(resource_id, {"op": "remove"}, kind=kind)),
            (directory.stub.DeleteScimResource, pb.DeleteScimResourceRequest(**named)),
        ]
        for method, request in requests:
            error = await identity.refused(method, request, directory.secret)
            assert error.reason is Reason.NOT_FOUND
    making = pb.CreateScimResourceRequest(
        resource_type=GROUPS,
        resource_json=json.dumps({"displayName": "Eng", "members": [{"value": user_id}]}).encode(),
    )
    error = await identity.refused(directory.stub.CreateScimResource, making, directory.secret)
    assert error.details["scim_type"] == "invalidValue"
    listing = pb.ListScimResourcesRequest(organization_id=other.organization_id, resource_type=USERS, count=1)
    error = await identity.refused(directory.stub.ListScimResources, listing, directory.secret)
    assert error.reason is Reason.NOT_FOUND
    assert await directory.find() == ([directory.owner.user_id], 1)


async def test_nothing_is_served_until_scim_is_enabled_and_to_no_key_without_the_permission(
    directory: Directory,
) -> None:
    request = pb.ListScimResourcesRequest(resource_type=USERS, count=1)
    key = await directory.identity.key(directory.organization_id, *BUILT_IN["developer"].permissions)
    error = await directory.identity.refused(directory.stub.ListScimResources, request, key.secret)
    assert error.reason is Reason.PERMISSION_DENIED
    await directory.find()
    asked = pb.GetScimSettingsRequest(organization_id=directory.organization_id)
    settings = await directory.identity.call(directory.stub.GetScimSettings, asked, directory.owner.secret)
    assert settings.scim_settings.HasField("last_use_time")
    await directory.update_settings("enabled", enabled=False)
    error = await directory.identity.refused(directory.stub.ListScimResources, request, directory.secret)
    assert error.reason is Reason.NOT_FOUND


async def test_settings_change_only_as_seen(directory: Directory) -> None:
    settings = await directory.update_settings("default_role_ids", default_role_ids=["analyst"])
    await directory.update_settings("default_role_ids", default_role_ids=["finance"], etag=settings.etag)
    request = directory.updating("default_role_ids", default_role_ids=["analyst"], etag=settings.etag)
    error: PlatformError = await directory.identity.refused(
        directory.stub.UpdateScimSettings, request, directory.owner.secret
    )
    assert error.reason is Reason.FAILED_PRECONDITION
