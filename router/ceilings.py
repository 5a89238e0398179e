"""Bounds what a request can use, before it runs; it never estimates, since a budget is only safe behind a true bound.

A token is at least one byte of the body, and what a chat template adds is less than what JSON costs the body, but for a
template's own preamble. So prompts have at most as many tokens as the body has bytes, and some; and the engine itself
holds each prompt and its completion together to the model's context.
"""

from __future__ import annotations

import msgspec

from aiaas.identity.v1.budget_service_pb2 import BUDGET_UNIT_COST, BUDGET_UNIT_TOKENS
from router.prices import Price, ceiling_cost_micros

PREAMBLE_TOKENS = 512
"""What a chat template may add to a prompt by itself, such as a system message of its own."""

UNKNOWN_CONTEXT_TOKENS = 1 << 17
"""The context of a model of which nobody has said it."""

LEAST_COMPLETION_TOKENS = 16
"""An answer that a nearly spent budget would cut to fewer tokens is refused instead, unless it asked for no more."""

_MICROS = 1_000_000


class Ceiling(msgspec.Struct, frozen=True):
    """The most that a request can use: `prompt_tokens` of all its prompts together, `completion_tokens` of each of its
    `choices`, at the price in force."""

    prompt_tokens: int
    completion_tokens: int
    choices: int
    price: Price

    @property
    def all_completion_tokens(self) -> int:
        """Those of all choices together."""
        return self.completion_tokens * self.choices

    def amount(self, unit: int) -> int:
        """The most that a budget of this unit can be charged."""
        if unit == BUDGET_UNIT_COST:
            return ceiling_cost_micros(self.price, self.prompt_tokens, self.all_completion_tokens)
        if unit == BUDGET_UNIT_TOKENS:
            return self.prompt_tokens + self.all_completion_tokens
        return 1

    def within(self, unit: int, amount: int) -> Ceiling | None:
        """The ceiling of the longest answer for which `amount` of this unit is enough; None if none is worth giving."""
        if self.amount(unit) <= amount:
            return self
        if unit == BUDGET_UNIT_COST:
            prompt = max(self.price.prompt_micros_per_million, self.price.cached_prompt_micros_per_million)
            left = amount * _MICROS - self.prompt_tokens * prompt
            tokens = left // self.price.completion_micros_per_million if self.price.completion_micros_per_million else 0
        elif unit == BUDGET_UNIT_TOKENS:
            tokens = amount - self.prompt_tokens
        else:
            return None
        tokens = tokens // self.choices
        if tokens < min(LEAST_COMPLETION_TOKENS, self.completion_tokens) or not tokens:
            return None
        return msgspec.structs.replace(self, completion_tokens=tokens)


def ceiling_of(
    body_bytes: int | None,
    prompts: int,
    completion_tokens: int | None,
    choices: int,
    context_tokens: int,
    price: Price,
) -> Ceiling:
    """The ceiling of a request of so many prompts, whose body has so many bytes, None where they tell nothing, as those
    of a picture don't. `completion_tokens` is what it asked for each of its `choices`, None if it left that to the
    engine; `context_tokens` is the model's, 0 if unknown."""
    context = context_tokens or UNKNOWN_CONTEXT_TOKENS
    return Ceiling(
        prompt_tokens=prompts * context
        if body_bytes is None
        else min(body_bytes + prompts * PREAMBLE_TOKENS, prompts * context),
        completion_tokens=context if completion_tokens is None else min(completion_tokens, context),
        choices=choices,
        price=price,
    )
