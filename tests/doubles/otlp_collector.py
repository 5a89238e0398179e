"""An OTLP collector in a process of its own, which appends all it is sent to a file, as gRPC and forking do not go well
together: python -m tests.doubles.otlp_collector PORT FILE
"""

from __future__ import annotations

import signal
import sys
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps spans as they came."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def Export(self, request: Any, context: Any) -> trace_service_pb2.ExportTraceServiceResponse:
        """Append them."""
        self._file.write(request.SerializeToString())
        return trace_service_pb2.ExportTraceServiceResponse()


def main(port: str, path: str) -> None:
    """Serve until SIGTERM."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(Path(path)), server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main(*sys.argv[1:])
