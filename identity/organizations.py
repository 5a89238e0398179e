"""Organizations and their life: made, changed, suspended, deleted, reactivated; it never knows how they are stored or
called."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

from identity import fields
from identity.roles import PLATFORM_ORGANIZATION_ID
from mesh.auth import Principal, RateLimits
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.pages import TimePlace
from mesh.updates import check_etag

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

_NEVER = datetime.fromtimestamp(0, UTC)
_PLATFORMS_TO_SET = ("rate_limits", "allowed_models")


DELETION_DELAY = timedelta(days=30)
"""For so long a deletion can be taken back; then the data goes."""


class OrganizationState(StrEnum):
    """Where an organization is in its life."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Organization:
    """A tenant. No `allowed_models` means all."""

    organization_id: str
    display_name: str
    rate_limits: RateLimits = field(default_factory=RateLimits)
    allowed_models: tuple[str, ...] = ()
    state: OrganizationState = OrganizationState.ACTIVE
    create_time: datetime = _NEVER
    update_time: datetime = _NEVER
    purge_time: datetime | None = None
    revision: int = field(default=1, compare=False)


CHANGEABLE = ("display_name", "rate_limits", "allowed_models")
"""What an update may change; limits and models only by the platform, which they protect."""


class Organizations:
    """The operations on organizations. Callers' permissions were held to the contract before."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def create(self, caller: Principal, wanted: Organization, request_id: str) -> Organization:
        """Make an organization; a repeat with the same `request_id` gives the first one."""
        fields.check_request_id(request_id)
        _check(wanted)
        now = self._clock.now()
        new = replace(wanted, organization_id=new_id("org", clock=self._clock), create_time=now, update_time=now)
        async with self._store.transaction() as stored:
            if first := await stored.creations.claim(
                caller.organization_id, "CreateOrganization", request_id, new.organization_id, now
            ):
                return await existing(stored, first)
            await stored.organizations.add(new)
        return new

    async def get(self, organization_id: str) -> Organization:
        """One organization. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            return await existing(stored, organization_id)

    async def list(
        self, caller: Principal, after: TimePlace | None, limit: int, state: OrganizationState | None
    ) -> list[Organization]:
        """Up to `limit` organizations that come after `after` and that the caller may see."""
        only = None if caller.platform else caller.organization_id
        async with self._store.transaction() as stored:
            return await stored.organizations.page(after, limit, state, only)

    async def update(
        self, caller: Principal, organization_id: str, wanted: Organization, changed: Collection[str], etag: str
    ) -> Organization:
        """Change the fields `changed` to the values of `wanted`.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, FAILED_PRECONDITION (another etag), PERMISSION_DENIED when
        somebody outside the platform changes what the platform sets.
        """
        if not caller.platform and (denied := [name for name in _PLATFORMS_TO_SET if name in changed]):
            raise PlatformError(
                Reason.PERMISSION_DENIED,
                field=f"organization.{denied[0]}",
                description=f"'organization.{denied[0]}' can be changed by the platform's administrators only.",
            )
        async with self._store.transaction() as stored:
            current = await existing(stored, organization_id, lock=True)
            check_etag(etag, current.revision, "organization.etag")
            new = replace(current, **{name: getattr(wanted, name) for name in changed})
            _check(new)
            if new == current:
                return current
            if "rate_limits" in changed or "allowed_models" in changed:
                await stored.revoke("organization_id", organization_id)
            return await stored.organizations.change(replace(new, update_time=self._clock.now()))

    async def suspend(self, organization_id: str, reason: str) -> Organization:
        """Stop all use of its credentials. Suspending it again changes nothing.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, FAILED_PRECONDITION for the platform's own or a deleted
        organization.
        """
        fields.check_reason(reason, "reason", required=False)
        _refuse_platforms_own(organization_id, "suspended")
        async with self._store.transaction() as stored:
            current = await existing(stored, organization_id, lock=True)
            if current.state is OrganizationState.DELETED:
                raise PlatformError(Reason.FAILED_PRECONDITION, description="The organization is deleted.")
            return await self._set_state(stored, current, OrganizationState.SUSPENDED)

    async def delete(self, organization_id: str, etag: str) -> Organization:
        """Stop all use of its credentials at once, and have its data go after the delay. Deleting it again changes
        nothing.

        Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION for the platform's own and for another etag.
        """
        _refuse_platforms_own(organization_id, "deleted")
        async with self._store.transaction() as stored:
            current = await existing(stored, organization_id, lock=True)
            check_etag(etag, current.revision, "etag")
            return await self._set_state(stored, current, OrganizationState.DELETED)

    async def reactivate(self, organization_id: str, reason: str) -> Organization:
        """End a suspension, or take back a deletion that has not happened yet.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, FAILED_PRECONDITION where its data may be going already.
        """
        fields.check_reason(reason, "reason", required=False)
        async with self._store.transaction() as stored:
            current = await existing(stored, organization_id, lock=True)
            if current.purge_time is not None and current.purge_time <= self._clock.now():
                raise PlatformError(Reason.FAILED_PRECONDITION, description="The organization's data is being removed.")
            return await self._set_state(stored, current, OrganizationState.ACTIVE)

    async def _set_state(self, stored: Transaction, current: Organization, state: OrganizationState) -> Organization:
        # A cache may hold a refusal as well as a principal, so both ways are announced; and again where nothing
        # changes, since the first announcement may have been lost.
        await stored.revoke("organization_id", current.organization_id)
        if current.state is state:
            return current
        now = self._clock.now()
        purge_time = now + DELETION_DELAY if state is OrganizationState.DELETED else None
        return await stored.organizations.change(replace(current, state=state, purge_time=purge_time, update_time=now))


async def existing(stored: Transaction, organization_id: str, *, lock: bool = False) -> Organization:
    """The organization, `lock`ed against other changes until the transaction ends. Raises PlatformError(NOT_FOUND)."""
    organization = await stored.organizations.get(organization_id, lock=lock)
    if organization is None:
        raise PlatformError(Reason.NOT_FOUND)
    return organization


def _refuse_platforms_own(organization_id: str, what: str) -> None:
    if organization_id == PLATFORM_ORGANIZATION_ID:
        raise PlatformError(
            Reason.FAILED_PRECONDITION, description=f"The platform's own organization cannot be {what}."
        )


def _check(organization: Organization) -> None:
    fields.check_all(
        lambda: fields.check_display_name(organization.display_name, "organization.display_name"),
        lambda: fields.check_rate_limits(organization.rate_limits, "organization.rate_limits"),
        lambda: fields.check_models(organization.allowed_models, "organization.allowed_models"),
    )
