"""One try at a backend: what it counts there while it runs, and what its end says of it; it never sends a byte."""

from __future__ import annotations

from mesh.tracing import Span
from router.backends import Served
from router.routing_policies import RoutingPolicy
from router.usage import AttemptRecord

OUTRUN = "outrun"
"""The reason of an attempt that was hung up on, as another was answered first."""


class Attempt:
    """Counts at its backend from now on, until `end`. `failed` is what it has shown of the backend; None is nothing."""

    __slots__ = ("_is_trial", "_policy", "failed", "record", "served", "span")

    def __init__(self, served: Served, policy: RoutingPolicy, now: float) -> None:
        self.served = served
        self.record = AttemptRecord(served.backend.backend_id, now)
        self.failed: bool | None = None
        self.span: Span | None = None
        self._policy = policy
        self._is_trial = served.breaker.start()
        served.state.start_request()

    def end(self, now: float, failure_reason: str) -> None:
        """It is over; once only. `now` is monotonic seconds."""
        self.served.state.end_request()
        self.served.breaker.end(now, failed=self.failed, is_trial=self._is_trial, policy=self._policy)
        self.record.ended = now
        self.record.failure_reason = failure_reason
        if self.span is not None:
            if failure_reason:
                self.span.fail(failure_reason)
            self.span.end()
