"""Months, and what becomes a line."""

from datetime import UTC, datetime, timedelta

import pytest

from analytics.statements import CORRECTION, USAGE, Amounts, Group, Month, kept_since, last_due, lines_of

OCTOBER = Month(2026, 10)


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def group(month: Month, api_key_id: str = "key_a") -> Group:
    return Group(month, api_key_id, "smollm2", "price_1")


@pytest.mark.parametrize(
    ("now", "due"),
    [
        ("2026-11-02T23:59:59.999999", Month(2026, 9)),
        ("2026-11-03T00:00:00", OCTOBER),
        ("2026-11-30T23:59:59", OCTOBER),
        ("2027-01-02T12:00:00", Month(2026, 11)),
        ("2027-01-03T00:00:00", Month(2026, 12)),
    ],
)
def test_month_is_due_from_the_third_day_of_the_next_on(now: str, due: Month) -> None:
    assert last_due(moment(now)) == due


def test_month_is_that_of_utc() -> None:
    in_another_zone = datetime.fromisoformat("2026-11-01T00:30:00+02:00")
    assert Month.of(in_another_zone) == OCTOBER
    assert (OCTOBER.start, OCTOBER.end) == (moment("2026-10-01"), moment("2026-11-01"))
    assert (Month(2026, 12).plus(1), Month(2026, 1).plus(-1)) == (Month(2027, 1), Month(2025, 12))


@pytest.mark.parametrize(
    ("now", "first"),
    [("2026-11-01", OCTOBER), ("2026-11-01T00:00:01", Month(2026, 11)), ("2026-11-20", Month(2026, 11))],
)
def test_month_that_is_cut_by_retention_is_not_kept(now: str, first: Month) -> None:
    assert kept_since(moment(now), timedelta(days=31)) == first


def test_lines_are_usage_then_corrections_in_the_order_of_their_groups() -> None:
    september = OCTOBER.plus(-1)
    raw = {
        group(OCTOBER, "key_b"): Amounts(1, cost_micros=5),
        group(OCTOBER, "key_a"): Amounts(2, cost_micros=6),
        group(september, "key_b"): Amounts(4, cost_micros=9),
        group(september, "key_c"): Amounts(1),
    }
    stated = {
        group(september, "key_a"): Amounts(1, cost_micros=3),
        group(september, "key_b"): Amounts(3, cost_micros=10),
        group(september, "key_c"): Amounts(1),
    }
    lines = list(lines_of(OCTOBER, raw, stated))
    assert [line.line_number for line in lines] == [1, 2, 3, 4]
    assert [(line.kind, line.group, line.amounts) for line in lines] == [
        (USAGE, group(OCTOBER, "key_a"), Amounts(2, cost_micros=6)),
        (USAGE, group(OCTOBER, "key_b"), Amounts(1, cost_micros=5)),
        (CORRECTION, group(september, "key_a"), Amounts(-1, cost_micros=-3)),
        (CORRECTION, group(september, "key_b"), Amounts(1, cost_micros=-1)),
    ]
