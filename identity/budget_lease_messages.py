"""Leases, their reports and the ledger's totals as they travel, and back; it never decides what a value may be, only
whether it is one."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration

from aiaas.identity.v1 import budget_service_pb2 as pb
from identity.budget_leases import (
    DENIED_FOR,
    BudgetLease,
    BudgetLeaseState,
    LeaseAsk,
    LeaseDenial,
    LeaseReport,
    LeaseSettlement,
    LedgerLine,
    LedgerTotal,
    Run,
)
from identity.budget_messages import UNIT_NUMBERS
from identity.fields import check_id, invalid
from mesh.conversions import from_timestamp, to_timestamp

LEASE_STATES = {
    pb.BUDGET_LEASE_STATE_ACTIVE: BudgetLeaseState.ACTIVE,
    pb.BUDGET_LEASE_STATE_EXPIRED: BudgetLeaseState.EXPIRED,
    pb.BUDGET_LEASE_STATE_SETTLED: BudgetLeaseState.SETTLED,
}
_LEASE_STATE_NUMBERS = {state: number for number, state in LEASE_STATES.items()}


def run_from_proto(request: pb.LeaseRequest | pb.RenewRequest | pb.ReleaseRequest) -> Run:
    """Which run of which router asks. Raises PlatformError(INVALID_ARGUMENT)."""
    return Run(check_id(request.router_id, "router_id"), check_id(request.router_instance_id, "router_instance_id"))


def asks_from_proto(asks: Iterable[pb.LeaseAsk]) -> list[LeaseAsk]:
    """What is asked for. Raises PlatformError(INVALID_ARGUMENT)."""
    return [
        LeaseAsk(check_id(ask.budget_id, f"asks[{index}].budget_id"), ask.needed, ask.wanted)
        for index, ask in enumerate(asks)
    ]


def reports_from_proto(reports: Iterable[pb.LeaseReport]) -> list[LeaseReport]:
    """What is reported. Raises PlatformError(INVALID_ARGUMENT)."""
    return [
        LeaseReport(
            budget_lease_id=check_id(report.budget_lease_id, f"reports[{index}].budget_lease_id"),
            sequence=report.sequence,
            spent=report.spent,
            reserved=report.reserved,
            wanted=report.wanted,
            lines=_lines(report.lines, f"reports[{index}].lines"),
        )
        for index, report in enumerate(reports)
    ]


def settlements_from_proto(settlements: Iterable[pb.LeaseSettlement]) -> list[LeaseSettlement]:
    """What is settled. Raises PlatformError(INVALID_ARGUMENT)."""
    return [
        LeaseSettlement(
            budget_lease_id=check_id(settlement.budget_lease_id, f"settlements[{index}].budget_lease_id"),
            spent=settlement.spent,
            lines=_lines(settlement.lines, f"settlements[{index}].lines"),
        )
        for index, settlement in enumerate(settlements)
    ]


def moment_from_proto(message: Any, name: str, prefix: str = "") -> datetime:
    """The time in a field that must be set. Raises PlatformError(INVALID_ARGUMENT)."""
    if not message.HasField(name):
        raise invalid(prefix + name, "is required")
    return from_timestamp(getattr(message, name), prefix + name)


def lease_to_proto(lease: BudgetLease) -> pb.BudgetLease:
    """A lease as it travels."""
    return pb.BudgetLease(
        budget_lease_id=lease.budget_lease_id,
        organization_id=lease.organization_id,
        budget_id=lease.budget_id,
        period_start=to_timestamp(lease.period_start),
        router_id=lease.holder.router_id,
        router_instance_id=lease.holder.router_instance_id,
        sequence=lease.sequence,
        amount=lease.amount,
        spent=lease.spent,
        state=_LEASE_STATE_NUMBERS[lease.state],
        admit_for=_duration(lease.admit_for),
        valid_for=_duration(lease.valid_for),
        expire_time=to_timestamp(lease.expire_time),
        create_time=to_timestamp(lease.create_time),
    )


def reported_to_proto(reports: Iterable[LeaseReport], leases: Iterable[BudgetLease | None]) -> list[pb.BudgetLease]:
    """Leases after their reports. One that is not there is fenced as well: nothing may run on it."""
    return [
        pb.BudgetLease(budget_lease_id=report.budget_lease_id, state=pb.BUDGET_LEASE_STATE_EXPIRED)
        if lease is None
        else lease_to_proto(lease)
        for report, lease in zip(reports, leases, strict=True)
    ]


def denial_to_proto(denial: LeaseDenial) -> pb.LeaseDenial:
    """A denial as it travels."""
    period = denial.period
    return pb.LeaseDenial(
        budget_id=period.budget_id,
        limit=period.limit,
        spent=period.spent,
        leased=period.leased,
        retry_after=_duration(DENIED_FOR) if denial.may_return else None,
        period_end=to_timestamp(period.end_time),
    )


def total_to_proto(total: LedgerTotal) -> pb.LedgerTotal:
    """A sum of the ledger as it travels."""
    return pb.LedgerTotal(
        organization_id=total.organization_id,
        budget_id=total.budget_id,
        unit=UNIT_NUMBERS[total.unit],
        hour_start=to_timestamp(total.hour_start),
        api_key_id=total.api_key_id,
        model=total.model,
        spent=total.spent,
        requests=total.requests,
    )


def _lines(lines: Iterable[pb.LedgerLine], field: str) -> tuple[LedgerLine, ...]:
    return tuple(
        LedgerLine(
            hour_start=moment_from_proto(line, "hour_start", f"{field}[{index}]."),
            api_key_id=line.api_key_id,
            model=line.model,
            spent=line.spent,
            requests=line.requests,
        )
        for index, line in enumerate(lines)
    )


def _duration(length: timedelta | None) -> Duration | None:
    if length is None:
        return None
    duration = Duration()
    duration.FromTimedelta(length)
    return duration
