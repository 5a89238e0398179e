"""What a price is, which version of it holds at a moment, and what a request costs by it; it never stores or bills.

Money is whole micro-dollars, and prices are micro-dollars per million tokens. A cost is divided and rounded once, at
its end, and upwards: nothing that has a price is free by rounding, and no request costs a whole micro-dollar too much.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Protocol

from aiaas.type.v1.usage_event_pb2 import TokenUsage
from mesh.errors import PlatformError, Reason

MOST_MICROS = 10**15
"""The highest amount. With a thousand million tokens of each kind, a cost still fits into 64 bits."""

SKEW = timedelta(minutes=1)
"""How far a price may begin in the past, since the clocks of callers are not ours."""

_MILLION = 1_000_000
_EVER = datetime.min.replace(tzinfo=UTC)
_NEVER = datetime.max.replace(tzinfo=UTC)


class Amounts(Protocol):
    """What tokens cost, in micro-dollars per million: a `Price`, or the `PriceSnapshot` that an event keeps of one."""

    @property
    def prompt_micros_per_million(self) -> int:
        """Prompt tokens."""

    @property
    def cached_prompt_micros_per_million(self) -> int:
        """Prompt tokens that the engine took from its prefix cache."""

    @property
    def completion_micros_per_million(self) -> int:
        """Completion tokens."""


@dataclass(frozen=True, slots=True)
class Price:
    """One version of a model's price. It is never changed; a later `valid_from` takes its place."""

    price_id: str
    model_id: str
    prompt_micros_per_million: int
    cached_prompt_micros_per_million: int
    completion_micros_per_million: int
    valid_from: datetime
    create_time: datetime


def check_amount(field: str, amount: int | None) -> int:
    """The amount, if it was given and is from 0 to MOST_MICROS. Raises PlatformError(INVALID_ARGUMENT)."""
    if amount is None:
        raise _invalid(field, "is required; zero is free on purpose")
    if not 0 <= amount <= MOST_MICROS:
        raise _invalid(field, f"must be 0 to {MOST_MICROS}")
    return amount


def beginning(given: datetime | None, now: datetime) -> datetime:
    """From when a new price is valid: the moment that was given, else `now`.

    Raises PlatformError(INVALID_ARGUMENT) for one in the past, where requests were already billed by another price.
    """
    if given is None:
        return now
    if given < now - SKEW:
        raise _invalid("price.valid_from", "must not be in the past")
    return given


def already_priced() -> PlatformError:
    """The error for a second price of a model from the same moment on."""
    return PlatformError(
        Reason.ALREADY_EXISTS,
        field="price.valid_from",
        description="The model already has a price from this moment on.",
    )


def cost_micros(price: Amounts, usage: TokenUsage) -> int:
    """What these tokens cost, in micro-dollars: each kind of token by its own amount, summed, divided by a million once
    and rounded up. Cached prompt tokens are part of the prompt's, and cost their own amount instead."""
    prompt = usage.prompt_tokens
    # A part is never above its whole, else a cheap cache would make the rest of the cost negative.
    cached = min(usage.cached_prompt_tokens, prompt)
    total = (
        (prompt - cached) * price.prompt_micros_per_million
        + cached * price.cached_prompt_micros_per_million
        + usage.completion_tokens * price.completion_micros_per_million
    )
    return -(-total // _MILLION)


def ceiling_cost_micros(price: Amounts, prompt_tokens: int, completion_tokens: int) -> int:
    """The most that a request of up to so many tokens can cost, in micro-dollars, however much of it is cached."""
    prompt_micros = max(price.prompt_micros_per_million, price.cached_prompt_micros_per_million)
    total = prompt_tokens * prompt_micros + completion_tokens * price.completion_micros_per_million
    return -(-total // _MILLION)


class PriceSchedule:
    """The versions of one model's price, in the order in which they begin.

    The version that was found last is kept with the time in which it holds, so that almost every question costs two
    comparisons.
    """

    __slots__ = ("_current", "_moments", "_since", "_until", "_versions")

    def __init__(self, versions: Iterable[Price]) -> None:
        self._versions = tuple(versions)
        self._moments = [_EVER, *(price.valid_from for price in self._versions), _NEVER]
        self._current: Price | None = None
        self._since = self._until = _EVER

    def at(self, moment: datetime) -> Price | None:
        """The version that holds at `moment`, the one that began last; None before the first."""
        if not self._since <= moment < self._until:
            index = bisect_right(self._moments, moment, hi=len(self._versions) + 1)
            self._since, self._until = self._moments[index - 1], self._moments[index]
            self._current = self._versions[index - 2] if index > 1 else None
        return self._current


def schedules(prices: Iterable[Price]) -> dict[str, PriceSchedule]:
    """The schedule of each model that has a price, from prices in the order of (model_id, valid_from)."""
    return {model_id: PriceSchedule(versions) for model_id, versions in groupby(prices, lambda price: price.model_id)}


def _invalid(field: str, rule: str) -> PlatformError:
    return PlatformError(Reason.INVALID_ARGUMENT, field=field, description=f"'{field}' {rule}.")
