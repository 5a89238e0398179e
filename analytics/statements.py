"""What a statement is: its lines, the bytes that its hashes and signatures are over, and what a look at one finds
wrong; it never reads usage and never stores anything.

A line's hash is SHA-256 over the hash before it and the line's content, a statement's over the hash of the statement
before, its own content and the hash of its last line. docs/statements.md tells the exact form, for whoever verifies
one alone. Each line's hash is signed too, so that one that was rewritten together with all hashes after it is still the
one that is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from aiaas.analytics.v1.statement_service_pb2 import StatementLineKind
from aiaas.type.v1.usage_event_pb2 import UsageEvent
from mesh.signing import Signer, canonical, has_signed, written

USAGE = StatementLineKind.STATEMENT_LINE_KIND_USAGE
CORRECTION = StatementLineKind.STATEMENT_LINE_KIND_CORRECTION

_ISSUE_DAY = 3
_KINDS = {USAGE: "usage", CORRECTION: "correction"}
_LINE = "aiaas.statement_line.v1"
_STATEMENT = "aiaas.statement.v1"


class Month(NamedTuple):
    """A month in UTC."""

    year: int
    month: int

    @classmethod
    def of(cls, moment: datetime) -> Month:
        """The month that a moment is in."""
        utc = moment.astimezone(UTC)
        return cls(utc.year, utc.month)

    def __str__(self) -> str:
        return f"{self.year:04}-{self.month:02}"

    @property
    def start(self) -> datetime:
        """Its first moment."""
        return datetime(self.year, self.month, 1, tzinfo=UTC)

    @property
    def end(self) -> datetime:
        """The first moment after it."""
        return self.plus(1).start

    @property
    def issue_time(self) -> datetime:
        """When its statements are issued by themselves."""
        return self.end.replace(day=_ISSUE_DAY)

    def plus(self, months: int) -> Month:
        """The month so many later."""
        year, month = divmod(self.year * 12 + self.month - 1 + months, 12)
        return Month(year, month + 1)


def last_due(now: datetime) -> Month:
    """The last month whose statements are issued by now."""
    before = Month.of(now).plus(-1)
    return before if before.issue_time <= now else before.plus(-1)


def kept_since(now: datetime, raw_kept: timedelta) -> Month:
    """The first month of which all raw usage is there, when it is kept for so long."""
    oldest = now - raw_kept
    month = Month.of(oldest)
    return month if month.start >= oldest else month.plus(1)


class Amounts(NamedTuple):
    """What is summed; negative amounts take back what was stated before."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_micros: int = 0

    def plus(self, other: Amounts) -> Amounts:
        """The sum, amount by amount."""
        return Amounts(*map(sum, zip(self, other, strict=True)))

    def minus(self, other: Amounts) -> Amounts:
        """What is left, amount by amount."""
        return Amounts(*(own - others for own, others in zip(self, other, strict=True)))

    def is_above(self, other: Amounts) -> bool:
        """Whether any amount is more than the other's."""
        return any(own > others for own, others in zip(self, other, strict=True))


NOTHING = Amounts()


class Group(NamedTuple):
    """Whose usage a line sums, in the order of lines."""

    month: Month
    api_key_id: str
    model: str
    price_id: str


class Usage(NamedTuple):
    """One request, as far as it is billed; `event` is the serialized UsageEvent."""

    api_key_id: str
    model: str
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    cost_micros: int
    event: bytes


class Sums:
    """The usage of one month by groups; it takes as much memory as there are groups, however many the requests are."""

    def __init__(self, month: Month) -> None:
        self._month = month
        self._sums: dict[tuple[str, str, str], list[int]] = {}

    def add(self, batch: Iterable[Usage]) -> None:
        """Add requests of the month."""
        for api_key_id, model, *tokens_and_cost, event in batch:
            place = api_key_id, model, UsageEvent.FromString(event).price.price_id
            sums = self._sums.setdefault(place, [0] * len(NOTHING))
            for index, amount in enumerate((1, *tokens_and_cost)):
                sums[index] += amount

    def groups(self) -> dict[Group, Amounts]:
        """What came of them."""
        return {Group(self._month, *place): Amounts(*sums) for place, sums in self._sums.items()}


@dataclass(frozen=True, slots=True)
class StatementLine:
    """One line. Hash and signature are its place in a statement, which it gets when it is issued."""

    line_number: int
    kind: StatementLineKind.ValueType
    group: Group
    amounts: Amounts
    hash: bytes = b""
    signature: bytes = b""

    def digest(self, previous_hash: bytes) -> bytes:
        """The hash that the line must have."""
        month, *place = self.group
        content = [_LINE, self.line_number, _KINDS.get(self.kind, ""), *month, *place, *self.amounts]
        return hashlib.sha256(previous_hash + canonical(content)).digest()


