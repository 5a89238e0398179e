"""Issues statements, by itself on the third day of the month after and whenever somebody asks; it never changes one.

Any number of processes may: of an organization one issues at a time, and a month has one statement. What was missed is
made up for, the oldest month first. Requests are read some thousand at a time, so that memory grows with the lines of a
statement alone. Metric: `aiaas_analytics_statements_total{outcome}`.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta

from analytics import metrics
from analytics.statement_keys import StatementKeys
from analytics.statement_store import Issuing, StatementStore
from analytics.statements import (
    NOTHING,
    Amounts,
    Group,
    Month,
    Statement,
    Sums,
    issued,
    kept_since,
    last_due,
    lines_of,
)
from analytics.store import UsageStore
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id

logger = logging.getLogger(__name__)

_INTERVAL_S = 3600.0
_RETRY_S = 60.0


@dataclass(frozen=True, slots=True)
class _Books:
    """What an organization used by month, what its statements say of it, and the newest of them."""

    used: dict[Month, Amounts]
    stated: dict[Group, Amounts]
    last: Statement | None

    def is_over(self, month: Month) -> bool:
        """Whether the months of statements have gone past it."""
        return self.last is not None and month <= self.last.month

    def without_statement(self) -> list[Month]:
        """The months with usage that are to have a statement, the oldest first."""
        return [month for month in sorted(self.used) if not self.is_over(month)]

    def to_correct(self) -> list[Month]:
        """The months that have had their statement, or none, and whose usage is not as stated."""
        stated: dict[Month, Amounts] = {}
        for group, amounts in self.stated.items():
            stated[group.month] = stated.get(group.month, NOTHING).plus(amounts)
        return [
            month
            for month in sorted(self.used.keys() | stated.keys())
            if self.is_over(month) and self.used.get(month, NOTHING) != stated.get(month, NOTHING)
        ]


class StatementIssuer:
    """Works until it is cancelled. Raw usage is there for `raw_kept`; older months are left as they were stated."""

    def __init__(
        self, store: StatementStore, usage: UsageStore, keys: StatementKeys, clock: Clock, raw_kept: timedelta
    ) -> None:
        self._store = store
        self._usage = usage
        self._keys = keys
        self._clock = clock
        self._raw_kept = raw_kept
        self._issued_until: Month | None = None

    async def run(self) -> None:
        """Issue what is due, hourly; sooner while something is away."""
        while True:
            try:
                is_done = await self.work()
            except PlatformError as error:
                logger.warning("statements wait: %s", error.reason.value)
                is_done = False
            await asyncio.sleep(_INTERVAL_S if is_done else _RETRY_S)

    async def work(self) -> bool:
        """Issue what is due to all organizations; whether nothing is left. Raises PlatformError(UNAVAILABLE)."""
        due = last_due(self._clock.now())
        if self._issued_until == due:
            return True
        if not await self._is_counted(due):
            logger.warning("statements of %s wait: its usage is not all counted yet", due)
            return False
        if due < kept_since(self._clock.now(), self._raw_kept):
            logger.error("no statements of %s: single usage events are not kept for long enough", due)
        left = 0
        for organization_id in await self._store.organizations():
            try:
                await self._issue_due(organization_id, due)
            except PlatformError as error:
                left += 1
                metrics.STATEMENTS.labels("failed").inc()
                logger.error("statements of %s wait: %s", organization_id, error.reason.value)
        if left:
            return False
        self._issued_until = due
        return True

    async def issue(self, organization_id: str, month: Month) -> Statement:
        """The statement of a month, issued unless it was before.

        Raises PlatformError: FAILED_PRECONDITION while the month is not over or not all counted, when its raw usage is
        gone, after the statement of a later month, and before that of an earlier one with usage.
        """
        now = self._clock.now()
        if now < month.end:
            raise _refused(
                f"{month} is not over yet. Its statement can be issued from {month.end:%Y-%m-%d} on, in UTC."
            )
        if not await self._is_counted(month):
            raise _refused(f"The usage of {month} is not all counted yet. Try again later.")
        async with self._store.transaction(organization_id) as stored:
            await stored.wait()
            if known := await stored.find(month):
                return known
            since = kept_since(now, self._raw_kept)
            if month < since:
                raise _refused(f"Raw usage of {month} is not kept any more; that of {since} and later is.")
            books = await self._books(stored, since, month)
            if books.last is not None and books.is_over(month):
                raise _refused(f"The statement of {books.last.month} was issued: it, or the next, corrects {month}.")
            if (first := min(books.without_statement(), default=month)) < month:
                raise _refused(f"The statement of {first} comes first.")
            wrong, raw = books.to_correct(), dict[Group, Amounts]()
            for each in (*wrong, month):
                raw |= await sums_of(stored, each)
            stated = {group: amounts for group, amounts in books.stated.items() if group.month in wrong}
            signer = await self._keys.signer(stored)
            statement, chained = issued(
                new_id("statement", clock=self._clock),
                organization_id,
                month,
                lines_of(month, raw, stated),
                b"" if books.last is None else books.last.hash,
                now,
                signer,
            )
            await stored.add(statement, chained)
        metrics.STATEMENTS.labels("issued").inc()
        return statement

    async def _issue_due(self, organization_id: str, due: Month) -> None:
        async with self._store.transaction(organization_id) as stored:
            books = await self._books(stored, kept_since(self._clock.now(), self._raw_kept), due)
        months = books.without_statement()
        if not months and books.to_correct() and not books.is_over(due):
            months = [due]
        for month in months:
            await self.issue(organization_id, month)

    async def _books(self, stored: Issuing, since: Month, until: Month) -> _Books:
        return _Books(await stored.used(since.start, until.end), await stored.stated(since, until), await stored.last())

    async def _is_counted(self, month: Month) -> bool:
        complete_until = await self._usage.complete_until()
        return complete_until is not None and complete_until >= month.end


async def sums_of(stored: Issuing, month: Month) -> dict[Group, Amounts]:
    """The raw usage of a month by groups."""
    sums = Sums(month)
    async with aclosing(stored.usage(month)) as batches:
        async for batch in batches:
            await asyncio.to_thread(sums.add, batch)
    return sums.groups()


def _refused(why: str) -> PlatformError:
    return PlatformError(Reason.FAILED_PRECONDITION, description=why)
