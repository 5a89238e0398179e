"""All SQL of statements: the usage that they are made of, what was issued and the keys that sign; it never sums,
hashes or signs."""

# ruff: noqa: S608 - only text of this file goes into a statement; every value is a parameter

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from analytics.statements import Amounts, Group, Month, Statement, StatementLine, Usage
from mesh.database import Connection, Database

_LONG_S = 600.0
"""Seconds that a sum over an organization's months, or waiting for another who issues, may take."""

_ROWS_AT_ONCE = 5_000
_STATEMENT = (
    "statement_id, organization_id, year, month, lines, requests, prompt_tokens, completion_tokens, cost_micros,"
    " issue_time, previous_hash, hash, key_id, signature"
)
_LINE = (
    "line_number, kind, year, month, api_key_id, model, price_id, requests, prompt_tokens, cached_prompt_tokens,"
    " completion_tokens, cost_micros, hash, signature"
)
_SUMS = ", ".join(f"sum({name})::bigint" for name in Amounts._fields)
# Outcomes by their number in the contract: 2 refused, which is billed nothing.
_BILLED = "organization_id = $1 AND admit_time >= $2 AND admit_time < $3 AND outcome <> 2"
_ISSUING = "aiaas.analytics.statements"
_KEYS = "aiaas.analytics.statement_keys"

