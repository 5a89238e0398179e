"""Short ways to read, check and fill the audit log; it never looks into the database."""

import itertools
from typing import Any, TypeAlias

import asyncpg

from aiaas.identity.v1 import audit_service_pb2
from tests.integration.identity.harness import Identity

Sql: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Entry = audit_service_pb2.AuditEntry
# A service account's name is given once.
NUMBERS = itertools.count()
ACCOUNTS = "/aiaas.identity.v1.ServiceAccountService"
SUCCEEDED = audit_service_pb2.AUDIT_OUTCOME_SUCCEEDED
DENIED = audit_service_pb2.AUDIT_OUTCOME_DENIED
FAILED = audit_service_pb2.AUDIT_OUTCOME_FAILED


async def entries(identity: Identity, organization_id: str, **filters: object) -> list[Entry]:
    """All entries, newest first."""
    request = audit_service_pb2.ListAuditEntriesRequest(
        organization_id=organization_id,
        filter=audit_service_pb2.AuditFilter(**filters),  # type: ignore[arg-type]
        page_size=500,
    )
    return list((await identity.call(identity.audit.ListAuditEntries, request)).audit_entries)


async def verify(identity: Identity, organization_id: str, after: int = 0) -> audit_service_pb2.VerifyAuditLogResponse:
    request = audit_service_pb2.VerifyAuditLogRequest(organization_id=organization_id, after_sequence=after)
    return await identity.call(identity.audit.VerifyAuditLog, request)


async def checkpoint(identity: Identity, organization_id: str) -> audit_service_pb2.AuditCheckpoint:
    request = audit_service_pb2.CreateAuditCheckpointRequest(organization_id=organization_id)
    return (await identity.call(identity.audit.CreateAuditCheckpoint, request)).audit_checkpoint


async def grown(identity: Identity, organization_id: str, count: int = 6) -> None:
    """A chain of so many entries."""
    for _ in range(count):
        await identity.service_account(organization_id, f"Worker {next(NUMBERS)}")


async def announce_nothing(_: object) -> None:
    pass


def recordable(entry: Entry) -> dict[str, Any]:
    """What another service would tell of an entry."""
    kept = ("organization_id", "event_time", "method", "outcome", "principal_id", "principal_kind")
    return {name: getattr(entry, name) for name in kept}


async def checkpoints(identity: Identity, organization_id: str) -> list[audit_service_pb2.AuditCheckpoint]:
    request = audit_service_pb2.ListAuditCheckpointsRequest(organization_id=organization_id)
    return list((await identity.call(identity.audit.ListAuditCheckpoints, request)).audit_checkpoints)


async def export(identity: Identity, organization_id: str) -> list[Entry]:
    request = audit_service_pb2.ExportAuditEntriesRequest(organization_id=organization_id)
    call = identity.audit.ExportAuditEntries(
        request, metadata=(("authorization", f"Bearer {identity.admin}"),), timeout=30
    )
    return [answer.audit_entry async for answer in call]
