"""Budgets as people see them: made, changed, removed, listed; it never spends, and never knows how they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias

from identity import fields
from identity.organizations import existing
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.pages import TimePlace
from mesh.updates import check_etag

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

_NEVER = datetime.fromtimestamp(0, UTC)
_MODEL_LENGTH = 200
_MOST_PERCENT = 1000

LARGEST = 2**62
"""The largest limit, overrides included: half of what PostgreSQL and protobuf hold, so that no sum of two overflows."""

SUBJECTS = ("user_id", "service_account_id", "api_key_id")
"""Whose requests a budget can count; with none of them, the whole organization's."""

DEFAULT_ALERT_PERCENTS = (50, 80, 100)
"""The thresholds of a budget that names none."""


PeriodKey: TypeAlias = tuple[str, datetime]
"""Which period: its budget's id and its start."""


class BudgetUnit(StrEnum):
    """What a budget counts."""

    COST = "cost"
    TOKENS = "tokens"
    REQUESTS = "requests"


class BudgetInterval(StrEnum):
    """How long a period lasts, by the UTC calendar."""

    DAILY = "daily"
    MONTHLY = "monthly"
    QUARTERLY = "quarterly"
    ANNUAL = "annual"
    TOTAL = "total"


@dataclass(frozen=True, slots=True)
class BudgetPeriod:
    """One period of a budget. `limit` holds the overrides; `end_time` is exclusive, and None for TOTAL."""

    budget_id: str
    start_time: datetime
    end_time: datetime | None
    limit: int
    spent: int
    leased: int
    is_hard: bool


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit on what is used in a period. At most one of the three subjects is set; none is the whole organization.

    An empty `model` means all. `current_period` is there on what was stored.
    """

    budget_id: str
    organization_id: str
    display_name: str
    unit: BudgetUnit
    interval: BudgetInterval
    is_hard: bool
    limit: int
    alert_percents: tuple[int, ...] = ()
    user_id: str = ""
    service_account_id: str = ""
    api_key_id: str = ""
    model: str = ""
    disabled: bool = False
    create_time: datetime = _NEVER
    update_time: datetime = _NEVER
    revision: int = field(default=1, compare=False)
    current_period: BudgetPeriod | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class BudgetAlert:
    """A threshold that was passed, with what was spent and the limit at that moment."""

    budget_alert_id: str
    organization_id: str
    budget_id: str
    period_start: datetime
    percent: int
    spent: int
    limit: int
    cross_time: datetime


CHANGEABLE = ("display_name", "limit", "enforcement", "alert_percents", "disabled")
"""What an update may change, by the names of the contract; what a budget counts is fixed when it is made."""


class Budgets:
    """The operations on budgets. Callers' permissions were held to the contract before."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def create(self, wanted: Budget, request_id: str) -> Budget:
        """Make a budget of `wanted.organization_id`; a repeat with the same `request_id` gives the first one.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT naming the field, ALREADY_EXISTS where the same thing has a
        budget.
        """
        fields.check_request_id(request_id)
        wanted = _checked(wanted)
        now = self._clock.now()
        organization_id = wanted.organization_id
        new = replace(wanted, budget_id=new_id("budget", clock=self._clock), create_time=now, update_time=now)
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            if first := await stored.creations.claim(organization_id, "CreateBudget", request_id, new.budget_id, now):
                return await budget(stored, organization_id, first)
            await _check_subject(stored, new)
            await stored.budgets.change_revision(organization_id)
            if not await stored.budgets.add(new):
                raise PlatformError(
                    Reason.ALREADY_EXISTS,
                    field="budget",
                    description=f"'{await stored.budgets.find_same(new)}' limits the same subject, model, unit and"
                    " interval already.",
                )
            return await budget(stored, organization_id, new.budget_id)

    async def get(self, organization_id: str, budget_id: str) -> Budget:
        """One budget. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            return await budget(stored, organization_id, budget_id)

    async def update(self, organization_id: str, budget_id: str, changes: Mapping[str, Any], etag: str) -> Budget:
        """Change the fields of a Budget that `changes` names to its values. The running period follows.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, FAILED_PRECONDITION for another etag and for a hard limit
        below what the running period has spent and leased.
        """
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            await stored.budgets.change_revision(organization_id)
            current = await budget(stored, organization_id, budget_id, lock=True)
            check_etag(etag, current.revision, "budget.etag")
            new = _checked(replace(current, **changes))
            if new == current:
                return current
            await stored.budgets.change(replace(new, update_time=self._clock.now()))
            period = await stored.budget_periods.lock_current(budget_id)
            if (new.limit, new.is_hard) != (current.limit, current.is_hard):
                _check_room(new, period, await stored.budget_overrides.sum_active(budget_id, period.start_time))
                await stored.budgets.fit(budget_id, period.start_time)
            await stored.budget_alerts.record_crossed([(budget_id, period.start_time)])
            return await budget(stored, organization_id, budget_id)

    async def delete(self, organization_id: str, budget_id: str, etag: str) -> None:
        """Remove a budget; its periods and its ledger stay. Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            await stored.budgets.change_revision(organization_id)
            current = await budget(stored, organization_id, budget_id, lock=True)
            check_etag(etag, current.revision, "etag")
            await stored.budgets.remove(organization_id, budget_id, self._clock.now())

    async def list_periods(
        self, organization_id: str, budget_id: str, after: TimePlace | None, limit: int
    ) -> list[BudgetPeriod]:
        """Up to `limit` periods of a budget, newest first. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            await budget(stored, organization_id, budget_id)
            return await stored.budgets.page_of_periods(budget_id, after, limit)

    async def list_alerts(
        self, organization_id: str, after: TimePlace | None, limit: int, budget_id: str
    ) -> list[BudgetAlert]:
        """Up to `limit` thresholds that were passed, newest first, of one budget if asked."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            return await stored.budget_alerts.page(organization_id, after, limit, budget_id)

    async def resolve(self, organization_id: str) -> tuple[list[Budget], int]:
        """The budgets that bind requests, by id, and the revision that they are of; none and 0 for a stranger."""
        async with self._store.transaction() as stored:
            # Read first: budgets newer than their revision are resolved once too often, older ones never again.
            revision = await stored.budgets.revision(organization_id)
            return await stored.budgets.list_binding(organization_id), revision

    async def list(
        self, organization_id: str, after: TimePlace | None, limit: int, only: Mapping[str, str]
    ) -> list[Budget]:
        """Up to `limit` budgets that come after `after`, whose subject and model are those of `only`."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            return await stored.budgets.page(organization_id, after, limit, only)


def check_model(value: str, field: str) -> str:
    """A model that a budget can be for, or nothing; whether it exists is for the router to know.

    Raises PlatformError(INVALID_ARGUMENT).
    """
    if len(value) > _MODEL_LENGTH or not value.isprintable():
        raise fields.invalid(field, f"must have at most {_MODEL_LENGTH} printable characters")
    return value


async def budget(stored: Transaction, organization_id: str, budget_id: str, *, lock: bool = False) -> Budget:
    """The budget, `lock`ed against other changes until the transaction ends. Raises PlatformError(NOT_FOUND)."""
    found = await stored.budgets.get(organization_id, budget_id, lock=lock)
    if found is None:
        raise PlatformError(Reason.NOT_FOUND)
    return found


async def _check_subject(stored: Transaction, new: Budget) -> None:
    """Raise PlatformError(INVALID_ARGUMENT) naming the subject's field if the organization has no such subject."""
    organization_id = new.organization_id
    if new.api_key_id and await stored.api_keys.get(organization_id, new.api_key_id) is None:
        raise fields.invalid("budget.api_key_id", "names no API key of this organization")
    if not (new.service_account_id or new.user_id):
        return
    if await stored.holders.find(organization_id, new.service_account_id, new.user_id) is None:
        name = "user_id" if new.user_id else "service_account_id"
        raise fields.invalid(f"budget.{name}", "names nobody in this organization")


