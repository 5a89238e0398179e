"""Service accounts, the actors of an organization that are not people; it never makes a credential for one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from identity import fields
from identity.custom_roles import check_assignment
from identity.organizations import existing
from mesh.auth import Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.pages import TimePlace
from mesh.updates import check_etag

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

_NEVER = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """An actor that is not a person."""

    service_account_id: str
    organization_id: str
    display_name: str
    role_ids: tuple[str, ...] = ()
    disabled: bool = False
    create_time: datetime = _NEVER
    update_time: datetime = _NEVER
    revision: int = field(default=1, compare=False)


CHANGEABLE = ("display_name", "role_ids", "disabled")
"""What an update may change."""


class ServiceAccounts:
    """The operations on service accounts."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def create(self, caller: Principal, wanted: ServiceAccount, request_id: str) -> ServiceAccount:
        """Make a service account of `wanted.organization_id`; a repeat with the same `request_id` gives the first one.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, PERMISSION_DENIED, ALREADY_EXISTS for a name that is taken.
        """
        fields.check_request_id(request_id)
        fields.check_display_name(wanted.display_name, "service_account.display_name")
        now = self._clock.now()
        organization_id = wanted.organization_id
        new = replace(wanted, service_account_id=new_id("sa", clock=self._clock), create_time=now, update_time=now)
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            if first := await stored.creations.claim(
                organization_id, "CreateServiceAccount", request_id, new.service_account_id, now
            ):
                return await account(stored, organization_id, first)
            await check_assignment(stored, caller, organization_id, new.role_ids, "service_account.role_ids")
            if not await stored.service_accounts.add(new):
                raise _name_taken()
        return new

    async def get(self, organization_id: str, service_account_id: str) -> ServiceAccount:
        """One service account. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            return await account(stored, organization_id, service_account_id)

    async def list(self, organization_id: str, after: TimePlace | None, limit: int) -> list[ServiceAccount]:
        """Up to `limit` service accounts that come after `after`."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            return await stored.service_accounts.page(organization_id, after, limit)

    async def update(
        self, caller: Principal, wanted: ServiceAccount, changed: Collection[str], etag: str
    ) -> ServiceAccount:
        """Change the fields `changed` of a service account to the values of `wanted`.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, PERMISSION_DENIED, ALREADY_EXISTS, FAILED_PRECONDITION for
        another etag.
        """
        organization_id, service_account_id = wanted.organization_id, wanted.service_account_id
        async with self._store.transaction() as stored:
            current = await account(stored, organization_id, service_account_id, lock=True)
            check_etag(etag, current.revision, "service_account.etag")
            new = replace(current, **{name: getattr(wanted, name) for name in changed})
            fields.check_display_name(new.display_name, "service_account.display_name")
            if new == current:
                return current
            if new.role_ids != current.role_ids:
                await check_assignment(
                    stored, caller, organization_id, new.role_ids, "service_account.role_ids", current=current.role_ids
                )
            if new.disabled != current.disabled:
                # To disable is to take every role, and to enable is to give them.
                held = ((), new.role_ids) if new.disabled else (new.role_ids, ())
                await check_assignment(
                    stored, caller, organization_id, held[0], "service_account.disabled", current=held[1]
                )
            if (new.role_ids, new.disabled) != (current.role_ids, current.disabled):
                await stored.revoke("service_account_id", service_account_id)
            updated = await stored.service_accounts.change(replace(new, update_time=self._clock.now()))
            if updated is None:
                raise _name_taken()
            return updated

    async def delete(self, caller: Principal, organization_id: str, service_account_id: str) -> None:
        """Remove a service account and revoke its API keys. Raises PlatformError: NOT_FOUND, PERMISSION_DENIED."""
        now = self._clock.now()
        async with self._store.transaction() as stored:
            current = await account(stored, organization_id, service_account_id, lock=True)
            await check_assignment(stored, caller, organization_id, (), "service_account_id", current=current.role_ids)
            await stored.api_keys.revoke_of_service_account(organization_id, service_account_id, now)
            await stored.service_accounts.remove(organization_id, service_account_id, now)
            await stored.revoke("service_account_id", service_account_id)


async def account(
    stored: Transaction, organization_id: str, service_account_id: str, *, lock: bool = False
) -> ServiceAccount:
    """The service account, `lock`ed until the transaction ends. Raises PlatformError(NOT_FOUND)."""
    found = await stored.service_accounts.get(organization_id, service_account_id, lock=lock)
    if found is None:
        raise PlatformError(Reason.NOT_FOUND)
    return found


def _name_taken() -> PlatformError:
    return PlatformError(
        Reason.ALREADY_EXISTS,
        field="service_account.display_name",
        description="'service_account.display_name' is that of another service account already.",
    )