@dataclass(frozen=True, slots=True)
class Statement:
    """What an organization owes for a month."""

    statement_id: str
    organization_id: str
    month: Month
    lines: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost_micros: int
    issue_time: datetime
    previous_hash: bytes
    hash: bytes = b""
    key_id: str = ""
    signature: bytes = b""

    def digest(self, last_line_hash: bytes) -> bytes:
        """The hash that the statement must have; `last_line_hash` is `first_hash` where it has no lines."""
        content = [
            *(_STATEMENT, self.statement_id, self.organization_id, *self.month, self.lines),
            *(self.requests, self.prompt_tokens, self.completion_tokens, self.cost_micros, written(self.issue_time)),
        ]
        return hashlib.sha256(self.previous_hash + canonical(content) + last_line_hash).digest()


def first_hash(statement_id: str) -> bytes:
    """What stands before the first line, so that lines belong to one statement."""
    return hashlib.sha256(statement_id.encode()).digest()


def lines_of(month: Month, raw: Mapping[Group, Amounts], stated: Mapping[Group, Amounts]) -> Iterator[StatementLine]:
    """The lines of a month, in their order and not hashed yet: its usage, then what is not as stated of months before.

    `raw` is the usage of this month and of those before that are looked at, `stated` what statements with their
    corrections say of these.
    """
    usage = [(USAGE, group, raw[group]) for group in sorted(raw) if group.month == month]
    corrections = (
        (CORRECTION, group, raw.get(group, NOTHING).minus(stated.get(group, NOTHING)))
        for group in sorted(raw.keys() | stated.keys())
        if group.month < month
    )
    entries = [*usage, *(entry for entry in corrections if entry[2] != NOTHING)]
    return (StatementLine(number, *entry) for number, entry in enumerate(entries, start=1))


def issued(
    statement_id: str,
    organization_id: str,
    month: Month,
    lines: Iterable[StatementLine],
    previous_hash: bytes,
    issue_time: datetime,
    signer: Signer,
) -> tuple[Statement, list[StatementLine]]:
    """A statement and its lines, hashed and signed."""
    last_hash, total, chained = first_hash(statement_id), NOTHING, list[StatementLine]()
    for line in lines:
        last_hash = line.digest(last_hash)
        chained.append(replace(line, hash=last_hash, signature=signer.sign(last_hash)))
        total = total.plus(line.amounts)
    statement = Statement(
        statement_id=statement_id,
        organization_id=organization_id,
        month=month,
        lines=len(chained),
        requests=total.requests,
        prompt_tokens=total.prompt_tokens,
        completion_tokens=total.completion_tokens,
        cost_micros=total.cost_micros,
        issue_time=issue_time,
        previous_hash=previous_hash,
        key_id=signer.key_id,
    )
    digest = statement.digest(last_hash)
    return replace(statement, hash=digest, signature=signer.sign(digest)), chained


@dataclass(frozen=True, slots=True)
class Flaw:
    """What is wrong; `line_number` is that of the first line that is, 0 where it is none of them."""

    line_number: int
    problem: str


class StatementWalk:
    """A walk along the lines of a statement, of which `taken` lie behind. It ends at a flaw. `public_key` is raw."""

    def __init__(self, statement: Statement, public_key: bytes) -> None:
        self._statement = statement
        self._public_key = public_key
        self._hash = first_hash(statement.statement_id)
        self.taken = 0

    def take(self, lines: Iterable[StatementLine]) -> Flaw | None:
        """Look at the next lines, in the order of their numbers."""
        for line in lines:
            if problem := self._problem(line):
                return Flaw(self.taken + 1, problem)
            self._hash, self.taken = line.hash, line.line_number
        return None

    def end(self, before: Statement | None) -> Flaw | None:
        """Look at the statement itself and the one `before` it, once all lines were taken."""
        statement = self._statement
        signed = has_signed(self._public_key, statement.signature, statement.hash)
        if statement.hash != statement.digest(self._hash) or not signed:
            if self.taken < statement.lines:
                return Flaw(self.taken + 1, "It is missing.")
            return Flaw(0, "The statement itself was edited: its hash or signature is not that of its content.")
        if statement.previous_hash != (before.hash if before else b""):
            return Flaw(0, "The statement before is not the one that this was chained to.")
        return None

    def _problem(self, line: StatementLine) -> str:
        if line.line_number != self.taken + 1:
            return "It is missing."
        if line.hash != line.digest(self._hash):
            return "It was edited, or is not where it was written: its hash is not that of its content."
        if not has_signed(self._public_key, line.signature, line.hash):
            return "It was not written by the platform: its key did not sign the hash."
        return ""
