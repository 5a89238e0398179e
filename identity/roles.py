"""Which permissions exist, which roles are built in and what scopes mean; it never knows who holds a role.

A permission exists when an RPC of identity, router or analytics declares it in its contract. A role that names another
one fails at import, so that a renamed permission cannot silently stop being granted. A permission of an RPC whose
request names no organization is the platform's unless it is listed here, so that a new one is nobody's by oversight.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType

from mesh.auth import policy_of

_CONTRACTS = ("aiaas.identity.v1", "aiaas.router.v1", "aiaas.analytics.v1")
_NEVER = datetime.fromtimestamp(0, UTC)

OWNER = "owner"
PLATFORM_ADMIN = "platform_admin"
PLATFORM_ORGANIZATION_ID = "org_platform"
"""The organization of those who run the platform; the role platform_admin exists in it alone."""


def _declared() -> Iterator[tuple[str, bool]]:
    """Each permission that an RPC declares, and whether the RPC acts within an organization that its request names."""
    for contract in _CONTRACTS:
        for module in pkgutil.iter_modules(importlib.import_module(contract).__path__, f"{contract}."):
            if module.name.endswith("_service_pb2"):
                for service in importlib.import_module(module.name).DESCRIPTOR.services_by_name.values():
                    for method in service.methods:
                        if permission := policy_of(method).permission:
                            yield permission, "organization_id" in method.input_type.fields_by_name


ALL_PERMISSIONS: frozenset[str] = frozenset(permission for permission, _ in _declared())
"""Every permission that an RPC declares."""

DEFAULT_SCOPES = ("inference.create", "inference.list_models")
"""What an API key without scopes carries."""


def expand(scope: str) -> frozenset[str]:
    """The permissions that "resource.verb" or "resource.*" names; none if no RPC declares it."""
    resource, _, verb = scope.partition(".")
    if verb == "*" and resource:
        return frozenset(name for name in ALL_PERMISSIONS if name.startswith(f"{resource}."))
    return ALL_PERMISSIONS & {scope}


def expand_all(scopes: Iterable[str]) -> frozenset[str]:
    """The permissions that the scopes of an API key name together."""
    return frozenset().union(*map(expand, tuple(scopes) or DEFAULT_SCOPES))


def _permissions(*scopes: str) -> frozenset[str]:
    for scope in scopes:
        if not expand(scope):
            raise ValueError(f"no RPC declares the permission {scope}")
    return expand_all(scopes)


@dataclass(frozen=True, slots=True)
class Role:
    """A named set of permissions. `organization_id` is empty for a built-in role.

    `own_keys_only` confines its holders to API keys that act as themselves.
    """

    role_id: str
    display_name: str
    permissions: frozenset[str]
    organization_id: str = ""
    own_keys_only: bool = False
    create_time: datetime = _NEVER
    update_time: datetime = _NEVER
    revision: int = field(default=1, compare=False)

    @property
    def built_in(self) -> bool:
        """Whether it is the same everywhere and cannot be changed."""
        return not self.organization_id


# Within an organization by their requests, and yet not for the organization to decide.
_PLATFORMS = _permissions("organizations.suspend", "organizations.delete", "statements.issue", "budget_leases.settle")
# In no organization by their requests, and yet for every tenant: inference is in the caller's own.
_EVERYBODYS = _permissions("inference.*", "prices.list")

PLATFORM_PERMISSIONS: frozenset[str] = (
    frozenset(permission for permission, in_organization in _declared() if not in_organization) - _EVERYBODYS
) | _PLATFORMS
"""What concerns more than one organization, and so belongs to platform_admin alone."""

TENANT_PERMISSIONS: frozenset[str] = ALL_PERMISSIONS - PLATFORM_PERMISSIONS
"""The most that anybody can hold within an organization."""

_READS_USAGE = _permissions(
    "organizations.get", "usage.query", "usage.list_records", "spend.*", "exports.get", "exports.list"
)
_READS_MONEY = _permissions(
    *("prices.list", "statements.get", "statements.list", "budgets.get", "budgets.list", "budget_alerts.list"),
    *("budget_overrides.get", "budget_overrides.list", "budget_leases.list"),
)

BUILT_IN: Mapping[str, Role] = MappingProxyType(
    {
        role.role_id: role
        for role in (
            Role("admin", "Admin", TENANT_PERMISSIONS - _permissions("organizations.update")),
            Role("analyst", "Analyst", _READS_USAGE | _permissions("reliability.query", "inference.list_models")),
            Role(
                "developer",
                "Developer",
                _permissions("organizations.get", "inference.*", "api_keys.*", "usage.query"),
                own_keys_only=True,
            ),
            Role("finance", "Finance", _READS_USAGE | _READS_MONEY | _permissions("usage.explain")),
            Role(
                "manager",
                "Manager",
                _READS_USAGE
                | _READS_MONEY
                | _permissions("users.create", "users.get", "users.list", "users.update", "invites.*")
                | _permissions("service_accounts.*", "api_keys.*", "roles.get", "roles.list", "budget_overrides.create")
                | _permissions("inference.*", "usage.explain", "reliability.query"),
            ),
            Role(OWNER, "Owner", TENANT_PERMISSIONS),
            Role(PLATFORM_ADMIN, "Platform administrator", ALL_PERMISSIONS),
        )
    }
)
"""The built-in roles by id, in the order of their ids."""

PROTECTED = (OWNER, PLATFORM_ADMIN)
"""Roles that only somebody who holds as much can take from their holders."""


def is_known_in(role_id: str, organization_id: str) -> bool:
    """Whether a built-in role of this id can be held in the organization."""
    return role_id in BUILT_IN and (role_id != PLATFORM_ADMIN or organization_id == PLATFORM_ORGANIZATION_ID)


def held_through(role_ids: Iterable[str], custom_permissions: Iterable[str], organization_id: str) -> frozenset[str]:
    """The permissions of a holder of `role_ids`, of which the custom ones grant `custom_permissions` together."""
    held = TENANT_PERMISSIONS & frozenset(custom_permissions)
    for role_id in role_ids:
        if is_known_in(role_id, organization_id):
            held |= BUILT_IN[role_id].permissions
    return held


def confined_to_own_keys(role_ids: Iterable[str], custom_permissions: Iterable[str]) -> bool:
    """Whether a holder may use its permissions on API keys only for keys that act as itself.

    So it is when all that lets it touch keys is a role with `own_keys_only`; custom roles never confine.
    """
    granting = [
        BUILT_IN[role_id] for role_id in role_ids if role_id in BUILT_IN and _on_keys(BUILT_IN[role_id].permissions)
    ]
    return bool(granting) and all(role.own_keys_only for role in granting) and not _on_keys(custom_permissions)


def _on_keys(permissions: Iterable[str]) -> bool:
    return any(permission.startswith("api_keys.") for permission in permissions)
