"""Charges are explained from their records, in numbers that a reader can add up."""

from datetime import UTC, datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aiaas.type.v1 import usage_event_pb2 as pb
from analytics.charges import cost_micros, cost_parts, explain
from tests.doubles.costs import CASES
from tests.doubles.usage_events import usage_event

PRICE = pb.PriceSnapshot(
    price_id="price_1",
    prompt_micros_per_million=150_000,
    cached_prompt_micros_per_million=75_000,
    completion_micros_per_million=600_000,
)
USAGE = pb.TokenUsage(prompt_tokens=1_000, cached_prompt_tokens=200, completion_tokens=50)


def answered(**fields: Any) -> pb.UsageEvent:
    values: dict[str, Any] = {
        "usage": USAGE,
        "usage_source": pb.USAGE_SOURCE_ENGINE,
        "price": PRICE,
        "cost_micros": 165,
        "attempts": [pb.Attempt(backend_id="backend-1", duration_micros=1_250_000)],
    }
    return usage_event(**values | fields)


def charge(**fields: Any) -> pb.BudgetCharge:
    values: dict[str, Any] = {
        "budget_id": "budget_1",
        "reserved": 500,
        "charged": 165,
        "unit": pb.CHARGE_UNIT_COST,
    }
    event = pb.BudgetCharge(**values | fields)
    event.period_start.FromDatetime(datetime(2026, 11, 1, tzinfo=UTC))
    return event


def test_an_answer_is_explained_from_its_end_to_its_budgets() -> None:
    assert explain(answered(budgets=[charge(budget_lease_id="lease_1")])) == [
        "Admitted at 2026-11-20 12:30:15 UTC, the request for smollm2 was answered in full.",
        "Attempt 1, on backend-1, succeeded after 1.250 s.",
        "1,000 prompt tokens, 200 of them cached, and 50 completion tokens, told by the engine.",
        "The price at admission was price_1.",
        "800 prompt tokens x 150,000 micro-dollars per million = 120,000,000.",
        "200 cached prompt tokens x 75,000 micro-dollars per million = 15,000,000.",
        "50 completion tokens x 600,000 micro-dollars per million = 30,000,000.",
        "Together 165,000,000, divided by 1,000,000 once and rounded up: 165 micro-dollars.",
        "Budget budget_1, in its period from 2026-11-01 00:00:00 UTC: 500 micro-dollars were reserved by lease "
        "lease_1, 165 were charged.",
    ]


def test_every_attempt_and_every_budget_has_its_line() -> None:
    attempts = [
        pb.Attempt(backend_id="backend-1", duration_micros=2_000, failure_reason="connection_refused"),
        pb.Attempt(backend_id="backend-2", duration_micros=500_000),
    ]
    budgets = [charge(), charge(budget_id="budget_2", unit=pb.CHARGE_UNIT_TOKENS, reserved=2_000, charged=1_050)]
    steps = explain(answered(attempts=attempts, budgets=budgets))
    assert "Attempt 1, on backend-1, ended with connection_refused after 0.002 s." in steps
    assert "Attempt 2, on backend-2, succeeded after 0.500 s." in steps
    period = "in its period from 2026-11-01 00:00:00 UTC"
    assert [step for step in steps if step.startswith("Budget ")] == [
        f"Budget budget_1, {period}: 500 micro-dollars were reserved, 165 were charged.",
        f"Budget budget_2, {period}: 2,000 tokens were reserved, 1,050 were charged.",
    ]


def test_a_refused_request_says_why_nothing_is_billed() -> None:
    refused = usage_event(outcome=pb.OUTCOME_REFUSED, reason="insufficient_quota", usage=None, cost_micros=0)
    assert explain(refused) == [
        "Admitted at 2026-11-20 12:30:15 UTC, the request for smollm2 was refused (insufficient_quota).",
        "Nothing is billed, since the request was refused.",
        "No budget was charged.",
    ]


