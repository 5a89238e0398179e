"""Whether an hour of an organization is unlike its hours before, by medians; it never reads a sum or tells anybody.

An hour is compared twice: with the same hour of the days before, and with the same hour of the same weekday before. It
is an anomaly only where it is far above both, so that what comes every Monday is none. Far is counted in spreads: the
median absolute deviation, which a few wild hours do not move, but never less than what small or steady organizations
need so as not to be alarmed at nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from statistics import median
from typing import NamedTuple

DAYS = 28
"""How far an hour is compared back: four weeks, so that each weekday is there four times."""

LEAST_DAYS = 14
"""Days that must be comparable before anything is judged: two of each weekday."""

DEVIATIONS = 8.0
"""How many spreads above the median an hour is an anomaly. The median absolute deviation of amounts is never above
their median, so ten times what is usual always is one. Of normally distributed amounts it is five standard
deviations."""

SPEND_FLOOR_MICROS = 10_000_000
"""What an hour must cost above the usual at least: ten dollars."""

SPEND_SPREAD = 0.25
"""The least spread of spend, as a share of the median: however steady it was, it must triple."""

LEAST_REQUESTS = 50
"""Requests that an hour needs for its error rate to be judged or compared with."""

ERROR_RATE_FLOOR = 0.1
"""How far an error rate must be above the usual at least: of ten requests one more."""

STANDARD_ERRORS = 4.0
"""How many standard errors of so many requests an error rate must be above the usual: chance does not do that."""

_DAY = timedelta(days=1)
_WEEK_DAYS = 7


class Hour(NamedTuple):
    """Sums of one hour. `requests` were admitted; `failed_requests` of them were not answered in full, though their
    clients stayed."""

    requests: int = 0
    failed_requests: int = 0
    cost_micros: int = 0

    @property
    def error_rate(self) -> float:
        """Failed requests of each request."""
        return self.failed_requests / self.requests


class Anomaly(NamedTuple):
    """How far an hour is off: what was seen, the median of comparable hours, and how many spreads lie between."""

    observed: float
    expected: float
    deviations: float


def compared_hours(hour: datetime) -> list[datetime]:
    """The hours that an hour is compared with, latest first."""
    return [hour - day * _DAY for day in range(1, DAYS + 1)]


def spend_anomaly(hour: datetime, since: datetime, hours: Mapping[datetime, Hour]) -> Anomaly | None:
    """Whether an hour cost too much. Nothing was used in hours that are missing from `hours`, and those before `since`,
    when the organization first used anything, count for nothing."""
    before = ((each, float(hours.get(each, Hour()).cost_micros)) for each in compared_hours(hour) if each >= since)
    return _judge(
        hour,
        float(hours.get(hour, Hour()).cost_micros),
        before,
        lambda usual: max(SPEND_SPREAD * usual, SPEND_FLOOR_MICROS / DEVIATIONS),
    )


def error_rate_anomaly(hour: datetime, hours: Mapping[datetime, Hour]) -> Anomaly | None:
    """Whether too many requests of an hour failed. Only hours of `LEAST_REQUESTS` count."""
    judged = hours.get(hour, Hour())
    if judged.requests < LEAST_REQUESTS:
        return None
    before = (
        (each, found.error_rate)
        for each in compared_hours(hour)
        if (found := hours.get(each, Hour())).requests >= LEAST_REQUESTS
    )

    def least_spread(usual: float) -> float:
        standard_error = math.sqrt(usual * (1 - usual) / judged.requests)
        return max(STANDARD_ERRORS * standard_error, ERROR_RATE_FLOOR) / DEVIATIONS

    return _judge(hour, judged.error_rate, before, least_spread)


def _judge(
    hour: datetime,
    observed: float,
    before: Iterable[tuple[datetime, float]],
    least_spread: Callable[[float], float],
) -> Anomaly | None:
    known = dict(before)
    if len(known) < LEAST_DAYS:
        return None
    same_weekday = [value for each, value in known.items() if (hour - each).days % _WEEK_DAYS == 0]
    # What is nearest to it tells best how far off it is.
    nearest = min(_compare(observed, known.values(), same_weekday, least_spread), key=lambda found: found.deviations)
    return nearest if nearest.deviations >= DEVIATIONS else None


def _compare(
    observed: float, daily: Iterable[float], weekly: Iterable[float], least_spread: Callable[[float], float]
) -> Iterator[Anomaly]:
    for values in map(list, (daily, weekly)):
        if values:
            usual = median(values)
            spread = max(median(abs(value - usual) for value in values), least_spread(usual))
            yield Anomaly(observed, usual, (observed - usual) / spread)
