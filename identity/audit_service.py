"""AuditService: requests to the domain, its answers back; it never decides anything."""

from collections.abc import AsyncIterator

import msgspec

from aiaas.identity.v1 import audit_service_pb2 as pb
from aiaas.identity.v1 import audit_service_pb2_grpc
from aiaas.type.v1 import principal_pb2
from identity.audit import Audit, AuditFilter
from identity.audit_chain import AuditChange, AuditCheckpoint, AuditEntry, AuditOutcome
from identity.fields import check_filter, check_id, invalid
from mesh.conversions import from_timestamp, to_timestamp
from mesh.pages import Text, cut, read_page_size, read_token

_OUTCOMES = {
    pb.AUDIT_OUTCOME_SUCCEEDED: AuditOutcome.SUCCEEDED,
    pb.AUDIT_OUTCOME_DENIED: AuditOutcome.DENIED,
    pb.AUDIT_OUTCOME_FAILED: AuditOutcome.FAILED,
}
_OUTCOME_NUMBERS = {outcome: number for number, outcome in _OUTCOMES.items()}
_KINDS = {
    principal_pb2.PRINCIPAL_KIND_UNSPECIFIED: "",
    principal_pb2.PRINCIPAL_KIND_USER: "user",
    principal_pb2.PRINCIPAL_KIND_SERVICE_ACCOUNT: "service_account",
    principal_pb2.PRINCIPAL_KIND_API_KEY: "api_key",
}
_KIND_NUMBERS = {kind: number for number, kind in _KINDS.items()}
_FILTER_LENGTH = 200


class _Sequence(msgspec.Struct, frozen=True, array_like=True):
    """A place in a chain."""

    sequence: int


class _CheckpointPlace(msgspec.Struct, frozen=True, array_like=True):
    """A place in the order of checkpoints."""

    sequence: int
    id: Text


