"""ReconciliationService over gRPC: asks for reports and shows them; it compares nothing itself."""

from __future__ import annotations

import msgspec

from aiaas.analytics.v1 import reconciliation_service_pb2 as pb
from aiaas.analytics.v1 import reconciliation_service_pb2_grpc
from analytics.reconciler import Reconciler
from analytics.reconciliation_store import ReconciliationStore
from analytics.reconciliations import KINDS, Report, check_range
from mesh import context as call
from mesh.clock import Clock
from mesh.conversions import from_timestamp, to_timestamp
from mesh.errors import PlatformError, Reason
from mesh.fields import check_id, check_request_id, invalid
from mesh.pages import TimePlace, cut, read_page_size, read_token


class _DifferencePlace(msgspec.Struct, frozen=True, array_like=True):
    """A place in the order of a report's differences."""

    position: int


class ReconciliationService(reconciliation_service_pb2_grpc.ReconciliationServiceServicer):
    """aiaas.analytics.v1.ReconciliationService."""

    def __init__(self, store: ReconciliationStore, reconciler: Reconciler, clock: Clock) -> None:
        self._store = store
        self._reconciler = reconciler
        self._clock = clock

    async def CreateReconciliation(
        self, request: pb.CreateReconciliationRequest, context: object
    ) -> pb.CreateReconciliationResponse:
        """A report that is made now; it is running when this returns."""
        asked, now = request.reconciliation, self._clock.now()
        if asked.kind not in KINDS:
            raise invalid("reconciliation.kind", "must be a known kind")
        for name in ("start_time", "end_time"):
            if not asked.HasField(name):
                raise invalid(f"reconciliation.{name}", "is required")
        start = from_timestamp(asked.start_time, "reconciliation.start_time")
        end = from_timestamp(asked.end_time, "reconciliation.end_time")
        check_range(start, end, now)
        check_request_id(request.request_id)
        principal = call.principal.get()
        creator_id = principal.id if principal else ""
        report = await self._store.create(asked.kind, start, end, now, creator_id, request.request_id)
        self._reconciler.wake()
        return pb.CreateReconciliationResponse(reconciliation=_message(report))

    async def GetReconciliation(
        self, request: pb.GetReconciliationRequest, context: object
    ) -> pb.GetReconciliationResponse:
        """One report."""
        return pb.GetReconciliationResponse(reconciliation=_message(await self._get(request.reconciliation_id)))

    async def ListReconciliations(
        self, request: pb.ListReconciliationsRequest, context: object
    ) -> pb.ListReconciliationsResponse:
        """A page of reports."""
        for name, kinds in (("kind", pb.ReconciliationKind), ("state", pb.ReconciliationState)):
            if getattr(request, name) not in kinds.values():
                raise invalid(name, "must be a known value")
        size, before = read_page_size(request.page_size), read_token(request, TimePlace)
        found = await self._store.list_reports(request.kind, request.state, before, size + 1)
        reports, token = cut(
            request, found, size, _message, lambda report: TimePlace(report.create_time, report.reconciliation_id)
        )
        return pb.ListReconciliationsResponse(reconciliations=reports, next_page_token=token)

    async def ListReconciliationDifferences(
        self, request: pb.ListReconciliationDifferencesRequest, context: object
    ) -> pb.ListReconciliationDifferencesResponse:
        """A page of a report's differences."""
        size, after = read_page_size(request.page_size), read_token(request, _DifferencePlace)
        report = await self._get(request.reconciliation_id)
        found = await self._store.list_differences(report.reconciliation_id, after.position if after else 0, size + 1)
        differences, token = cut(
            request,
            found,
            size,
            lambda item: pb.ReconciliationDifference.FromString(item[1]),
            lambda item: _DifferencePlace(item[0]),
        )
        return pb.ListReconciliationDifferencesResponse(reconciliation_differences=differences, next_page_token=token)

    async def _get(self, reconciliation_id: str) -> Report:
        report = await self._store.get(check_id(reconciliation_id, "reconciliation_id"))
        if report is None:
            raise PlatformError(Reason.NOT_FOUND)
        return report


def _message(report: Report) -> pb.Reconciliation:
    return pb.Reconciliation(
        reconciliation_id=report.reconciliation_id,
        kind=report.kind,
        start_time=to_timestamp(report.start_time),
        end_time=to_timestamp(report.end_time),
        state=report.state,
        compared=report.compared,
        differences=report.differences,
        republished=report.republished,
        missing_sources=report.missing_sources,
        create_time=to_timestamp(report.create_time),
        finish_time=to_timestamp(report.finish_time),
    )
