"""How a directory keeps an organization's people by SCIM 2.0 (RFC 7644): settings, and what all resources have in
common; it never knows what a user or a group is made of.

What a directory may give is what whoever wrote the settings could: the directory's own key needs none of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from identity import scim_documents
from identity.granted_roles import NO_RULES, RoleRules, check_rules
from identity.organizations import existing
from identity.scim_documents import Condition
from mesh.auth import Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.updates import check_etag

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

_NEVER = datetime.fromtimestamp(0, UTC)
_COUNT = 500


class ScimKind(StrEnum):
    """What a resource is."""

    USER = "user"
    GROUP = "group"


@dataclass(frozen=True, slots=True)
class ScimSettings:
    """How an organization uses SCIM. The revision of settings that were never changed is 0."""

    organization_id: str
    enabled: bool = False
    rules: RoleRules = NO_RULES
    last_use_time: datetime | None = field(default=None, compare=False)
    update_time: datetime = _NEVER
    revision: int = field(default=0, compare=False)


CHANGEABLE = ("enabled", "group_roles", "default_role_ids")
"""What an update of the settings may change."""


class Resource(NamedTuple):
    """A resource as SCIM shows it."""

    resource_id: str
    document: bytes
    version: str


class Directory(Protocol):
    """Users, or groups: what is particular to them. Every change is made with the organization's row locked."""

    @property
    def filterable(self) -> Collection[str]:
        """The attributes that filters can ask for, in lower case."""

    async def create(self, stored: Transaction, settings: ScimSettings, document: Mapping[str, Any]) -> str:
        """Make one; its id. Raises PlatformError: INVALID_ARGUMENT, ALREADY_EXISTS."""

    async def documents(
        self, stored: Transaction, organization_id: str, conditions: Sequence[Condition], offset: int, limit: int
    ) -> tuple[list[dict[str, Any]], int]:
        """Up to `limit` of those that the conditions hold for after the first `offset`, by their ids; how many there
        are in all."""

    async def replace(
        self, stored: Transaction, settings: ScimSettings, resource_id: str, document: Mapping[str, Any]
    ) -> None:
        """Have one be what the document says. Raises PlatformError: INVALID_ARGUMENT, ALREADY_EXISTS,
        FAILED_PRECONDITION."""

    async def remove(self, stored: Transaction, settings: ScimSettings, resource_id: str) -> None:
        """Remove one. Raises PlatformError(FAILED_PRECONDITION)."""

    async def follow_rules(self, stored: Transaction, settings: ScimSettings) -> None:
        """Have everybody hold what the settings' rules give."""


