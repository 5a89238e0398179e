"""ExportService over gRPC: takes orders for files and tells what became of them; it writes none."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

from aiaas.analytics.v1 import export_service_pb2 as pb
from aiaas.analytics.v1 import export_service_pb2_grpc
from analytics.export_store import ExportStore
from analytics.exporter import Exporter
from analytics.exports import Schedule, StoredExport, check_form, next_run, read_wanted
from analytics.object_storage import Storage, StorageAwayError, StorageRefusedError
from analytics.usage import filter_message
from mesh import context as call
from mesh.clock import Clock
from mesh.conversions import to_timestamp
from mesh.errors import PlatformError, Reason
from mesh.fields import check_id, check_request_id, require
from mesh.pages import TimePlace, cut, read_page_size, read_token
from mesh.updates import check_etag, etag_of, fields_to_change

LINK = timedelta(hours=24)
"""How long a link to a file is good."""

_CHANGEABLE = ("enabled", "granularity", "format", "compression")


class ExportService(export_service_pb2_grpc.ExportServiceServicer):
    """aiaas.analytics.v1.ExportService. Without object storage it takes no orders."""

    def __init__(self, store: ExportStore, storage: Storage | None, exporter: Exporter | None, clock: Clock) -> None:
        self._store = store
        self._storage = storage
        self._exporter = exporter
        self._clock = clock

    async def CreateExport(self, request: pb.CreateExportRequest, context: object) -> pb.CreateExportResponse:
        """Order an export."""
        organization_id = check_id(request.organization_id, "organization_id")
        check_request_id(request.request_id)
        now = self._clock.now()
        wanted = read_wanted(request.export, now)
        self._check_storage()
        principal = call.principal.get()
        creator_id = principal.id if principal else ""
        stored = await self._store.create(organization_id, wanted, creator_id, request.request_id, now)
        self._wake()
        return pb.CreateExportResponse(export=_message(stored))

    async def GetExport(self, request: pb.GetExportRequest, context: object) -> pb.GetExportResponse:
        """One export, with links to its file while there is one."""
        stored = _found(await self._store.get(*_names(request)))
        response = pb.GetExportResponse(export=_message(stored))
        if stored.state == pb.EXPORT_STATE_SUCCEEDED and self._storage is not None:
            try:
                response.download_url = await self._storage.link(stored.object_key, LINK)
                response.manifest_url = await self._storage.link(stored.manifest_key, LINK)
            except (StorageRefusedError, StorageAwayError):
                raise PlatformError(Reason.UNAVAILABLE) from None
        return response

    async def ListExports(self, request: pb.ListExportsRequest, context: object) -> pb.ListExportsResponse:
        """A page of exports."""
        organization_id = check_id(request.organization_id, "organization_id")
        require(request.state in pb.ExportState.values(), "state", "must be a known value")
        size, before = read_page_size(request.page_size), read_token(request, TimePlace)
        found = await self._store.page(organization_id, request.state, before, size + 1)
        exports, token = cut(
            request, found, size, _message, lambda stored: TimePlace(stored.create_time, stored.export_id)
        )
        return pb.ListExportsResponse(exports=exports, next_page_token=token)

    async def CancelExport(self, request: pb.CancelExportRequest, context: object) -> pb.CancelExportResponse:
        """Stop an export."""
        stored = _found(await self._store.cancel(*_names(request), self._clock.now()))
        self._wake()
        return pb.CancelExportResponse(export=_message(stored))

    async def RetryExport(self, request: pb.RetryExportRequest, context: object) -> pb.RetryExportResponse:
        """Start an export again."""
        names = _names(request)
        self._check_storage()
        stored = await self._store.start_again(*names, self._clock.now())
        if stored is None:
            _found(await self._store.get(*names))
            raise PlatformError(
                Reason.FAILED_PRECONDITION, description="Only an export that failed or expired can be started again."
            )
        self._wake()
        return pb.RetryExportResponse(export=_message(stored))

    async def GetExportSchedule(
        self, request: pb.GetExportScheduleRequest, context: object
    ) -> pb.GetExportScheduleResponse:
        """The monthly export of an organization."""
        schedule = await self._store.schedule(check_id(request.organization_id, "organization_id"))
        return pb.GetExportScheduleResponse(export_schedule=_schedule_message(schedule))

    async def UpdateExportSchedule(
        self, request: pb.UpdateExportScheduleRequest, context: object
    ) -> pb.UpdateExportScheduleResponse:
        """Change the monthly export of an organization."""
        organization_id = check_id(request.organization_id, "organization_id")
        asked = request.export_schedule
        changed = fields_to_change(request.update_mask, asked, _CHANGEABLE)
        check_form(asked, "export_schedule", needed=False)
        stored = await self._store.schedule(organization_id)
        check_etag(asked.etag, stored.revision, "export_schedule.etag")
        values: dict[str, Any] = {name: _usual(name, getattr(asked, name)) for name in changed}
        wanted = replace(stored, **values)
        if wanted.enabled:
            self._check_storage()
        if not wanted.enabled:
            wanted = replace(wanted, next_run_time=None)
        elif not stored.enabled:
            wanted = replace(wanted, next_run_time=next_run(self._clock.now()))
        schedule = await self._store.change_schedule(wanted)
        if schedule is None:
            raise PlatformError(
                Reason.FAILED_PRECONDITION, description="The schedule was changed meanwhile. Read it again."
            )
        return pb.UpdateExportScheduleResponse(export_schedule=_schedule_message(schedule))

    def _check_storage(self) -> None:
        if self._storage is None:
            raise PlatformError(
                Reason.FAILED_PRECONDITION, description="There is no object storage for exports on this platform."
            )

    def _wake(self) -> None:
        if self._exporter is not None:
            self._exporter.wake()


def _names(request: pb.GetExportRequest | pb.CancelExportRequest | pb.RetryExportRequest) -> tuple[str, str]:
    return check_id(request.organization_id, "organization_id"), check_id(request.export_id, "export_id")


def _found(stored: StoredExport | None) -> StoredExport:
    if stored is None:
        raise PlatformError(Reason.NOT_FOUND)
    return stored


def _usual(name: str, value: int) -> int:
    """What an unspecified value of a schedule means."""
    if name == "granularity":
        return value or pb.EXPORT_GRANULARITY_DAILY
    if name == "format":
        return value or pb.EXPORT_FORMAT_CSV
    return value


def _message(stored: StoredExport) -> pb.Export:
    wanted = stored.wanted
    return pb.Export(
        export_id=stored.export_id,
        organization_id=stored.organization_id,
        granularity=wanted.granularity,
        format=wanted.format,
        compression=wanted.compression,
        start_time=to_timestamp(wanted.start_time),
        end_time=to_timestamp(wanted.end_time),
        filter=filter_message(wanted.filter),
        state=stored.state,
        progress_percent=stored.progress_percent,
        rows=stored.rows,
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        object_key=stored.object_key if stored.state == pb.EXPORT_STATE_SUCCEEDED else "",
        failure_reason=stored.failure_reason,
        creator_id=stored.creator_id,
        create_time=to_timestamp(stored.create_time),
        finish_time=to_timestamp(stored.finish_time),
        expire_time=to_timestamp(stored.expire_time),
    )


def _schedule_message(schedule: Schedule) -> pb.ExportSchedule:
    return pb.ExportSchedule(
        organization_id=schedule.organization_id,
        enabled=schedule.enabled,
        granularity=schedule.granularity,
        format=schedule.format,
        compression=schedule.compression,
        next_run_time=to_timestamp(schedule.next_run_time),
        last_export_id=schedule.last_export_id,
        etag=etag_of(schedule.revision),
    )