def _check_room(new: Budget, period: BudgetPeriod, overrides: int) -> None:
    """Raise PlatformError if `new`, with `overrides` added, cannot be the limit of the running period."""
    if new.limit + overrides > LARGEST:
        raise fields.invalid("budget.limit", f"and its active overrides of {overrides} must be at most {LARGEST}")
    if new.is_hard and new.limit + overrides < period.spent + period.leased:
        raise PlatformError(
            Reason.FAILED_PRECONDITION,
            field="budget.limit",
            description=f"A hard limit must be at least {period.spent + period.leased - overrides}: the running period"
            f" has {period.spent} spent and {period.leased} leased, and {overrides} of it by overrides.",
        )


def _checked(wanted: Budget) -> Budget:
    """The budget with its thresholds in order, or the default ones. Raises PlatformError(INVALID_ARGUMENT)."""
    percents = wanted.alert_percents
    fields.check_all(
        lambda: fields.check_display_name(wanted.display_name, "budget.display_name"),
        lambda: check_model(wanted.model, "budget.model"),
        lambda: fields.require(0 <= wanted.limit <= LARGEST, "budget.limit", f"must be 0 to {LARGEST}"),
        lambda: fields.check_once(percents, "budget.alert_percents"),
        lambda: fields.require(
            all(1 <= percent <= _MOST_PERCENT for percent in percents),
            "budget.alert_percents",
            f"must hold values of 1 to {_MOST_PERCENT}",
        ),
    )
    return replace(wanted, alert_percents=tuple(sorted(wanted.alert_percents)) or DEFAULT_ALERT_PERCENTS)
