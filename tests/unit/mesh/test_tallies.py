"""Counters and histograms of the hot path are exposed as prometheus_client's own are."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from mesh.tallies import HotCounter, HotHistogram

BUCKETS = (0.005, 0.1, 1, 10)
VALUES = (0.0, 0.005, 0.0051, 0.1, 3.0, 10.0, 11.0)


def exposed(registry: CollectorRegistry, generate: Callable[[CollectorRegistry], bytes]) -> str:
    """All but when things were made, which nobody asks; of exemplars, not when they were."""
    text = generate(registry).decode()
    lines = [line for line in text.splitlines() if "_created" not in line]
    return "\n".join(re.sub(r"(# \{.*\} \S+) \S+$", r"\1", line) for line in lines)


@pytest.mark.parametrize("generate", [generate_latest, generate_openmetrics])
def test_text_is_that_of_prometheus_client(generate: Callable[[CollectorRegistry], bytes]) -> None:
    texts = []
    for make_counter, make_histogram in ((HotCounter, HotHistogram), (Counter, Histogram)):
        registry = CollectorRegistry()
        counter: Any = make_counter("things", 'What "is" counted.', ["kind", "model"], registry=registry)
        histogram: Any = make_histogram("seconds", "How long.", ["kind"], buckets=BUCKETS, registry=registry)
        counter.labels("a", "m").inc()
        counter.labels("a", "m").inc(41)
        counter.labels("b", 'n"').inc(0)
        for value in VALUES:
            histogram.labels("a").observe(value)
        histogram.labels("b").observe(0.7, {"trace_id": "12"})
        texts.append(exposed(registry, generate))
    assert texts[0] == texts[1]
    assert 'things_total{kind="a",model="m"} 42.0' in texts[0]


def test_no_two_metrics_have_one_name() -> None:
    registry = CollectorRegistry()
    HotCounter("things", "Counted.", ["kind"], registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        HotCounter("things", "Counted.", ["kind"], registry=registry)
