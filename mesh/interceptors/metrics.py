"""Counts every RPC and how long it took; it labels by method and status code, never by anything a caller chose."""

import asyncio
import time
from functools import cache
from typing import Any

import grpc
from grpc_interceptor import AsyncServerInterceptor
from prometheus_client import Counter, Histogram

from mesh.interceptors.handler import Handler, proceed

_REQUESTS = Counter("aiaas_grpc_server_requests_total", "RPCs that ended.", ["method", "code"])
_DURATION = Histogram("aiaas_grpc_server_request_duration_seconds", "Time until an RPC ended.", ["method"])

# By how much gRPC's own clock may be ahead of the one that it shows.
_SLACK_S = 0.05

_NAMES = {int(code.value[0]): code.name for code in grpc.StatusCode}


class MetricsInterceptor(AsyncServerInterceptor):
    """Writes `aiaas_grpc_server_requests_total` and `aiaas_grpc_server_request_duration_seconds`."""

    async def intercept(
        self, method: Handler, request: Any, context: grpc.aio.ServicerContext[Any, Any], method_name: str
    ) -> Any:
        """Passes the call on and counts its end; of a stream, the end of the stream."""
        started = time.monotonic()
        code = "OK"
        try:
            return await proceed(method, request, context)
        except asyncio.CancelledError:
            # gRPC cancels a call both when its caller goes and when the caller's time is over.
            left_s = context.time_remaining()
            code = "DEADLINE_EXCEEDED" if left_s is not None and left_s < _SLACK_S else "CANCELLED"
            raise
        except BaseException:
            code = _code(context)
            raise
        finally:
            _requests(method_name, code).inc()
            _duration(method_name).observe(time.monotonic() - started)


def _code(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    code: Any = context.code()
    # It is the number where gRPC's own core set it.
    return _NAMES.get(code, "UNKNOWN") if isinstance(code, int) else getattr(code, "name", "UNKNOWN")


# `labels` takes a lock and a look-up each time; the pairs are few and known.
@cache
def _requests(method_name: str, code: str) -> Any:
    return _REQUESTS.labels(method_name, code)


@cache
def _duration(method_name: str) -> Any:
    return _DURATION.labels(method_name)
