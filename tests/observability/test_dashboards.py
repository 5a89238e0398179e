"""Every query of every dashboard, asked of a real Prometheus that scrapes a platform under a little load."""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from prometheus_client import start_http_server

from deploy.dashboards.__main__ import documents
from deploy.local.engines import HOST
from deploy.local.ports import free_port
from tests.doubles.engine_metrics import EngineMetrics
from tests.doubles.scripted_backend import chat_stream
from tests.observability.conftest import MODEL, Watched, until

# What Grafana puts there; scraped every two seconds, twenty are enough for a rate, on a busy machine too.
_VARIABLES = {"$__rate_interval": "20s", "$__range": "1m", "$model": ".*"}
_LOAD_S = 5.0
_ROUNDS = 8
# As the chart has it for engines.
_VLLM = {"source_labels": ["__name__"], "regex": "vllm_(.+)", "target_label": "__name__", "replacement": "vllm:${1}"}

# What may have no series: nothing of it happened under this load, or no hour was compared yet.
QUIET = {
    "Attempts that are not audited",
    "Budgets that said no",
    "Differences",
    "Exports",
    "Lines that differ",
    "Refused or stopped",
    "Since the last comparison",
    "Tokens that nothing explains",
    "Webhooks",
}


class Asked(NamedTuple):
    """One query of a panel, and what came of it."""

    dashboard: str
    panel: str
    query: str
    series: int
    values: list[float]


@contextmanager
def prometheus(targets: dict[str, str], folder: Path) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes each target by its job every two seconds."""
    program = shutil.which("prometheus")
    assert program, "apt-get install prometheus"
    jobs = [
        {"job_name": job, "static_configs": [{"targets": [at]}], "metric_relabel_configs": [_VLLM]}
        for job, at in targets.items()
    ]
    (folder / "prometheus.yml").write_text(
        yaml.safe_dump({"global": {"scrape_interval": "2s", "scrape_timeout": "2s"}, "scrape_configs": jobs})
    )
    port = free_port()
    with (folder / "log").open("w") as log, httpx.Client(base_url=f"http://{HOST}:{port}", trust_env=False) as client:
        server = subprocess.Popen(
            (
                program,
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address={HOST}:{port}",
            ),
            stdout=log,
            stderr=log,
        )
        try:
            until(lambda: _scrapes(client, set(targets)), f"all of {set(targets)} are scraped")
            yield client
        finally:
            server.terminate()
            server.wait(20)


def _scrapes(client: httpx.Client, jobs: set[str]) -> bool:
    try:
        active = client.get("/api/v1/targets").json()["data"]["activeTargets"]
    except (httpx.TransportError, ValueError):
        return False
    return {target["labels"]["job"] for target in active if target["health"] == "up"} == jobs


def load(watched: Watched, engine: EngineMetrics) -> None:
    """Requests of most kinds that there are: answered, streamed, repeated, wrong, refused, and administration."""
    key = watched.new_key()
    until_s = time.monotonic() + _LOAD_S
    number = 0
    while time.monotonic() < until_s or number < _ROUNDS:
        number += 1
        watched.engine.script.append(chat_stream("Hel", "lo"))
        assert watched.chat(watched.new_key(), stream=True).status_code == 200
        assert watched.chat(key, idempotency_key=f"dashboards-{number}").status_code == 200
        assert watched.chat("aias_wrong").status_code == 401
        assert watched.http.get("/admin/v1/organizations/org_unknown").status_code == 404
        # A key that may infer, and nothing else.
        refused = watched.http.get("/admin/v1/organizations", headers={"Authorization": f"Bearer {key}"})
        assert refused.status_code == 403
        sign_in = {"email": "nobody@example.com", "password": "wrong-password"}
        assert watched.http.post("/admin/v1/sessions", json=sign_in).status_code >= 400
        engine.work()
        time.sleep(0.2)


def ask(client: httpx.Client, name: str, document: dict[str, Any]) -> Iterator[Asked]:
    """Every query of a dashboard. Raises AssertionError for one that Prometheus does not understand."""
    for panel in document["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for variable, value in _VARIABLES.items():
                query = query.replace(variable, value)
            answer = client.get("/api/v1/query", params={"query": query})
            assert answer.status_code == 200, f"{name}, {panel['title']}: {query}: {answer.text}"
            result = answer.json()["data"]["result"]
            values = [float(series["value"][1]) for series in result]
            yield Asked(name, panel["title"], target["expr"], len(result), values)


@pytest.fixture(scope="module")
def asked(watched: Watched, tmp_path_factory: pytest.TempPathFactory) -> list[Asked]:
    """All queries, asked once the load has been scraped."""
    engine = EngineMetrics(MODEL)
    server, thread = start_http_server(0, HOST, engine.registry)
    targets = {**watched.stack.ops, "vllm": f"{HOST}:{server.server_port}"}
    try:
        with prometheus(targets, tmp_path_factory.mktemp("prometheus")) as client:
            load(watched, engine)
            # The next scrape has all of it.
            time.sleep(2.5)
            return [one for name, document in documents().items() for one in ask(client, name, document)]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_every_query_is_understood_and_has_data_where_there_must_be_some(asked: list[Asked]) -> None:
    print()
    for one in asked:
        print(f"{one.dashboard:<15} {one.panel:<36} {one.series:>3} series  {one.query}")
    empty = {one.panel for one in asked if all(math.isnan(value) for value in one.values)}
    assert empty <= QUIET
    assert len(asked) > 100


def test_numbers_are_of_the_size_that_the_load_had(asked: list[Asked]) -> None:
    first = {(one.dashboard, one.panel): one.values[0] for one in asked if one.values}
    assert 0.5 < first["system", "Requests/s"] < 500
    assert first["system", "Failures"] == 0
    assert 0 < first["system", "p95 to the first token"] < 2.5
    assert first["system", "Processes down"] == 0
    assert first["usage", "Tokens"] > 20
    assert first["usage", "Spend"] > 0
    assert first["identity", "Refused/s"] > 0
    assert 0 < first["identity", "From the cache"] <= 1
    assert first["money", "Rejected by analytics"] == 0
    assert first["money", "Cannot be written"] == 0