def test_a_failed_request_says_why_nothing_is_billed_and_what_was_tried() -> None:
    attempt = pb.Attempt(backend_id="backend-1", duration_micros=60_000_000, failure_reason="backend_timeout")
    failed = answered(
        outcome=pb.OUTCOME_FAILED, reason="backend_timeout", usage=None, cost_micros=0, attempts=[attempt]
    )
    assert explain(failed)[1:3] == [
        "Attempt 1, on backend-1, ended with backend_timeout after 60.000 s.",
        "Nothing is billed, since the request failed before it produced anything.",
    ]


def test_clamped_counted_and_checkpointed_tokens_are_told_as_such() -> None:
    clamped = explain(answered(usage_clamped=True))
    assert "The engine told more tokens than the request could have used; no more than that is billed." in clamped
    counted = explain(answered(usage_source=pb.USAGE_SOURCE_COUNTED))
    assert any("counted by the router from what passed through" in step for step in counted)
    aborted = explain(answered(usage_source=pb.USAGE_SOURCE_CHECKPOINT, outcome=pb.OUTCOME_ABORTED, reason="aborted"))
    assert aborted[0].endswith("was aborted, since its router died (aborted).")
    assert any("as of the last checkpoint before the router died" in step for step in aborted)


def test_reasoning_is_a_part_of_completion() -> None:
    usage = pb.TokenUsage(prompt_tokens=1_000, cached_prompt_tokens=200, completion_tokens=50, reasoning_tokens=20)
    steps = explain(answered(usage=usage))
    assert "20 of the completion tokens are reasoning, which costs no more for it." in steps
    assert "Together 165,000,000, divided by 1,000,000 once and rounded up: 165 micro-dollars." in steps


def test_a_recorded_cost_that_does_not_follow_is_not_talked_away() -> None:
    assert "The record says otherwise: 166 micro-dollars are billed." in explain(answered(cost_micros=166))
    assert "The record holds no price; it says that 165 micro-dollars are billed." in explain(answered(price=None))


def test_every_recorded_cost_follows_from_its_record() -> None:
    for case in CASES:
        steps = explain(answered(price=case.price, usage=case.usage, cost_micros=case.cost_micros))
        assert any(step.endswith(f"rounded up: {case.cost_micros:,} micro-dollars.") for step in steps), case
        assert not any("says otherwise" in step for step in steps), case


AMOUNT = st.integers(0, 10**9)


@given(AMOUNT, AMOUNT, AMOUNT, AMOUNT, AMOUNT, AMOUNT)
def test_parts_of_a_cost_are_its_sum_and_each_is_what_its_tokens_cost(
    prompt: int, cached: int, completion: int, prompt_price: int, cached_price: int, completion_price: int
) -> None:
    price = pb.PriceSnapshot(
        prompt_micros_per_million=prompt_price,
        cached_prompt_micros_per_million=cached_price,
        completion_micros_per_million=completion_price,
    )
    usage = pb.TokenUsage(prompt_tokens=prompt + cached, cached_prompt_tokens=cached, completion_tokens=completion)
    cost = cost_micros(price, usage)
    parts = cost_parts(price, usage, cost)
    assert sum(parts) == cost
    exact = (prompt * prompt_price, cached * cached_price, completion * completion_price)
    for part, micros in zip(parts, exact, strict=True):
        assert abs(part * 10**6 - micros) < 2 * 10**6
        assert part >= 0
        assert micros or not part


def test_cost_without_a_price_is_divided_by_tokens_and_without_tokens_is_that_of_completion() -> None:
    assert cost_parts(
        pb.PriceSnapshot(), pb.TokenUsage(prompt_tokens=3, cached_prompt_tokens=1, completion_tokens=1), 8
    ) == (
        4,
        2,
        2,
    )
    assert cost_parts(pb.PriceSnapshot(), pb.TokenUsage(), 7) == (0, 0, 7)
    assert cost_parts(PRICE, USAGE, 0) == (0, 0, 0)
