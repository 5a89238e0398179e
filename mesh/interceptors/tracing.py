"""One span for every RPC, by OpenTelemetry's own instrumentation; a relay's inferences get theirs by `mesh.tracing`."""

from __future__ import annotations

from typing import Any

import grpc
from opentelemetry.instrumentation.grpc import aio_server_interceptor

from mesh.interceptors.handler import is_connection


def tracing_interceptor() -> grpc.aio.ServerInterceptor[Any, Any]:
    """The interceptor; it costs some 200 us for each RPC, sampled or not, so it is left out where no span goes."""
    interceptor: grpc.aio.ServerInterceptor[Any, Any] = aio_server_interceptor(filter_=_is_a_span)  # type: ignore[no-untyped-call]
    return interceptor


def _is_a_span(details: grpc.HandlerCallDetails) -> bool:
    """Whether an RPC gets a span: not gRPC's own services, and not a stream that lives as long as its peers."""
    if not details.method.startswith("/aiaas."):
        return False
    try:
        return not is_connection(details.method)
    except KeyError:
        # Nobody serves it.
        return False
