"""When hours are due, which lines differ, and what an engine may have counted."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aiaas.type.v1.usage_event_pb2 import OUTCOME_CANCELLED, USAGE_SOURCE_ENGINE
from analytics.reconciliations import (
    HOUR,
    Amounts,
    Difference,
    EngineBalance,
    EngineWindow,
    Line,
    compare,
    engine_request,
    hours_due,
    lacking,
)
from tests.doubles.usage_events import usage_event

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
LINE = Line(NOON, NOON + HOUR, "org_a", "key_a", "m")


@pytest.mark.parametrize(
    ("last", "minute", "due"),
    [
        # Nothing was compared before: the hour before this one, once it has settled.
        (None, 10, [11]),
        (None, 9, [10]),
        (11, 59, []),
        (10, 10, [11]),
        # What nobody compared is made up for.
        (8, 10, [9, 10, 11]),
    ],
)
def test_hours_are_due_once_their_usage_is_in(last: int | None, minute: int, due: list[int]) -> None:
    before = None if last is None else NOON.replace(hour=last)
    assert [hour.hour for hour in hours_due(before, NOON.replace(minute=minute))] == due


def test_only_the_hours_of_a_day_are_made_up_for() -> None:
    due = hours_due(NOON - timedelta(days=9), NOON.replace(minute=10))
    assert (len(due), due[-1]) == (24, NOON - HOUR)


def test_lines_differ_when_any_amount_does_and_a_line_without_amounts_is_none() -> None:
    source = {LINE: Amounts(1, 10), LINE._replace(model="n"): Amounts(), LINE._replace(model="o"): Amounts(1)}
    analytics = {LINE: Amounts(1, 11), LINE._replace(model="o"): Amounts(1), LINE._replace(model="p"): Amounts(2)}
    assert {each.line.model for each in compare(source, analytics)} == {"m", "p"}
    assert list(lacking(compare(source, analytics))) == []
    assert list(lacking(compare(analytics, source))) != []
    # A source that is not whole may know less, but not more.
    assert compare(source, analytics, whole=False) == []
    assert {each.line.model for each in compare(analytics, source, whole=False)} == {"m", "p"}


def test_money_makes_a_difference_larger_than_tokens_do() -> None:
    cheap = Difference(LINE, Amounts(9, 900, 0, 900, 5), Amounts())
    dear = Difference(LINE, Amounts(), Amounts(1, 1, 0, 1, 6))
    assert dear.size > cheap.size


def balance(*counted: tuple[int, int], reset: bool = False, **requests: Any) -> EngineBalance:
    """Windows of half an hour from noon on; a request of 10 + 5 tokens that ran within, and perhaps another."""
    start, half = NOON, HOUR / 2
    windows = []
    for prompt, completion in counted:
        windows.append(EngineWindow("b", start, start + half, prompt, 0, completion, reset))
        start += half
    made = EngineBalance(windows)
    made.add(request(5, 1))
    if requests:
        made.add(request(**requests))
    return made


def request(minute: float, minutes: float, **fields: Any) -> Any:
    admit_time = NOON + timedelta(minutes=minute)
    event = usage_event(usage_source=USAGE_SOURCE_ENGINE, **fields)
    event.end_time.FromDatetime(admit_time + timedelta(minutes=minutes))
    return engine_request(event, admit_time)


def test_an_engine_that_counted_what_was_used_agrees() -> None:
    exact = balance((10, 3), (0, 2))
    assert exact.difference() is None
    assert exact.residual() == (0, 0)


def test_an_engine_counts_a_prompt_for_each_of_its_answers() -> None:
    windows = [EngineWindow("b", NOON, NOON + HOUR, 30, 0, 5, False)]
    made = EngineBalance(windows)
    made.add(request(5, 1, choices=3))
    assert made.difference() is None


@pytest.mark.parametrize(("counted", "residual"), [((12, 5), (2, 0)), ((10, 4), (0, -1)), ((0, 9), (-10, 4))])
def test_an_engine_that_counted_anything_else_differs(counted: tuple[int, int], residual: tuple[int, int]) -> None:
    other = balance(counted)
    difference = other.difference()
    assert difference is not None
    assert other.residual() == residual
    assert (difference.source.prompt_tokens, difference.source.completion_tokens) == counted
    assert difference.explanations == ()


@pytest.mark.parametrize("counted", [(10, 5), (20, 5), (13, 7), (20, 10)])
@pytest.mark.parametrize(("minute", "minutes"), [(-1, 2), (29, 2), (-1, 90), (29, 0.99)])
def test_a_request_across_an_edge_was_counted_in_part(counted: tuple[int, int], minute: float, minutes: float) -> None:
    assert balance(counted, minute=minute, minutes=minutes).difference() is None


def test_a_request_across_an_edge_explains_no_more_than_its_own_tokens() -> None:
    difference = balance((21, 10), minute=29, minutes=2).difference()
    assert difference is not None
    assert difference.explanations == (
        "Requests across an edge of this time: 1; up to 10 prompt and 5 completion tokens of theirs are counted.",
    )


@pytest.mark.parametrize(("minute", "minutes"), [(-9, 2), (31, 2)])
def test_a_request_of_another_time_does_not_matter(minute: float, minutes: float) -> None:
    assert balance((10, 5), minute=minute, minutes=minutes).difference() is None
    assert balance((20, 10), minute=minute, minutes=minutes).residual() == (10, 5)


def test_a_restart_explains_what_is_missing_and_not_what_is_too_much() -> None:
    restarted = balance((4, 9), reset=True)
    assert restarted.residual() == (0, 4)
    difference = restarted.difference()
    assert difference is not None
    assert difference.explanations == (
        "The engine restarted between 12:00:00 and 12:30:00 UTC; what it had counted since it was last read is lost.",
    )


def test_requests_that_were_broken_off_or_counted_by_others_are_told() -> None:
    difference = balance((30, 10), minute=6, minutes=1, outcome=OUTCOME_CANCELLED, usage_clamped=True).difference()
    assert difference is not None
    assert difference.explanations == (
        "Requests broken off: 1; what the engine still made for them is billed to nobody.",
        "Requests of which the engine told no usage, or too much: 1; others counted for them.",
    )
