"""Holds what clients saw, the router's journal, identity's ledger and analytics against each other; it never mends
anything, and shares no arithmetic with what it checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from math import ceil
from typing import NamedTuple

import asyncpg

from aiaas.router.v1 import journal_service_pb2 as journal_pb
from aiaas.router.v1 import journal_service_pb2_grpc
from aiaas.type.v1.usage_event_pb2 import (
    CHARGE_UNIT_COST,
    CHARGE_UNIT_REQUESTS,
    CHARGE_UNIT_TOKENS,
    OUTCOME_FAILED,
    OUTCOME_REFUSED,
    OUTCOME_SUCCEEDED,
    UsageEvent,
)
from tests.money.client import PROMPT_TOKENS, Seen

LATE_S = 1.0
"""A stream that broke off is billed to within so many seconds of tokens of what its client saw."""

_UNITS = {"cost": CHARGE_UNIT_COST, "tokens": CHARGE_UNIT_TOKENS, "requests": CHARGE_UNIT_REQUESTS}
_UNBILLED = (OUTCOME_REFUSED, OUTCOME_FAILED)
_PAGE = 500


class Finding(NamedTuple):
    """Something that does not agree. Kinds: lost, doubled, unknown, wrong, leak, overspend."""

    kind: str
    what: str


class Place(NamedTuple):
    """What all three books sum by."""

    organization_id: str
    hour: datetime
    api_key_id: str
    model: str


class Amounts(NamedTuple):
    """What was used in a place."""

    requests: int
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    cost_micros: int


class Row(NamedTuple):
    """A request as analytics has it."""

    request_id: str
    admit_time: datetime
    place: Place
    outcome: int
    amounts: Amounts


class Budget(NamedTuple):
    """A budget of everything that its organization does."""

    budget_id: str
    organization_id: str
    unit: int
    is_hard: bool


class Period(NamedTuple):
    """A period of a budget, as the ledger has it."""

    budget_id: str
    period_start: datetime
    limit: int
    spent: int
    leased: int


class Line(NamedTuple):
    """What the ledger sums by."""

    budget_id: str
    hour: datetime
    api_key_id: str
    model: str


@dataclass
class Books:
    """All that is written down. `open_entries` and `unpublished_entries` are the journal's, `sums` those of analytics,
    `lines` the ledger's spending and requests, `leases` those that are not settled, `slots` those taken in Redis."""

    events: list[UsageEvent] = field(default_factory=list)
    open_entries: int = 0
    unpublished_entries: int = 0
    rows: list[Row] = field(default_factory=list)
    sums: dict[Place, Amounts] = field(default_factory=dict)
    budgets: list[Budget] = field(default_factory=list)
    periods: list[Period] = field(default_factory=list)
    lines: dict[Line, tuple[int, int]] = field(default_factory=dict)
    leases: list[str] = field(default_factory=list)
    slots: int = 0


def check(books: Books, seen: Sequence[Seen]) -> list[Finding]:
    """Everything that does not agree."""
    return [
        *_terminal_rows(books, seen),
        *_journal_and_analytics(books),
        *_sums(books),
        *_costs(books),
        *_charges(books),
        *_ledger(books),
        *_limits(books),
        *_leaks(books),
        *_bills(books, seen),
    ]


def _terminal_rows(books: Books, seen: Sequence[Seen]) -> Iterator[Finding]:
    """Each admitted request has one terminal record, and nobody else has any."""
    in_journal = Counter(event.request_id for event in books.events)
    in_analytics = Counter(row.request_id for row in books.rows)
    for where, counted in (("the journal", in_journal), ("analytics", in_analytics)):
        for request_id, count in counted.items():
            if count > 1:
                yield Finding("doubled", f"{request_id} is {count} times in {where}")
        for request in seen:
            if request.is_admitted and not counted[request.request_id]:
                yield Finding("lost", f"{request.request_id} was answered and is not in {where}")
        for request_id in counted.keys() - {request.request_id for request in seen}:
            yield Finding("unknown", f"{request_id} is in {where}, and nobody sent it")


