"""The tables of the audit log: chains, entries, checkpoints; it never judges a chain."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

import logging
from dataclasses import replace

import asyncpg
import msgspec

from identity.audit import AuditFilter
from identity.audit_chain import (
    NO_HASH,
    PLATFORM_CHAIN,
    AuditChange,
    AuditCheckpoint,
    AuditEntry,
    AuditKeys,
    AuditOutcome,
    ChainEnd,
)
from identity.stores.rows import Connection, Query, Row
from mesh.errors import PlatformError, Reason

logger = logging.getLogger(__name__)

_ENTRY = (
    "organization_id, sequence, audit_entry_id, event_time, principal_kind, principal_id, api_key_id, method,"
    " permission, resource_type, resource_id, outcome, reason, changes, request_id, client_address, previous_hash,"
    " hash, key_id, signature"
)
_CHECKPOINT = "audit_checkpoint_id, organization_id, sequence, hash, create_time, key_id, signature"


class AuditRows:
    """The audit log, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def has_changed_anything(self) -> bool:
        """Whether the transaction has written or locked a row: only then it has an id of its own."""
        return await self._connection.fetchval("SELECT pg_current_xact_id_if_assigned()") is not None

    async def append(self, entry: AuditEntry, keys: AuditKeys) -> None:
        """Add an entry to the chain of its organization, or of the platform where there is no such organization. One
        whose id is there already changes nothing.

        The chain is locked until the transaction ends, so this comes last in it. Raises PlatformError(UNAVAILABLE)
        when it cannot be written.
        """
        try:
            chain = await self._locked_chain(entry.organization_id)
            if chain is None:
                entry = replace(entry, organization_id=PLATFORM_CHAIN)
                chain = await self._locked_chain(PLATFORM_CHAIN)
            assert chain is not None  # noqa: S101
            chained = keys.chained(entry, chain["sequence"] + 1, chain["hash"])
            await self._connection.execute(
                f"WITH added AS (INSERT INTO audit_entries ({_ENTRY})"
                " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)"
                " ON CONFLICT (audit_entry_id) DO NOTHING RETURNING organization_id, sequence, hash)"
                " UPDATE audit_chains SET sequence = added.sequence, hash = added.hash FROM added"
                " WHERE audit_chains.organization_id = added.organization_id",
                *_values(chained),
            )
        except asyncpg.PostgresError as error:
            logger.error("an audit entry cannot be written: %s", type(error).__name__)
            raise PlatformError(Reason.UNAVAILABLE) from error

    async def get(self, organization_id: str, audit_entry_id: str) -> AuditEntry | None:
        """One entry."""
        row = await self._connection.fetchrow(
            f"SELECT {_ENTRY} FROM audit_entries WHERE organization_id = $1 AND audit_entry_id = $2",
            organization_id,
            audit_entry_id,
        )
        return None if row is None else _entry_of(row)

    async def at(self, organization_id: str, sequence: int) -> AuditEntry | None:
        """The entry at a place in the chain."""
        row = await self._connection.fetchrow(
            f"SELECT {_ENTRY} FROM audit_entries WHERE organization_id = $1 AND sequence = $2",
            organization_id,
            sequence,
        )
        return None if row is None else _entry_of(row)

    async def first(self, organization_id: str) -> AuditEntry | None:
        """The oldest entry that is there."""
        row = await self._connection.fetchrow(
            f"SELECT {_ENTRY} FROM audit_entries WHERE organization_id = $1 ORDER BY sequence LIMIT 1", organization_id
        )
        return None if row is None else _entry_of(row)

    async def forget_old(self, most: int) -> int:
        """Remove about so many entries of one chain that are kept no longer; returns how many, or 0."""
        return int(await self._connection.fetchval("SELECT forget_old_audit_entries($1)", most))

    async def page(self, organization_id: str, asked: AuditFilter, before: int | None, limit: int) -> list[AuditEntry]:
        """Entries newest first, those before a place in the chain."""
        query = _query(organization_id, asked)
        if before is not None:
            query.where("sequence < {}", before)
        return await self._entries(query, f"ORDER BY sequence DESC LIMIT {limit:d}")

    async def following(
        self, organization_id: str, asked: AuditFilter, after: int, until: int, limit: int
    ) -> list[AuditEntry]:
        """Entries oldest first, those after a place in the chain and up to another one."""
        query = _query(organization_id, asked)
        query.where("sequence > {} AND sequence <= {}", after, until)
        return await self._entries(query, f"ORDER BY sequence LIMIT {limit:d}")

    async def end(self, organization_id: str) -> ChainEnd:
        """Where the chain ends, at one moment."""
        row = await self._connection.fetchrow(
            "SELECT (SELECT max(sequence) FROM audit_entries WHERE organization_id = $1) AS last_sequence,"
            " sequence, hash FROM (SELECT) AS once LEFT JOIN audit_chains ON organization_id = $1",
            organization_id,
        )
        assert row is not None  # noqa: S101
        return ChainEnd(row["sequence"] or 0, row["hash"] or NO_HASH, row["last_sequence"] or 0)

    async def list_without_checkpoint(self, limit: int) -> list[str]:
        """Organizations whose chain has grown since its last checkpoint."""
        rows = await self._connection.fetch(
            f"SELECT organization_id FROM audit_chains WHERE sequence > checkpoint_sequence LIMIT {limit:d}"
        )
        return [row["organization_id"] for row in rows]

    async def lock_uncovered_end(self, organization_id: str) -> ChainEnd | None:
        """The end of a chain, locked, if no checkpoint covers it yet."""
        row = await self._connection.fetchrow(
            "SELECT sequence, hash FROM audit_chains WHERE organization_id = $1 AND sequence > checkpoint_sequence"
            " FOR NO KEY UPDATE",
            organization_id,
        )
        return None if row is None else ChainEnd(row["sequence"], row["hash"], row["sequence"])

    async def add_checkpoint(self, checkpoint: AuditCheckpoint) -> None:
        """Store a checkpoint over the end of a chain that this transaction has locked."""
        await self._connection.execute(
            f"INSERT INTO audit_checkpoints ({_CHECKPOINT}) VALUES ($1, $2, $3, $4, $5, $6, $7)",
            checkpoint.audit_checkpoint_id,
            checkpoint.organization_id,
            checkpoint.sequence,
            checkpoint.hash,
            checkpoint.create_time,
            checkpoint.key_id,
            checkpoint.signature,
        )
        await self._connection.execute(
            "UPDATE audit_chains SET checkpoint_sequence = $2 WHERE organization_id = $1",
            checkpoint.organization_id,
            checkpoint.sequence,
        )

    async def page_of_checkpoints(
        self, organization_id: str, before: tuple[int, str] | None, limit: int
    ) -> list[AuditCheckpoint]:
        """Checkpoints newest first, those before a (sequence, id)."""
        query = Query()
        query.where("organization_id = {}", organization_id)
        if before is not None:
            query.where("(sequence, audit_checkpoint_id) < ({}, {})", *before)
        rows = await self._connection.fetch(
            f"SELECT {_CHECKPOINT} FROM audit_checkpoints WHERE {query}"
            f" ORDER BY sequence DESC, audit_checkpoint_id DESC LIMIT {limit:d}",
            *query.values,
        )
        return [AuditCheckpoint(**row) for row in rows]

    async def checkpoints_after(self, organization_id: str, sequence: int) -> list[AuditCheckpoint]:
        """All checkpoints over later entries."""
        rows = await self._connection.fetch(
            f"SELECT {_CHECKPOINT} FROM audit_checkpoints WHERE organization_id = $1 AND sequence > $2",
            organization_id,
            sequence,
        )
        return [AuditCheckpoint(**row) for row in rows]

    async def _entries(self, query: Query, order: str) -> list[AuditEntry]:
        rows = await self._connection.fetch(f"SELECT {_ENTRY} FROM audit_entries WHERE {query} {order}", *query.values)
        return [_entry_of(row) for row in rows]

    async def _locked_chain(self, organization_id: str) -> Row | None:
        """A chain, begun if need be; None where there is no such organization."""
        select = "SELECT sequence, hash FROM audit_chains WHERE organization_id = $1 FOR NO KEY UPDATE"
        if row := await self._connection.fetchrow(select, organization_id):
            return row
        await self._connection.execute(
            "INSERT INTO audit_chains (organization_id) SELECT $1::text"
            " WHERE $1 = $2 OR EXISTS (SELECT FROM organizations WHERE organization_id = $1) ON CONFLICT DO NOTHING",
            organization_id,
            PLATFORM_CHAIN,
        )
        return await self._connection.fetchrow(select, organization_id)


