"""Explains a charge step by step from its record alone; it never looks up a price or a budget of today.

The cost is worked out again here, by the same rule as in the router that billed it, so that an explanation proves the
recorded cost instead of repeating it. Both are held to one table of cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC

from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.type.v1.usage_event_pb2 import (
    Attempt,
    BudgetCharge,
    ChargeUnit,
    Outcome,
    PriceSnapshot,
    TokenUsage,
    UsageEvent,
    UsageSource,
)

_MILLION = 1_000_000

_ENDS: dict[int, str] = {
    Outcome.OUTCOME_SUCCEEDED: "answered in full",
    Outcome.OUTCOME_REFUSED: "refused",
    Outcome.OUTCOME_FAILED: "not answered, since no backend produced anything",
    Outcome.OUTCOME_CANCELLED: "cancelled, since the client went away",
    Outcome.OUTCOME_TRUNCATED: "broken off in the middle of its answer",
    Outcome.OUTCOME_DEADLINE_EXCEEDED: "ended by its deadline",
    Outcome.OUTCOME_ABORTED: "aborted, since its router died",
}
_SOURCES: dict[int, str] = {
    UsageSource.USAGE_SOURCE_ENGINE: "told by the engine",
    UsageSource.USAGE_SOURCE_COUNTED: "counted by the router from what passed through, since the engine told none",
    UsageSource.USAGE_SOURCE_CHECKPOINT: "as of the last checkpoint before the router died",
}
_UNITS: dict[int, str] = {
    ChargeUnit.CHARGE_UNIT_COST: "micro-dollars",
    ChargeUnit.CHARGE_UNIT_TOKENS: "tokens",
    ChargeUnit.CHARGE_UNIT_REQUESTS: "requests",
}
_UNBILLED = frozenset({Outcome.OUTCOME_REFUSED, Outcome.OUTCOME_FAILED})


def cost_micros(price: PriceSnapshot, usage: TokenUsage) -> int:
    """What these tokens cost, in micro-dollars: products of tokens and prices, summed, divided by a million once and
    rounded up."""
    return -(-sum(tokens * amount for _, tokens, amount in _products(price, usage)) // _MILLION)


def cost_parts(price: PriceSnapshot, usage: TokenUsage, cost_micros: int) -> tuple[int, int, int]:
    """What of a cost is for prompt tokens, cached ones and completion tokens, in whole micro-dollars whose sum is the
    cost; each is off by less than two for the rounding. A cost without a price is divided by tokens."""
    if not cost_micros:
        return 0, 0, 0
    (_, fresh, fresh_price), (_, cached, cached_price), (_, made, made_price) = _products(price, usage)
    prompt, cached_prompt = fresh * fresh_price, cached * cached_price
    if not (total := prompt + cached_prompt + made * made_price):
        prompt, cached_prompt, total = fresh, cached, fresh + cached + made or 1
    first = cost_micros * prompt // total
    both = cost_micros * (prompt + cached_prompt) // total
    return first, both - first, cost_micros - both


def explain(record: UsageEvent) -> list[str]:
    """How a record's charge came about, a sentence for each step: its end, attempts, tokens, cost, budgets."""
    return [
        _end(record),
        *(_attempt(number, attempt) for number, attempt in enumerate(record.attempts, start=1)),
        *_cost(record),
        *map(_budget, record.budgets),
        *(() if record.budgets else ("No budget was charged.",)),
    ]


def _products(price: PriceSnapshot, usage: TokenUsage) -> tuple[tuple[str, int, int], ...]:
    """Each kind of token that is billed: its name, how many, and micro-dollars per million."""
    cached = min(usage.cached_prompt_tokens, usage.prompt_tokens)
    return (
        ("prompt tokens", usage.prompt_tokens - cached, price.prompt_micros_per_million),
        ("cached prompt tokens", cached, price.cached_prompt_micros_per_million),
        ("completion tokens", usage.completion_tokens, price.completion_micros_per_million),
    )


def _end(record: UsageEvent) -> str:
    # An outcome that is newer than this code is told by its number.
    end = _ENDS.get(record.outcome, f"ended with outcome {record.outcome}")
    reason = f" ({record.reason})" if record.reason else ""
    return f"Admitted at {_time(record.admit_time)}, the request for {record.model or 'no model'} was {end}{reason}."


def _attempt(number: int, attempt: Attempt) -> str:
    end = f"ended with {attempt.failure_reason}" if attempt.failure_reason else "succeeded"
    return f"Attempt {number}, on {attempt.backend_id}, {end} after {attempt.duration_micros / 1e6:.3f} s."


def _cost(record: UsageEvent) -> Iterator[str]:
    usage, price = record.usage, record.price
    billed = f"{record.cost_micros:,} micro-dollars"
    if record.outcome in _UNBILLED and not record.cost_micros:
        why = "was refused" if record.outcome == Outcome.OUTCOME_REFUSED else "failed before it produced anything"
        yield f"Nothing is billed, since the request {why}."
        return
    source = _SOURCES.get(record.usage_source, "of an unknown source")
    yield (
        f"{usage.prompt_tokens:,} prompt tokens, {usage.cached_prompt_tokens:,} of them cached, and "
        f"{usage.completion_tokens:,} completion tokens, {source}."
    )
    if record.usage_clamped:
        yield "The engine told more tokens than the request could have used; no more than that is billed."
    if usage.reasoning_tokens:
        yield f"{usage.reasoning_tokens:,} of the completion tokens are reasoning, which costs no more for it."
    if not price.price_id:
        yield f"The record holds no price; it says that {billed} are billed."
        return
    yield f"The price at admission was {price.price_id}."
    products = _products(price, usage)
    for name, tokens, amount in products:
        yield f"{tokens:,} {name} x {amount:,} micro-dollars per million = {tokens * amount:,}."
    total, cost = sum(tokens * amount for _, tokens, amount in products), cost_micros(price, usage)
    yield f"Together {total:,}, divided by 1,000,000 once and rounded up: {cost:,} micro-dollars."
    if cost != record.cost_micros:
        yield f"The record says otherwise: {billed} are billed."


def _budget(charge: BudgetCharge) -> str:
    unit = _UNITS.get(charge.unit, "units")
    lease = f" by lease {charge.budget_lease_id}" if charge.budget_lease_id else ""
    return (
        f"Budget {charge.budget_id}, in its period from {_time(charge.period_start)}: {charge.reserved:,} {unit} were "
        f"reserved{lease}, {charge.charged:,} were charged."
    )


def _time(timestamp: Timestamp) -> str:
    return timestamp.ToDatetime(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