def _journal_and_analytics(books: Books) -> Iterator[Finding]:
    """Analytics has what the journal has, request by request."""
    rows = {row.request_id: row for row in books.rows}
    told = set()
    for event in books.events:
        told.add(event.request_id)
        row = rows.get(event.request_id)
        if row is None:
            yield Finding("lost", f"{event.request_id} is in the journal and not in analytics")
        elif (row.place, row.outcome, row.amounts) != (_place(event), event.outcome, _amounts(event)):
            yield Finding("wrong", f"{event.request_id} is {_amounts(event)} in the journal and {row.amounts} there")
    for request_id in rows.keys() - told:
        yield Finding("lost", f"{request_id} is in analytics and not in the journal")


def _sums(books: Books) -> Iterator[Finding]:
    """The hourly sums are those of the journal's requests."""
    told: dict[Place, Amounts] = {}
    for event in books.events:
        place = _place(event)
        told[place] = Amounts(*map(sum, zip(told.get(place, (0,) * 5), _amounts(event), strict=True)))
    for place in told.keys() | books.sums.keys():
        if told.get(place) != books.sums.get(place):
            kind = "lost" if _requests(told, place) > _requests(books.sums, place) else "doubled"
            if _requests(told, place) == _requests(books.sums, place):
                kind = "wrong"
            yield Finding(kind, f"{place} sums to {told.get(place)}, and analytics has {books.sums.get(place)}")


def _costs(books: Books) -> Iterator[Finding]:
    """A cost is the tokens by the price that was in force, rounded up once."""
    for event in books.events:
        usage, price = event.usage, event.price
        if event.outcome in _UNBILLED and any(_amounts(event)[1:]):
            yield Finding("wrong", f"{event.request_id} brought nothing and is billed {_amounts(event)}")
        fresh = usage.prompt_tokens - usage.cached_prompt_tokens
        micros = (
            Fraction(fresh * price.prompt_micros_per_million)
            + usage.cached_prompt_tokens * price.cached_prompt_micros_per_million
            + usage.completion_tokens * price.completion_micros_per_million
        ) / 1_000_000
        if event.cost_micros != ceil(micros):
            yield Finding("wrong", f"{event.request_id} costs {ceil(micros)} and is billed {event.cost_micros}")


def _charges(books: Books) -> Iterator[Finding]:
    """Every budget is charged with all that its requests used."""
    for event in books.events:
        used = _used(event)
        charges = {charge.budget_id: charge for charge in event.budgets}
        for budget in books.budgets:
            if budget.organization_id != event.organization_id or not used[budget.unit]:
                continue
            charge = charges.get(budget.budget_id)
            if charge is None:
                yield Finding("wrong", f"{event.request_id} is not charged to {budget.budget_id}")
            elif charge.charged != used[budget.unit]:
                yield Finding("wrong", f"{event.request_id} used {used[budget.unit]}, charged {charge.charged}")


def _ledger(books: Books) -> Iterator[Finding]:
    """The ledger has what the journal charged, line by line and period by period."""
    lines: dict[Line, tuple[int, int]] = {}
    periods: Counter[tuple[str, datetime]] = Counter()
    for event in books.events:
        place = _place(event)
        for charge in event.budgets:
            line = Line(charge.budget_id, place.hour, place.api_key_id, place.model)
            spent, requests = lines.get(line, (0, 0))
            lines[line] = (spent + charge.charged, requests + (event.outcome not in _UNBILLED))
            periods[charge.budget_id, charge.period_start.ToDatetime(UTC)] += charge.charged
    lines = {line: amounts for line, amounts in lines.items() if any(amounts)}
    for line in lines.keys() | books.lines.keys():
        told, known = lines.get(line, (0, 0)), books.lines.get(line, (0, 0))
        if told != known:
            yield Finding(_side(told[0] - known[0]), f"{line} is charged {told}, and the ledger has {known}")
    for period in books.periods:
        charged = periods.pop((period.budget_id, period.period_start), 0)
        if charged != period.spent:
            yield Finding(_side(charged - period.spent), f"{period} spent {period.spent}, the journal says {charged}")
    for (budget_id, period_start), charged in periods.items():
        if charged:
            yield Finding(
                "lost", f"{budget_id} of {period_start} was charged {charged}, and the ledger has no such period"
            )


