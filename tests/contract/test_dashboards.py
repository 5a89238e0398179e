"""Dashboards: the committed ones are what the code makes, each metric in them is counted by somebody, and the chart
delivers these very files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiaas.type.v1 import options_pb2
from deploy.dashboards.__main__ import documents, write
from deploy.reference.__main__ import PACKAGES
from deploy.reference.sources import find_metrics
from tests.doubles import engine_metrics

ROOT = Path(options_pb2.__file__).parents[5]
COMMITTED = ROOT / "deploy/dashboards/json"

# What every process tells of itself by prometheus_client, and Prometheus of what it scrapes.
COMMON = {
    "up",
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
}
_OPERATORS = {"sum", "max", "min", "avg", "count", "by", "or", "topk"}
_NO_METRICS = _OPERATORS | {"time", "vector", "rate", "increase", "changes", "histogram_quantile"}
_SUFFIXES = {"Counter": ("",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}


def panels(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (panel for panel in document["panels"] if panel["type"] != "row")


def metrics_of(query: str) -> set[str]:
    """The metrics that a query names: every name that is no function, label, string or variable."""
    bare = re.sub(r'"[^"]*"', "", query)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\bby \([^)]*\)", "", bare)
    return set(re.findall(r"[a-zA-Z_:][\w:]*", re.sub(r"\b\d\w*", "", bare))) - _NO_METRICS


def known() -> set[str]:
    ours = {
        f"{metric.name}{suffix}"
        for package in PACKAGES
        for metric in find_metrics(ROOT, package)
        for suffix in _SUFFIXES[metric.kind]
    }
    return ours | COMMON | engine_metrics.names()


def unknown(document: dict[str, Any], names: set[str]) -> set[str]:
    found = {name for panel in panels(document) for target in panel["targets"] for name in metrics_of(target["expr"])}
    return found - names


def test_committed_dashboards_are_what_the_code_makes(tmp_path: Path) -> None:
    write(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in COMMITTED.iterdir()}, "run 'make generate'"


@pytest.mark.parametrize("name", documents())
def test_every_metric_of_a_dashboard_is_counted_by_somebody(name: str) -> None:
    document = documents()[name]
    assert unknown(document, known()) == set()
    assert len(list(panels(document))) > 8


def test_metric_that_was_renamed_is_found() -> None:
    renamed = known() - {"aiaas_edge_requests_total"}
    assert unknown(documents()["system"], renamed) == {"aiaas_edge_requests_total"}


@pytest.mark.parametrize("name", documents())
def test_every_panel_says_what_it_is_and_has_a_place_of_its_own(name: str) -> None:
    document = documents()[name]
    ids = [panel["id"] for panel in document["panels"]]
    assert len(set(ids)) == len(ids)
    places: set[tuple[int, int]] = set()
    for panel in panels(document):
        assert panel["title"]
        assert panel["description"].endswith((".", "?"))
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & places, panel["title"]
        places |= cells


def test_chart_delivers_the_committed_files() -> None:
    delivered = ROOT / "deploy/helm/aiaas/files/dashboards"
    assert delivered.resolve() == COMMITTED
    assert {path.name for path in delivered.iterdir()} == {f"{name}.json" for name in documents()}
    assert all(json.loads(path.read_text())["uid"].startswith("aiaas-") for path in delivered.iterdir())
