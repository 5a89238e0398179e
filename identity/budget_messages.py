"""Budgets, periods, alerts and overrides as they travel, and back; it never decides what a value may be, only whether
it is one."""

from __future__ import annotations

from typing import Any

from aiaas.identity.v1 import budget_service_pb2 as pb
from identity.budget_overrides import BudgetOverride, BudgetOverrideState
from identity.budgets import SUBJECTS, Budget, BudgetAlert, BudgetInterval, BudgetPeriod, BudgetUnit
from identity.fields import check_id, invalid
from mesh.conversions import from_timestamp, to_timestamp
from mesh.updates import etag_of

UNITS = {
    pb.BUDGET_UNIT_COST: BudgetUnit.COST,
    pb.BUDGET_UNIT_TOKENS: BudgetUnit.TOKENS,
    pb.BUDGET_UNIT_REQUESTS: BudgetUnit.REQUESTS,
}
INTERVALS = {
    pb.BUDGET_INTERVAL_DAILY: BudgetInterval.DAILY,
    pb.BUDGET_INTERVAL_MONTHLY: BudgetInterval.MONTHLY,
    pb.BUDGET_INTERVAL_QUARTERLY: BudgetInterval.QUARTERLY,
    pb.BUDGET_INTERVAL_ANNUAL: BudgetInterval.ANNUAL,
    pb.BUDGET_INTERVAL_TOTAL: BudgetInterval.TOTAL,
}
OVERRIDE_STATES = {
    pb.BUDGET_OVERRIDE_STATE_PENDING: BudgetOverrideState.PENDING,
    pb.BUDGET_OVERRIDE_STATE_ACTIVE: BudgetOverrideState.ACTIVE,
    pb.BUDGET_OVERRIDE_STATE_REJECTED: BudgetOverrideState.REJECTED,
    pb.BUDGET_OVERRIDE_STATE_REVOKED: BudgetOverrideState.REVOKED,
    pb.BUDGET_OVERRIDE_STATE_EXPIRED: BudgetOverrideState.EXPIRED,
}
_IS_HARD = {pb.BUDGET_ENFORCEMENT_HARD: True, pb.BUDGET_ENFORCEMENT_SOFT: False}
UNIT_NUMBERS = {unit: number for number, unit in UNITS.items()}
_INTERVAL_NUMBERS = {interval: number for number, interval in INTERVALS.items()}
_OVERRIDE_STATE_NUMBERS = {state: number for number, state in OVERRIDE_STATES.items()}


def budget_from_proto(organization_id: str, message: pb.Budget) -> Budget:
    """A budget that is wanted. Raises PlatformError(INVALID_ARGUMENT) naming what is absent or unknown."""
    unit, interval = UNITS.get(message.unit), INTERVALS.get(message.interval)
    if unit is None:
        raise invalid("budget.unit", "is absent or unknown")
    if interval is None:
        raise invalid("budget.interval", "is absent or unknown")
    return Budget(
        budget_id="",
        organization_id=organization_id,
        display_name=message.display_name,
        unit=unit,
        interval=interval,
        is_hard=_is_hard(message),
        limit=_limit(message),
        alert_percents=tuple(message.alert_percents),
        user_id=_subject(message, "user_id"),
        service_account_id=_subject(message, "service_account_id"),
        api_key_id=_subject(message, "api_key_id"),
        model=message.model,
        disabled=message.disabled,
    )


def budget_changes_from_proto(message: pb.Budget, changed: frozenset[str]) -> dict[str, Any]:
    """The new values of those fields of a Budget that `changed` names as the contract does.

    Raises PlatformError(INVALID_ARGUMENT) naming what is absent or unknown.
    """
    changes: dict[str, Any] = {name: getattr(message, name) for name in changed & {"display_name", "disabled"}}
    if "alert_percents" in changed:
        changes["alert_percents"] = tuple(message.alert_percents)
    if "enforcement" in changed:
        changes["is_hard"] = _is_hard(message)
    if "limit" in changed:
        changes["limit"] = _limit(message)
    return changes


def budget_to_proto(budget: Budget) -> pb.Budget:
    """A budget as it travels."""
    message = pb.Budget(
        budget_id=budget.budget_id,
        organization_id=budget.organization_id,
        display_name=budget.display_name,
        model=budget.model,
        unit=UNIT_NUMBERS[budget.unit],
        interval=_INTERVAL_NUMBERS[budget.interval],
        enforcement=pb.BUDGET_ENFORCEMENT_HARD if budget.is_hard else pb.BUDGET_ENFORCEMENT_SOFT,
        limit=budget.limit,
        alert_percents=budget.alert_percents,
        disabled=budget.disabled,
        current_period=None if budget.current_period is None else period_to_proto(budget.current_period),
        create_time=to_timestamp(budget.create_time),
        update_time=to_timestamp(budget.update_time),
        etag=etag_of(budget.revision),
    )
    for name in SUBJECTS:
        if subject := getattr(budget, name):
            setattr(message, name, subject)
    return message


def period_to_proto(period: BudgetPeriod) -> pb.BudgetPeriod:
    """A period as it travels."""
    return pb.BudgetPeriod(
        budget_id=period.budget_id,
        start_time=to_timestamp(period.start_time),
        end_time=to_timestamp(period.end_time),
        limit=period.limit,
        spent=period.spent,
        leased=period.leased,
    )


def alert_to_proto(alert: BudgetAlert) -> pb.BudgetAlert:
    """An alert as it travels."""
    return pb.BudgetAlert(
        budget_alert_id=alert.budget_alert_id,
        organization_id=alert.organization_id,
        budget_id=alert.budget_id,
        period_start=to_timestamp(alert.period_start),
        percent=alert.percent,
        spent=alert.spent,
        limit=alert.limit,
        cross_time=to_timestamp(alert.cross_time),
    )


def override_from_proto(organization_id: str, budget_id: str, message: pb.BudgetOverride) -> BudgetOverride:
    """An override that is wanted. Raises PlatformError(INVALID_ARGUMENT) naming what is absent."""
    if not message.HasField("expire_time"):
        raise invalid("budget_override.expire_time", "is required")
    return BudgetOverride(
        budget_override_id="",
        organization_id=organization_id,
        budget_id=budget_id,
        amount=message.amount,
        expire_time=from_timestamp(message.expire_time, "budget_override.expire_time"),
        reason=message.reason,
    )


def override_to_proto(override: BudgetOverride) -> pb.BudgetOverride:
    """An override as it travels."""
    return pb.BudgetOverride(
        budget_override_id=override.budget_override_id,
        organization_id=override.organization_id,
        budget_id=override.budget_id,
        amount=override.amount,
        expire_time=to_timestamp(override.expire_time),
        reason=override.reason,
        state=_OVERRIDE_STATE_NUMBERS[override.state],
        requester_id=override.requester_id,
        approver_id=override.approver_id,
        create_time=to_timestamp(override.create_time),
        decide_time=to_timestamp(override.decide_time),
        etag=etag_of(override.revision),
    )


def _subject(message: pb.Budget, name: str) -> str:
    """The subject if it is in this field. One that is set and empty is not the whole organization, but a mistake."""
    return check_id(getattr(message, name), f"budget.{name}") if message.WhichOneof("subject") == name else ""


def _is_hard(message: pb.Budget) -> bool:
    if message.enforcement not in _IS_HARD:
        raise invalid("budget.enforcement", "is absent or unknown")
    return _IS_HARD[message.enforcement]


def _limit(message: pb.Budget) -> int:
    if not message.HasField("limit"):
        raise invalid("budget.limit", "is required")
    return message.limit
