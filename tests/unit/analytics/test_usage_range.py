"""Ranges: what is read from days and what from hours, and bounds where no hours are kept."""

import itertools
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from aiaas.analytics.v1.usage_service_pb2 import UsageInterval
from analytics.usage_range import DAY, HOUR, Span, edges_of, read_zone, spans_of
from tests.doubles.usage_events import NOW

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CLOSED = datetime(2026, 11, 20, tzinfo=UTC)
WHOLE, HOURS, DAYS, MONTHS = UsageInterval.values()


def at(*moment: int) -> datetime:
    return datetime(*moment, tzinfo=UTC)  # type: ignore[misc, arg-type]


def test_days_of_utc_are_read_as_days_and_the_rest_as_hours() -> None:
    days, hours = spans_of((at(2026, 11, 1, 7), at(2026, 11, 3), at(2026, 11, 4), at(2026, 11, 20, 5)), CLOSED)
    assert days == [Span(at(2026, 11, 2), CLOSED)]
    assert hours == [Span(at(2026, 11, 1, 7), at(2026, 11, 2)), Span(CLOSED, at(2026, 11, 20, 5))]


def test_days_of_another_zone_are_read_as_hours() -> None:
    edges = edges_of(at(2026, 11, 1), at(2026, 11, 9), DAYS, read_zone("Europe/Berlin"), EPOCH)
    assert spans_of(edges, CLOSED) == ([], [Span(at(2026, 11, 1), at(2026, 11, 9))])


def test_months_of_another_zone_are_read_as_days_but_for_their_bounds() -> None:
    edges = edges_of(at(2026, 9, 30, 22), at(2026, 10, 31, 23), MONTHS, read_zone("Europe/Berlin"), EPOCH)
    days, hours = spans_of(edges, CLOSED)
    assert days == [Span(at(2026, 10, 1), at(2026, 10, 31))]
    assert hours == [Span(at(2026, 9, 30, 22), at(2026, 10, 1)), Span(at(2026, 10, 31), at(2026, 10, 31, 23))]


def test_bounds_before_hours_are_kept_move_to_the_nearest_midnight_of_utc() -> None:
    since = at(2026, 11, 3)
    edges = edges_of(at(2026, 10, 31, 7), at(2026, 11, 4, 12), DAYS, read_zone("Europe/Berlin"), since)
    assert edges == (
        *(at(2026, 10, 31), at(2026, 11, 1), at(2026, 11, 2), since),
        *(at(2026, 11, 3, 23), at(2026, 11, 4, 12)),
    )
    edges = edges_of(at(2026, 10, 31, 7), at(2026, 11, 2, 12, 1), HOURS, read_zone(""), since)
    assert edges == (at(2026, 10, 31), at(2026, 11, 1), at(2026, 11, 2), since)


@given(
    st.timedeltas(timedelta(), timedelta(days=200)).map(lambda ago: NOW - ago),
    st.timedeltas(timedelta(hours=1), timedelta(days=200)),
    st.sampled_from([WHOLE, HOURS, DAYS, MONTHS]),
    st.sampled_from(["", "Europe/Berlin", "Asia/Kolkata", "Pacific/Kiritimati", "America/Los_Angeles"]),
    st.integers(0, 150),
    st.integers(0, 150),
)
def test_every_hour_is_read_once_and_none_that_is_gone(
    start: datetime, length: timedelta, interval: UsageInterval.ValueType, zone: str, kept: int, closed: int
) -> None:
    closed_until = CLOSED - DAY * closed
    hourly_since = min(CLOSED - DAY * kept, closed_until)
    edges = edges_of(start, start + length, interval, read_zone(zone), hourly_since)
    assert list(edges) == sorted(set(edges))
    assert edges[0] <= start
    assert edges[-1] >= start + length
    days, hours = spans_of(edges, closed_until)
    spans = sorted([*days, *hours])
    assert (spans[0].start, spans[-1].end) == (edges[0], edges[-1])
    assert all(one.end == other.start for one, other in itertools.pairwise(spans))
    assert all(span.start.hour == span.end.hour == 0 and span.end <= closed_until for span in days)
    assert all(span.start >= hourly_since for span in hours)
    inner = set(edges[1:-1])
    assert not any(span.start + HOUR * n in inner for span in days for n in range(24) if n)
