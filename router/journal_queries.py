"""Questions about a journal, to be asked in a thread; they never change anything.

Each walks along the time of admission, some entries at a time, and holds neither pages of the file nor the interpreter
for longer than that.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice
from operator import attrgetter

from aiaas.type.v1.usage_event_pb2 import TokenUsage, UsageEvent
from router.journal_store import FIRST_KEY, LAST_KEY, JournalStore, State, Stored, time_key
from router.leases import Spender
from router.usage import counted_requests

_HOUR_S = 3600
# About a millisecond's work; then whoever waits for the interpreter gets it.
_ENTRIES_AT_ONCE = 200
_BREATH_S = 0.0005


@dataclass(frozen=True, slots=True)
class Selection:
    """Some entries: those that fit everything that is set. Times of admission are microseconds since the epoch."""

    state: State | None = None
    organization_id: str = ""
    request_ids: frozenset[str] = frozenset()
    start_micros: int = 0
    end_micros: int | None = None

    def fits(self, stored: Stored) -> bool:
        """Whether an entry of the right time is one of them."""
        if self.state not in (None, stored.state):
            return False
        if not self.organization_id and not self.request_ids:
            return True
        event = UsageEvent.FromString(stored.event)
        return self.organization_id in ("", event.organization_id) and (
            not self.request_ids or event.request_id in self.request_ids
        )

    @property
    def keys(self) -> tuple[bytes, bytes]:
        """From which key on, and up to which."""
        return (
            time_key(self.start_micros) if self.start_micros else FIRST_KEY,
            LAST_KEY if self.end_micros is None else time_key(self.end_micros),
        )


@dataclass(slots=True)
class Total:
    """What the ended requests of one organization, hour of admission, key and model used and cost."""

    organization_id: str
    hour_start_s: int
    api_key_id: str
    model: str
    requests: int = 0
    usage: TokenUsage = field(default_factory=TokenUsage)
    cost_micros: int = 0


def select(store: JournalStore, selection: Selection, after: bytes = FIRST_KEY) -> Iterator[Stored]:
    """The ended entries of a selection, in the order of admission, from behind a key on."""
    start, stop = selection.keys
    start = max(start, after + b"\0" if after else FIRST_KEY)
    only_unpublished = selection.state is State.UNPUBLISHED
    while chunk := store.read_ended(start, stop, _ENTRIES_AT_ONCE, only_unpublished=only_unpublished):
        yield from filter(selection.fits, chunk)
        start = chunk[-1].key + b"\0"
        time.sleep(_BREATH_S)


def list_entries(store: JournalStore, selection: Selection, after: bytes, limit: int) -> list[Stored]:
    """At most `limit` entries of a selection, open ones among them, in the order of admission, from behind a key on."""
    start, stop = selection.keys
    runs = (
        stored
        for stored in store.read_open()
        if max(start, after + b"\0" if after else FIRST_KEY) <= stored.key < stop and selection.fits(stored)
    )
    ended = iter(()) if selection.state is State.OPEN else select(store, selection, after)
    return list(islice(merge(runs, ended, key=attrgetter("key")), limit))


def sum_up(store: JournalStore, selection: Selection) -> list[Total]:
    """The totals of a selection, in the order of organization, hour, API key and model."""
    totals: dict[tuple[str, int, str, str], Total] = {}
    for stored in select(store, selection):
        event = UsageEvent.FromString(stored.event)
        hour_start_s = event.admit_time.seconds // _HOUR_S * _HOUR_S
        key = (event.organization_id, hour_start_s, event.api_key_id, event.model)
        total = totals.setdefault(key, Total(*key))
        total.requests += 1
        total.usage.prompt_tokens += event.usage.prompt_tokens
        total.usage.cached_prompt_tokens += event.usage.cached_prompt_tokens
        total.usage.completion_tokens += event.usage.completion_tokens
        total.usage.reasoning_tokens += event.usage.reasoning_tokens
        total.cost_micros += event.cost_micros
    return [total for _, total in sorted(totals.items())]


def lease_charges(store: JournalStore, lease_ids: Collection[str]) -> dict[str, dict[Spender, tuple[int, int]]]:
    """What ended requests were charged to leases, by spender: units and requests."""
    # Most entries have no such lease, and to look for its id is cheaper than to read an event.
    needles = [lease_id.encode() for lease_id in lease_ids]
    charges: dict[str, dict[Spender, tuple[int, int]]] = {lease_id: {} for lease_id in lease_ids}
    for stored in select(store, Selection()):
        if not any(needle in stored.event for needle in needles):
            continue
        event = UsageEvent.FromString(stored.event)
        spender = Spender(event.admit_time.seconds // _HOUR_S * _HOUR_S, event.api_key_id, event.model)
        charged: defaultdict[str, int] = defaultdict(int)
        for charge in event.budgets:
            if charge.budget_lease_id in charges:
                charged[charge.budget_lease_id] += charge.charged
        for lease_id, units in charged.items():
            before_units, before_requests = charges[lease_id].get(spender, (0, 0))
            charges[lease_id][spender] = (before_units + units, before_requests + counted_requests(event.outcome))
    return charges
