"""Queues, event by event, with seeded randomness, to hold formulas against; it never uses one."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random


def waits_s(
    rate: float, service_s: Callable[[Random], float], servers: int, arrivals: int, *, seed: int = 1
) -> list[float]:
    """How long each of so many arrivals at random times waits for the first free server, the shortest first.

    The first tenth is left out, as it finds the servers idle.
    """
    random = Random(seed)
    free_at = [0.0] * servers
    now, waits = 0.0, []
    for number in range(arrivals):
        now += random.expovariate(rate)
        begins = max(now, free_at[0])
        heapq.heapreplace(free_at, begins + service_s(random))
        if number >= arrivals // 10:
            waits.append(begins - now)
    return sorted(waits)


def sends_per_s(rate: float, window_s: float, arrivals: int, *, seed: int = 1) -> float:
    """How often sends who sends at once, but `window_s` after the last time at the earliest."""
    random = Random(seed)
    now, last, sent = 0.0, -window_s, 0
    for _ in range(arrivals):
        now += random.expovariate(rate)
        # Whoever comes before a send that is due goes with it.
        if now > last:
            last, sent = max(now, last + window_s), sent + 1
    return sent / now
