"""Sums events by hour or day and by everything that usage is grouped by; it never stores a sum.

The parts of a sum are those that can be added up, histograms among them, so that it does not matter in how many pieces
or in which order events are summed.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from analytics.events import Event
from analytics.sketches import bucket_of, cells_of

KEYS = (
    "api_key_id",
    "user_id",
    "service_account_id",
    "model",
    "backend_id",
    "endpoint",
    "outcome",
    "reason",
)
"""The columns of a sum that say what it is of, after its organization and period."""

SUMS = (
    "requests",
    "prompt_tokens",
    "cached_prompt_tokens",
    "completion_tokens",
    "cost_micros",
    "prompt_cost_micros",
    "cached_prompt_cost_micros",
    "completion_cost_micros",
)
"""The columns that are added up."""

SKETCHES = ("latency", "ttft")
"""The columns that are histograms."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def hour_of(moment: datetime) -> datetime:
    """The beginning of the hour of a moment in UTC."""
    return moment.replace(minute=0, second=0, microsecond=0)


def day_of(moment: datetime) -> datetime:
    """The beginning of the day of a moment in UTC."""
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


class Rollup:
    """Sums over events by `period`, an hour or a day of UTC."""

    def __init__(self, period: timedelta) -> None:
        self._period = period
        self._sums: dict[tuple[Any, ...], tuple[list[int], dict[int, int], dict[int, int]]] = {}

    def add(self, events: Iterable[Event]) -> None:
        """Add events, each of which must not have been added before."""
        period, sums = self._period, self._sums
        start = end = _EPOCH
        for event in events:
            moment = event.admit_time
            # Most events are of the period of the one before.
            if not start <= moment < end:
                start = moment - (moment - _EPOCH) % period
                end = start + period
            key = (event.organization_id, start, *event[3:10], event.reason)
            found = sums.get(key)
            if found is None:
                found = sums[key] = ([0] * len(SUMS), {}, {})
            totals, latency, ttft = found
            totals[0] += 1
            totals[1] += event.prompt_tokens
            totals[2] += event.cached_prompt_tokens
            totals[3] += event.completion_tokens
            totals[4] += event.cost_micros
            totals[5] += event.prompt_cost_micros
            totals[6] += event.cached_prompt_cost_micros
            totals[7] += event.completion_cost_micros
            if event.latency_micros:
                bucket = bucket_of(event.latency_micros)
                latency[bucket] = latency.get(bucket, 0) + 1
            if event.ttft_micros:
                bucket = bucket_of(event.ttft_micros)
                ttft[bucket] = ttft.get(bucket, 0) + 1

    def rows(self) -> list[tuple[Any, ...]]:
        """The sums in the order of their keys: organization, start of the period, KEYS, SUMS, SKETCHES."""
        sums = self._sums
        rows = []
        for key in sorted(sums):
            totals, latency, ttft = sums[key]
            rows.append((*key, *totals, cells_of(latency), cells_of(ttft)))
        return rows
