"""Every query of every dashboard, asked of a real Prometheus that scrapes a platform under a little load."""

from __future__ import annotations

import time

import pytest
from anyio.from_thread import start_blocking_portal
from prometheus_client import start_http_server

from deploy.local.engines import HOST
from tests.doubles.engine_metrics import EngineMetrics
from tests.doubles.prometheus import watching
from tests.doubles.scripted_backend import chat_stream
from tests.observability.asking import Asked, ask
from tests.observability.conftest import MODEL, Watched, until

# What Grafana puts there; scraped every two seconds, twenty are enough for a rate, on a busy machine too.
_VARIABLES = {"$__rate_interval": "20s", "$__range": "1m", "$model": ".*"}
_LOAD_S = 5.0
_ROUNDS = 8

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


@pytest.fixture(scope="module")
def asked(watched: Watched, tmp_path_factory: pytest.TempPathFactory) -> list[Asked]:
    """All queries, asked once the load has been scraped."""
    engine = EngineMetrics(MODEL)
    server, thread = start_http_server(0, HOST, engine.registry)
    targets = {**watched.stack.ops, "vllm": f"{HOST}:{server.server_port}"}
    try:
        with (
            start_blocking_portal() as portal,
            portal.wrap_async_context_manager(
                watching([], targets, tmp_path_factory.mktemp("prometheus"), every="2s")
            ) as prometheus,
        ):
            until(lambda: portal.call(prometheus.sees, set(targets)), f"all of {set(targets)} are scraped")
            load(watched, engine)
            # The next scrape has all of it.
            time.sleep(2.5)
            return portal.call(ask, prometheus, _VARIABLES)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_every_query_is_understood_and_has_data_where_there_must_be_some(asked: list[Asked]) -> None:
    print()
    for one in asked:
        print(f"{one.dashboard:<15} {one.panel:<36} {len(one.values):>3} series  {one.query}")
    assert {one.panel for one in asked if one.is_empty} <= QUIET
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
