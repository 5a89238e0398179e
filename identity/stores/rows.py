"""What the tables' modules share: the connection's type, keyset pages, limits as JSON; it holds no query."""

from __future__ import annotations

from typing import Any, TypeAlias

import asyncpg
import msgspec

from mesh.auth import RateLimits
from mesh.database import Connection as Connection
from mesh.errors import PlatformError, Reason

Row: TypeAlias = asyncpg.Record


class Query:
    """The conditions and values of a query whose filters are optional, collected in order."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._conditions: list[str] = []

    def where(self, condition: str, *values: Any) -> None:
        """Add a condition; each {} in it becomes the next value's placeholder."""
        places = []
        for value in values:
            self.values.append(value)
            places.append(f"${len(self.values)}")
        self._conditions.append(condition.format(*places))

    def __str__(self) -> str:
        return " AND ".join(self._conditions) or "true"


def limits_to_json(limits: RateLimits) -> str:
    """Rate limits as they are stored."""
    return msgspec.json.encode(limits).decode()


def limits_from_json(stored: str) -> RateLimits:
    """Rate limits as they were stored."""
    return msgspec.json.decode(stored, type=RateLimits)


def found(row: Row | None) -> Row:
    """The row of a statement that has one. Raises PlatformError(NOT_FOUND) if it went away meanwhile."""
    if row is None:
        raise PlatformError(Reason.NOT_FOUND)
    return row
