"""Roles, scopes and what they hold."""

import pytest

from identity import roles
from identity.roles import ALL_PERMISSIONS, BUILT_IN, PLATFORM_ORGANIZATION_ID, PLATFORM_PERMISSIONS, TENANT_PERMISSIONS


def test_every_permission_of_a_role_is_declared_by_an_rpc() -> None:
    for role in BUILT_IN.values():
        assert role.permissions, role.role_id
        assert role.permissions <= ALL_PERMISSIONS, role.role_id


def test_permissions_come_from_all_three_services() -> None:
    assert {"api_keys.create", "inference.create", "models.create", "usage.query"} <= ALL_PERMISSIONS


def test_role_that_names_an_undeclared_permission_is_an_error() -> None:
    for scope in ("no_such.permission", "no_such.*", "usage.", "*"):
        with pytest.raises(ValueError, match="no RPC declares"):
            roles._permissions(scope)


def test_only_the_platform_administrator_holds_what_concerns_every_organization() -> None:
    for role_id, role in BUILT_IN.items():
        assert bool(role.permissions & PLATFORM_PERMISSIONS) == (role_id == "platform_admin")
    assert BUILT_IN["platform_admin"].permissions == ALL_PERMISSIONS
    for scope in ("models.*", "backends.*", "prices.create", "signing_keys.rotate", "routers.list"):
        assert roles.expand(scope) <= PLATFORM_PERMISSIONS
    assert {f"organizations.{verb}" for verb in ("create", "list", "suspend", "delete")} <= PLATFORM_PERMISSIONS


def test_owner_holds_everything_of_its_organization_and_every_other_role_less() -> None:
    assert BUILT_IN["owner"].permissions == TENANT_PERMISSIONS
    for role_id in ("admin", "manager", "developer", "analyst", "finance"):
        assert BUILT_IN[role_id].permissions < TENANT_PERMISSIONS


@pytest.mark.parametrize("role_id", ["analyst", "finance"])
def test_those_who_read_usage_change_nothing(role_id: str) -> None:
    verbs = {permission.partition(".")[2] for permission in BUILT_IN[role_id].permissions}
    assert verbs <= {"get", "list", "query", "list_records", "explain", "forecast", "list_models"}
    assert "usage.query" in BUILT_IN[role_id].permissions


def test_scopes_name_a_verb_or_a_whole_resource_and_none_mean_inference() -> None:
    assert roles.expand("usage.query") == {"usage.query"}
    assert roles.expand("usage.*") == {"usage.query", "usage.list_records", "usage.explain"}
    assert roles.expand_all(()) == {"inference.create", "inference.list_models"}
    for scope in ("", "*", ".*", "*.*", "usage", "usage.", "usage.none", "us.*", "usage.*.*", "usage .query"):
        assert not roles.expand(scope), scope


def test_platform_administrator_is_a_role_of_the_platforms_organization_alone() -> None:
    assert roles.held_through(["platform_admin"], [], PLATFORM_ORGANIZATION_ID) == ALL_PERMISSIONS
    assert not roles.held_through(["platform_admin"], [], "org_1")


def test_custom_role_never_grants_what_belongs_to_the_platform_or_to_nobody() -> None:
    granted = roles.held_through(["role_1"], ["usage.query", "organizations.create", "gone.permission"], "org_1")
    assert granted == {"usage.query"}


@pytest.mark.parametrize(
    ("role_ids", "custom_permissions", "confined"),
    [
        (["developer"], [], True),
        (["developer", "analyst"], [], True),
        (["developer", "role_1"], ["usage.query"], True),
        (["developer", "role_1"], ["api_keys.list"], False),
        (["developer", "manager"], [], False),
        (["owner"], [], False),
        (["analyst"], [], False),
    ],
)
def test_developer_is_confined_to_its_own_keys_unless_another_role_grants_more(
    role_ids: list[str], custom_permissions: list[str], confined: bool
) -> None:
    assert roles.confined_to_own_keys(role_ids, custom_permissions) is confined
