"""BudgetService: requests to the domain, its answers back; it never decides anything."""

from collections.abc import AsyncIterator
from typing import Any

from aiaas.identity.v1 import budget_service_pb2 as pb
from aiaas.identity.v1 import budget_service_pb2_grpc
from identity.budget_changes import BudgetChanges
from identity.budget_lease_messages import (
    LEASE_STATES,
    asks_from_proto,
    denial_to_proto,
    lease_to_proto,
    moment_from_proto,
    reported_to_proto,
    reports_from_proto,
    run_from_proto,
    settlements_from_proto,
    total_to_proto,
)
from identity.budget_leases import BudgetLeases, LedgerPlace
from identity.budget_messages import (
    OVERRIDE_STATES,
    alert_to_proto,
    budget_changes_from_proto,
    budget_from_proto,
    budget_to_proto,
    override_from_proto,
    override_to_proto,
    period_to_proto,
)
from identity.budget_overrides import BudgetOverrides
from identity.budgets import CHANGEABLE, SUBJECTS, Budgets, check_model
from identity.fields import check_filter, check_id, invalid
from identity.principals import caller
from mesh.pages import TimePlace, cut, read_page_size, read_token
from mesh.updates import fields_to_change


class BudgetService(budget_service_pb2_grpc.BudgetServiceServicer):
    """The budgets of organizations."""

    def __init__(
        self, budgets: Budgets, overrides: BudgetOverrides, leases: BudgetLeases, changes: BudgetChanges
    ) -> None:
        self._budgets = budgets
        self._overrides = overrides
        self._leases = leases
        self._changes = changes

    async def CreateBudget(self, request: pb.CreateBudgetRequest, context: object) -> pb.CreateBudgetResponse:
        """Make a budget."""
        wanted = budget_from_proto(_organization(request), request.budget)
        made = await self._budgets.create(wanted, request.request_id)
        return pb.CreateBudgetResponse(budget=budget_to_proto(made))

    async def GetBudget(self, request: pb.GetBudgetRequest, context: object) -> pb.GetBudgetResponse:
        """Return one budget."""
        found = await self._budgets.get(*_budget(request))
        return pb.GetBudgetResponse(budget=budget_to_proto(found))

    async def ListBudgets(self, request: pb.ListBudgetsRequest, context: object) -> pb.ListBudgetsResponse:
        """List budgets."""
        organization_id = _organization(request)
        only = {name: check_filter(getattr(request, name), name) for name in SUBJECTS}
        only["model"] = check_model(request.model, "model")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._budgets.list(
            organization_id, after, size + 1, {name: value for name, value in only.items() if value}
        )
        budgets, token = cut(
            request, rows, size, budget_to_proto, lambda row: TimePlace(row.create_time, row.budget_id)
        )
        return pb.ListBudgetsResponse(budgets=budgets, next_page_token=token)

    async def UpdateBudget(self, request: pb.UpdateBudgetRequest, context: object) -> pb.UpdateBudgetResponse:
        """Change a budget."""
        changed = fields_to_change(request.update_mask, request.budget, CHANGEABLE)
        changes = budget_changes_from_proto(request.budget, changed)
        updated = await self._budgets.update(*_budget(request), changes, request.budget.etag)
        return pb.UpdateBudgetResponse(budget=budget_to_proto(updated))

    async def DeleteBudget(self, request: pb.DeleteBudgetRequest, context: object) -> pb.DeleteBudgetResponse:
        """Remove a budget."""
        await self._budgets.delete(*_budget(request), request.etag)
        return pb.DeleteBudgetResponse()

    async def ListBudgetPeriods(
        self, request: pb.ListBudgetPeriodsRequest, context: object
    ) -> pb.ListBudgetPeriodsResponse:
        """List a budget's periods."""
        organization_id, budget_id = _budget(request)
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._budgets.list_periods(organization_id, budget_id, after, size + 1)
        periods, token = cut(request, rows, size, period_to_proto, lambda row: TimePlace(row.start_time, row.budget_id))
        return pb.ListBudgetPeriodsResponse(budget_periods=periods, next_page_token=token)

    async def ListBudgetAlerts(
        self, request: pb.ListBudgetAlertsRequest, context: object
    ) -> pb.ListBudgetAlertsResponse:
        """List the thresholds that were passed."""
        organization_id, budget_id = _organization(request), check_filter(request.budget_id, "budget_id")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._budgets.list_alerts(organization_id, after, size + 1, budget_id)
        alerts, token = cut(
            request, rows, size, alert_to_proto, lambda row: TimePlace(row.cross_time, row.budget_alert_id)
        )
        return pb.ListBudgetAlertsResponse(budget_alerts=alerts, next_page_token=token)

    async def CreateBudgetOverride(
        self, request: pb.CreateBudgetOverrideRequest, context: object
    ) -> pb.CreateBudgetOverrideResponse:
        """Ask for an override."""
        wanted = override_from_proto(*_budget(request), request.budget_override)
        made = await self._overrides.create(caller(), wanted, request.request_id)
        return pb.CreateBudgetOverrideResponse(budget_override=override_to_proto(made))

    async def GetBudgetOverride(
        self, request: pb.GetBudgetOverrideRequest, context: object
    ) -> pb.GetBudgetOverrideResponse:
        """Return one override."""
        found = await self._overrides.get(*_override(request))
        return pb.GetBudgetOverrideResponse(budget_override=override_to_proto(found))

    async def ListBudgetOverrides(
        self, request: pb.ListBudgetOverridesRequest, context: object
    ) -> pb.ListBudgetOverridesResponse:
        """List a budget's overrides."""
        organization_id, budget_id = _budget(request)
        if request.state and request.state not in OVERRIDE_STATES:
            raise invalid("state", "is unknown")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._overrides.list(
            organization_id, budget_id, after, size + 1, OVERRIDE_STATES.get(request.state)
        )
        overrides, token = cut(
            request, rows, size, override_to_proto, lambda row: TimePlace(row.create_time, row.budget_override_id)
        )
        return pb.ListBudgetOverridesResponse(budget_overrides=overrides, next_page_token=token)

    async def ApproveBudgetOverride(
        self, request: pb.ApproveBudgetOverrideRequest, context: object
    ) -> pb.ApproveBudgetOverrideResponse:
        """Let an override count."""
        approved = await self._overrides.approve(caller(), *_override(request), request.etag)
        return pb.ApproveBudgetOverrideResponse(budget_override=override_to_proto(approved))

    async def RejectBudgetOverride(
        self, request: pb.RejectBudgetOverrideRequest, context: object
    ) -> pb.RejectBudgetOverrideResponse:
        """Refuse an override."""
        rejected = await self._overrides.reject(caller(), *_override(request), request.reason)
        return pb.RejectBudgetOverrideResponse(budget_override=override_to_proto(rejected))

    async def RevokeBudgetOverride(
        self, request: pb.RevokeBudgetOverrideRequest, context: object
    ) -> pb.RevokeBudgetOverrideResponse:
        """End an override."""
        revoked = await self._overrides.revoke(*_override(request), request.reason)
        return pb.RevokeBudgetOverrideResponse(budget_override=override_to_proto(revoked))

    async def ListBudgetLeases(
        self, request: pb.ListBudgetLeasesRequest, context: object
    ) -> pb.ListBudgetLeasesResponse:
        """List a budget's leases."""
        organization_id, budget_id = _budget(request)
        if request.state and request.state not in LEASE_STATES:
            raise invalid("state", "is unknown")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._leases.list_of_budget(
            organization_id, budget_id, after, size + 1, LEASE_STATES.get(request.state)
        )
        leases, token = cut(
            request, rows, size, lease_to_proto, lambda row: TimePlace(row.create_time, row.budget_lease_id)
        )
        return pb.ListBudgetLeasesResponse(budget_leases=leases, next_page_token=token)

    async def SettleBudgetLease(
        self, request: pb.SettleBudgetLeaseRequest, context: object
    ) -> pb.SettleBudgetLeaseResponse:
        """Settle a lease by hand."""
        if not request.HasField("spent"):
            raise invalid("spent", "is required")
        budget_lease_id = check_id(request.budget_lease_id, "budget_lease_id")
        settled = await self._leases.settle_by_hand(*_budget(request), budget_lease_id, request.spent, request.reason)
        return pb.SettleBudgetLeaseResponse(budget_lease=lease_to_proto(settled))

    async def ResolveBudgets(self, request: pb.ResolveBudgetsRequest, context: object) -> pb.ResolveBudgetsResponse:
        """Return the budgets that can bind requests."""
        budgets, revision = await self._budgets.resolve(_organization(request))
        return pb.ResolveBudgetsResponse(budgets=map(budget_to_proto, budgets), revision=revision)

    async def WatchBudgets(
        self, request: pb.WatchBudgetsRequest, context: object
    ) -> AsyncIterator[pb.WatchBudgetsResponse]:
        """Stream the organizations whose budgets have changed."""
        if request.after_revision < 0:
            raise invalid("after_revision", "must not be negative")
        async for revision, organization_id in self._changes.watch(request.after_revision):
            yield pb.WatchBudgetsResponse(revision=revision, organization_id=organization_id)

    async def Lease(self, request: pb.LeaseRequest, context: object) -> pb.LeaseResponse:
        """Lease slices of budgets."""
        answer = await self._leases.lease(
            run_from_proto(request),
            request.request_id,
            _organization(request),
            request.revision,
            asks_from_proto(request.asks),
        )
        return pb.LeaseResponse(
            leases=map(lease_to_proto, answer.leases),
            denials=map(denial_to_proto, answer.denials),
            revision=answer.revision,
        )

    async def Renew(self, request: pb.RenewRequest, context: object) -> pb.RenewResponse:
        """Report on leases and extend them."""
        reports = reports_from_proto(request.reports)
        leases = await self._leases.renew(run_from_proto(request), reports)
        return pb.RenewResponse(leases=reported_to_proto(reports, leases))

    async def Release(self, request: pb.ReleaseRequest, context: object) -> pb.ReleaseResponse:
        """Give leases back."""
        reports = reports_from_proto(request.reports)
        leases = await self._leases.release(run_from_proto(request), reports)
        return pb.ReleaseResponse(leases=reported_to_proto(reports, leases))

    async def Settle(self, request: pb.SettleRequest, context: object) -> pb.SettleResponse:
        """Settle expired leases from a router's journal."""
        router_id = check_id(request.router_id, "router_id")
        settled = await self._leases.settle(router_id, settlements_from_proto(request.settlements))
        return pb.SettleResponse(leases=map(lease_to_proto, settled))

    async def ListRouterLeases(
        self, request: pb.ListRouterLeasesRequest, context: object
    ) -> pb.ListRouterLeasesResponse:
        """List a router's leases that are not settled."""
        router_id = check_id(request.router_id, "router_id")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._leases.list_of_router(router_id, after, size + 1)
        leases, token = cut(
            request, rows, size, lease_to_proto, lambda row: TimePlace(row.create_time, row.budget_lease_id)
        )
        return pb.ListRouterLeasesResponse(leases=leases, next_page_token=token)

    async def QueryLedger(self, request: pb.QueryLedgerRequest, context: object) -> pb.QueryLedgerResponse:
        """Sum the ledger."""
        organization_id = check_filter(request.organization_id, "organization_id")
        times = moment_from_proto(request, "start_time"), moment_from_proto(request, "end_time")
        size, after = read_page_size(request.page_size), read_token(request, LedgerPlace)
        rows = await self._leases.query(organization_id, *times, after, size + 1)
        totals, token = cut(
            request,
            rows,
            size,
            total_to_proto,
            lambda row: LedgerPlace(row.organization_id, row.budget_id, row.hour_start, row.api_key_id, row.model),
        )
        return pb.QueryLedgerResponse(totals=totals, next_page_token=token)


def _organization(request: Any) -> str:
    return check_id(request.organization_id, "organization_id")


def _budget(request: Any) -> tuple[str, str]:
    return _organization(request), check_id(request.budget_id, "budget_id")


def _override(request: Any) -> tuple[str, str, str]:
    return *_budget(request), check_id(request.budget_override_id, "budget_override_id")
