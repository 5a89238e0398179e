"""A ceiling is never below what a request can use, and a shortened one costs no more than is left."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiaas.identity.v1.budget_service_pb2 import BUDGET_UNIT_COST, BUDGET_UNIT_REQUESTS, BUDGET_UNIT_TOKENS
from aiaas.type.v1.usage_event_pb2 import TokenUsage
from router.ceilings import LEAST_COMPLETION_TOKENS, PREAMBLE_TOKENS, Ceiling, ceiling_of
from router.prices import Price, cost_micros

NOW = datetime(2026, 3, 1, tzinfo=UTC)
PRICE = Price("price_1", "m", 150_000, 75_000, 600_000, NOW, NOW)
FREE = replace(PRICE, prompt_micros_per_million=0, cached_prompt_micros_per_million=0, completion_micros_per_million=0)

amounts = st.integers(0, 10**9)
prices = st.builds(
    lambda prompt, cached, completion: Price("price_1", "m", prompt, cached, completion, NOW, NOW),
    amounts,
    amounts,
    amounts,
)
ceilings = st.builds(Ceiling, st.integers(1, 200_000), st.integers(0, 200_000), st.integers(1, 16), prices)
units = st.sampled_from([BUDGET_UNIT_COST, BUDGET_UNIT_TOKENS, BUDGET_UNIT_REQUESTS])


def test_prompt_is_bounded_by_bytes_and_by_the_context() -> None:
    assert ceiling_of(1000, 1, 10, 1, 8192, PRICE).prompt_tokens == 1000 + PREAMBLE_TOKENS
    assert ceiling_of(100_000, 1, 10, 1, 8192, PRICE).prompt_tokens == 8192


def test_prompt_with_a_picture_is_bounded_by_the_context_alone() -> None:
    assert ceiling_of(None, 1, 10, 1, 8192, PRICE).prompt_tokens == 8192


def test_each_of_several_prompts_may_fill_the_context() -> None:
    assert ceiling_of(100_000, 5, 0, 1, 512, PRICE).prompt_tokens == 5 * 512
    assert ceiling_of(1000, 5, 0, 1, 8192, PRICE).prompt_tokens == 1000 + 5 * PREAMBLE_TOKENS


def test_answer_without_a_limit_is_bounded_by_the_context() -> None:
    assert ceiling_of(10, 1, None, 1, 8192, PRICE).completion_tokens == 8192
    assert ceiling_of(10, 1, 9000, 1, 8192, PRICE).completion_tokens == 8192


def test_amounts_count_every_choice() -> None:
    ceiling = Ceiling(1000, 100, 4, PRICE)
    assert ceiling.amount(BUDGET_UNIT_TOKENS) == 1400
    assert ceiling.amount(BUDGET_UNIT_COST) == 150 + 240
    assert ceiling.amount(BUDGET_UNIT_REQUESTS) == 1


def test_a_free_model_takes_nothing_of_a_cost_budget() -> None:
    assert Ceiling(1000, 100, 1, FREE).amount(BUDGET_UNIT_COST) == 0


def test_an_answer_too_short_to_be_worth_it_is_refused() -> None:
    ceiling = Ceiling(100, 1000, 1, PRICE)
    assert ceiling.within(BUDGET_UNIT_TOKENS, 100 + LEAST_COMPLETION_TOKENS - 1) is None
    shorter = ceiling.within(BUDGET_UNIT_TOKENS, 100 + LEAST_COMPLETION_TOKENS)
    assert shorter is not None
    assert shorter.completion_tokens == LEAST_COMPLETION_TOKENS


@pytest.mark.parametrize("unit", [BUDGET_UNIT_COST, BUDGET_UNIT_TOKENS, BUDGET_UNIT_REQUESTS])
def test_nothing_left_admits_nothing(unit: int) -> None:
    assert Ceiling(100, 1000, 1, PRICE).within(unit, 0) is None
    assert Ceiling(100, 0, 1, PRICE).within(unit, 0) is None


@given(ceilings, units, st.integers(0, 10**12))
def test_what_is_shortened_fits(ceiling: Ceiling, unit: int, left: int) -> None:
    shorter = ceiling.within(unit, left)
    if shorter is not None:
        assert shorter.amount(unit) <= left
        assert shorter.completion_tokens <= ceiling.completion_tokens
        assert shorter.prompt_tokens == ceiling.prompt_tokens


@given(ceilings, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_no_usage_within_a_ceiling_costs_more(ceiling: Ceiling, prompt: int, cached: int, completion: int) -> None:
    prompt = min(prompt, ceiling.prompt_tokens)
    usage = TokenUsage(
        prompt_tokens=prompt,
        cached_prompt_tokens=min(cached, prompt),
        completion_tokens=min(completion, ceiling.all_completion_tokens),
    )
    assert cost_micros(ceiling.price, usage) <= ceiling.amount(BUDGET_UNIT_COST)
    assert usage.prompt_tokens + usage.completion_tokens <= ceiling.amount(BUDGET_UNIT_TOKENS)
