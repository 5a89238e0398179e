"""The formulas of queues: waiting times of M/M/c and M/G/1, and how often a sender that gathers sends; it never knows
what waits.

Rates are per second, times in seconds. Queues are served in the order of arrival.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def gathered(rate: float, window_s: float) -> float:
    """How often who sends at once, but `window_s` after the last time at the earliest, sends for random arrivals."""
    return rate / (rate * window_s + math.exp(-rate * window_s)) if rate else 0.0


def delayed(rate: float, window_s: float) -> float:
    """How often who sends `window_s` after the first arrival sends for random arrivals."""
    return rate / (1 + rate * window_s)


def erlang_c(servers: int, offered: float) -> float:
    """The share of arrivals that wait in M/M/c, for `offered` = arrival rate times mean service time.

    Raises ValueError where the queue grows without end.
    """
    if offered >= servers:
        raise ValueError("There is more work than servers.")
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = offered * blocked / (number + offered * blocked)
    utilisation = offered / servers
    return blocked / (1 - utilisation * (1 - blocked))


def mmc_wait_s(rate: float, service_s: float, servers: int, quantile: float = 0.99) -> float:
    """What `quantile` of the arrivals wait at most in M/M/c, exactly. Raises ValueError as `erlang_c` does."""
    waiting = erlang_c(servers, rate * service_s)
    beyond = 1 - quantile
    return math.log(waiting / beyond) * service_s / (servers - rate * service_s) if waiting > beyond else 0.0


def mg1_wait_s(works: Sequence[tuple[float, float]], quantile: float = 0.99) -> float:
    """What `quantile` of the arrivals wait at most for one server that does several kinds of work, each of a rate and a
    mean time that is exponential.

    It is the tail of M/G/1 (Cramer and Lundberg), which is exact for one kind. Raises ValueError where the queue grows
    without end.
    """
    utilisation = sum(rate * time_s for rate, time_s in works)
    if utilisation >= 1:
        raise ValueError("There is more work than servers.")
    low, high = 0.0, 1 / max(time_s for rate, time_s in works if rate)
    for _ in range(60):
        decay = (low + high) / 2
        is_low = sum(rate * time_s / (1 - decay * time_s) for rate, time_s in works if rate) < 1
        low, high = (decay, high) if is_low else (low, decay)
    slope = sum(rate * time_s / (1 - low * time_s) ** 2 for rate, time_s in works if rate)
    waiting, beyond = (1 - utilisation) / (slope - 1), 1 - quantile
    return math.log(waiting / beyond) / low if waiting > beyond else 0.0
