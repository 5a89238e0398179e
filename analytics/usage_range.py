"""The range of a question, its buckets, and from which sums these are read; it never reads a row itself.

Sums are kept for whole hours of UTC, so ranges and buckets begin and end on these. Where a zone is half an hour off,
its days and months begin at the full hour before midnight. Beyond the time for which hours are kept only days of UTC
are left, so bounds there move to the nearest midnight in UTC, and what is narrower becomes one day. Every bucket tells
its own bounds.
"""

from __future__ import annotations

import functools
import itertools
import zoneinfo
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.analytics.v1.usage_service_pb2 import UsageInterval
from analytics.rollups import day_of, hour_of
from mesh.fields import invalid

RANGE = timedelta(days=400)
"""How long a range may be: as long as events are kept."""

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)

# Beyond these, arithmetic in zones leaves the calendar.
_YEARS = range(1970, 9999)


class Coverage(NamedTuple):
    """Days before `closed_until` are summed, hours are kept since `hourly_since`; both are midnights in UTC."""

    closed_until: datetime = datetime(1970, 1, 1, tzinfo=UTC)
    hourly_since: datetime = datetime(1970, 1, 1, tzinfo=UTC)


class Span(NamedTuple):
    """A time from `start` to `end`, exclusive."""

    start: datetime
    end: datetime


def edges_of(
    start: datetime,
    end: datetime,
    interval: UsageInterval.ValueType,
    zone: zoneinfo.ZoneInfo,
    hourly_since: datetime,
) -> tuple[datetime, ...]:
    """The bounds of the buckets of a range, each once and ascending: its start, every beginning of a bucket between,
    its end. Hours are told apart since `hourly_since`, a midnight in UTC."""
    first, last = hour_of(start), hour_of(end - timedelta.resolution) + HOUR
    between = itertools.takewhile(lambda beginning: beginning < last, _beginnings(first, interval, zone))
    edges = [first if first >= hourly_since else day_of(first)]
    if last < hourly_since:
        last = day_of(last - timedelta.resolution) + DAY
    for edge in itertools.chain((_told_apart(edge, hourly_since) for edge in between), [last]):
        if edges[-1] < edge <= last:
            edges.append(edge)
    return tuple(edges)


def spans_of(edges: Sequence[datetime], closed_until: datetime) -> tuple[list[Span], list[Span]]:
    """What of the buckets between `edges` is read from the sums of days, and what from those of hours: the days of UTC
    that lie in one bucket as a whole and before `closed_until`, and the rest."""
    days: list[Span] = []
    hours: list[Span] = []
    for start, end in itertools.pairwise(edges):
        first_day = day_of(start + DAY - timedelta.resolution)
        last_day = min(day_of(end), closed_until)
        if first_day < last_day:
            _append(hours, start, first_day)
            _append(days, first_day, last_day)
            _append(hours, last_day, end)
        else:
            _append(hours, start, end)
    return days, hours


def midnight(day: date, zone: zoneinfo.ZoneInfo) -> datetime:
    """The first moment of a day, in UTC. Where clocks skip midnight or pass it twice, that is what fold=0 means."""
    return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)


def month_after(day: date) -> date:
    """The first day of the month after that of `day`."""
    return (day.replace(day=1) + 31 * DAY).replace(day=1)


def read_moment(timestamp: Timestamp, field: str) -> datetime:
    """A moment of a request. Raises PlatformError(INVALID_ARGUMENT)."""
    try:
        moment = timestamp.ToDatetime(UTC)
    except (ValueError, OverflowError):
        raise invalid(field, "must be a time") from None
    if moment.year not in _YEARS:
        raise invalid(field, f"must be in the years {_YEARS[0]} to {_YEARS[-1]}")
    return moment


def check_range(start: datetime, end: datetime) -> None:
    """Raises PlatformError(INVALID_ARGUMENT) for a range that is empty or too long."""
    if start >= end:
        raise invalid("start_time", "must be before the end of the range")
    if end - start > RANGE:
        raise invalid("start_time", f"must be at most {RANGE.days} days before the end of the range")


def read_zone(name: str) -> zoneinfo.ZoneInfo:
    """The zone of a request, UTC where it names none. Raises PlatformError(INVALID_ARGUMENT)."""
    name = name or "UTC"
    if name not in _zones():
        raise invalid("time_zone", 'must be a zone of the IANA database, such as "Europe/Berlin"')
    return zoneinfo.ZoneInfo(name)


def _told_apart(edge: datetime, hourly_since: datetime) -> datetime:
    return edge if edge >= hourly_since else day_of(edge + DAY / 2)


def _append(spans: list[Span], start: datetime, end: datetime) -> None:
    if start >= end:
        return
    if spans and spans[-1].end == start:
        start = spans.pop().start
    spans.append(Span(start, end))


def _beginnings(start: datetime, interval: UsageInterval.ValueType, zone: zoneinfo.ZoneInfo) -> Iterator[datetime]:
    """Where the buckets after the one with `start` begin, without an end."""
    if interval == UsageInterval.USAGE_INTERVAL_HOUR:
        while True:
            start += HOUR
            yield start
    day = start.astimezone(zone).date()
    while interval != UsageInterval.USAGE_INTERVAL_UNSPECIFIED:
        day = day + DAY if interval == UsageInterval.USAGE_INTERVAL_DAY else month_after(day)
        yield hour_of(midnight(day, zone))


@functools.cache
def _zones() -> frozenset[str]:
    # Trying to load a name instead would open files by what a client wrote.
    return frozenset(zoneinfo.available_timezones())
