"""Forecasts: weekdays by their medians, a range from their spread, and honesty where there is little to judge by."""

import random
from datetime import UTC, datetime

import pytest

from aiaas.analytics.v1.spend_service_pb2 import ForecastSpendRequest
from aiaas.analytics.v1.usage_service_pb2 import UsageInterval
from analytics.forecast import DayCost, ForecastQuery, forecast, read_forecast_query
from analytics.usage_range import DAY, Coverage
from mesh.errors import PlatformError

NOW = datetime(2026, 11, 20, 12, 30, tzinfo=UTC)  # a Friday
DAYS_INTERVAL = UsageInterval.USAGE_INTERVAL_DAY


def asked(
    interval: UsageInterval.ValueType = UsageInterval.USAGE_INTERVAL_UNSPECIFIED, zone: str = ""
) -> ForecastQuery:
    request = ForecastSpendRequest(organization_id="org_a", interval=interval, time_zone=zone)
    return read_forecast_query(request, NOW, Coverage())


def history(days: int, cost: int = 240, weekend: int = 24) -> list[DayCost]:
    """Half of each day's cost before noon; today until now as its weekday wants it."""
    found = []
    for ago in range(days, 0, -1):
        day = NOW.date() - DAY * ago
        whole = weekend if day.weekday() >= 5 else cost
        found.append(DayCost(day, whole // 2, whole // 2))
    return [*found, DayCost(NOW.date(), cost // 2, 0)]


def test_month_ends_as_its_weekdays_always_did() -> None:
    made = forecast(asked(), history(56))
    # 14 workdays and 5 days of weekends are over, half of today, and 6 and 4 are to come.
    assert made.spent == 14 * 240 + 5 * 24 + 120
    assert made.expected == made.spent + 120 + 6 * 240 + 4 * 24
    assert (made.low, made.high, made.enough_history) == (made.expected, made.expected, True)


def test_one_odd_day_moves_nothing() -> None:
    days = history(56)
    odd = [day._replace(before=10**9) if day.day.day == 9 and day.day.month == 10 else day for day in days]
    assert forecast(asked(), odd).expected == forecast(asked(), days).expected


def test_day_ends_as_its_weekday_always_did() -> None:
    made = forecast(asked(DAYS_INTERVAL), history(56))
    assert (made.spent, made.expected) == (120, 240)


def test_what_the_running_hour_cost_already_counts_at_least() -> None:
    *before, today = history(56)
    assert forecast(asked(DAYS_INTERVAL), [*before, today._replace(after=100)]).expected == 240
    assert forecast(asked(DAYS_INTERVAL), [*before, today._replace(after=500)]).expected == 620


def test_range_holds_about_eight_of_ten_ends() -> None:
    source = random.Random(4)
    inside = 0
    for _ in range(400):
        days = [DayCost(NOW.date() - DAY * ago, 0, round(source.gauss(10_000, 1_500))) for ago in range(56, 0, -1)]
        made = forecast(asked(), [*days, DayCost(NOW.date(), 0, 0)])
        end = made.spent + sum(round(source.gauss(10_000, 1_500)) for _ in range(11))
        inside += made.low <= end <= made.high
    assert 0.7 < inside / 400 < 0.95


def test_less_than_two_weeks_are_not_enough_and_count_alike() -> None:
    made = forecast(asked(), history(13))
    assert not made.enough_history
    assert made.expected == made.spent + 120 + 10 * 240
    assert forecast(asked(), history(14)).enough_history


def test_first_day_goes_on_as_it_began() -> None:
    made = forecast(asked(DAYS_INTERVAL), [DayCost(NOW.date(), 1250, 0)])
    assert (made.spent, made.expected, made.low, made.high) == (1250, 2400, 1250, 3550)
    assert not made.enough_history


def test_nothing_spent_is_nothing_expected() -> None:
    assert forecast(asked(), [DayCost(NOW.date(), 0, 0)]) == (0, 0, 0, 0, False)


def test_periods_are_those_of_the_zone() -> None:
    assert asked(zone="Europe/Berlin").period == (
        datetime(2026, 10, 31, 23, tzinfo=UTC),
        datetime(2026, 11, 30, 23, tzinfo=UTC),
    )
    assert asked(DAYS_INTERVAL, "Asia/Tokyo").period == (
        datetime(2026, 11, 19, 15, tzinfo=UTC),
        datetime(2026, 11, 20, 15, tzinfo=UTC),
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"interval": UsageInterval.USAGE_INTERVAL_HOUR}, "interval"), ({"time_zone": "Mars/Olympus"}, "time_zone")],
)
def test_wrong_field_is_named(fields: dict[str, object], field: str) -> None:
    with pytest.raises(PlatformError) as caught:
        read_forecast_query(ForecastSpendRequest(organization_id="org_a", **fields), NOW, Coverage())  # type: ignore[arg-type]
    assert caught.value.field == field