def _limits(books: Books) -> Iterator[Finding]:
    """No hard budget has more spent and leased than its limit, nor have its requests used more."""
    used: Counter[tuple[str, int]] = Counter()
    for event in books.events:
        for unit, amount in _used(event).items():
            used[event.organization_id, unit] += amount
    hard = {budget.budget_id: budget for budget in books.budgets if budget.is_hard}
    for period in books.periods:
        if period.budget_id in hard and period.spent + period.leased > period.limit:
            yield Finding("overspend", f"{period}")
    limits: Counter[str] = Counter()
    for period in books.periods:
        limits[period.budget_id] += period.limit
    for budget in hard.values():
        whole = used[budget.organization_id, budget.unit]
        if whole > limits[budget.budget_id]:
            yield Finding("overspend", f"{budget} had {limits[budget.budget_id]}, and {whole} was used")


def _leaks(books: Books) -> Iterator[Finding]:
    """Nothing is held for requests that are over."""
    for period in books.periods:
        if period.leased:
            yield Finding("leak", f"{period} has {period.leased} leased")
    for lease in books.leases:
        yield Finding("leak", f"{lease} is not settled")
    if books.slots:
        yield Finding("leak", f"{books.slots} slots are taken in Redis")
    if books.open_entries:
        yield Finding("leak", f"{books.open_entries} requests run in the journal")
    if books.unpublished_entries:
        yield Finding("leak", f"{books.unpublished_entries} events wait in the journal")


def _bills(books: Books, seen: Sequence[Seen]) -> Iterator[Finding]:
    """What is billed is what clients saw: exactly, where an answer was whole."""
    events = {event.request_id: event for event in books.events}
    for request in seen:
        event = events.get(request.request_id)
        if event is None:
            continue
        off = event.usage.completion_tokens - request.tokens
        if not request.is_admitted:
            # What an engine made is billed, also where the answer was lost on its way; but nothing that was refused.
            if 400 <= request.status < 500 and any(_amounts(event)[1:]):
                yield Finding("wrong", f"{request.request_id} was refused, and is billed {_amounts(event)}")
        elif event.outcome == OUTCOME_SUCCEEDED:
            if off and request.ended in ("done", "answered"):
                yield Finding("wrong", f"{request.request_id} had {request.tokens} tokens, billed {off:+}")
            if event.usage.prompt_tokens != PROMPT_TOKENS:
                yield Finding("wrong", f"{request.request_id} is billed {event.usage.prompt_tokens} prompt tokens")
        elif request.ended == "done":
            yield Finding("wrong", f"{request.request_id} had its whole answer, and is {event.outcome}")
        elif abs(off) > most_off(request) and (request.is_read or off < 0):
            yield Finding("wrong", f"{request.request_id} had {request.tokens} tokens, billed {off:+}")


def most_off(request: Seen) -> float:
    """By how many tokens the bill of a stream that broke off may differ from what its client saw: those of a second,
    and one that was on its way."""
    return LATE_S * request.tokens_per_s + 1


def tokens_off(books: Books, seen: Iterable[Seen]) -> list[int]:
    """Tokens billed less tokens seen, of each request that was begun and is in the journal."""
    events = {event.request_id: event for event in books.events}
    return [
        events[request.request_id].usage.completion_tokens - request.tokens
        for request in seen
        if request.request_id in events
    ]


def _place(event: UsageEvent) -> Place:
    hour = event.admit_time.ToDatetime(UTC).replace(minute=0, second=0, microsecond=0)
    return Place(event.organization_id, hour, event.api_key_id, event.model)


def _amounts(event: UsageEvent) -> Amounts:
    usage = event.usage
    return Amounts(1, usage.prompt_tokens, usage.cached_prompt_tokens, usage.completion_tokens, event.cost_micros)


