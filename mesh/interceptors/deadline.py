"""Sees that every call ends: by its caller's deadline, or by one of ours where the caller set none."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_interceptor import AsyncServerInterceptor

from mesh import context as call
from mesh.errors import PlatformError, Reason
from mesh.interceptors.handler import Handler, proceed

UNARY_TIMEOUT_S = 30.0


class DeadlineInterceptor(AsyncServerInterceptor):
    """Sets `mesh.context.deadline`, which channels pass on, and ends the call when it comes."""

    def __init__(self, *, stream_timeout_s: float) -> None:
        self._stream_timeout_s = stream_timeout_s

    async def intercept(
        self, method: Handler, request: Any, context: grpc.aio.ServicerContext[Any, Any], method_name: str
    ) -> Any:
        """Passes the call on. Raises PlatformError(DEADLINE_EXCEEDED) when its time is over."""
        remaining_s = context.time_remaining()
        if not method_name.startswith("/aiaas."):
            # A health watch lasts as long as its channel.
            return await proceed(method, request, context)
        now = asyncio.get_running_loop().time()
        deadline = now + (UNARY_TIMEOUT_S if remaining_s is None else remaining_s)
        try:
            async with asyncio.timeout_at(deadline):
                call.deadline.set(deadline)
                answer = await proceed(method, request, context)
        except TimeoutError:
            raise PlatformError(Reason.DEADLINE_EXCEEDED) from None
        if isinstance(answer, AsyncIterator):
            deadline = now + (self._stream_timeout_s if remaining_s is None else remaining_s)
            call.deadline.set(deadline)
            return _stream(answer, deadline)
        return answer


async def _stream(answer: AsyncIterator[Any], deadline: float) -> AsyncIterator[Any]:
    timeout = asyncio.timeout_at(deadline)
    try:
        async with timeout:
            async for message in answer:
                yield message
    except TimeoutError:
        if timeout.expired():
            raise PlatformError(Reason.DEADLINE_EXCEEDED) from None
        raise
