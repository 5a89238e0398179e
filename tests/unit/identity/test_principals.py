"""From what decides on a key to the principal."""

from dataclasses import replace

from identity import roles
from identity.api_keys import ApiKey
from identity.organizations import OrganizationState
from identity.principals import NO_MODEL, Credential, Holder, principal_of
from mesh.auth import RateLimits

KEY = ApiKey("key_1", "org_1", "Key", granted=frozenset({"usage.query", "inference.create", "organizations.create"}))
CREDENTIAL = Credential(KEY, b"", OrganizationState.ACTIVE, RateLimits(), (), None)


def test_key_without_an_owner_holds_what_its_creator_held_within_its_scopes() -> None:
    assert principal_of(CREDENTIAL).permissions == {"inference.create"}
    scoped = replace(CREDENTIAL, key=replace(KEY, scopes=("usage.*", "organizations.*")))
    assert principal_of(scoped).permissions == {"usage.query"}


def test_owners_roles_count_as_they_are_now_and_not_as_they_were() -> None:
    key = replace(KEY, service_account_id="sa_1", scopes=("usage.*",))
    holder = Holder(("finance",), frozenset(), acting=True)
    assert principal_of(replace(CREDENTIAL, key=key, holder=holder)).permissions == roles.expand("usage.*")
    nothing = Holder((), frozenset(), acting=True)
    assert not principal_of(replace(CREDENTIAL, key=key, holder=nothing)).permissions


def test_platform_needs_the_role_in_the_platforms_organization() -> None:
    holder = Holder(("platform_admin",), frozenset(), acting=True)
    for organization_id, platform in ((roles.PLATFORM_ORGANIZATION_ID, True), ("org_1", False)):
        key = replace(KEY, organization_id=organization_id, service_account_id="sa_1", scopes=("models.*",))
        principal = principal_of(replace(CREDENTIAL, key=key, holder=holder))
        assert principal.platform is platform
        assert bool(principal.permissions) is platform


def test_models_are_those_that_organization_and_key_both_allow() -> None:
    for of_organization, of_key, allowed in (
        ((), (), ()),
        (("a",), (), ("a",)),
        ((), ("a",), ("a",)),
        (("a", "b"), ("b", "c"), ("b",)),
        (("a",), ("b",), NO_MODEL),
    ):
        credential = replace(CREDENTIAL, key=replace(KEY, allowed_models=of_key), organization_models=of_organization)
        assert principal_of(credential).allowed_models == allowed


def test_neither_digest_nor_secret_is_in_a_representation() -> None:
    assert "hidden" not in repr(replace(CREDENTIAL, digest=b"hidden"))
