"""The tables of declarative configuration; it never reads a document."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

import msgspec

from identity.configuration_documents import Change, Problem
from identity.configurations import AppliedRevision, Configuration
from identity.stores.rows import Connection, Query, Row
from mesh.pages import TimePlace

_COLUMNS = (
    "organization_id, document, allow_deletions, source_path, source_revision, paused, sync_time, check_time,"
    " drifted_resources, problems"
)


class ConfigurationRows:
    """Configurations and what was applied of them, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get(self, organization_id: str) -> Configuration | None:
        """How an organization and its document stand to each other."""
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS} FROM configurations WHERE organization_id = $1", organization_id
        )
        return None if row is None else _configuration_of(row)

    async def lock(self, organization_id: str) -> Configuration:
        """The same, locked until the transaction ends; it is made if there is none."""
        await self._connection.execute(
            "INSERT INTO configurations (organization_id) VALUES ($1) ON CONFLICT DO NOTHING", organization_id
        )
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS} FROM configurations WHERE organization_id = $1 FOR UPDATE", organization_id
        )
        assert row is not None  # noqa: S101
        return _configuration_of(row)

    async def change(self, configuration: Configuration) -> None:
        """Store a configuration that is locked."""
        await self._connection.execute(
            "UPDATE configurations SET document = $2, allow_deletions = $3, source_path = $4, source_revision = $5,"
            " paused = $6, sync_time = $7, check_time = $8, drifted_resources = $9, problems = $10::jsonb,"
            " revision = revision + 1 WHERE organization_id = $1",
            configuration.organization_id,
            configuration.document,
            configuration.allow_deletions,
            configuration.source_path,
            configuration.source_revision,
            configuration.paused,
            configuration.sync_time,
            configuration.check_time,
            configuration.drifted_resources,
            msgspec.json.encode(configuration.problems).decode(),
        )

    async def add_revision(self, applied: AppliedRevision) -> None:
        """Store what was applied."""
        await self._connection.execute(
            "INSERT INTO configuration_revisions (configuration_revision_id, organization_id, source_revision,"
            " document_sha256, principal_id, changes, apply_time) VALUES ($1, $2, $3, $4, $5, $6::jsonb, $7)",
            applied.configuration_revision_id,
            applied.organization_id,
            applied.source_revision,
            applied.document_sha256,
            applied.principal_id,
            msgspec.json.encode(applied.changes).decode(),
            applied.apply_time,
        )

    async def page_of_revisions(
        self, organization_id: str, after: TimePlace | None, limit: int
    ) -> list[AppliedRevision]:
        """What was applied, newest first."""
        query = Query()
        query.where("organization_id = {}", organization_id)
        if after is not None:
            query.where("(apply_time, configuration_revision_id) < ({}, {})", after.create_time, after.id)
        rows = await self._connection.fetch(
            "SELECT configuration_revision_id, organization_id, source_revision, document_sha256, principal_id,"
            f" changes, apply_time FROM configuration_revisions WHERE {query}"
            f" ORDER BY apply_time DESC, configuration_revision_id DESC LIMIT {limit:d}",
            *query.values,
        )
        return [_revision_of(row) for row in rows]


def _configuration_of(row: Row) -> Configuration:
    fields = dict(row) | {"problems": msgspec.json.decode(row["problems"], type=tuple[Problem, ...])}
    return Configuration(**fields)


def _revision_of(row: Row) -> AppliedRevision:
    fields = dict(row) | {"changes": msgspec.json.decode(row["changes"], type=tuple[Change, ...])}
    return AppliedRevision(**fields)
