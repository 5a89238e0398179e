"""The audit log: written, read, signed and verified; it never decides what is worth an entry, nor how one is stored."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from identity import attempts
from identity.attempts import Attempt, AttemptBounds
from identity.audit_chain import (
    NO_HASH,
    AuditCheckpoint,
    AuditEntry,
    AuditKeys,
    AuditOutcome,
    ChainWalk,
    Flaw,
)
from identity.fields import invalid, is_id
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason, as_platform_error
from mesh.ids import new_id

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

logger = logging.getLogger(__name__)

KEPT = timedelta(days=400)
"""So long entries are kept; 0005_audit.sql says the same to the database."""

_CHECKPOINT_INTERVAL_S = 60.0
_BATCH = 500
_FORGOTTEN_AT_ONCE = 10_000
_TEXT_LENGTH = 1000


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which entries. What is empty does not narrow; `start_time` is inclusive, `end_time` is not."""

    start_time: datetime | None = None
    end_time: datetime | None = None
    principal_id: str = ""
    permission: str = ""
    resource_type: str = ""
    resource_id: str = ""
    outcome: AuditOutcome | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """How many entries and checkpoints were looked at, and the first flaw, if there is one."""

    entries: int
    checkpoints: int
    flaw: Flaw | None


class Audit:
    """The operations on the audit log."""

    def __init__(self, store: Store, clock: Clock, keys: AuditKeys) -> None:
        self._store = store
        self._clock = clock
        self._keys = keys

    async def record(self, entry: AuditEntry) -> None:
        """Store an entry in a transaction of its own; one whose id is stored already changes nothing.

        Raises PlatformError(UNAVAILABLE).
        """
        with attempts.apart():
            async with self._store.transaction(across=True) as stored:
                await stored.audit.append(entry, self._keys)

    @asynccontextmanager
    async def own(self, doing: str, organization_id: str) -> AsyncIterator[None]:
        """Within the block the platform does something by itself: each transaction that changes anything has an entry
        in the organization's chain, with `doing` as its method and nobody as its principal."""

        def describe(entry_id: str, outcome: AuditOutcome, reason: str, _: None) -> AuditEntry:
            return AuditEntry(
                audit_entry_id=entry_id,
                organization_id=organization_id,
                event_time=self._clock.now(),
                method=doing,
                outcome=outcome,
                resource_type="organization",
                resource_id=organization_id,
                reason=reason,
            )

        attempt: Attempt[None] = Attempt(describe, self, AttemptBounds(self._clock), mutates=False)
        token = attempts.current.set(attempt)
        try:
            yield
            await attempt.settle()
        except BaseException as error:
            reason = as_platform_error(error).reason if isinstance(error, Exception) else Reason.CANCELLED
            await attempt.fail(reason, doing)
            raise
        finally:
            attempts.current.reset(token)

    async def take_in(self, entries: Sequence[AuditEntry]) -> None:
        """Store what other services recorded, all or nothing; what is there already changes nothing.

        Raises PlatformError: INVALID_ARGUMENT, UNAVAILABLE.
        """
        if len(entries) > _BATCH:
            raise invalid("audit_entries", f"may hold {_BATCH} values")
        for index, entry in enumerate(entries):
            _check(entry, f"audit_entries[{index}]")
        async with self._store.transaction() as stored:
            # In one order for all, since each chain stays locked until the end.
            for entry in sorted(entries, key=lambda entry: entry.organization_id):
                await stored.audit.append(entry, self._keys)

    async def get(self, organization_id: str, audit_entry_id: str) -> AuditEntry:
        """One entry. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            entry = await stored.audit.get(organization_id, audit_entry_id)
        if entry is None:
            raise PlatformError(Reason.NOT_FOUND)
        return entry

    async def list_entries(
        self, organization_id: str, asked: AuditFilter, before: int | None, limit: int
    ) -> list[AuditEntry]:
        """Up to `limit` entries, newest first, from before the place `before` in the chain."""
        async with self._store.transaction() as stored:
            return await stored.audit.page(organization_id, asked, before, limit)

    async def export(self, organization_id: str, asked: AuditFilter) -> AsyncIterator[AuditEntry]:
        """The entries that there are now, oldest first."""
        async with self._store.transaction() as stored:
            until = (await stored.audit.end(organization_id)).last_sequence
        after = 0
        while True:
            async with self._store.transaction() as stored:
                entries = await stored.audit.following(organization_id, asked, after, until, _BATCH)
            for entry in entries:
                yield entry
            if len(entries) < _BATCH:
                return
            after = entries[-1].sequence

    async def verify(self, organization_id: str, after: int) -> Verification:
        """Recompute the chain from the entry after the place `after` on, and hold it against its checkpoints.

        The hash of the entry before the first one that is looked at is taken as it is. Raises
        PlatformError(INVALID_ARGUMENT).
        """
        if after < 0:
            raise invalid("after_sequence", "must not be negative")
        async with self._store.transaction() as stored:
            # Checkpoints first: each of them was made over an entry that is there by now.
            checkpoints = await stored.audit.checkpoints_after(organization_id, after)
            end = await stored.audit.end(organization_id)
            before = await stored.audit.at(organization_id, after) if after else None
            oldest = await stored.audit.first(organization_id)
        if after > max(end.sequence, end.last_sequence):
            raise invalid("after_sequence", "is beyond the end of the chain")
        begin_hash = before.hash if before else NO_HASH
        if before is None and oldest is not None and after < oldest.sequence and self._is_old(oldest, checkpoints):
            after, begin_hash = oldest.sequence - 1, oldest.previous_hash
        elif before is None and after:
            return Verification(0, 0, Flaw(after, "It is missing."))
        walk = ChainWalk(self._keys, checkpoints, after, begin_hash)
        flaw = None
        while flaw is None and walk.sequence < end.last_sequence:
            async with self._store.transaction() as stored:
                entries = await stored.audit.following(
                    organization_id, AuditFilter(), walk.sequence, end.last_sequence, _BATCH
                )
            if not entries:
                flaw = Flaw(walk.sequence + 1, "It is missing.")
                break
            # Hundreds of signatures take tens of milliseconds.
            flaw = await asyncio.to_thread(walk.take, entries)
        flaw = flaw or walk.end(end)
        looked_at = sum(checkpoint.sequence <= walk.sequence for checkpoint in checkpoints)
        return Verification(walk.sequence - after, looked_at, flaw)

    async def list_checkpoints(
        self, organization_id: str, before: tuple[int, str] | None, limit: int
    ) -> list[AuditCheckpoint]:
        """Up to `limit` checkpoints, newest first, from before a (sequence, id)."""
        async with self._store.transaction() as stored:
            return await stored.audit.page_of_checkpoints(organization_id, before, limit)

    async def checkpoint(self, organization_id: str) -> AuditCheckpoint:
        """Sign the chain as it is now; the last checkpoint where nothing was added since.

        Raises PlatformError(NOT_FOUND) for an organization without entries.
        """
        async with self._store.transaction() as stored:
            if made := await self._sign_end(stored, organization_id):
                return made
            found = await stored.audit.page_of_checkpoints(organization_id, None, 1)
        if not found:
            raise PlatformError(Reason.NOT_FOUND)
        return found[0]

    async def run(self, stop: asyncio.Event) -> None:
        """Sign every chain that has grown and remove what is kept no longer, once a minute, until `stop` is set. Any
        number of processes may do so."""
        while not stop.is_set():
            try:
                async with asyncio.timeout(_CHECKPOINT_INTERVAL_S):
                    await stop.wait()
            except TimeoutError:
                pass
            try:
                await self.sign_all()
                await self.forget_old()
            except PlatformError as error:
                logger.warning("checkpoints were not made: %s", error.reason.value)
            except Exception:
                logger.exception("checkpoints were not made")

    async def sign_all(self) -> None:
        """Sign every chain that has grown since its last checkpoint. Raises PlatformError(UNAVAILABLE)."""
        while True:
            async with self._store.transaction() as stored:
                grown = await stored.audit.list_without_checkpoint(_BATCH)
            for organization_id in grown:
                async with self._store.transaction() as stored:
                    await self._sign_end(stored, organization_id)
            if len(grown) < _BATCH:
                return

    async def forget_old(self) -> None:
        """Remove entries that are older than 400 days; each chain begins with one that a checkpoint was signed over.

        Raises PlatformError(UNAVAILABLE).
        """
        forgotten = True
        while forgotten:
            async with self._store.transaction() as stored:
                forgotten = await stored.audit.forget_old(_FORGOTTEN_AT_ONCE) > 0

    def _is_old(self, entry: AuditEntry, checkpoints: Sequence[AuditCheckpoint]) -> bool:
        """Whether a chain may begin with the entry, since what was before it is kept no longer."""
        return any(
            checkpoint.sequence == entry.sequence
            and checkpoint.create_time < self._clock.now() - KEPT
            and self._keys.has_signed_checkpoint(checkpoint)
            for checkpoint in checkpoints
        )

    async def _sign_end(self, stored: Transaction, organization_id: str) -> AuditCheckpoint | None:
        end = await stored.audit.lock_uncovered_end(organization_id)
        if end is None:
            return None
        checkpoint = self._keys.sign(
            AuditCheckpoint(
                audit_checkpoint_id=new_id("acp", clock=self._clock),
                organization_id=organization_id,
                sequence=end.sequence,
                hash=end.hash,
                create_time=self._clock.now(),
            )
        )
        await stored.audit.add_checkpoint(checkpoint)
        # A copy that whoever can change the database cannot change.
        logger.info(
            "an audit checkpoint was signed",
            extra={
                "organization_id": organization_id,
                "sequence": checkpoint.sequence,
                "hash": checkpoint.hash.hex(),
                "create_time": checkpoint.create_time.isoformat(),
                "key_id": checkpoint.key_id,
                "signature": checkpoint.signature.hex(),
            },
        )
        return checkpoint


def _check(entry: AuditEntry, field: str) -> None:
    for name in ("audit_entry_id", "organization_id"):
        if not is_id(getattr(entry, name)):
            raise invalid(f"{field}.{name}", "is not an id")
    texts = [
        *(entry.principal_id, entry.api_key_id, entry.method, entry.permission, entry.resource_type),
        *(entry.resource_id, entry.reason, entry.request_id, entry.client_address),
        *(text for change in entry.changes for text in (change.field, change.before_json, change.after_json)),
    ]
    if any(len(text) > _TEXT_LENGTH or "\0" in text for text in texts):
        raise invalid(field, f"must hold texts of at most {_TEXT_LENGTH} characters without NUL")