class Scim:
    """The operations on what directories keep. Callers' permissions were held to the contract before."""

    def __init__(self, store: Store, clock: Clock, directories: Mapping[ScimKind, Directory]) -> None:
        self._store = store
        self._clock = clock
        self._directories = directories

    async def settings(self, organization_id: str) -> ScimSettings:
        """How an organization uses SCIM. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            return await stored.scim_settings.get(organization_id) or ScimSettings(organization_id)

    async def update_settings(
        self, caller: Principal, wanted: ScimSettings, changed: Collection[str], etag: str
    ) -> ScimSettings:
        """Change the fields `changed` to the values of `wanted`; roles follow the new rules at once.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, PERMISSION_DENIED, FAILED_PRECONDITION for another etag.
        """
        organization_id = wanted.organization_id
        async with self._store.transaction() as stored:
            await existing(stored, organization_id, lock=True)
            current = await stored.scim_settings.get(organization_id) or ScimSettings(organization_id)
            check_etag(etag, current.revision, "scim_settings.etag")
            rules = RoleRules(
                *(
                    getattr((wanted if name in changed else current).rules, name)
                    for name in ("group_roles", "default_role_ids")
                )
            )
            enabled = wanted.enabled if "enabled" in changed else current.enabled
            new = replace(current, enabled=enabled, rules=rules)
            if new == current:
                return current
            await check_rules(stored, caller, organization_id, new.rules, current.rules, "scim_settings")
            new = await stored.scim_settings.put(replace(new, update_time=self._clock.now()))
            if new.rules != current.rules:
                for directory in self._directories.values():
                    await directory.follow_rules(stored, new)
            return new

    async def create(self, organization_id: str, kind: ScimKind, document: bytes) -> Resource:
        """Make a user or a group. Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, ALREADY_EXISTS."""
        read = scim_documents.read(document)
        async with self._store.transaction() as stored:
            settings = await self._enabled(stored, organization_id, lock=True)
            resource_id = await self._directories[kind].create(stored, settings, read)
            return _resource(await self._document(stored, organization_id, kind, resource_id))

    async def get(
        self,
        organization_id: str,
        kind: ScimKind,
        resource_id: str,
        attributes: Collection[str],
        excluded: Collection[str],
    ) -> Resource:
        """One user or group. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            await self._enabled(stored, organization_id)
            document = await self._document(stored, organization_id, kind, resource_id)
        return _resource(document, attributes, excluded)

    async def list(
        self,
        organization_id: str,
        kind: ScimKind,
        filter_text: str,
        start_index: int,
        count: int,
        attributes: Collection[str],
        excluded: Collection[str],
    ) -> tuple[list[Resource], int]:
        """Up to `count` users or groups from the `start_index`-th on, which counts from 1; how many there are in all.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT.
        """
        directory = self._directories[kind]
        conditions = scim_documents.read_filter(filter_text, directory.filterable)
        async with self._store.transaction() as stored:
            await self._enabled(stored, organization_id)
            documents, total = await directory.documents(
                stored, organization_id, conditions, max(start_index, 1) - 1, min(max(count, 0), _COUNT)
            )
        return [_resource(document, attributes, excluded) for document in documents], total

    async def replace(
        self, organization_id: str, kind: ScimKind, resource_id: str, document: bytes, version: str
    ) -> Resource:
        """Have a user or group be what the document says. Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT,
        ALREADY_EXISTS, FAILED_PRECONDITION for another version."""
        read = scim_documents.read(document)
        async with self._store.transaction() as stored:
            settings = await self._enabled(stored, organization_id, lock=True)
            _check_version(version, await self._document(stored, organization_id, kind, resource_id))
            await self._directories[kind].replace(stored, settings, resource_id, read)
            return _resource(await self._document(stored, organization_id, kind, resource_id))

    async def patch(
        self, organization_id: str, kind: ScimKind, resource_id: str, patch: bytes, version: str
    ) -> Resource:
        """Change a user or group, all of it or nothing. Raises what `replace` raises."""
        read = scim_documents.read(patch)
        async with self._store.transaction() as stored:
            settings = await self._enabled(stored, organization_id, lock=True)
            current = await self._document(stored, organization_id, kind, resource_id)
            _check_version(version, current)
            changed = scim_documents.patched(current, read)
            await self._directories[kind].replace(stored, settings, resource_id, changed)
            return _resource(await self._document(stored, organization_id, kind, resource_id))

    async def delete(self, organization_id: str, kind: ScimKind, resource_id: str, version: str) -> None:
        """Remove a group, or end a membership. Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION for another version
        and for the last owner."""
        async with self._store.transaction() as stored:
            settings = await self._enabled(stored, organization_id, lock=True)
            _check_version(version, await self._document(stored, organization_id, kind, resource_id))
            await self._directories[kind].remove(stored, settings, resource_id)

    async def _enabled(self, stored: Transaction, organization_id: str, *, lock: bool = False) -> ScimSettings:
        await existing(stored, organization_id, lock=lock)
        settings = await stored.scim_settings.get(organization_id)
        if settings is None or not settings.enabled:
            raise PlatformError(Reason.NOT_FOUND, description="The organization does not use SCIM.")
        await stored.scim_settings.note_use(organization_id, self._clock.now())
        return settings

    async def _document(
        self, stored: Transaction, organization_id: str, kind: ScimKind, resource_id: str
    ) -> dict[str, Any]:
        found, _ = await self._directories[kind].documents(
            stored, organization_id, [Condition("id", resource_id)], 0, 1
        )
        if not found:
            raise PlatformError(Reason.NOT_FOUND)
        return found[0]


def _resource(document: dict[str, Any], attributes: Collection[str] = (), excluded: Collection[str] = ()) -> Resource:
    written, version = scim_documents.write(document)
    if attributes or excluded:
        written = scim_documents.cut(written, attributes, excluded)
    return Resource(document["id"], written, version)


def _check_version(version: str, document: Mapping[str, Any]) -> None:
    if version and version != scim_documents.write(document)[1]:
        raise PlatformError(
            Reason.FAILED_PRECONDITION,
            field="version",
            description="It has changed since you read it. Read it again, and repeat the change with the new version.",
        )