# The next organization is looked for in the index, as often as there are some, instead of reading all events.
_ORGANIZATIONS = """
WITH RECURSIVE known AS (
    (SELECT organization_id FROM usage_events ORDER BY organization_id LIMIT 1)
    UNION ALL
    SELECT (
        SELECT organization_id FROM usage_events WHERE organization_id > known.organization_id
        ORDER BY organization_id LIMIT 1
    ) FROM known WHERE organization_id IS NOT NULL
)
SELECT organization_id FROM known WHERE organization_id IS NOT NULL
"""


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key that signs, its private half sealed."""

    key_id: str
    public_key: bytes
    sealed_private_key: bytes = field(repr=False)
    create_time: datetime


class Issuing:
    """Statements and usage of one organization, within a transaction."""

    def __init__(self, connection: Connection, organization_id: str) -> None:
        self._connection = connection
        self._organization_id = organization_id

    async def wait(self) -> None:
        """Returns when nobody else issues for the organization until the transaction ends."""
        await self._lock(_ISSUING, self._organization_id)

    async def find(self, month: Month) -> Statement | None:
        """The statement of a month."""
        row = await self._connection.fetchrow(
            f"SELECT {_STATEMENT} FROM statements WHERE organization_id = $1 AND year = $2 AND month = $3",
            self._organization_id,
            *month,
        )
        return None if row is None else _statement_of(row)

    async def last(self) -> Statement | None:
        """The newest statement."""
        row = await self._connection.fetchrow(
            f"SELECT {_STATEMENT} FROM statements WHERE organization_id = $1 ORDER BY year DESC, month DESC LIMIT 1",
            self._organization_id,
        )
        return None if row is None else _statement_of(row)

    async def used(self, start: datetime, end: datetime) -> dict[Month, Amounts]:
        """What raw usage sums up to in each month that has some."""
        rows = await self._connection.fetch(
            "SELECT date_trunc('month', admit_time, 'UTC'), count(*), sum(prompt_tokens)::bigint,"
            " sum(cached_prompt_tokens)::bigint, sum(completion_tokens)::bigint, sum(cost_micros)::bigint"
            f" FROM usage_events WHERE {_BILLED} GROUP BY 1 ORDER BY 1",
            self._organization_id,
            start,
            end,
            timeout=_LONG_S,
        )
        return {Month.of(start): Amounts(*amounts) for start, *amounts in rows}

    async def stated(self, since: Month, until: Month) -> dict[Group, Amounts]:
        """What all statements say of these months, corrections included."""
        rows = await self._connection.fetch(
            f"SELECT year, month, api_key_id, model, price_id, {_SUMS} FROM statement_lines"
            " WHERE organization_id = $1 AND (year, month) >= ($2, $3) AND (year, month) <= ($4, $5)"
            " GROUP BY 1, 2, 3, 4, 5",
            self._organization_id,
            *since,
            *until,
        )
        return {Group(Month(row[0], row[1]), *row[2:5]): Amounts(*row[5:]) for row in rows}

    async def usage(self, month: Month) -> AsyncGenerator[list[Usage], None]:
        """The requests of a month that are billed, some thousand at a time, all of one moment."""
        cursor = await self._connection.cursor(
            "SELECT api_key_id, model, prompt_tokens, cached_prompt_tokens, completion_tokens, cost_micros, event"
            f" FROM usage_events WHERE {_BILLED}",
            self._organization_id,
            month.start,
            month.end,
        )
        while found := await cursor.fetch(_ROWS_AT_ONCE):
            yield [Usage(*row) for row in found]

    async def add(self, statement: Statement, lines: Sequence[StatementLine]) -> None:
        """Store a statement of this organization."""
        await self._connection.execute(
            f"INSERT INTO statements ({_STATEMENT})"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
            statement.statement_id,
            statement.organization_id,
            *statement.month,
            statement.lines,
            statement.requests,
            statement.prompt_tokens,
            statement.completion_tokens,
            statement.cost_micros,
            statement.issue_time,
            statement.previous_hash,
            statement.hash,
            statement.key_id,
            statement.signature,
        )
        await self._connection.copy_records_to_table(
            "statement_lines",
            columns=["statement_id", "organization_id", *_LINE.split(", ")],
            records=[(statement.statement_id, statement.organization_id, *_values(line)) for line in lines],
            timeout=_LONG_S,
        )

    async def lock_keys(self) -> None:
        """Returns when nobody else makes a key until the transaction ends."""
        await self._lock(_KEYS, "")

    async def keys(self) -> list[StoredKey]:
        """All keys, newest first."""
        rows = await self._connection.fetch(
            "SELECT key_id, public_key, sealed_private_key, create_time FROM statement_keys ORDER BY create_time DESC"
        )
        return [StoredKey(*row) for row in rows]

    async def add_key(self, key: StoredKey) -> None:
        """Store a new key."""
        await self._connection.execute(
            "INSERT INTO statement_keys (key_id, public_key, sealed_private_key, create_time) VALUES ($1, $2, $3, $4)",
            key.key_id,
            key.public_key,
            key.sealed_private_key,
            key.create_time,
        )

    async def _lock(self, kind: str, name: str) -> None:
        await self._connection.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended($1, hashtext($2)))", kind, name, timeout=_LONG_S
        )


class StatementStore:
    """Statements, their lines and keys. Every method raises PlatformError(UNAVAILABLE) when PostgreSQL is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @asynccontextmanager
    async def transaction(self, organization_id: str) -> AsyncIterator[Issuing]:
        """Statements and usage of an organization in one transaction."""
        async with self._database.transaction() as connection:
            yield Issuing(connection, organization_id)

    async def organizations(self) -> list[str]:
        """Those with raw usage."""
        async with self._database.transaction() as connection:
            return [row["organization_id"] for row in await connection.fetch(_ORGANIZATIONS, timeout=_LONG_S)]

    async def get(self, organization_id: str, statement_id: str) -> Statement | None:
        """One statement."""
        row = await self._database.fetchrow(
            f"SELECT {_STATEMENT} FROM statements WHERE organization_id = $1 AND statement_id = $2",
            organization_id,
            statement_id,
        )
        return None if row is None else _statement_of(row)

    async def page(self, organization_id: str, before: Month | None, limit: int) -> list[Statement]:
        """Up to `limit` statements of months before `before`, newest first."""
        rows = await self._database.fetch(
            f"SELECT {_STATEMENT} FROM statements WHERE organization_id = $1 AND (year, month) < ($2, $3)"
            " ORDER BY year DESC, month DESC LIMIT $4",
            organization_id,
            *(before or _NEVER),
            limit,
        )
        return [_statement_of(row) for row in rows]

    async def lines(self, organization_id: str, statement_id: str, after: int, limit: int) -> list[StatementLine]:
        """Up to `limit` lines in their order, those after a line's number."""
        rows = await self._database.fetch(
            f"SELECT {_LINE} FROM statement_lines WHERE organization_id = $1 AND statement_id = $2 AND line_number > $3"
            " ORDER BY line_number LIMIT $4",
            organization_id,
            statement_id,
            after,
            limit,
        )
        return [
            StatementLine(row[0], row[1], Group(Month(row[2], row[3]), *row[4:7]), Amounts(*row[7:12]), *row[12:])
            for row in rows
        ]

    async def key(self, key_id: str) -> StoredKey | None:
        """One key."""
        row = await self._database.fetchrow(
            "SELECT key_id, public_key, sealed_private_key, create_time FROM statement_keys WHERE key_id = $1", key_id
        )
        return None if row is None else StoredKey(*row)


# After every month that a smallint and a calendar know.
_NEVER = Month(32767, 12)


def _statement_of(row: Any) -> Statement:
    values = dict(row)
    return Statement(**values | {"month": Month(values.pop("year"), values["month"])})


def _values(line: StatementLine) -> tuple[Any, ...]:
    month, *place = line.group
    return (line.line_number, line.kind, *month, *place, *line.amounts, line.hash, line.signature)
