"""Organizations as their documents describe them: planned, applied all or nothing, compared; it never reads a file.

A change is made by the same operations as a person's would be, in one transaction, so that every rule and permission
holds for it, and the audit log has it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime
from enum import IntEnum
from typing import TYPE_CHECKING

from identity import fields
from identity.configuration_documents import (
    Change,
    ChangeKind,
    DocumentError,
    Problem,
    compare,
    describe,
    problem_at,
    read,
    write,
)
from identity.configuration_resources import Resources, current_document
from identity.organizations import existing
from identity.roles import BUILT_IN, OWNER
from mesh.auth import Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.pages import TimePlace

if TYPE_CHECKING:
    from identity.stores import Store, Transaction


class ConfigurationState(IntEnum):
    """How an organization and its document stand to each other, as the contract numbers it."""

    DISABLED = 1
    SYNCED = 2
    DRIFTED = 3
    FAILED = 4
    PAUSED = 5


@dataclass(frozen=True, slots=True)
class Configuration:
    """An organization's document as it was applied last, None before the first time, and what has come of it since."""

    organization_id: str
    document: str | None = None
    allow_deletions: bool = False
    source_path: str = ""
    source_revision: str = ""
    paused: bool = False
    sync_time: datetime | None = None
    check_time: datetime | None = None
    drifted_resources: int = 0
    problems: tuple[Problem, ...] = ()

    @property
    def document_sha256(self) -> bytes:
        """Of the document; empty without one."""
        return b"" if self.document is None else hashlib.sha256(self.document.encode()).digest()

    @property
    def state(self) -> ConfigurationState:
        """In one word."""
        if self.paused:
            return ConfigurationState.PAUSED
        if self.problems:
            return ConfigurationState.FAILED
        if self.document is None:
            return ConfigurationState.DISABLED
        return ConfigurationState.DRIFTED if self.drifted_resources else ConfigurationState.SYNCED


@dataclass(frozen=True, slots=True)
class Plan:
    """What a document changes, or why it cannot be applied."""

    changes: tuple[Change, ...] = ()
    problems: tuple[Problem, ...] = ()
    fingerprint: str = ""

    @property
    def text(self) -> str:
        """The same for people."""
        return describe(self.changes)

    @property
    def effective(self) -> list[Change]:
        """The changes that are made; what is only kept is none."""
        return [change for change in self.changes if change.kind is not ChangeKind.KEEP]


@dataclass(frozen=True, slots=True)
class AppliedRevision:
    """A document that was applied, by whom (empty: the watched directory), and what it changed."""

    configuration_revision_id: str
    organization_id: str
    source_revision: str
    document_sha256: bytes
    principal_id: str
    changes: tuple[Change, ...]
    apply_time: datetime


@dataclass(frozen=True, slots=True)
class Source:
    """Where a document was found: its path in the watched directory, and the directory's revision if that is known."""

    path: str = ""
    revision: str = ""


