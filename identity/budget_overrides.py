"""Overrides of budgets: asked for by one, approved by another, ended in time; it never lets anybody approve alone."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from identity import fields
from identity.audit_chain import AuditChange, AuditEntry, AuditOutcome
from identity.budgets import LARGEST, Budget, budget
from mesh.auth import Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.pages import TimePlace
from mesh.updates import check_etag

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

logger = logging.getLogger(__name__)

_NEVER = datetime.fromtimestamp(0, UTC)
_SWEEP_INTERVAL_S = 1.0
# Of each kind in one sweep, which is one transaction.
_SWEPT = 100


class BudgetOverrideState(StrEnum):
    """Where an override is in its life."""

    PENDING = "pending"
    ACTIVE = "active"
    REJECTED = "rejected"
    REVOKED = "revoked"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class BudgetOverride:
    """A permission to pass a budget's limit for a while. `period_start` is the period that it raises, once approved."""

    budget_override_id: str
    organization_id: str
    budget_id: str
    amount: int
    expire_time: datetime
    reason: str
    state: BudgetOverrideState = BudgetOverrideState.PENDING
    requester_id: str = ""
    approver_id: str = ""
    period_start: datetime | None = None
    create_time: datetime = _NEVER
    decide_time: datetime | None = None
    revision: int = field(default=1, compare=False)


