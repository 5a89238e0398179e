"""What it means that two records of the same usage agree: lines, amounts, differences; it never reads a record itself.

Journals and the ledger sum by the hour of admission, as analytics does, so their lines must be equal. Engines know no
requests: of each one it is only known that its tokens moved the counters between its admission and its end. So what an
engine counted in a stretch of time is at least what requests within it used, and at most what all used that overlap it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from aiaas.analytics.v1.reconciliation_service_pb2 import ReconciliationKind, ReconciliationState
from aiaas.type.v1.usage_event_pb2 import Outcome, UsageEvent, UsageSource
from mesh.fields import invalid

HOUR = timedelta(hours=1)

KINDS = tuple(kind for kind in ReconciliationKind.values() if kind)
"""Everything that can be compared."""

SETTLED = timedelta(minutes=10)
"""So long after its end an hour is compared: requests that ran across it have ended by then, almost all."""

CAUGHT_UP = timedelta(hours=24)
"""Hours that nobody compared, since analytics was away or behind, are made up for if they are not older than this."""

RANGE = timedelta(hours=72)
"""How long a range may be: as long as journals remember."""

OVERLAP = timedelta(hours=2)
"""How long before a range a request may be admitted and still run in it."""

LATE = timedelta(seconds=1)
"""How long an engine takes, at most, until its counters hold what it has answered."""

_BROKEN_OFF = frozenset(
    {
        Outcome.OUTCOME_CANCELLED,
        Outcome.OUTCOME_TRUNCATED,
        Outcome.OUTCOME_DEADLINE_EXCEEDED,
        Outcome.OUTCOME_ABORTED,
    }
)
_UNBILLED = frozenset({Outcome.OUTCOME_REFUSED, Outcome.OUTCOME_FAILED})


class Line(NamedTuple):
    """What amounts are summed by; what a kind does not know is empty."""

    start_time: datetime
    end_time: datetime
    organization_id: str = ""
    api_key_id: str = ""
    model: str = ""
    backend_id: str = ""
    budget_id: str = ""


class Amounts(NamedTuple):
    """Amounts of one record, named as in ReconciledAmounts; those that it does not know are 0."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_micros: int = 0
    budget_units: int = 0

    def plus(self, other: Amounts) -> Amounts:
        """The sum, amount by amount."""
        return Amounts(*map(sum, zip(self, other, strict=True)))

    def is_above(self, other: Amounts) -> bool:
        """Whether any amount is more than the other's."""
        return any(own > others for own, others in zip(self, other, strict=True))


NOTHING = Amounts()


class Difference(NamedTuple):
    """A line on which two records do not agree, and what accounts for some of it, a sentence each."""

    line: Line
    source: Amounts
    analytics: Amounts
    explanations: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, ...]:
        """By what differences are ordered: money and budgets first, then tokens, then requests."""
        off = Amounts(*(abs(own - others) for own, others in zip(self.source, self.analytics, strict=True)))
        return off.cost_micros, off.budget_units, off.prompt_tokens + off.completion_tokens, off.requests


@dataclass(frozen=True, slots=True)
class Report:
    """A comparison, as it is stored; `residual_*` are tokens that engines counted and nothing explains."""

    reconciliation_id: str
    kind: ReconciliationKind.ValueType
    start_time: datetime
    end_time: datetime
    state: ReconciliationState.ValueType
    compared: int
    differences: int
    republished: int
    missing_sources: tuple[str, ...]
    residual_prompt_tokens: int
    residual_completion_tokens: int
    create_time: datetime
    finish_time: datetime | None
    claim_time: datetime | None


@dataclass(slots=True)
class Finding:
    """What a comparison has found. `missing_sources` names who could not be read."""

    compared: int = 0
    differences: list[Difference] = field(default_factory=list)
    republished: int = 0
    missing_sources: list[str] = field(default_factory=list)
    residual_prompt_tokens: int = 0
    residual_completion_tokens: int = 0

    @property
    def state(self) -> ReconciliationState.ValueType:
        """How the report stands once this is all of it."""
        if self.differences:
            return ReconciliationState.RECONCILIATION_STATE_DIFFERED
        if self.missing_sources:
            return ReconciliationState.RECONCILIATION_STATE_INCOMPLETE
        return ReconciliationState.RECONCILIATION_STATE_AGREED


def check_range(start: datetime, end: datetime, now: datetime) -> None:
    """Hold a range to whole hours, 72 at most, and none that has not begun. Raises PlatformError(INVALID_ARGUMENT)."""
    for moment, name in ((start, "start_time"), (end, "end_time")):
        if moment != hour_of(moment):
            raise invalid(f"reconciliation.{name}", "must be on the hour")
    if start >= end:
        raise invalid("reconciliation.start_time", "must be before the end of the range")
    if end - start > RANGE:
        raise invalid("reconciliation.start_time", "must be at most 72 hours before the end of the range")
    if end > hour_of(now) + HOUR:
        raise invalid("reconciliation.end_time", "must not be after the running hour")


def hour_of(moment: datetime) -> datetime:
    """The start of its hour."""
    return moment.replace(minute=0, second=0, microsecond=0)


def hours_due(last: datetime | None, complete_until: datetime) -> list[datetime]:
    """The starts of the hours that are to be compared, after the `last` one that was: those whose usage has come in."""
    newest = hour_of(complete_until - SETTLED) - HOUR
    start = newest if last is None else max(last + HOUR, newest - CAUGHT_UP + HOUR)
    hours = []
    while start <= newest:
        hours.append(start)
        start += HOUR
    return hours


