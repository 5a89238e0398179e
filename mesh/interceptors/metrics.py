"""Counts every RPC and how long it took; it labels by method and status code, never by anything a caller chose."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import grpc
from grpc_interceptor import AsyncServerInterceptor
from prometheus_client import Counter, Histogram

from mesh.interceptors.handler import Handler, proceed

_REQUESTS = Counter("aiaas_grpc_server_requests_total", "RPCs that ended.", ["method", "code"])
_DURATION = Histogram("aiaas_grpc_server_request_duration_seconds", "Time until an RPC ended.", ["method"])

_NAMES = {int(code.value[0]): code.name for code in grpc.StatusCode}


class MetricsInterceptor(AsyncServerInterceptor):
    """Writes `aiaas_grpc_server_requests_total` and `aiaas_grpc_server_request_duration_seconds`."""

    async def intercept(
        self, method: Handler, request: Any, context: grpc.aio.ServicerContext[Any, Any], method_name: str
    ) -> Any:
        """Passes the call on and counts its end; of a stream, the end of the stream."""
        started = time.monotonic()
        with _counted(method_name, context, started) as counted:
            answer = await proceed(method, request, context)
            if isinstance(answer, AsyncIterator):
                counted.clear()
                return _stream(answer, method_name, context, started)
            return answer


async def _stream(
    answer: AsyncIterator[Any], method_name: str, context: grpc.aio.ServicerContext[Any, Any], started: float
) -> AsyncIterator[Any]:
    with _counted(method_name, context, started):
        async for message in answer:
            yield message


@contextmanager
def _counted(method_name: str, context: grpc.aio.ServicerContext[Any, Any], started: float) -> Iterator[list[None]]:
    """Counts at the end of the block, unless the list that it gives was cleared."""
    pending = [None]
    code = "OK"
    try:
        yield pending
    except (asyncio.CancelledError, GeneratorExit):
        code = "CANCELLED"
        raise
    except BaseException:
        # It is the number where gRPC's own core set it.
        set_code: Any = context.code()
        code = _NAMES.get(set_code, "UNKNOWN") if isinstance(set_code, int) else getattr(set_code, "name", "UNKNOWN")
        raise
    finally:
        if pending:
            _requests(method_name, code).inc()
            _duration(method_name).observe(time.monotonic() - started)


# `labels` takes a lock and a look-up each time; the pairs are few and known.
@cache
def _requests(method_name: str, code: str) -> Any:
    return _REQUESTS.labels(method_name, code)


@cache
def _duration(method_name: str) -> Any:
    return _DURATION.labels(method_name)
