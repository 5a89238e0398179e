"""What tokens cost, worked out by hand: whoever computes a cost computes these."""

from typing import NamedTuple

from aiaas.type.v1.usage_event_pb2 import PriceSnapshot, TokenUsage


class Case(NamedTuple):
    """Micro-dollars per million of each kind, tokens, and micro-dollars."""

    prompt_price: int
    cached_price: int
    completion_price: int
    prompt: int
    cached: int
    completion: int
    cost_micros: int

    @property
    def price(self) -> PriceSnapshot:
        return PriceSnapshot(
            price_id="price_1",
            prompt_micros_per_million=self.prompt_price,
            cached_prompt_micros_per_million=self.cached_price,
            completion_micros_per_million=self.completion_price,
        )

    @property
    def usage(self) -> TokenUsage:
        return TokenUsage(
            prompt_tokens=self.prompt, cached_prompt_tokens=self.cached, completion_tokens=self.completion
        )


CASES = (
    # Nothing used, and everything free.
    Case(150_000, 75_000, 600_000, 0, 0, 0, 0),
    Case(0, 0, 0, 1_000_000, 10, 1_000_000, 0),
    # A single token is rounded up, and so is what is only a little above a whole.
    Case(150_000, 75_000, 600_000, 1, 0, 0, 1),
    Case(1, 1, 1, 1, 0, 0, 1),
    Case(1_000_000, 0, 0, 7, 0, 0, 7),
    Case(1_000_001, 0, 0, 7, 0, 0, 8),
    # 900 x 150,000 + 100 x 75,000 + 50 x 600,000 = 172,500,000.
    Case(150_000, 75_000, 600_000, 1_000, 100, 50, 173),
    # Rounded once: three times a third would be rounded up to three.
    Case(333_333, 333_333, 333_333, 2, 1, 1, 1),
    # The whole prompt was cached, and an engine told more cached tokens than there were.
    Case(150_000, 75_000, 0, 1_000, 1_000, 0, 75),
    Case(150_000, 75_000, 0, 1_000, 2_000, 0, 75),
    # Far beyond 64 bits in between.
    Case(10**15, 10**15, 10**15, 10**9, 0, 10**9, 2 * 10**18),
)
