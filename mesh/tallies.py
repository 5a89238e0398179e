"""Counters and histograms of the hot path: plain numbers, which the registry reads when it is asked for its metrics;
they never take a lock, so one event loop alone may count.

What they expose is what prometheus_client's own would. Those lock and check at each step: a count costs six times as
much, and a request has a dozen.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString


class Tally:
    """How many, or how much."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, amount: int = 1) -> None:
        """Count so much more; never less than nothing."""
        self.value += amount


class Spread:
    """How often something was at most each of some bounds, and how much it was altogether."""

    __slots__ = ("_bounds", "counts", "exemplars", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        # One more for what is above all bounds.
        self.counts = [0] * (len(bounds) + 1)
        self.exemplars: dict[int, Exemplar] = {}
        self.sum = 0.0

    def observe(self, value: float, exemplar: dict[str, str] | None = None) -> None:
        """Count a value; `exemplar` is what names one that is traced."""
        place = bisect_left(self._bounds, value)
        self.counts[place] += 1
        self.sum += value
        if exemplar is not None:
            self.exemplars[place] = Exemplar(exemplar, value, time.time())


class HotCounter(Collector):
    """A counter by labels. Bind each child once."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], *, registry: CollectorRegistry = REGISTRY
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, tuple(labels)
        self._children: dict[tuple[str, ...], Tally] = {}
        registry.register(self)

    def labels(self, *values: str) -> Tally:
        """The child of these values."""
        return self._children.setdefault(values, Tally())

    def describe(self) -> Iterable[CounterMetricFamily]:
        """See Collector."""
        return [CounterMetricFamily(self._name, self._documentation, labels=self._labels)]

    def collect(self) -> Iterator[CounterMetricFamily]:
        """See Collector."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, tally in self._children.items():
            family.add_metric(values, tally.value)
        yield family


class HotHistogram(Collector):
    """A histogram by labels. Bind each child once."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        buckets: tuple[float, ...],
        *,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, tuple(labels)
        self._buckets = buckets
        self._names = [floatToGoString(bound) for bound in (*buckets, float("inf"))]  # type: ignore[no-untyped-call]
        self._children: dict[tuple[str, ...], Spread] = {}
        registry.register(self)

    def labels(self, *values: str) -> Spread:
        """The child of these values."""
        return self._children.setdefault(values, Spread(self._buckets))

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """See Collector."""
        return [HistogramMetricFamily(self._name, self._documentation, labels=self._labels)]

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """See Collector."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, spread in self._children.items():
            so_far = itertools.accumulate(spread.counts)
            buckets = [
                (name, float(count), spread.exemplars[place]) if place in spread.exemplars else (name, float(count))
                for place, (name, count) in enumerate(zip(self._names, so_far, strict=True))
            ]
            family.add_metric(values, buckets, spread.sum)
        yield family
