"""The tables of policies and of their decisions; it never evaluates a policy."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import msgspec

from identity.policies import Decision, Policy
from identity.policy_rego import Bundle
from identity.stores.rows import Connection, Query, Row, found
from mesh.database import Database
from mesh.pages import TimePlace

_COLUMNS = (
    "policy_id, organization_id, display_name, modules, data_json, disabled, version, create_time, update_time,"
    " revision"
)
_DECISION = (
    "policy_decision_id, organization_id, request_id, principal_id, input, allowed, policy_ids, denying_policy_id,"
    " reason, decide_time, duration_micros"
)
_MODULES = tuple[tuple[str, str], ...]


class PolicyRows:
    """Policies, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, policy: Policy) -> None:
        """Store a new policy."""
        await self._connection.execute(
            "INSERT INTO policies (policy_id, organization_id, display_name, modules, data_json, disabled, create_time,"
            " update_time) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            policy.policy_id,
            policy.organization_id,
            policy.display_name,
            msgspec.json.encode(policy.bundle.modules).decode(),
            policy.bundle.data_json,
            policy.disabled,
            policy.create_time,
            policy.update_time,
        )

    async def get(self, organization_id: str, policy_id: str, *, lock: bool = False) -> Policy | None:
        """One policy, locked if asked."""
        row = await self._connection.fetchrow(
            f"SELECT {_COLUMNS} FROM policies WHERE organization_id = $1 AND policy_id = $2"
            f"{' FOR NO KEY UPDATE' if lock else ''}",
            organization_id,
            policy_id,
        )
        return None if row is None else _policy_of(row)

    async def page(self, organization_id: str, after: TimePlace | None, limit: int) -> list[Policy]:
        """Policies, oldest first."""
        query = Query()
        query.where("organization_id = {}", organization_id)
        if after is not None:
            query.where("(create_time, policy_id) > ({}, {})", after.create_time, after.id)
        rows = await self._connection.fetch(
            f"SELECT {_COLUMNS} FROM policies WHERE {query} ORDER BY create_time, policy_id LIMIT {limit:d}",
            *query.values,
        )
        return [_policy_of(row) for row in rows]

    async def change(self, policy: Policy) -> Policy:
        """Store what changed of a policy that is there; gives it with its new revision."""
        row = await self._connection.fetchrow(
            "UPDATE policies SET display_name = $3, modules = $4, data_json = $5, disabled = $6, version = $7,"
            " update_time = $8, revision = revision + 1 WHERE organization_id = $1 AND policy_id = $2"
            f" RETURNING {_COLUMNS}",
            policy.organization_id,
            policy.policy_id,
            policy.display_name,
            msgspec.json.encode(policy.bundle.modules).decode(),
            policy.bundle.data_json,
            policy.disabled,
            policy.version,
            policy.update_time,
        )
        return _policy_of(found(row))

    async def remove(self, organization_id: str, policy_id: str) -> None:
        """Remove a policy."""
        await self._connection.execute(
            "DELETE FROM policies WHERE organization_id = $1 AND policy_id = $2", organization_id, policy_id
        )


async def find_policy_versions(database: Database, organization_id: str) -> list[tuple[str, int]]:
    """The ids and versions of those that decide, oldest first; one query without a transaction, as each decision asks
    it."""
    rows = await database.fetch(
        "SELECT policy_id, version FROM policies WHERE organization_id = $1 AND NOT disabled"
        " ORDER BY create_time, policy_id",
        organization_id,
    )
    return [(row["policy_id"], row["version"]) for row in rows]


class PolicyDecisionRows:
    """Recorded decisions, within a transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, decisions: Sequence[Decision]) -> None:
        """Store decisions, but those of organizations that are gone."""
        await self._connection.executemany(
            f"INSERT INTO policy_decisions ({_DECISION}) SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11"
            " WHERE EXISTS (SELECT FROM organizations WHERE organization_id = $2)",
            [
                (
                    decision.policy_decision_id,
                    decision.organization_id,
                    decision.request_id,
                    decision.principal_id,
                    decision.input,
                    decision.allowed,
                    list(decision.policy_ids),
                    decision.denying_policy_id,
                    decision.reason,
                    decision.decide_time,
                    decision.duration_micros,
                )
                for decision in decisions
            ],
        )

    async def page(
        self,
        organization_id: str,
        before: TimePlace | None,
        limit: int,
        start_time: datetime,
        end_time: datetime,
        *,
        denied_only: bool = False,
        principal_id: str = "",
    ) -> list[Decision]:
        """Decisions, newest first."""
        query = Query()
        query.where("organization_id = {}", organization_id)
        query.where("decide_time >= {} AND decide_time < {}", start_time, end_time)
        if before is not None:
            query.where("(decide_time, policy_decision_id) < ({}, {})", before.create_time, before.id)
        if denied_only:
            query.where("NOT allowed")
        if principal_id:
            query.where("principal_id = {}", principal_id)
        rows = await self._connection.fetch(
            f"SELECT {_DECISION} FROM policy_decisions WHERE {query}"
            f" ORDER BY decide_time DESC, policy_decision_id DESC LIMIT {limit:d}",
            *query.values,
        )
        return [Decision(**{**row, "policy_ids": tuple(row["policy_ids"])}) for row in rows]

    async def forget_until(self, moment: datetime, most: int) -> int:
        """Remove at most so many that are older; gives how many."""
        rows = await self._connection.fetch(
            "DELETE FROM policy_decisions WHERE policy_decision_id IN (SELECT policy_decision_id FROM policy_decisions"
            " WHERE decide_time < $1 LIMIT $2) RETURNING policy_decision_id",
            moment,
            most,
        )
        return len(rows)


def _policy_of(row: Row) -> Policy:
    return Policy(
        policy_id=row["policy_id"],
        organization_id=row["organization_id"],
        display_name=row["display_name"],
        bundle=Bundle(msgspec.json.decode(row["modules"], type=_MODULES), row["data_json"]),
        disabled=row["disabled"],
        version=row["version"],
        create_time=row["create_time"],
        update_time=row["update_time"],
        revision=row["revision"],
    )