class Configurations:
    """The operations on configurations."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def get(self, organization_id: str) -> Configuration:
        """How the organization and its document stand to each other now. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            found = await stored.configurations.get(organization_id) or Configuration(organization_id)
            return await self._checked(stored, found)

    async def export(self, organization_id: str) -> str:
        """The organization as it is, as a document. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            return write(await current_document(stored, organization_id))

    async def plan(self, organization_id: str, text: str, *, allow_deletions: bool) -> Plan:
        """What applying a document would change. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            return await self._plan(stored, organization_id, text, allow_deletions=allow_deletions)

    async def drift(self, organization_id: str) -> Plan:
        """What would bring the organization back to the document that was applied last. Raises
        PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            found = await stored.configurations.get(organization_id)
            if found is None or found.document is None:
                return Plan()
            return await self._plan(stored, organization_id, found.document, allow_deletions=found.allow_deletions)

    async def apply(
        self,
        caller: Principal,
        organization_id: str,
        text: str,
        *,
        allow_deletions: bool,
        fingerprint: str = "",
        request_id: str = "",
    ) -> tuple[Plan, Configuration]:
        """Bring an organization to its document, all or nothing; a plan with problems has changed nothing.

        Raises PlatformError: NOT_FOUND, PERMISSION_DENIED for a change that the caller may not make,
        FAILED_PRECONDITION where the document or the organization is not what `fingerprint` was made of.
        """
        fields.check_request_id(request_id)
        try:
            async with self._store.transaction() as stored:
                await existing(stored, organization_id, lock=True)
                current = await stored.configurations.lock(organization_id)
                revision_id = new_id("crev", clock=self._clock)
                now = self._clock.now()
                if await stored.creations.claim(organization_id, "ApplyConfiguration", request_id, revision_id, now):
                    return Plan(), await self._checked(stored, current)
                plan = await self._plan(stored, organization_id, text, allow_deletions=allow_deletions)
                if fingerprint and fingerprint != plan.fingerprint:
                    raise PlatformError(
                        Reason.FAILED_PRECONDITION,
                        field="fingerprint",
                        description="The document or the organization has changed since it was planned.",
                    )
                wanted = replace(
                    current, document=text, allow_deletions=allow_deletions, source_path="", source_revision=""
                )
                return plan, await self._make(stored, wanted, plan, caller)
        except DocumentError as error:
            return Plan(problems=error.problems), await self.get(organization_id)

    async def sync(self, organization_id: str, text: str, source: Source) -> tuple[Plan, Configuration]:
        """Bring an organization to the document of the watched directory, or compare them only where that is paused;
        what is wrong with it is remembered. Raises PlatformError: NOT_FOUND, UNAVAILABLE."""
        try:
            allow_deletions = read(text).allow_deletions
            async with self._store.transaction() as stored:
                await existing(stored, organization_id, lock=True)
                current = await stored.configurations.lock(organization_id)
                plan = await self._plan(stored, organization_id, text, allow_deletions=allow_deletions)
                if current.paused:
                    return plan, await self._note(stored, current, source, drifted_resources=len(plan.effective))
                wanted = replace(current, document=text, allow_deletions=allow_deletions)
                if not plan.effective and current.document == text and not current.problems:
                    return plan, await self._note(stored, current, source, drifted_resources=0)
                wanted = replace(wanted, source_path=source.path, source_revision=source.revision)
                return plan, await self._make(stored, wanted, plan, _directory(organization_id))
        except DocumentError as error:
            async with self._store.transaction() as stored:
                current = await stored.configurations.lock(organization_id)
                return Plan(problems=error.problems), await self._note(stored, current, source, problems=error.problems)

    async def pause(self, organization_id: str, *, paused: bool) -> Configuration:
        """Stop applying the watched directory, or begin again. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id, lock=True)
            changed = replace(await stored.configurations.lock(organization_id), paused=paused)
            await stored.configurations.change(changed)
            return await self._checked(stored, changed)

    async def list_revisions(self, organization_id: str, after: TimePlace | None, limit: int) -> list[AppliedRevision]:
        """Up to `limit` of what was applied, newest first. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            return await stored.configurations.page_of_revisions(organization_id, after, limit)

    async def _plan(self, stored: Transaction, organization_id: str, text: str, *, allow_deletions: bool) -> Plan:
        try:
            wanted = read(text)
        except DocumentError as error:
            return Plan(problems=error.problems)
        current = await current_document(stored, organization_id)
        made_of = f"{allow_deletions}\n{write(current)}\n{text}"
        return Plan(
            changes=tuple(compare(current, wanted, allow_deletions=allow_deletions)),
            fingerprint=hashlib.sha256(made_of.encode()).hexdigest(),
        )

    async def _make(self, stored: Transaction, wanted: Configuration, plan: Plan, caller: Principal) -> Configuration:
        """Make a plan's changes, and remember them. Raises DocumentError, PlatformError(PERMISSION_DENIED)."""
        if plan.problems:
            raise DocumentError(plan.problems)
        assert wanted.document is not None  # noqa: S101
        organization_id, now = wanted.organization_id, self._clock.now()
        resources = Resources(self._store.joined(stored), self._clock, organization_id, caller)
        for change in plan.effective:
            try:
                await resources.make(change)
            except PlatformError as error:
                if error.reason in (Reason.INVALID_ARGUMENT, Reason.FAILED_PRECONDITION, Reason.ALREADY_EXISTS):
                    raise DocumentError(
                        [problem_at(wanted.document, change.resource_type, change.resource_name, error.message)]
                    ) from None
                raise
        done = replace(wanted, sync_time=now, check_time=now, drifted_resources=0, problems=())
        await stored.configurations.change(done)
        await stored.configurations.add_revision(
            AppliedRevision(
                configuration_revision_id=new_id("crev", clock=self._clock),
                organization_id=organization_id,
                source_revision=wanted.source_revision,
                document_sha256=hashlib.sha256(wanted.document.encode()).digest(),
                principal_id=caller.id,
                changes=plan.changes,
                apply_time=now,
            )
        )
        return done

    async def _note(
        self,
        stored: Transaction,
        current: Configuration,
        source: Source,
        *,
        drifted_resources: int = 0,
        problems: tuple[Problem, ...] = (),
    ) -> Configuration:
        """Remember what came of looking at a document that was not applied."""
        noted = replace(
            current,
            source_path=source.path,
            source_revision=source.revision,
            check_time=self._clock.now(),
            drifted_resources=drifted_resources,
            problems=problems,
        )
        await stored.configurations.change(noted)
        return noted

    async def _checked(self, stored: Transaction, found: Configuration) -> Configuration:
        """A configuration as compared with the organization right now."""
        if found.document is None:
            return found
        plan = await self._plan(stored, found.organization_id, found.document, allow_deletions=found.allow_deletions)
        return replace(found, check_time=self._clock.now(), drifted_resources=len(plan.effective))


def _directory(organization_id: str) -> Principal:
    """Who acts for the watched directory: whoever may write there runs the platform."""
    return Principal(
        kind="service_account",
        id="",
        organization_id=organization_id,
        permissions=BUILT_IN[OWNER].permissions,
        platform=True,
    )
