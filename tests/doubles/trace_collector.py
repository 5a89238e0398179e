"""OTLP collectors on real gRPC servers, here and in a process of its own, and a memory for the spans of one process;
none of them changes a span."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mesh import tracing


class Received(NamedTuple):
    """A span as it came, and the name of the service that sent it."""

    service: str
    span: Span


class TraceCollector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span it is sent, by its name."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: dict[str, Received] = {}

    def Export(self, request: Any, context: Any) -> trace_service_pb2.ExportTraceServiceResponse:
        """Takes spans."""
        for of_resource in request.resource_spans:
            attributes = {item.key: item.value.string_value for item in of_resource.resource.attributes}
            for of_scope in of_resource.scope_spans:
                for span in of_scope.spans:
                    self.spans[span.name] = Received(attributes["service.name"], span)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[TraceCollector]:
    """A running collector."""
    collector = TraceCollector()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()


@contextmanager
def collecting_into(port: int, path: Path) -> Iterator[Path]:
    """A collector in a process of its own; gives the file that it appends each export to."""
    collector = subprocess.Popen((sys.executable, "-m", "tests.doubles.otlp_collector", str(port), str(path)))
    try:
        yield path
    finally:
        collector.terminate()
        collector.wait(10)


@contextmanager
def recording(ratio: float = 1.0, draw: Callable[[], float] = random.random) -> Iterator[InMemorySpanExporter]:
    """The spans of this process are kept, once they have ended, whether made by hand or by the instrumentation."""
    exporter = InMemorySpanExporter()
    provider = tracing.record("test", SimpleSpanProcessor(exporter), ratio, draw)
    # OpenTelemetry lets itself be configured only once.
    before, trace._TRACER_PROVIDER = trace._TRACER_PROVIDER, provider
    try:
        yield exporter
    finally:
        trace._TRACER_PROVIDER = before
        tracing.stop()
        provider.shutdown()
