"""What tokens cost, which price holds at a moment, and what a price may be."""

from datetime import UTC, datetime, timedelta
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiaas.type.v1.usage_event_pb2 import PriceSnapshot, TokenUsage
from mesh.errors import PlatformError, Reason
from router.prices import (
    MOST_MICROS,
    Price,
    PriceSchedule,
    beginning,
    ceiling_cost_micros,
    check_amount,
    cost_micros,
    schedules,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
INT64_MAX = 2**63 - 1


def price(
    prompt: int = 0, cached: int = 0, completion: int = 0, *, valid_from: datetime = NOW, model_id: str = "m"
) -> Price:
    return Price(f"price_{valid_from:%d%H%M%S}", model_id, prompt, cached, completion, valid_from, NOW)


def usage(uncached: int, cached: int, completion: int) -> TokenUsage:
    return TokenUsage(prompt_tokens=uncached + cached, cached_prompt_tokens=cached, completion_tokens=completion)


amounts = st.integers(0, MOST_MICROS)
counts = st.integers(0, 500_000_000) | st.integers(0, 3)
prices = st.builds(price, amounts | st.integers(0, 3), amounts, amounts | st.integers(0, 3))


def test_worked_example() -> None:
    # 900 x 0.15, 100 x 0.075 and 50 x 0.60 dollars per million are 172.5 micro-dollars.
    assert cost_micros(price(150_000, 75_000, 600_000), usage(900, 100, 50)) == 173


def test_one_token_is_not_free_by_rounding_but_zero_is_free_on_purpose() -> None:
    assert cost_micros(price(prompt=1), usage(1, 0, 0)) == 1
    assert cost_micros(price(), usage(1_000, 1_000, 1_000)) == 0
    assert cost_micros(price(1, 1, 1), TokenUsage()) == 0


def test_rounding_is_done_once_and_not_for_each_kind_of_token() -> None:
    assert cost_micros(price(400_000, 400_000, 200_000), usage(1, 1, 1)) == 1
    assert ceiling_cost_micros(price(400_000, 400_000, 200_000), 2, 1) == 1


def test_reasoning_is_part_of_the_completion_and_not_billed_again() -> None:
    counted = TokenUsage(completion_tokens=10, reasoning_tokens=7)
    assert cost_micros(price(completion=1_000_000), counted) == 10


@given(prices, counts, counts, counts)
def test_cost_is_the_exact_sum_rounded_up(at: Price, uncached: int, cached: int, completion: int) -> None:
    exact = (
        uncached * Fraction(at.prompt_micros_per_million, 1_000_000)
        + cached * Fraction(at.cached_prompt_micros_per_million, 1_000_000)
        + completion * Fraction(at.completion_micros_per_million, 1_000_000)
    )
    assert cost_micros(at, usage(uncached, cached, completion)) == ceil(exact)


@given(prices, st.tuples(counts, counts, counts), st.tuples(counts, counts, counts))
def test_more_tokens_of_any_kind_never_cost_less(
    at: Price, fewer: tuple[int, int, int], more: tuple[int, int, int]
) -> None:
    uncached, cached, completion = fewer
    base = cost_micros(at, usage(*fewer))
    assert cost_micros(at, usage(uncached + more[0], cached, completion)) >= base
    assert cost_micros(at, usage(uncached, cached + more[1], completion)) >= base
    assert cost_micros(at, usage(uncached, cached, completion + more[2])) >= base


@given(prices, counts, counts, counts)
def test_cost_is_never_negative_even_if_more_is_cached_than_there_is(
    at: Price, prompt: int, cached: int, completion: int
) -> None:
    counted = TokenUsage(prompt_tokens=prompt, cached_prompt_tokens=cached, completion_tokens=completion)
    assert 0 <= cost_micros(at, counted) <= ceiling_cost_micros(at, prompt, completion)


@given(prices, counts, counts, counts, counts, counts)
def test_ceiling_bounds_every_usage_within_it(
    at: Price, uncached: int, cached: int, completion: int, spare_prompt: int, spare_completion: int
) -> None:
    ceiling = ceiling_cost_micros(at, uncached + cached + spare_prompt, completion + spare_completion)
    assert cost_micros(at, usage(uncached, cached, completion)) <= ceiling


@given(prices, st.integers(0, 10_000), st.integers(0, 10_000))
def test_ceiling_is_reached_by_the_dearer_kind_of_prompt(at: Price, prompt: int, completion: int) -> None:
    dearest = max(cost_micros(at, usage(prompt, 0, completion)), cost_micros(at, usage(0, prompt, completion)))
    assert ceiling_cost_micros(at, prompt, completion) == dearest


def test_dearest_request_fits_into_an_event() -> None:
    dearest = price(MOST_MICROS, MOST_MICROS, MOST_MICROS)
    counted = TokenUsage(prompt_tokens=1_000_000_000, completion_tokens=1_000_000_000)
    assert cost_micros(dearest, counted) < INT64_MAX


@given(prices, counts, counts, counts)
def test_snapshot_in_an_event_costs_what_its_price_does(at: Price, uncached: int, cached: int, completion: int) -> None:
    snapshot = PriceSnapshot(
        price_id=at.price_id,
        prompt_micros_per_million=at.prompt_micros_per_million,
        cached_prompt_micros_per_million=at.cached_prompt_micros_per_million,
        completion_micros_per_million=at.completion_micros_per_million,
    )
    counted = usage(uncached, cached, completion)
    assert cost_micros(snapshot, counted) == cost_micros(at, counted)


@pytest.mark.parametrize("amount", [0, 1, MOST_MICROS])
def test_amount_in_range_is_taken(amount: int) -> None:
    assert check_amount("price.prompt_micros_per_million", amount) == amount


@pytest.mark.parametrize("amount", [None, -1, MOST_MICROS + 1])
def test_amount_that_is_absent_or_out_of_range_is_refused_by_name(amount: int | None) -> None:
    with pytest.raises(PlatformError) as caught:
        check_amount("price.prompt_micros_per_million", amount)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_ARGUMENT, "price.prompt_micros_per_million")
    assert "price.prompt_micros_per_million" in caught.value.message


