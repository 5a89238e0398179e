"""Leaves a backend alone that fails too often for a model, and has one attempt find out when that is over; it never
sends one."""

from __future__ import annotations

from prometheus_client import Gauge

from router.recent import Recent
from router.routing_policies import RoutingPolicy


class Breaker:
    """Closed, everything passes. Open, nothing does for a while, and then one attempt at a time, whose success closes
    it. Times are monotonic seconds."""

    __slots__ = ("_gauge", "_open_until", "_recent", "_tries")

    def __init__(self, gauge: Gauge | None = None) -> None:
        self._gauge = gauge
        self._recent = Recent()
        self._open_until = 0.0
        self._tries = False

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed since it was opened."""
        return self._open_until > 0

    def lets_pass(self, now: float) -> bool:
        """Whether an attempt may be made."""
        return not self._open_until or (now >= self._open_until and not self._tries)

    def start(self) -> bool:
        """An attempt begins; returns whether it is the one that finds out."""
        if self._open_until:
            self._tries = True
        return self._tries

    def end(self, now: float, *, failed: bool | None, is_trial: bool, policy: RoutingPolicy) -> None:
        """An attempt has ended; None where that says nothing of the backend."""
        if is_trial:
            self._tries = False
        if failed is None:
            return
        if self._open_until:
            # What began before it opened says nothing new.
            if is_trial:
                self._set(now + policy.open_millis / 1000 if failed else 0.0)
            return
        recent = self._recent
        recent.count(now)
        if failed:
            recent.mark(now)
            if recent.all >= policy.least_attempts and recent.marked * 100 >= recent.all * policy.failure_percent:
                self._recent = Recent()
                self._set(now + policy.open_millis / 1000)

    def _set(self, open_until: float) -> None:
        self._open_until = open_until
        if self._gauge is not None:
            self._gauge.set(1 if open_until else 0)