class BudgetOverrides:
    """The operations on overrides. Callers' permissions were held to the contract before."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def create(self, caller: Principal, wanted: BudgetOverride, request_id: str) -> BudgetOverride:
        """Ask for an override of a budget; a repeat with the same `request_id` gives the first one.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT naming the field.
        """
        fields.check_request_id(request_id)
        now = self._clock.now()
        _check(wanted, now)
        new = replace(
            wanted,
            budget_override_id=new_id("override", clock=self._clock),
            requester_id=_person(caller),
            create_time=now,
        )
        organization_id, budget_id = wanted.organization_id, wanted.budget_id
        async with self._store.transaction() as stored:
            overridden = await budget(stored, organization_id, budget_id)
            if first := await stored.creations.claim(
                organization_id, "CreateBudgetOverride", request_id, new.budget_override_id, now
            ):
                return await _override(stored, organization_id, budget_id, first)
            if not _is_within(new, overridden):
                raise fields.invalid("budget_override.amount", f"may be at most the budget's limit, {overridden.limit}")
            await stored.budget_overrides.add(new)
        return new

    async def get(self, organization_id: str, budget_id: str, budget_override_id: str) -> BudgetOverride:
        """One override. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            await budget(stored, organization_id, budget_id)
            return await _override(stored, organization_id, budget_id, budget_override_id)

    async def list(
        self,
        organization_id: str,
        budget_id: str,
        after: TimePlace | None,
        limit: int,
        state: BudgetOverrideState | None,
    ) -> list[BudgetOverride]:
        """Up to `limit` overrides of a budget, newest first. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            await budget(stored, organization_id, budget_id)
            return await stored.budget_overrides.page(organization_id, budget_id, after, limit, state)

    async def approve(
        self, caller: Principal, organization_id: str, budget_id: str, budget_override_id: str, etag: str
    ) -> BudgetOverride:
        """Raise the limit of the running period, until the override or the period ends.

        Raises PlatformError: NOT_FOUND, PERMISSION_DENIED for whoever asked for it, FAILED_PRECONDITION for another
        etag and for what cannot be approved any more.
        """
        async with self._store.transaction() as stored:
            current = await self._to_decide(stored, caller, organization_id, budget_id, budget_override_id)
            check_etag(etag, current.revision, "etag")
            overridden = await budget(stored, organization_id, budget_id)
            period = await stored.budget_periods.lock_current(budget_id)
            raised = await stored.budget_overrides.sum_active(budget_id, period.start_time)
            if not _is_within(current, overridden) or overridden.limit + raised + current.amount > LARGEST:
                raise _impossible(f"The budget's limit is {overridden.limit} now; it cannot be raised by so much.")
            approved = await stored.budget_overrides.change(
                replace(self._decided(current, caller, BudgetOverrideState.ACTIVE), period_start=period.start_time)
            )
            await stored.budgets.fit(budget_id, period.start_time)
            return approved

    async def reject(
        self, caller: Principal, organization_id: str, budget_id: str, budget_override_id: str, reason: str
    ) -> BudgetOverride:
        """Refuse an override. Raises PlatformError as `approve` does."""
        fields.check_reason(reason, "reason", required=False)
        async with self._store.transaction() as stored:
            current = await self._to_decide(stored, caller, organization_id, budget_id, budget_override_id)
            return await stored.budget_overrides.change(self._decided(current, caller, BudgetOverrideState.REJECTED))

    async def revoke(
        self, organization_id: str, budget_id: str, budget_override_id: str, reason: str
    ) -> BudgetOverride:
        """End an override before its time, or before anybody approved it. Revoking it again changes nothing.

        Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION for one that has ended otherwise.
        """
        fields.check_reason(reason, "reason", required=False)
        async with self._store.transaction() as stored:
            current = await self._to_change(stored, organization_id, budget_id, budget_override_id)
            if current.state is BudgetOverrideState.REVOKED:
                return current
            if current.state not in (BudgetOverrideState.PENDING, BudgetOverrideState.ACTIVE):
                raise _impossible(f"The override is {current.state.value}.")
            revoked = await stored.budget_overrides.change(replace(current, state=BudgetOverrideState.REVOKED))
            if current.period_start is not None:
                await _lower(stored, budget_id, current.period_start)
            return revoked

    async def run(self, stop: asyncio.Event) -> None:
        """Sweep every second until `stop` is set."""
        while not stop.is_set():
            try:
                await self.sweep()
            except PlatformError as error:
                logger.warning("overrides were not ended: %s", error.reason.value)
            except Exception:
                logger.exception("overrides were not ended")
            try:
                async with asyncio.timeout(_SWEEP_INTERVAL_S):
                    await stop.wait()
            except TimeoutError:
                pass

    async def sweep(self) -> None:
        """End the overrides whose time is over, and lower limits that ended ones had raised, as leases come back.

        Any number of processes may do so at the same time.
        """
        async with self._store.transaction() as stored:
            if not await stored.budget_overrides.claim_sweep():
                return
            due = await stored.budget_overrides.list_due(_SWEPT)
            falling = await stored.budgets.list_falling(_SWEPT)
            for organization_id in {override.organization_id for override in due} | {place[0] for place in falling}:
                await stored.budgets.change_revision(organization_id)
            ended = await stored.budget_overrides.expire([override.budget_override_id for override in due])
            # In one order, as each takes its organization's chain.
            for override in sorted(ended, key=lambda one: (one.organization_id, one.budget_override_id)):
                await self._store.record(stored, self._expired(override))
            raised = {(override.budget_id, override.period_start) for override in ended if override.period_start}
            for budget_id, period_start in sorted(raised | {place[1:] for place in falling}):
                await _lower(stored, budget_id, period_start)

    def _expired(self, override: BudgetOverride) -> AuditEntry:
        return AuditEntry(
            audit_entry_id=new_id("aud", clock=self._clock),
            organization_id=override.organization_id,
            event_time=self._clock.now(),
            method="BudgetOverrides",
            outcome=AuditOutcome.SUCCEEDED,
            resource_type="budget_override",
            resource_id=override.budget_override_id,
            reason="expired",
            changes=(
                AuditChange("budget_id", after_json=msgspec.json.encode(override.budget_id).decode()),
                AuditChange("state", after_json=msgspec.json.encode(override.state.value).decode()),
            ),
        )

    async def _to_change(
        self, stored: Transaction, organization_id: str, budget_id: str, budget_override_id: str
    ) -> BudgetOverride:
        """An override of a budget that is there, locked, with the change of the budgets begun."""
        await budget(stored, organization_id, budget_id)
        await stored.budgets.change_revision(organization_id)
        return await _override(stored, organization_id, budget_id, budget_override_id, lock=True)

    async def _to_decide(
        self, stored: Transaction, caller: Principal, organization_id: str, budget_id: str, budget_override_id: str
    ) -> BudgetOverride:
        """A pending override that the caller may decide on, locked."""
        current = await self._to_change(stored, organization_id, budget_id, budget_override_id)
        if not (caller.user_id or caller.service_account_id):
            raise PlatformError(
                Reason.PERMISSION_DENIED,
                description="An API key that acts for nobody cannot decide on an override: a second person must.",
            )
        if _person(caller) == await _behind(stored, organization_id, current.requester_id):
            raise PlatformError(
                Reason.PERMISSION_DENIED,
                description="You asked for this override, so somebody else must decide on it.",
            )
        if current.state is not BudgetOverrideState.PENDING:
            raise _impossible(f"The override is {current.state.value}.")
        if current.expire_time <= self._clock.now():
            raise _impossible("The override's time is over.")
        return current

    def _decided(self, current: BudgetOverride, caller: Principal, state: BudgetOverrideState) -> BudgetOverride:
        return replace(current, state=state, approver_id=_person(caller), decide_time=self._clock.now())


async def _override(
    stored: Transaction, organization_id: str, budget_id: str, budget_override_id: str, *, lock: bool = False
) -> BudgetOverride:
    found = await stored.budget_overrides.get(organization_id, budget_id, budget_override_id, lock=lock)
    if found is None:
        raise PlatformError(Reason.NOT_FOUND)
    return found


async def _behind(stored: Transaction, organization_id: str, requester_id: str) -> str:
    """Who asked: what a key that acts for nobody asks for, its maker asks for, who may have been such a key again."""
    seen: set[str] = set()
    while requester_id not in seen:
        seen.add(requester_id)
        key = await stored.api_keys.get(organization_id, requester_id)
        if key is not None:
            requester_id = key.user_id or key.service_account_id or key.creator_id
    return requester_id


async def _lower(stored: Transaction, budget_id: str, period_start: datetime) -> None:
    await stored.budgets.fit(budget_id, period_start)
    await stored.budget_alerts.record_crossed([(budget_id, period_start)])


def _person(caller: Principal) -> str:
    """Who acts: all keys that act as the same user or service account are the same one."""
    return caller.user_id or caller.service_account_id or caller.id


def _is_within(override: BudgetOverride, overridden: Budget) -> bool:
    """Whether the override at most doubles the limit, so that a slip of the finger cannot lift it out of sight."""
    return override.amount <= overridden.limit


def _impossible(description: str) -> PlatformError:
    return PlatformError(Reason.FAILED_PRECONDITION, description=description)


def _check(wanted: BudgetOverride, now: datetime) -> None:
    if not 1 <= wanted.amount <= LARGEST:
        raise fields.invalid("budget_override.amount", f"must be 1 to {LARGEST}")
    fields.check_expire_time(wanted.expire_time, now, "budget_override.expire_time")
    fields.check_reason(wanted.reason, "budget_override.reason")
