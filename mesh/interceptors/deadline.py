"""Sees that every call ends: by its caller's deadline, or by one of ours where the caller set none.

Only a connection may last without either: a two-way stream, whose calls have deadlines of their own, or a watch.
"""

import asyncio
from functools import cache
from typing import Any

import grpc
from grpc_interceptor import AsyncServerInterceptor

from mesh import context as call
from mesh.auth import find_method
from mesh.errors import PlatformError, Reason
from mesh.interceptors.handler import Handler, is_connection, proceed

UNARY_TIMEOUT_S = 30.0


class DeadlineInterceptor(AsyncServerInterceptor):
    """Sets `mesh.context.deadline`, which channels pass on, and ends the call when it comes."""

    def __init__(self, *, stream_timeout_s: float) -> None:
        self._stream_timeout_s = stream_timeout_s

    async def intercept(
        self, method: Handler, request: Any, context: grpc.aio.ServicerContext[Any, Any], method_name: str
    ) -> Any:
        """Passes the call on. Raises PlatformError(DEADLINE_EXCEEDED) when its time is over."""
        if not method_name.startswith("/aiaas."):
            # A health watch lasts as long as its channel.
            return await proceed(method, request, context)
        left_s = context.time_remaining()
        timeout = asyncio.timeout(self._default_s(method_name) if left_s is None else left_s)
        try:
            async with timeout:
                call.deadline.set(timeout.when())
                return await proceed(method, request, context)
        except TimeoutError:
            if not timeout.expired():
                raise
            raise PlatformError(Reason.DEADLINE_EXCEEDED) from None

    def _default_s(self, method_name: str) -> float | None:
        if is_connection(method_name):
            return None
        return self._stream_timeout_s if _streams(method_name) else UNARY_TIMEOUT_S


@cache
def _streams(method_name: str) -> bool:
    return find_method(method_name).server_streaming