def compare(
    source: Mapping[Line, Amounts], analytics: Mapping[Line, Amounts], *, whole: bool = True
) -> list[Difference]:
    """The lines that differ. Where the source is not `whole`, analytics may well know more than it."""
    differences = []
    for line in source.keys() | analytics.keys():
        told, known = source.get(line, NOTHING), analytics.get(line, NOTHING)
        if told.is_above(known) if not whole else told != known:
            differences.append(Difference(line, told, known))
    return differences


def lacking(differences: Iterable[Difference]) -> Iterator[Line]:
    """The lines of which analytics knows less than the source."""
    return (each.line for each in differences if each.source.is_above(each.analytics))


def budget_charges(event: UsageEvent, hour_start: datetime) -> Iterator[tuple[Line, Amounts]]:
    """What the ledger should say of a request that was admitted in an hour, a line for each budget."""
    requests = 0 if event.outcome in _UNBILLED else 1
    for charge in event.budgets:
        line = Line(
            hour_start,
            hour_start + HOUR,
            organization_id=event.organization_id,
            api_key_id=event.api_key_id,
            model=event.model,
            budget_id=charge.budget_id,
        )
        yield line, Amounts(requests=requests, budget_units=charge.charged)


class EngineWindow(NamedTuple):
    """How far an engine's counters moved from `start_time` until `end_time`."""

    backend_id: str
    start_time: datetime
    end_time: datetime
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    reset: bool


class EngineRequest(NamedTuple):
    """A request that a backend worked on, as far as counters move by it."""

    backend_id: str
    admit_time: datetime
    end_time: datetime
    tokens: Amounts
    broken_off: bool
    told_by_engine: bool

    @property
    def has_tokens(self) -> bool:
        """Whether counters moved by it at all."""
        return bool(self.tokens.prompt_tokens or self.tokens.completion_tokens)


def engine_request(event: UsageEvent, admit_time: datetime) -> EngineRequest:
    """What an event says of the engine that answered."""
    usage = event.usage
    try:
        end_time = event.end_time.ToDatetime(UTC)
    except (ValueError, OverflowError):
        # Nobody held it to anything before, as nothing is billed by it.
        end_time = admit_time
    return EngineRequest(
        event.backend_id,
        admit_time,
        max(admit_time, end_time),
        # A prompt is counted once for each of its answers. Cached tokens stay out: vLLM counts them always, and tells
        # those of a request only if it is started to do so.
        Amounts(1, usage.prompt_tokens * max(1, event.choices), 0, usage.completion_tokens),
        broken_off=event.outcome in _BROKEN_OFF,
        told_by_engine=event.usage_source == UsageSource.USAGE_SOURCE_ENGINE and not event.usage_clamped,
    )


class EngineBalance:
    """One backend's windows, one after another, and the requests that ran in their time."""

    def __init__(self, windows: Sequence[EngineWindow]) -> None:
        self._windows = windows
        self._start, self._end = windows[0].start_time, windows[-1].end_time
        self._within = NOTHING
        self._across = NOTHING
        self._broken_off = 0
        self._untold = 0

    def add(self, request: EngineRequest) -> None:
        """Count a request of this backend; one that ran at another time does not matter."""
        if request.end_time <= self._start - LATE or request.admit_time >= self._end:
            return
        if self._start <= request.admit_time and request.end_time <= self._end - LATE:
            self._within = self._within.plus(request.tokens)
        else:
            self._across = self._across.plus(request.tokens)
        self._broken_off += request.broken_off
        self._untold += not request.told_by_engine

    def residual(self) -> tuple[int, int]:
        """Prompt and completion tokens that are too many or, negative, too few in the counters, explained ones left
        out: those that requests at the edges may account for, and those that a restart took along."""
        counted, most = self._counted(), self._within.plus(self._across)
        prompt = _beyond(counted.prompt_tokens, self._within.prompt_tokens, most.prompt_tokens)
        completion = _beyond(counted.completion_tokens, self._within.completion_tokens, most.completion_tokens)
        if any(window.reset for window in self._windows):
            return max(0, prompt), max(0, completion)
        return prompt, completion

    def difference(self) -> Difference | None:
        """The line of this backend, if what the engine counted cannot be what the requests used."""
        counted, most = self._counted(), self._within.plus(self._across)
        if not (
            _beyond(counted.prompt_tokens, self._within.prompt_tokens, most.prompt_tokens)
            or _beyond(counted.completion_tokens, self._within.completion_tokens, most.completion_tokens)
        ):
            return None
        line = Line(self._start, self._end, backend_id=self._windows[0].backend_id)
        return Difference(line, counted, self._within._replace(requests=0), tuple(self._explanations()))

    def _counted(self) -> Amounts:
        return Amounts(
            prompt_tokens=sum(window.prompt_tokens for window in self._windows),
            completion_tokens=sum(window.completion_tokens for window in self._windows),
        )

    def _explanations(self) -> Iterator[str]:
        for window in self._windows:
            if window.reset:
                between = f"{window.start_time:%H:%M:%S} and {window.end_time:%H:%M:%S} UTC"
                yield f"The engine restarted between {between}; what it had counted since it was last read is lost."
        across = self._across
        if across.requests:
            tokens = f"{across.prompt_tokens} prompt and {across.completion_tokens} completion tokens"
            yield f"Requests across an edge of this time: {across.requests}; up to {tokens} of theirs are counted."
        if self._broken_off:
            yield f"Requests broken off: {self._broken_off}; what the engine still made for them is billed to nobody."
        if self._untold:
            yield f"Requests of which the engine told no usage, or too much: {self._untold}; others counted for them."


def _beyond(value: int, least: int, most: int) -> int:
    """How far a value is above `most` or, negative, below `least`."""
    return max(0, value - most) + min(0, value - least)