def _used(event: UsageEvent) -> dict[int, int]:
    return {
        CHARGE_UNIT_COST: event.cost_micros,
        CHARGE_UNIT_TOKENS: event.usage.prompt_tokens + event.usage.completion_tokens,
        CHARGE_UNIT_REQUESTS: int(event.outcome not in _UNBILLED),
    }


def _requests(sums: Mapping[Place, Amounts], place: Place) -> int:
    return sums[place].requests if place in sums else 0


def _side(missing: int) -> str:
    return "lost" if missing > 0 else "doubled" if missing < 0 else "wrong"


async def read_journal(stub: journal_service_pb2_grpc.JournalServiceStub, books: Books) -> None:
    """Put what a router's journal says into the books."""
    status = (await stub.GetJournalStatus(journal_pb.GetJournalStatusRequest(), timeout=10)).status
    books.open_entries, books.unpublished_entries = status.open_entries, status.unpublished_entries
    request = journal_pb.ListJournalEntriesRequest(page_size=_PAGE)
    while True:
        page = await stub.ListJournalEntries(request, timeout=10)
        books.events += [entry.event for entry in page.entries if entry.state != journal_pb.JOURNAL_ENTRY_STATE_OPEN]
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


async def read_analytics(url: str, books: Books) -> None:
    """Put what analytics has stored into the books."""
    connection = await asyncpg.connect(url, timeout=5)
    try:
        rows = await connection.fetch("SELECT * FROM usage_events")
        sums = await connection.fetch("""
            SELECT organization_id, hour, api_key_id, model, sum(requests)::bigint AS requests,
                sum(prompt_tokens)::bigint AS prompt_tokens, sum(cached_prompt_tokens)::bigint AS cached_prompt_tokens,
                sum(completion_tokens)::bigint AS completion_tokens, sum(cost_micros)::bigint AS cost_micros
            FROM usage_hourly GROUP BY 1, 2, 3, 4
        """)
    finally:
        await connection.close()
    for row in rows:
        hour = row["admit_time"].replace(minute=0, second=0, microsecond=0)
        books.rows.append(
            Row(
                row["request_id"],
                row["admit_time"],
                Place(row["organization_id"], hour, row["api_key_id"], row["model"]),
                row["outcome"],
                Amounts(1, *(row[name] for name in Amounts._fields[1:])),
            )
        )
    for row in sums:
        place = Place(row["organization_id"], row["hour"], row["api_key_id"], row["model"])
        books.sums[place] = Amounts(*(row[name] for name in Amounts._fields))


async def read_ledger(url: str, books: Books) -> None:
    """Put what identity's ledger has stored into the books."""
    # Of every organization, beyond the walls between them.
    connection = await asyncpg.connect(url, timeout=5, server_settings={"app.organization_id": "*"})
    try:
        budgets = await connection.fetch("SELECT budget_id, organization_id, unit, is_hard FROM budgets")
        periods = await connection.fetch(
            "SELECT budget_id, period_start, limit_amount, spent, leased FROM budget_periods"
        )
        lines = await connection.fetch("""
            SELECT budget_id, hour_start, api_key_id, model, sum(spent)::bigint, sum(requests)::bigint FROM (
                SELECT budget_id, hour_start, api_key_id, model, spent, requests FROM budget_ledger
                UNION ALL
                SELECT budget_id, hour_start, api_key_id, model, l.spent, l.requests
                FROM budget_lease_lines l JOIN budget_leases USING (budget_lease_id)
            ) lines GROUP BY 1, 2, 3, 4 HAVING sum(spent) > 0 OR sum(requests) > 0
        """)
        leases = await connection.fetch("SELECT budget_lease_id FROM budget_leases WHERE state <> 'settled'")
    finally:
        await connection.close()
    books.budgets = [Budget(row[0], row[1], _UNITS[row[2]], row[3]) for row in budgets]
    books.periods = [Period(*row) for row in periods]
    books.lines = {Line(*row[:4]): (row[4], row[5]) for row in (tuple(row) for row in lines)}
    books.leases = [row[0] for row in leases]
