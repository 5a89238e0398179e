"""How well requests went: outcomes, and percentiles from histograms; it never reads a row."""

from __future__ import annotations

from typing import NamedTuple

from aiaas.type.v1.usage_event_pb2 import Outcome
from analytics.sketches import micros_of

QUANTILES = (0.50, 0.95, 0.99)
"""Which percentiles are told."""

FAILURES = (
    Outcome.OUTCOME_FAILED,
    Outcome.OUTCOME_TRUNCATED,
    Outcome.OUTCOME_DEADLINE_EXCEEDED,
    Outcome.OUTCOME_ABORTED,
)
"""What a backend or the platform failed. A client that goes away is no failure, and what was refused was not tried."""


class Percentiles(NamedTuple):
    """The buckets in which the QUANTILES of `samples` durations lie; none without samples."""

    buckets: tuple[int, ...]
    samples: int

    @property
    def micros(self) -> tuple[int, ...]:
        """The durations, in microseconds."""
        return tuple(map(micros_of, self.buckets)) if self.samples else (0,) * len(QUANTILES)


class OutcomeCount(NamedTuple):
    """How many requests ended in one way, for one reason."""

    outcome: int
    reason: str
    requests: int


class ReliabilityTotals(NamedTuple):
    """How well some requests went; those that were refused are among the outcomes alone."""

    requests: int
    failed_requests: int
    outcomes: tuple[OutcomeCount, ...]
    latency: Percentiles
    ttft: Percentiles

    @property
    def error_rate(self) -> float:
        """Failures per admitted request; 0 without any."""
        return self.failed_requests / self.requests if self.requests else 0.0
