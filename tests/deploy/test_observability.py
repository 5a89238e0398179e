"""The files for a collector, Tempo, Loki and Grafana: they parse, fit each other, and name what our processes really
write and where; none of these programs is run."""

from __future__ import annotations

import io
import json
import logging
import os
from datetime import datetime
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
import yaml

from edge.access_log import AccessLog
from edge.exchange import Exchange
from mesh import tracing
from mesh.telemetry import JsonFormatter
from tests.deploy.tools import CHART
from tests.deploy.values import EVERYTHING
from tests.doubles.trace_collector import recording

FOLDER = CHART.parents[1] / "observability"


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def port(address: str) -> int:
    return int(urlsplit(address if "//" in address else f"//{address}").port or 0)


def log_line() -> dict[str, Any]:
    """What a service writes within a traced request."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("router"))
    logger = logging.Logger("tests.observability")
    logger.addHandler(handler)
    with recording(1.0):
        span = tracing.begin("x")
        assert span is not None
        with span.as_current():
            logger.warning("within")
        span.end()
    return cast("dict[str, Any]", json.loads(stream.getvalue()))


async def request_line() -> dict[str, Any]:
    """What the edge writes of a traced request."""
    reading, writing = os.pipe()
    try:
        log = AccessLog("edge", writing)
        exchange = SimpleNamespace(
            request_id="req_1", trace_id="a" * 32, method="POST", reason=None, route="/v1/models", status=200
        )
        log.write(cast(Exchange, exchange), 0.1)
        log.close()
        return cast("dict[str, Any]", json.loads(os.read(reading, 65536)))
    finally:
        os.close(reading)
        os.close(writing)


def test_every_file_parses() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {
        "collector.yaml",
        "datasources.yaml",
        "loki.yaml",
        "tempo.yaml",
    }
    for path in FOLDER.iterdir():
        assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_pipelines_are_made_of_what_is_there_and_of_all_of_it() -> None:
    collector = read("collector")
    pipelines = collector["service"]["pipelines"].values()
    for kind in ("receivers", "processors", "exporters"):
        assert {name for pipeline in pipelines for name in pipeline[kind]} == set(collector[kind])


def test_spans_come_in_where_services_and_the_network_send_them() -> None:
    (arrow, *others) = [
        arrow for arrow in yaml.safe_load((CHART / "network.yaml").read_text())["arrows"] if arrow["to"] == "traces"
    ]
    listens = port(read("collector")["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"])
    assert [listens] == arrow["ports"]
    assert all(other["ports"] == arrow["ports"] for other in others)
    assert listens == port(EVERYTHING["tracing"]["endpoint"])


def test_what_leaves_goes_to_where_tempo_and_loki_listen() -> None:
    exporters, tempo, loki = read("collector")["exporters"], read("tempo"), read("loki")
    taken = port(tempo["distributor"]["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"])
    assert port(exporters["otlp/tempo"]["endpoint"]) == taken
    assert port(exporters["otlphttp/loki"]["endpoint"]) == loki["server"]["http_listen_port"]
    urls = {source["uid"]: source["url"] for source in read("datasources")["datasources"]}
    assert port(urls["tempo"]) == tempo["server"]["http_listen_port"]
    assert port(urls["loki"]) == loki["server"]["http_listen_port"]
    # In Kubernetes a name has no address of its own without a service; all three are asked in one namespace.
    hosts = {urlsplit(url).hostname or "" for url in urls.values()}
    assert {host.split(".", 1)[1] for host in hosts} == {"monitoring.svc"}


@pytest.mark.parametrize("whose", ["service", "edge"])
async def test_lines_have_the_fields_that_are_read_from_them(whose: str) -> None:
    line = log_line() if whose == "service" else await request_line()
    operators = {operator["type"]: operator for operator in read("collector")["receivers"]["filelog"]["operators"]}
    parser = operators["json_parser"]
    layout = parser["timestamp"]["layout"].replace("%LZ", "%fZ")
    assert datetime.strptime(line[field(parser["timestamp"])], layout)  # noqa: DTZ007 - Z is what is tried
    severity = parser["severity"]
    known = {"debug", "info", "error", *severity["mapping"].values()}
    assert line[field(severity)] in known
    assert operators["move"]["from"] == "attributes.service"
    assert line["service"] in ("router", "edge")
    ids = operators["trace_parser"]
    assert len(line[field(ids["trace_id"])]) == 32
    assert (field(ids["span_id"]) in line) == (whose == "service")


def field(parser: dict[str, str]) -> str:
    return parser["parse_from"].removeprefix("attributes.")


def test_every_level_is_known_to_the_collector() -> None:
    (parser,) = (one for one in read("collector")["receivers"]["filelog"]["operators"] if one["type"] == "json_parser")
    written = {name.lower() for name in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")}
    assert written == {"debug", "info", "error", *parser["severity"]["mapping"].values()}
