"""Health, readiness, metrics, the access log, and what an unforeseen exception looks like from outside."""

import logging
from typing import Any

import pytest

from edge.transcode.endpoint import Transcoder
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import KEY, Edge

MODELS = "/admin/v1/models"


async def test_health_says_that_the_process_runs(edge: Edge) -> None:
    response = await edge.client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


async def test_ready_names_every_peer_and_needs_the_router(edge: Edge, peers: dict[str, PeerDouble]) -> None:
    response = await edge.client.get("/ready")
    assert response.status_code == 200
    assert response.json()["checks"] == {"identity": "ok", "router": "ok", "analytics": "ok"}
    await peers["identity"].stop()
    response = await edge.client.get("/ready")
    assert (response.status_code, response.json()["status"]) == (200, "ready")
    assert response.json()["checks"]["identity"] != "ok"
    await peers["router"].stop()
    response = await edge.client.get("/ready")
    assert (response.status_code, response.json()["status"]) == (503, "not_ready")


async def test_metrics_count_by_route_template_and_status_class(edge: Edge) -> None:
    await edge.client.get("/admin/v1/models/some-model-id")
    await edge.client.get("/no-such-path")
    metrics = (await edge.client.get("/metrics")).text
    assert 'aiaas_edge_requests_total{route="/admin/v1/models/{model_id}",status_class="2xx"}' in metrics
    assert 'aiaas_edge_requests_total{route="unmatched",status_class="4xx"}' in metrics
    assert "aiaas_edge_request_duration_seconds_bucket" in metrics
    assert "some-model-id" not in metrics
    assert "no-such-path" not in metrics


async def test_log_line_has_the_template_and_never_the_query_or_the_key(
    edge: Edge, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        response = await edge.client.get(f"{MODELS}/secret-id?page_token=secret-token")
    (line,) = edge.access_lines()
    assert line["timestamp"].endswith("Z")
    assert line["duration_ms"] >= 0
    assert list(line) == [
        *("timestamp", "level", "service", "logger", "message", "request_id"),
        *("duration_ms", "method", "reason", "route", "status"),
    ]
    del line["timestamp"], line["duration_ms"]
    assert line == {
        "level": "info",
        "service": "edge",
        "logger": "edge.access",
        "message": "request",
        "request_id": response.headers["x-request-id"],
        "method": "GET",
        "reason": "unknown_field",
        "route": "/admin/v1/models/{model_id}",
        "status": 400,
    }
    everything = f"{line} {[vars(record) for record in caplog.records if record.name.startswith(('edge', 'uvicorn'))]}"
    for secret in ("secret-id", "secret-token", KEY):
        assert secret not in everything


@pytest.mark.parametrize("path", [MODELS, "/admin/v1/organizations/org_1/api-keys", "/oauth2/userinfo"])
async def test_what_no_peer_serves_is_501(edge: Edge, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    # As of one that is older than the edge.
    monkeypatch.setattr(PeerDouble, "service", lambda self, details: None)
    response = await edge.client.get(path)
    assert response.status_code == 501, response.text


@pytest.mark.parametrize("path", [MODELS, "/v1/models"])
async def test_unforeseen_exception_is_a_fixed_sentence_and_logged(
    edge: Edge, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(Transcoder, "__call__", broken)
    monkeypatch.setattr("edge.openai.models.ModelsEndpoint.__call__", broken)
    response = await edge.client.get(path, headers={"x-request-id": "mine"})
    assert response.status_code == 500
    assert "secret detail" not in response.text
    assert response.headers["x-request-id"] == "mine"
    error = response.json()["error"]
    assert error["message"] == "The server had an error while processing your request."
    assert ("status" in error) is (path == MODELS)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info is not None
