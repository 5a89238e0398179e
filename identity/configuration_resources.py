"""What a document names, in an organization: described as a document, and changed as one asks; it never decides what a
document may say.

Where two things have the same name, both are named by their ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from identity import fields
from identity.budgets import Budget, BudgetInterval, Budgets, BudgetUnit
from identity.configuration_documents import (
    BudgetItem,
    Change,
    ChangeKind,
    Document,
    Limits,
    MemberItem,
    ModelLimits,
    OrganizationSection,
    RoleItem,
    ServiceAccountItem,
)
from identity.custom_roles import Roles
from identity.organizations import Organization, Organizations, existing
from identity.roles import BUILT_IN, Role
from identity.service_accounts import ServiceAccount, ServiceAccounts
from identity.users import User, Users
from mesh.auth import ModelRateLimits, Principal, RateLimits
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

# More than any organization has, as everything is compared at once.
_ALL = 100_000
_PERMISSIONS: Mapping[str, str] = {
    "organization": "organizations",
    "role": "roles",
    "member": "users",
    "service_account": "service_accounts",
    "budget": "budgets",
}
_VERBS = {ChangeKind.CREATE: "create", ChangeKind.UPDATE: "update", ChangeKind.DELETE: "delete"}


class _Names:
    """Names of things by their ids, and the other way round."""

    def __init__(self, named: Iterable[tuple[str, str]], taken: Iterable[str] = ()) -> None:
        pairs = list(named)
        often = Counter([name for _, name in pairs] + list(taken))
        self._names = {thing_id: name if often[name] == 1 else thing_id for thing_id, name in pairs}
        self._ids = {name: thing_id for thing_id, name in self._names.items()}

    def name(self, thing_id: str) -> str:
        """What a document calls it; an id that is not known is its own name."""
        return self._names.get(thing_id, thing_id)

    def id(self, name: str) -> str:
        """What a document means; a name that is not known is an id, of a built-in role for example."""
        return self._ids.get(name, name)


async def current_document(stored: Transaction, organization_id: str) -> Document:
    """The organization as it is. Budgets of API keys are left out, as no document can name a key. Raises
    PlatformError(NOT_FOUND)."""
    organization = await existing(stored, organization_id)
    roles = await stored.roles.all(organization_id)
    role_names = _role_names(roles)
    members = await stored.users.page(organization_id, None, _ALL, "", "")
    accounts = await stored.service_accounts.page(organization_id, None, _ALL)
    budgets = [budget for budget in await _budgets(stored, organization_id) if not budget.api_key_id]
    budget_names = _Names((budget.budget_id, budget.display_name) for budget in budgets)
    emails = {member.user_id: member.email for member in members}
    account_names = {account.service_account_id: account.display_name for account in accounts}
    return Document(
        version=1,
        organization=OrganizationSection(
            rate_limits=_to_limits(organization.rate_limits), allowed_models=list(organization.allowed_models)
        ),
        roles=[RoleItem(name=role_names.name(role.role_id), permissions=sorted(role.permissions)) for role in roles],
        members=[
            MemberItem(
                email=member.email,
                display_name=member.display_name,
                roles=sorted(map(role_names.name, member.role_ids)),
            )
            for member in members
        ],
        service_accounts=[
            ServiceAccountItem(
                name=account.display_name,
                roles=sorted(map(role_names.name, account.role_ids)),
                disabled=account.disabled,
            )
            for account in accounts
        ],
        budgets=[
            BudgetItem(
                name=budget_names.name(budget.budget_id),
                unit=budget.unit.value,
                interval=budget.interval.value,
                limit=budget.limit,
                enforcement="hard" if budget.is_hard else "soft",
                alert_percents=list(budget.alert_percents),
                member=emails.get(budget.user_id, budget.user_id),
                service_account=account_names.get(budget.service_account_id, budget.service_account_id),
                model=budget.model,
                disabled=budget.disabled,
            )
            for budget in budgets
        ],
    )


class Resources:
    """Makes changes to one organization as `caller`, by the operations that people use; `store` is a part of one
    transaction."""

    def __init__(self, store: Store, clock: Clock, organization_id: str, caller: Principal) -> None:
        self._store = store
        self._organization_id = organization_id
        self._caller = caller
        self._organizations = Organizations(store, clock)
        self._roles = Roles(store, clock)
        self._users = Users(store, clock)
        self._service_accounts = ServiceAccounts(store, clock)
        self._budgets = Budgets(store, clock)

    async def make(self, change: Change) -> None:
        """Make one change.

        Raises PlatformError: PERMISSION_DENIED, naming the permission; INVALID_ARGUMENT, FAILED_PRECONDITION and
        ALREADY_EXISTS for what the document asks.
        """
        verb = "remove" if (change.resource_type, change.kind) == ("member", ChangeKind.DELETE) else _VERBS[change.kind]
        permission = f"{_PERMISSIONS[change.resource_type]}.{verb}"
        if permission not in self._caller.permissions:
            raise PlatformError(
                Reason.PERMISSION_DENIED,
                description=f"You have insufficient permissions for a change of the document. Missing permission:"
                f" {permission}.",
                permission=permission,
            )
        makers: Mapping[str, Callable[[Change], Awaitable[None]]] = {
            "organization": self._organization,
            "role": self._role,
            "member": self._member,
            "service_account": self._service_account,
            "budget": self._budget,
        }
        await makers[change.resource_type](change)

    async def _organization(self, change: Change) -> None:
        wanted: OrganizationSection = change.item
        new = Organization(
            self._organization_id,
            "",
            rate_limits=_from_limits(wanted.rate_limits),
            allowed_models=tuple(wanted.allowed_models),
        )
        changed = [field.field for field in change.fields]
        await self._organizations.update(self._caller, self._organization_id, new, changed, "")

    async def _role(self, change: Change) -> None:
        item: RoleItem = change.item
        wanted = Role("", item.name, frozenset(item.permissions))
        if change.kind is ChangeKind.CREATE:
            await self._roles.create(self._caller, self._organization_id, wanted, "")
            return
        role_id = (await self._role_names()).id(item.name)
        if change.kind is ChangeKind.DELETE:
            await self._roles.delete(self._organization_id, role_id)
        else:
            await self._roles.update(self._caller, self._organization_id, role_id, wanted, ("permissions",), "")

    async def _member(self, change: Change) -> None:
        item: MemberItem = change.item
        wanted = User("", self._organization_id, item.email, item.display_name, await self._role_ids(item.roles))
        if change.kind is ChangeKind.CREATE:
            await self._users.create(self._caller, wanted, "")
            return
        user_id = await self._user_id(item.email)
        if change.kind is ChangeKind.DELETE:
            await self._users.remove(self._caller, self._organization_id, user_id)
        else:
            wanted = User(user_id, self._organization_id, item.email, item.display_name, wanted.role_ids)
            await self._users.update(self._caller, wanted, ("display_name", "role_ids"), "")

    async def _service_account(self, change: Change) -> None:
        item: ServiceAccountItem = change.item
        account_id = "" if change.kind is ChangeKind.CREATE else await self._service_account_id(item.name)
        wanted = ServiceAccount(
            account_id, self._organization_id, item.name, await self._role_ids(item.roles), item.disabled
        )
        if change.kind is ChangeKind.CREATE:
            await self._service_accounts.create(self._caller, wanted, "")
        elif change.kind is ChangeKind.DELETE:
            await self._service_accounts.delete(self._caller, self._organization_id, account_id)
        else:
            await self._service_accounts.update(self._caller, wanted, ("role_ids", "disabled"), "")

    async def _budget(self, change: Change) -> None:
        item: BudgetItem = change.item
        if change.kind is ChangeKind.CREATE:
            new = Budget(
                budget_id="",
                organization_id=self._organization_id,
                display_name=item.name,
                unit=BudgetUnit(item.unit),
                interval=BudgetInterval(item.interval),
                is_hard=item.enforcement == "hard",
                limit=item.limit,
                alert_percents=tuple(item.alert_percents),
                user_id=await self._user_id(item.member) if item.member else "",
                service_account_id=await self._service_account_id(item.service_account) if item.service_account else "",
                model=item.model,
                disabled=item.disabled,
            )
            await self._budgets.create(new, "")
            return
        async with self._store.transaction() as stored:
            names = _Names(
                (budget.budget_id, budget.display_name)
                for budget in await _budgets(stored, self._organization_id)
                if not budget.api_key_id
            )
        budget_id = names.id(item.name)
        if change.kind is ChangeKind.DELETE:
            await self._budgets.delete(self._organization_id, budget_id, "")
            return
        fixed = {field.field for field in change.fields} & {"unit", "interval", "member", "service_account", "model"}
        if fixed:
            raise fields.invalid(min(fixed), "is fixed when a budget is made: give the other one another name")
        changes = {
            "limit": item.limit,
            "is_hard": item.enforcement == "hard",
            "alert_percents": tuple(item.alert_percents),
            "disabled": item.disabled,
        }
        await self._budgets.update(self._organization_id, budget_id, changes, "")

    async def _role_names(self) -> _Names:
        async with self._store.transaction() as stored:
            return _role_names(await stored.roles.all(self._organization_id))

    async def _role_ids(self, names: Iterable[str]) -> tuple[str, ...]:
        known = await self._role_names()
        return tuple(map(known.id, names))

    async def _user_id(self, email: str) -> str:
        async with self._store.transaction() as stored:
            found = await stored.users.page(self._organization_id, None, 1, email, "")
        if not found:
            raise fields.invalid("member", "names nobody in this organization")
        return found[0].user_id

    async def _service_account_id(self, name: str) -> str:
        async with self._store.transaction() as stored:
            found = await stored.service_accounts.find_named(self._organization_id, name)
        if found is None:
            raise fields.invalid("service_account", "names no service account of this organization")
        return found.service_account_id


async def _budgets(stored: Transaction, organization_id: str) -> list[Budget]:
    only: dict[str, Any] = {}
    return await stored.budgets.page(organization_id, None, _ALL, only)


def _role_names(roles: Iterable[Role]) -> _Names:
    return _Names(((role.role_id, role.display_name) for role in roles), BUILT_IN)


def _to_limits(limits: RateLimits) -> Limits:
    return Limits(
        requests_per_second=limits.requests_per_second,
        burst_requests=limits.burst_requests,
        tokens_per_minute=limits.tokens_per_minute,
        concurrent_requests=limits.concurrent_requests,
        models=[
            ModelLimits(
                model=model.model,
                requests_per_second=model.requests_per_second,
                tokens_per_minute=model.tokens_per_minute,
                concurrent_requests=model.concurrent_requests,
            )
            for model in limits.models
        ],
    )


def _from_limits(limits: Limits) -> RateLimits:
    return RateLimits(
        requests_per_second=limits.requests_per_second,
        burst_requests=limits.burst_requests,
        tokens_per_minute=limits.tokens_per_minute,
        concurrent_requests=limits.concurrent_requests,
        models=tuple(
            ModelRateLimits(
                model=model.model,
                requests_per_second=model.requests_per_second,
                tokens_per_minute=model.tokens_per_minute,
                concurrent_requests=model.concurrent_requests,
            )
            for model in limits.models
        ),
    )
