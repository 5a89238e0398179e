"""What is an anomaly and what never is, for any organization that there may be."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analytics.anomalies import (
    DAYS,
    ERROR_RATE_FLOOR,
    LEAST_DAYS,
    LEAST_REQUESTS,
    SPEND_FLOOR_MICROS,
    Hour,
    compared_hours,
    error_rate_anomaly,
    spend_anomaly,
)

HOUR = datetime(2026, 11, 20, 12, tzinfo=UTC)
EVER = HOUR - timedelta(days=365)
DOLLAR = 1_000_000
MICROS = st.integers(0, 10**15)


def spending(now: int, before: Sequence[int]) -> dict[datetime, Hour]:
    """Hours that cost so much; `before` has the latest first."""
    return {hour: Hour(1, 0, cost) for hour, cost in zip([HOUR, *compared_hours(HOUR)], [now, *before], strict=False)}


def failing(now: Hour, before: Sequence[Hour]) -> dict[datetime, Hour]:
    return dict(zip([HOUR, *compared_hours(HOUR)], [now, *before], strict=False))


@given(MICROS)
def test_what_always_costs_the_same_is_no_anomaly(cost: int) -> None:
    assert spend_anomaly(HOUR, EVER, spending(cost, [cost] * DAYS)) is None


@given(st.lists(MICROS, min_size=LEAST_DAYS, max_size=DAYS), st.data())
def test_ten_times_the_usual_above_the_floor_is_an_anomaly_whatever_came_before(
    before: list[int], data: st.DataObject
) -> None:
    same_weekday = before[6::7]
    # No more than half of the hours, of days and of weekdays, are above this.
    usual = max(sorted(before)[len(before) // 2], sorted(same_weekday)[len(same_weekday) // 2])
    now = data.draw(st.integers(10 * usual + SPEND_FLOOR_MICROS, 10**17))
    since = HOUR - timedelta(days=len(before))
    assert spend_anomaly(HOUR, since, spending(now, before)) is not None


@given(MICROS, st.lists(MICROS, min_size=DAYS, max_size=DAYS))
def test_less_than_the_floor_is_no_anomaly(usual: int, noise: list[int]) -> None:
    before = [usual + each % DOLLAR for each in noise]
    assert spend_anomaly(HOUR, EVER, spending(usual + SPEND_FLOOR_MICROS - 1, before)) is None


@given(st.lists(MICROS, min_size=7, max_size=7))
def test_what_comes_every_week_is_no_anomaly(week: list[int]) -> None:
    days = [week[day % 7] for day in range(DAYS + 1)]
    assert spend_anomaly(HOUR, EVER, spending(days[0], days[1:])) is None


@given(st.lists(MICROS, min_size=DAYS, max_size=DAYS), MICROS, MICROS)
def test_more_is_never_less_of_an_anomaly(before: list[int], first: int, second: int) -> None:
    less, more = sorted((first, second))
    if spend_anomaly(HOUR, EVER, spending(less, before)) is not None:
        assert spend_anomaly(HOUR, EVER, spending(more, before)) is not None


def test_one_wild_hour_before_hides_nothing() -> None:
    before = [20 * DOLLAR] * DAYS
    before[6] = 10_000 * DOLLAR
    found = spend_anomaly(HOUR, EVER, spending(200 * DOLLAR, before))
    assert found is not None
    # A quarter of twenty dollars is a spread.
    assert found == (200 * DOLLAR, 20 * DOLLAR, 36.0)


def test_spend_is_off_by_its_own_deviation_where_it_is_not_steady() -> None:
    before = [(40 if day % 2 else 20) * DOLLAR for day in range(DAYS)]
    # Around a median of 30 everything is 10 away, so 8 times that is 80.
    assert spend_anomaly(HOUR, EVER, spending(109 * DOLLAR, before)) is None
    assert spend_anomaly(HOUR, EVER, spending(111 * DOLLAR, before)) is not None


def test_organization_that_is_new_is_not_judged() -> None:
    hours = {HOUR: Hour(1, 0, 1000 * DOLLAR)}
    assert spend_anomaly(HOUR, HOUR - timedelta(days=LEAST_DAYS - 1), hours) is None
    assert spend_anomaly(HOUR, HOUR - timedelta(days=LEAST_DAYS), hours) is not None


@given(st.integers(LEAST_REQUESTS, 10**6), st.data())
def test_what_always_fails_alike_is_no_anomaly(requests: int, data: st.DataObject) -> None:
    hour = Hour(requests, data.draw(st.integers(0, requests)))
    assert error_rate_anomaly(HOUR, failing(hour, [hour] * DAYS)) is None


@given(st.integers(LEAST_REQUESTS, 10**6), st.data())
def test_ten_times_the_error_rate_above_the_floor_is_an_anomaly(requests: int, data: st.DataObject) -> None:
    usual = data.draw(st.floats(ERROR_RATE_FLOOR / 9, 0.1))
    before = Hour(10**6, int(usual * 10**6) + 1)
    now = Hour(requests, min(requests, int(10 * before.error_rate * requests) + 1))
    if now.failed_requests < requests:
        assert error_rate_anomaly(HOUR, failing(now, [before] * DAYS)) is not None


@given(st.lists(st.integers(0, 1000), min_size=7, max_size=7))
def test_what_fails_every_week_is_no_anomaly(week: list[int]) -> None:
    days = [Hour(1000, week[day % 7]) for day in range(DAYS + 1)]
    assert error_rate_anomaly(HOUR, failing(days[0], days[1:])) is None


@pytest.mark.parametrize("few", [Hour(1, 1), Hour(LEAST_REQUESTS - 1, LEAST_REQUESTS - 1)])
def test_few_requests_that_fail_are_no_anomaly(few: Hour) -> None:
    assert error_rate_anomaly(HOUR, failing(few, [Hour(1000, 0)] * DAYS)) is None
    # Nor do they say what is usual.
    assert error_rate_anomaly(HOUR, failing(Hour(1000, 1000), [few] * DAYS)) is None


@pytest.mark.parametrize(("requests", "failed", "is_anomaly"), [(50, 33, False), (50, 35, True), (5000, 2600, True)])
def test_more_of_few_requests_may_fail_by_chance(requests: int, failed: int, is_anomaly: bool) -> None:
    hours = failing(Hour(requests, failed), [Hour(1000, 400)] * DAYS)
    assert (error_rate_anomaly(HOUR, hours) is not None) == is_anomaly