def test_price_begins_at_once_or_when_it_says_and_not_in_the_past() -> None:
    assert beginning(None, NOW) == NOW
    assert beginning(NOW + HOUR, NOW) == NOW + HOUR
    assert beginning(NOW - timedelta(minutes=1), NOW) == NOW - timedelta(minutes=1)
    with pytest.raises(PlatformError) as caught:
        beginning(NOW - timedelta(minutes=1, microseconds=1), NOW)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_ARGUMENT, "price.valid_from")


def test_version_holds_from_its_first_moment_until_the_next_begins() -> None:
    first, second = price(1), price(2, valid_from=NOW + HOUR)
    schedule = PriceSchedule((first, second))
    instant = timedelta(microseconds=1)
    assert schedule.at(NOW - instant) is None
    assert schedule.at(NOW) is first
    assert schedule.at(NOW + HOUR - instant) is first
    assert schedule.at(NOW + HOUR) is second
    assert schedule.at(NOW + 1000 * HOUR) is second
    # And back again, as a clock that is set back asks.
    assert schedule.at(NOW + HOUR - instant) is first
    assert schedule.at(NOW - HOUR) is None


@given(st.sets(st.integers(0, 20)), st.lists(st.integers(-1, 21)))
def test_what_was_asked_before_never_changes_the_answer(beginnings: set[int], questions: list[int]) -> None:
    versions = [price(number, valid_from=NOW + number * HOUR) for number in sorted(beginnings)]
    schedule = PriceSchedule(versions)
    for question in questions:
        begun = [version for version in versions if version.valid_from <= NOW + question * HOUR]
        assert schedule.at(NOW + question * HOUR) == (begun[-1] if begun else None)


def test_each_model_has_its_own_schedule() -> None:
    found = schedules((price(1, model_id="a"), price(2, model_id="a", valid_from=NOW + HOUR), price(3, model_id="b")))
    assert {model_id: schedule.at(NOW) for model_id, schedule in found.items()} == {
        "a": price(1, model_id="a"),
        "b": price(3, model_id="b"),
    }