class AuditService(audit_service_pb2_grpc.AuditServiceServicer):
    """The audit log."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit

    async def ListAuditEntries(
        self, request: pb.ListAuditEntriesRequest, context: object
    ) -> pb.ListAuditEntriesResponse:
        """List entries, newest first."""
        organization_id = check_id(request.organization_id, "organization_id")
        size, before = read_page_size(request.page_size), read_token(request, _Sequence)
        rows = await self._audit.list_entries(
            organization_id, _filter(request.filter), None if before is None else before.sequence, size + 1
        )
        entries, token = cut(request, rows, size, _to_proto, lambda row: _Sequence(row.sequence))
        return pb.ListAuditEntriesResponse(audit_entries=entries, next_page_token=token)

    async def GetAuditEntry(self, request: pb.GetAuditEntryRequest, context: object) -> pb.GetAuditEntryResponse:
        """Return one entry."""
        found = await self._audit.get(
            check_id(request.organization_id, "organization_id"), check_id(request.audit_entry_id, "audit_entry_id")
        )
        return pb.GetAuditEntryResponse(audit_entry=_to_proto(found))

    async def ExportAuditEntries(
        self, request: pb.ExportAuditEntriesRequest, context: object
    ) -> AsyncIterator[pb.ExportAuditEntriesResponse]:
        """Stream entries, oldest first."""
        organization_id = check_id(request.organization_id, "organization_id")
        async for entry in self._audit.export(organization_id, _filter(request.filter)):
            yield pb.ExportAuditEntriesResponse(audit_entry=_to_proto(entry))

    async def VerifyAuditLog(self, request: pb.VerifyAuditLogRequest, context: object) -> pb.VerifyAuditLogResponse:
        """Recompute the chain."""
        found = await self._audit.verify(check_id(request.organization_id, "organization_id"), request.after_sequence)
        return pb.VerifyAuditLogResponse(
            intact=found.flaw is None,
            entries=found.entries,
            checkpoints=found.checkpoints,
            first_broken_sequence=0 if found.flaw is None else found.flaw.sequence,
            problem="" if found.flaw is None else found.flaw.problem,
        )

    async def ListAuditCheckpoints(
        self, request: pb.ListAuditCheckpointsRequest, context: object
    ) -> pb.ListAuditCheckpointsResponse:
        """List checkpoints, newest first."""
        organization_id = check_id(request.organization_id, "organization_id")
        size, place = read_page_size(request.page_size), read_token(request, _CheckpointPlace)
        before = None if place is None else (place.sequence, place.id)
        rows = await self._audit.list_checkpoints(organization_id, before, size + 1)
        checkpoints, token = cut(
            request,
            rows,
            size,
            _checkpoint_to_proto,
            lambda row: _CheckpointPlace(row.sequence, row.audit_checkpoint_id),
        )
        return pb.ListAuditCheckpointsResponse(audit_checkpoints=checkpoints, next_page_token=token)

    async def CreateAuditCheckpoint(
        self, request: pb.CreateAuditCheckpointRequest, context: object
    ) -> pb.CreateAuditCheckpointResponse:
        """Sign the chain as it is now."""
        made = await self._audit.checkpoint(check_id(request.organization_id, "organization_id"))
        return pb.CreateAuditCheckpointResponse(audit_checkpoint=_checkpoint_to_proto(made))

    async def RecordAuditEntries(
        self, request: pb.RecordAuditEntriesRequest, context: object
    ) -> pb.RecordAuditEntriesResponse:
        """Take in entries from other services."""
        entries = [_from_proto(entry, f"audit_entries[{index}]") for index, entry in enumerate(request.audit_entries)]
        await self._audit.take_in(entries)
        return pb.RecordAuditEntriesResponse()


def _filter(message: pb.AuditFilter) -> AuditFilter:
    if message.outcome and message.outcome not in _OUTCOMES:
        raise invalid("filter.outcome", "is unknown")
    for name in ("permission", "resource_type"):
        if len(getattr(message, name)) > _FILTER_LENGTH or "\0" in getattr(message, name):
            raise invalid(f"filter.{name}", f"must have at most {_FILTER_LENGTH} characters")
    return AuditFilter(
        start_time=from_timestamp(message.start_time, "filter.start_time") if message.HasField("start_time") else None,
        end_time=from_timestamp(message.end_time, "filter.end_time") if message.HasField("end_time") else None,
        principal_id=check_filter(message.principal_id, "filter.principal_id"),
        permission=message.permission,
        resource_type=message.resource_type,
        resource_id=check_filter(message.resource_id, "filter.resource_id"),
        outcome=_OUTCOMES.get(message.outcome),
    )


def _to_proto(entry: AuditEntry) -> pb.AuditEntry:
    return pb.AuditEntry(
        audit_entry_id=entry.audit_entry_id,
        organization_id=entry.organization_id,
        sequence=entry.sequence,
        event_time=to_timestamp(entry.event_time),
        principal_kind=_KIND_NUMBERS.get(entry.principal_kind, principal_pb2.PRINCIPAL_KIND_UNSPECIFIED),
        principal_id=entry.principal_id,
        api_key_id=entry.api_key_id,
        method=entry.method,
        permission=entry.permission,
        resource_type=entry.resource_type,
        resource_id=entry.resource_id,
        outcome=_OUTCOME_NUMBERS[entry.outcome],
        reason=entry.reason,
        changes=[
            pb.AuditChange(field=change.field, before_json=change.before_json, after_json=change.after_json)
            for change in entry.changes
        ],
        request_id=entry.request_id,
        client_address=entry.client_address,
        previous_hash=entry.previous_hash,
        hash=entry.hash,
        key_id=entry.key_id,
        signature=entry.signature,
    )


def _from_proto(message: pb.AuditEntry, field: str) -> AuditEntry:
    outcome, kind = _OUTCOMES.get(message.outcome), _KINDS.get(message.principal_kind)
    if outcome is None:
        raise invalid(f"{field}.outcome", "is unknown")
    if kind is None:
        raise invalid(f"{field}.principal_kind", "is unknown")
    return AuditEntry(
        audit_entry_id=message.audit_entry_id,
        organization_id=message.organization_id,
        event_time=from_timestamp(message.event_time, f"{field}.event_time"),
        method=message.method,
        outcome=outcome,
        principal_kind=kind,
        principal_id=message.principal_id,
        api_key_id=message.api_key_id,
        permission=message.permission,
        resource_type=message.resource_type,
        resource_id=message.resource_id,
        reason=message.reason,
        changes=tuple(AuditChange(change.field, change.before_json, change.after_json) for change in message.changes),
        request_id=message.request_id,
        client_address=message.client_address,
    )


def _checkpoint_to_proto(checkpoint: AuditCheckpoint) -> pb.AuditCheckpoint:
    return pb.AuditCheckpoint(
        audit_checkpoint_id=checkpoint.audit_checkpoint_id,
        organization_id=checkpoint.organization_id,
        sequence=checkpoint.sequence,
        hash=checkpoint.hash,
        create_time=to_timestamp(checkpoint.create_time),
        key_id=checkpoint.key_id,
        signature=checkpoint.signature,
    )
