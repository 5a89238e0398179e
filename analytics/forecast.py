"""Forecasts spend to the end of a day or month from medians of the weeks before; it never reads a row.

A day that is still to come is expected to cost what the same weekday cost in the last eight weeks, by the median, which
one odd day does not move. The rest of today is expected likewise, by what those days cost from the running hour on,
and counts at least what that hour has cost already. With less than two weeks of history all days count alike; with
none, the rest goes on as today did.

The 80 % range follows from what days were off by: half of the distance between the 10th and the 90th percentile of the
differences between the days of the history and what is expected of such days, grown with the square root of the days
ahead, as errors do that do not depend on each other. It never reaches below what is spent. With less than two days of
history it is as wide as what is still expected.
"""

from __future__ import annotations

import math
import statistics
import zoneinfo
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import NamedTuple

from aiaas.analytics.v1 import spend_service_pb2
from aiaas.analytics.v1.usage_service_pb2 import UsageInterval
from analytics.rollups import hour_of
from analytics.spend import SpendTotals
from analytics.usage import Bucket, UsageQuery, read_filter, read_text
from analytics.usage_range import DAY, HOUR, Coverage, edges_of, midnight, month_after, read_zone
from mesh.fields import invalid

HISTORY_DAYS = 56
"""How many days before today are judged by: eight of each weekday."""

ENOUGH_DAYS = 14
"""From how many on a forecast is more than a guess."""

_DAY, _MONTH = UsageInterval.USAGE_INTERVAL_DAY, UsageInterval.USAGE_INTERVAL_MONTH
_INTERVALS = {UsageInterval.USAGE_INTERVAL_UNSPECIFIED: _MONTH, _DAY: _DAY, _MONTH: _MONTH}


class DayCost(NamedTuple):
    """What a day cost, in micro-dollars: before the hour of the day that is running now, and from it on."""

    day: date
    before: int
    after: int

    @property
    def whole(self) -> int:
        """All of it."""
        return self.before + self.after


class Forecast(NamedTuple):
    """Micro-dollars: spent, at the end of the period, and the ends of an 80 % range."""

    spent: int
    expected: int
    low: int
    high: int
    enough_history: bool


@dataclass(frozen=True, slots=True)
class ForecastQuery:
    """The period, by its days, and the hours that it is forecast from, which `hours` asks for."""

    now: datetime
    zone: zoneinfo.ZoneInfo
    first: date
    end: date
    hours: UsageQuery

    @property
    def period(self) -> tuple[datetime, datetime]:
        """Start and end of the period."""
        return midnight(self.first, self.zone), midnight(self.end, self.zone)

    def days(self, buckets: Sequence[Bucket[SpendTotals]]) -> list[DayCost]:
        """What each day cost, oldest first and today last, by what its hours did. The first is the first that cost."""
        today, hour = self.now.astimezone(self.zone).date(), self.now.astimezone(self.zone).hour
        costs: dict[date, list[int]] = {today: [0, 0]}
        for bucket in buckets:
            local = self.hours.edges[bucket.place.bucket - 1].astimezone(self.zone)
            costs.setdefault(local.date(), [0, 0])[local.hour >= hour] += bucket.totals.cost_micros
        first = min(costs)
        days = (first + DAY * number for number in range((today - first).days + 1))
        return [DayCost(day, *costs.get(day, (0, 0))) for day in days]


def read_forecast_query(
    request: spend_service_pb2.ForecastSpendRequest, now: datetime, coverage: Coverage
) -> ForecastQuery:
    """What `request` asks for. Raises PlatformError(INVALID_ARGUMENT) that names the first field that is wrong."""
    interval = _INTERVALS.get(request.interval)
    if interval is None:
        raise invalid("interval", "must be a day or a month")
    zone = read_zone(request.time_zone)
    today = now.astimezone(zone).date()
    since = midnight(today - DAY * HISTORY_DAYS, zone)
    edges = edges_of(since, now + HOUR, UsageInterval.USAGE_INTERVAL_HOUR, zone, coverage.hourly_since)
    return ForecastQuery(
        now=now,
        zone=zone,
        first=today if interval == _DAY else today.replace(day=1),
        end=today + DAY if interval == _DAY else month_after(today),
        hours=UsageQuery(
            organization_id=read_text(request.organization_id, "organization_id"),
            edges=edges,
            group_by=(),
            filter=read_filter(request.filter),
            page_size=len(edges),
            after=None,
            coverage=coverage,
        ),
    )


def forecast(query: ForecastQuery, days: Sequence[DayCost]) -> Forecast:
    """What the period will have cost, by what `days` did, of which the last is today."""
    *history, today = days
    spent = sum(day.whole for day in days if day.day >= query.first)
    tomorrow, end = midnight(today.day + DAY, query.zone), midnight(query.end, query.zone)
    left = (tomorrow - hour_of(query.now)) / DAY
    ahead = [today.day + DAY * number for number in range(1, (query.end - today.day).days)]
    enough = len(history) >= ENOUGH_DAYS

    def median(of: date, cost: Callable[[DayCost], int]) -> float:
        return statistics.median(cost(day) for day in history if not enough or day.day.weekday() == of.weekday())

    if history:
        rest = max(0, median(today.day, lambda day: day.after) - today.after)
        rest += sum(median(day, lambda day: day.whole) for day in ahead)
    else:
        passed = query.now - midnight(today.day, query.zone)
        rest = today.whole * ((end - query.now) / max(passed, HOUR))
    spread = rest
    if len(history) > 1:
        deciles = statistics.quantiles(
            (day.whole - median(day.day, lambda day: day.whole) for day in history), n=10, method="inclusive"
        )
        spread = (deciles[-1] - deciles[0]) / 2 * math.sqrt(len(ahead) + left)
    return Forecast(
        spent=spent,
        expected=spent + round(rest),
        low=spent + max(0, round(rest - spread)),
        high=spent + round(rest + spread),
        enough_history=enough,
    )
