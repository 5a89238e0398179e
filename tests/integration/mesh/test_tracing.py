"""Traces across processes: to a real collector, and through the look-up of a credential on a real server."""

import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

from opentelemetry.proto.trace.v1.trace_pb2 import Span as SentSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from aiaas.router.v1.model_service_pb2 import GetModelRequest, GetModelResponse
from mesh import tracing
from mesh.auth import CachedAuthenticator, Principal
from mesh.interceptors.handler import metadata_value
from tests.doubles.clock import ManualClock
from tests.doubles.trace_collector import collecting, recording
from tests.integration.mesh.harness import DEVELOPER, Client, bearer, serving, until

GET_MODEL = "/aiaas.router.v1.ModelService/GetModel"

# Both leave without the clean-up of an interpreter: what has been sent by then is sent.
EDGE = """
import os, sys
from opentelemetry.trace import SpanKind
from mesh import tracing
end = tracing.configure_tracing("edge", sys.argv[1], 1.0)
request = tracing.begin("request")
request.set(method="POST", route="/v1/chat/completions", status=200)
relay = request.child("relay", SpanKind.CLIENT)
print(relay.traceparent, flush=True)
sys.stdin.readline()
relay.event("first byte")
relay.end()
request.end()
end()
os._exit(0)
"""

ROUTER = """
import os, sys
from opentelemetry.trace import SpanKind
from mesh import tracing
end = tracing.configure_tracing("router", sys.argv[1], 0.0)
inference = tracing.resume("inference", sys.argv[2])
inference.set(model="smollm2", output_tokens=3)
engine = inference.child("engine", SpanKind.CLIENT)
engine.fail("BACKEND_ERROR")
engine.end()
inference.end()
end()
os._exit(0)
"""


def test_two_processes_send_one_trace_to_a_collector() -> None:
    with collecting() as collector:
        command = [sys.executable, "-c"]
        with subprocess.Popen(
            [*command, EDGE, collector.endpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as edge:
            assert edge.stdin is not None
            assert edge.stdout is not None
            traceparent = edge.stdout.readline().strip()
            subprocess.run([*command, ROUTER, collector.endpoint, traceparent], check=True, timeout=30)
            edge.stdin.write("\n")
            edge.stdin.flush()
            assert edge.wait(30) == 0
    names = {"request": "edge", "relay": "edge", "inference": "router", "engine": "router"}
    assert {name: received.service for name, received in collector.spans.items()} == names
    request, relay, inference, engine = (collector.spans[name].span for name in names)
    assert len({span.trace_id for span in (request, relay, inference, engine)}) == 1
    assert (request.parent_span_id, relay.parent_span_id) == (b"", request.span_id)
    assert (inference.parent_span_id, engine.parent_span_id) == (relay.span_id, inference.span_id)
    kinds = [span.kind for span in (request, relay, inference, engine)]
    assert kinds == [SentSpan.SPAN_KIND_SERVER, SentSpan.SPAN_KIND_CLIENT] * 2
    assert {item.key: item.value.int_value for item in inference.attributes}["gen_ai.usage.output_tokens"] == 3
    assert (engine.status.code, engine.status.message) == (Status.STATUS_CODE_ERROR, "BACKEND_ERROR")
    assert [event.name for event in relay.events] == ["first byte"]
    times = [relay.start_time_unix_nano, inference.start_time_unix_nano, engine.end_time_unix_nano]
    times += [relay.events[0].time_unix_nano, relay.end_time_unix_nano]
    assert times == sorted(times)


def test_a_process_stops_soon_though_the_collector_is_away() -> None:
    script = """
import time
from mesh import tracing
end = tracing.configure_tracing("edge", "http://127.0.0.1:1", 1.0)
tracing.begin("request").end()
started = time.monotonic()
end()
print(time.monotonic() - started)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) < 4


class LookUp:
    """Makes an RPC for each credential."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def authenticate(self, credential: str) -> Principal:
        await self._client.models.GetModel(GetModelRequest(), metadata=bearer("developer"))
        return DEVELOPER


async def test_the_look_up_of_a_credential_belongs_to_the_request_that_needs_it(tmp_path: Path) -> None:
    with recording() as spans:
        async with serving(f"unix:{tmp_path}/s", traced=True) as client:
            authenticator = CachedAuthenticator(LookUp(client), ManualClock(), Random(1))
            request = tracing.begin("request")
            assert request is not None
            with request.as_current():
                await authenticator.authenticate("developer")
            request.end()
            await until(lambda: len(spans.get_finished_spans()) == 2)
        finished = {span.name: span for span in spans.get_finished_spans()}
    assert finished.keys() == {"request", GET_MODEL}
    parent = finished[GET_MODEL].parent
    assert parent is not None
    assert request.traceparent.split("-")[1:3] == [f"{parent.trace_id:032x}", f"{parent.span_id:016x}"]


async def test_the_look_up_for_a_request_that_is_not_sampled_carries_no_trace(tmp_path: Path) -> None:
    seen = []

    async def answer(_: Any, context: Any) -> GetModelResponse:
        seen.append(metadata_value(context, "traceparent"))
        return GetModelResponse()

    with recording(0.0):
        assert tracing.begin("request") is None
        async with serving(f"unix:{tmp_path}/s", {"GetModel": answer}) as client:
            await CachedAuthenticator(LookUp(client), ManualClock(), Random(1)).authenticate("developer")
    assert seen == [""]
