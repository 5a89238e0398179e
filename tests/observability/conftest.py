"""One whole platform that is watched: its traces go to a collector, its metrics to a Prometheus, and its engine
answers as the tests write down."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from anyio.from_thread import start_blocking_portal
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from deploy.local.engines import HOST
from deploy.local.ports import free_port
from deploy.local.stack import PRICE, Stack, running
from deploy.local.state import State
from tests.doubles.scripted_backend import ScriptedBackend
from tests.doubles.trace_collector import collecting_into

CHECKOUT = Path(__file__).resolve().parents[2]
MODEL = "scripted"
BACKENDS = ("scripted-1", "scripted-2")


class Sent(NamedTuple):
    """A span, and the service that sent it."""

    service: str
    span: Span

    @property
    def attributes(self) -> dict[str, Any]:
        """Its attributes; those that are lists as lists."""
        found = {}
        for item in self.span.attributes:
            kind = item.value.WhichOneof("value") or "string_value"
            value = getattr(item.value, kind)
            found[item.key] = [one.string_value for one in value.values] if kind == "array_value" else value
        return found


@dataclass
class Watched:
    """A platform that runs, and what watches it."""

    stack: Stack
    state: State
    engine: ScriptedBackend
    exports: Path
    http: httpx.Client

    def new_key(self) -> str:
        """A key that nobody has seen yet, of the first organization."""
        answer = self.http.post(
            f"/admin/v1/organizations/{self.stack.organization_id}/api-keys", json={"display_name": "observed"}
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["secret"])

    def chat(
        self, key: str, *, stream: bool = False, traceparent: str = "", idempotency_key: str = ""
    ) -> httpx.Response:
        """A chat completion."""
        named = {"traceparent": traceparent, "Idempotency-Key": idempotency_key}
        headers = {"Authorization": f"Bearer {key}"} | {name: value for name, value in named.items() if value}
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": stream}
        return self.http.post("/v1/chat/completions", json=body, headers=headers, timeout=20)

    def spans(self) -> list[Sent]:
        """All spans that were exported so far."""
        data = self.exports.read_bytes() if self.exports.exists() else b""
        return [
            Sent({item.key: item.value.string_value for item in of.resource.attributes}["service.name"], span)
            # Exports lie one after the other, which protobuf reads as one.
            for of in ExportTraceServiceRequest.FromString(data).resource_spans
            for of_scope in of.scope_spans
            for span in of_scope.spans
        ]


def until(condition: Callable[[], Any], what: str, within_s: float = 15.0) -> Any:
    """Polls until the condition gives something true, and returns that."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {within_s} s: {what}")


@pytest.fixture(scope="session")
def watched() -> Iterator[Watched]:
    """A stack in which only what its caller samples is traced."""
    otlp_port = free_port()
    settings = {
        "AIAAS_OTLP_ENDPOINT": f"http://{HOST}:{otlp_port}",
        "AIAAS_TRACE_RATIO": "0",
        # OpenTelemetry's own variable: milliseconds between two exports.
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    with (
        State.temporary() as state,
        collecting_into(otlp_port, state.root / "spans") as exports,
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(ScriptedBackend()) as engine,
        portal.wrap_async_context_manager(
            running(state, chat_replicas=0, settings=settings | _without(state))
        ) as stack,
        httpx.Client(
            base_url=stack.base_url, headers={"Authorization": f"Bearer {stack.platform_key}"}, trust_env=False
        ) as http,
    ):
        _register(http, engine)
        yield Watched(stack, state, engine, exports, http)


def _without(state: State) -> dict[str, str]:
    """WITHOUT=marks: a platform whose spans do not say that they failed; the tests of failures must fail then."""
    if os.environ.get("WITHOUT") != "marks":
        return {}
    state.write("switches/sitecustomize.py", "from mesh import tracing\ntracing.Span.fail = lambda *_: None\n")
    return {"PYTHONPATH": f"{state.folder('switches')}:{CHECKOUT}:{CHECKOUT / 'gen' / 'python'}"}


def _register(http: httpx.Client, engine: ScriptedBackend) -> None:
    """One model on one engine, under two names, so that a failed attempt has where to go."""
    model = {"context_tokens": 2048, "endpoints": ["ENDPOINT_CHAT_COMPLETIONS"]}
    http.patch(f"/admin/v1/models/{MODEL}?allow_missing=true", json=model).raise_for_status()
    http.post(f"/admin/v1/models/{MODEL}/prices", json=PRICE).raise_for_status()
    for backend_id in BACKENDS:
        backend = {"base_url": engine.base_url, "engine": "ENGINE_KIND_VLLM", "models": [{"model_id": MODEL}]}
        http.patch(f"/admin/v1/backends/{backend_id}?allow_missing=true", json=backend).raise_for_status()

    def healthy() -> bool:
        backends = http.get("/admin/v1/backends").json()["backends"]
        found = {one["backend_id"] for one in backends if one["health"] == "BACKEND_HEALTH_HEALTHY"}
        return found >= set(BACKENDS)

    until(healthy, "the engine is found healthy")