def _query(organization_id: str, asked: AuditFilter) -> Query:
    query = Query()
    query.where("organization_id = {}", organization_id)
    if asked.start_time is not None:
        query.where("event_time >= {}", asked.start_time)
    if asked.end_time is not None:
        query.where("event_time < {}", asked.end_time)
    if asked.outcome is not None:
        query.where("outcome = {}", asked.outcome.value)
    for name in ("principal_id", "permission", "resource_type", "resource_id"):
        if value := getattr(asked, name):
            query.where(f"{name} = {{}}", value)
    return query


def _values(entry: AuditEntry) -> tuple[object, ...]:
    written = {"changes": _changes_to_json(entry.changes), "outcome": entry.outcome.value}
    names = [name.strip() for name in _ENTRY.split(",")]
    return tuple(written[name] if name in written else getattr(entry, name) for name in names)


def _entry_of(row: Row) -> AuditEntry:
    """An entry as it is stored. What nobody here could have written is kept in a form that no hash was made of."""
    raw = row["changes"]
    try:
        outcome = AuditOutcome(row["outcome"])
        changes = tuple(AuditChange(*change) for change in msgspec.json.decode(raw, type=list[tuple[str, str, str]]))
    except ValueError:
        changes = ()
        outcome = AuditOutcome.FAILED
    if _changes_to_json(changes) != raw or outcome.value != row["outcome"]:
        changes = (AuditChange("unreadable", row["outcome"], raw),)
    return AuditEntry(**{**row, "outcome": outcome, "changes": changes})


def _changes_to_json(changes: tuple[AuditChange, ...]) -> str:
    return msgspec.json.encode([[change.field, change.before_json, change.after_json] for change in changes]).decode()
