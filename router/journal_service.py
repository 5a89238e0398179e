"""JournalService over gRPC: reads requests, asks the journal, writes answers; what an entry is, is in `journal`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NamedTuple, TypeAlias, TypedDict

import grpc
import msgspec
from google.protobuf.timestamp_pb2 import Timestamp
from msgspec.structs import astuple

from aiaas.router.v1 import journal_service_pb2 as pb
from aiaas.router.v1 import journal_service_pb2_grpc
from aiaas.type.v1.usage_event_pb2 import UsageEvent
from mesh.clock import Clock
from mesh.conversions import from_timestamp
from mesh.fields import invalid
from mesh.pages import cut, read_page_size, read_token
from router.journal import Journal
from router.journal_queries import Selection, Total, list_entries, sum_up
from router.journal_store import FIRST_KEY, JournalStore, State, Stored
from router.publisher import UsagePublisher

_STATES = {
    pb.JOURNAL_ENTRY_STATE_OPEN: State.OPEN,
    pb.JOURNAL_ENTRY_STATE_UNPUBLISHED: State.UNPUBLISHED,
    pb.JOURNAL_ENTRY_STATE_PUBLISHED: State.PUBLISHED,
}
_STATE_NUMBERS = {state: number for number, state in _STATES.items()}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_HOUR_MICROS = 3_600_000_000
# Pages of totals come one after the other, and to sum up takes a walk over the hours that are asked for.
_TOTALS_KEPT_S = 30.0
_Ranged: TypeAlias = pb.ListJournalEntriesRequest | pb.ReplayJournalRequest | pb.QueryJournalTotalsRequest
_Context = grpc.aio.ServicerContext[Any, Any]


class _EntryPlace(msgspec.Struct, frozen=True, array_like=True):
    """A place in the order of admission."""

    key: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class _TotalPlace(msgspec.Struct, frozen=True, array_like=True):
    """A place in the order of totals."""

    organization_id: str
    hour_start_s: int
    api_key_id: str
    model: str


class _Kept(NamedTuple):
    selection: Selection
    until: float
    totals: list[Total]


class JournalService(journal_service_pb2_grpc.JournalServiceServicer):
    """The journal of this replica."""

    def __init__(self, journal: Journal, publisher: UsagePublisher, clock: Clock) -> None:
        self._journal = journal
        self._publisher = publisher
        self._clock = clock
        self._kept: _Kept | None = None

    async def GetJournalStatus(
        self, request: pb.GetJournalStatusRequest, context: _Context
    ) -> pb.GetJournalStatusResponse:
        """Return how the journal stands."""
        journal = self._journal
        await journal.sync()
        status = await journal.read(lambda: read_status(journal.store, journal.limit_bytes))
        status.open_entries = journal.open_entries
        status.publish_failure_reason = self._publisher.failure_reason
        return pb.GetJournalStatusResponse(status=status)

    async def ListJournalEntries(
        self, request: pb.ListJournalEntriesRequest, context: _Context
    ) -> pb.ListJournalEntriesResponse:
        """Return a page of entries."""
        await self._journal.sync()
        return await self._journal.read(lambda: read_entries(self._journal.store, request, self._publisher.attempts))

    async def ReplayJournal(self, request: pb.ReplayJournalRequest, context: _Context) -> pb.ReplayJournalResponse:
        """Have entries published again."""
        if not request.request_ids and not (request.HasField("start_time") and request.HasField("end_time")):
            field = "end_time" if request.HasField("start_time") else "start_time"
            raise invalid(field, "is required unless requests are named")
        return pb.ReplayJournalResponse(
            entries=await self._journal.replay(
                Selection(
                    organization_id=request.organization_id,
                    request_ids=frozenset(request.request_ids),
                    **_range(request),
                )
            )
        )

    async def QueryJournalTotals(
        self, request: pb.QueryJournalTotalsRequest, context: _Context
    ) -> pb.QueryJournalTotalsResponse:
        """Return a page of sums."""
        selection, now = select_hours(request), self._clock.monotonic()
        kept = self._kept
        if kept is None or not request.page_token or kept.selection != selection or now > kept.until:
            await self._journal.sync()
            totals = await self._journal.read(lambda: sum_up(self._journal.store, selection))
            kept = self._kept = _Kept(selection, now + _TOTALS_KEPT_S, totals)
        return page_of_totals(self._journal.router_id, kept.totals, request)


def read_status(store: JournalStore, limit_bytes: int) -> pb.JournalStatus:
    """How a journal stands on its disk."""
    counts = store.read_counts()
    status = pb.JournalStatus(
        router_id=store.router_id,
        open_entries=len(store.read_open()),
        unpublished_entries=counts.unpublished_entries,
        published_entries=counts.ended_entries - counts.unpublished_entries,
        size_bytes=counts.size_bytes,
        limit_bytes=limit_bytes,
    )
    if counts.oldest_unpublished_micros is not None:
        status.oldest_unpublished_time.FromMicroseconds(counts.oldest_unpublished_micros)
    return status


def read_entries(
    store: JournalStore, request: pb.ListJournalEntriesRequest, attempts: Callable[[bytes], int]
) -> pb.ListJournalEntriesResponse:
    """A page of entries. `attempts` tells how often a key was tried that still waits. Raises PlatformError."""
    size, after = read_page_size(request.page_size), read_token(request, _EntryPlace)
    if request.state and request.state not in _STATES:
        raise invalid("state", "is unknown")
    selection = Selection(
        state=_STATES.get(request.state),
        organization_id=request.organization_id,
        request_ids=frozenset({request.request_id} - {""}),
        **_range(request),
    )

    def to_message(stored: Stored) -> pb.JournalEntry:
        message = pb.JournalEntry(
            state=_STATE_NUMBERS[stored.state],
            event=UsageEvent.FromString(stored.event),
            publish_attempts=max(stored.attempts, attempts(stored.key)),
        )
        if stored.state is State.PUBLISHED:
            # Only more than one try is written down.
            message.publish_attempts = max(1, stored.attempts)
        if stored.written_micros:
            message.checkpoint_time.FromMicroseconds(stored.written_micros)
        else:
            message.checkpoint_time.CopyFrom(message.event.admit_time)
        return message

    found = list_entries(store, selection, after.key if after else FIRST_KEY, size + 1)
    entries, token = cut(request, found, size, to_message, lambda stored: _EntryPlace(stored.key))
    return pb.ListJournalEntriesResponse(entries=entries, next_page_token=token)


def select_hours(request: pb.QueryJournalTotalsRequest) -> Selection:
    """What a question about totals is about. Raises PlatformError(INVALID_ARGUMENT)."""
    selection = Selection(organization_id=request.organization_id, **_range(request))
    for field, micros in (("start_time", selection.start_micros), ("end_time", selection.end_micros)):
        if not micros:
            raise invalid(field, "is required")
        if micros % _HOUR_MICROS:
            raise invalid(field, "must be on the hour")
    return selection


def page_of_totals(
    router_id: str, totals: Sequence[Total], request: pb.QueryJournalTotalsRequest
) -> pb.QueryJournalTotalsResponse:
    """A page of totals that are in order. Raises PlatformError(INVALID_ARGUMENT)."""
    size, after = read_page_size(request.page_size), read_token(request, _TotalPlace)
    start = 0 if after is None else bisect_right(totals, astuple(after), key=lambda total: astuple(_place(total)))
    messages, token = cut(request, totals[start : start + size + 1], size, _to_message, _place)
    return pb.QueryJournalTotalsResponse(router_id=router_id, totals=messages, next_page_token=token)


def _place(total: Total) -> _TotalPlace:
    return _TotalPlace(total.organization_id, total.hour_start_s, total.api_key_id, total.model)


def _to_message(total: Total) -> pb.JournalTotal:
    return pb.JournalTotal(
        organization_id=total.organization_id,
        api_key_id=total.api_key_id,
        model=total.model,
        hour_start=Timestamp(seconds=total.hour_start_s),
        requests=total.requests,
        usage=total.usage,
        cost_micros=total.cost_micros,
    )


class _Range(TypedDict):
    start_micros: int
    end_micros: int | None


def _range(request: _Ranged) -> _Range:
    """The range of admission of a request. Raises PlatformError(INVALID_ARGUMENT)."""
    start = _micros(request.start_time, "start_time") if request.HasField("start_time") else 0
    end = _micros(request.end_time, "end_time") if request.HasField("end_time") else None
    if end is not None and end <= start:
        raise invalid("end_time", "must be after 'start_time'")
    return _Range(start_micros=start, end_micros=end)


def _micros(timestamp: Timestamp, field: str) -> int:
    moment = from_timestamp(timestamp, field)
    if moment < _EPOCH:
        raise invalid(field, "is too long ago")
    return (moment - _EPOCH) // _MICROSECOND
