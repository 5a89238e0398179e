"""Verifies statements: hashes, signatures, the chain, and raw usage where it is still there; it never mends one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from analytics.statement_issuer import sums_of
from analytics.statement_keys import StatementKeys
from analytics.statement_store import StatementStore
from analytics.statements import (
    NOTHING,
    Amounts,
    Flaw,
    Group,
    Month,
    Statement,
    StatementWalk,
    kept_since,
)
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason

_LINES_AT_ONCE = 1_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found; `is_recomputed` tells whether raw usage of the statement's month was there to compare with."""

    flaw: Flaw | None
    is_recomputed: bool


class StatementVerifier:
    """Looks at what is stored. Raw usage is there for `raw_kept`."""

    def __init__(self, store: StatementStore, keys: StatementKeys, clock: Clock, raw_kept: timedelta) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._raw_kept = raw_kept

    async def verify(self, organization_id: str, statement_id: str) -> Verdict:
        """Verify one statement. Raises PlatformError(NOT_FOUND)."""
        statement = await self._store.get(organization_id, statement_id)
        if statement is None:
            raise PlatformError(Reason.NOT_FOUND)
        public_key = await self._keys.public_key(statement.key_id)
        if public_key is None:
            return Verdict(Flaw(0, f"The key {statement.key_id} is not one that this service can open."), False)
        walk, places = StatementWalk(statement, public_key), dict[Group, int]()
        while batch := await self._store.lines(organization_id, statement_id, walk.taken, _LINES_AT_ONCE):
            if flaw := walk.take(batch):
                return Verdict(flaw, False)
            places |= {line.group: line.line_number for line in batch}
        before = await self._store.page(organization_id, statement.month, 1)
        if flaw := walk.end(before[0] if before else None):
            return Verdict(flaw, False)
        since = kept_since(self._clock.now(), self._raw_kept)
        return Verdict(await self._recompute(statement, places, since), statement.month >= since)

    async def _recompute(self, statement: Statement, places: dict[Group, int], since: Month) -> Flaw | None:
        """The first line whose group has less raw usage than statements say of it. More is what came late: the next
        statement has it."""
        async with self._store.transaction(statement.organization_id) as stored:
            months = sorted({group.month for group in places if group.month >= since})
            stated = await stored.stated(months[0], months[-1]) if months else {}
            raw = dict[Group, Amounts]()
            for month in months:
                raw |= await sums_of(stored, month)
        wrong = [
            number
            for group, number in places.items()
            if group.month >= since and stated.get(group, NOTHING).is_above(raw.get(group, NOTHING))
        ]
        return Flaw(min(wrong), "Raw usage does not hold what is stated.") if wrong else None
