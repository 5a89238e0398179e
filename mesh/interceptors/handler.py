"""Runs what an interceptor wraps, whether it answers once or streams; it decides nothing.

A stream is written by the innermost interceptor, so that to all others every call is one coroutine: it raises where it
failed, also while a slow reader holds up a write, and has cleaned up when it ends.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import cache
from typing import Any

import grpc

from mesh.auth import find_method, policy_of
from mesh.errors import PlatformError, Reason

# How long after a failed write gRPC takes, at most, to cancel the call.
_CANCEL_WITHIN_S = 1.0

Handler = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Any]
"""Takes a request (or an iterator of them) and a context; gives an awaitable answer, or a generator of answers."""


async def proceed(method: Handler, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    """What the next one in the chain answers; None for a stream, which is over by then."""
    answer = method(request, context)
    if not isinstance(answer, AsyncGenerator):
        return await answer
    async with aclosing(answer):
        async for message in answer:
            await _write(context, message)
    return None


async def _write(context: grpc.aio.ServicerContext[Any, Any], message: Any) -> None:
    try:
        await context.write(message)
    except grpc.aio.InternalError:
        # The caller has gone, and gRPC is about to cancel this task: clean-up that began now would be cut off by that.
        await asyncio.sleep(_CANCEL_WITHIN_S)
        raise PlatformError(Reason.CANCELLED) from None


def metadata_value(context: grpc.aio.ServicerContext[Any, Any], name: str) -> str:
    """The caller's metadata of this name, or an empty string."""
    for key, value in context.invocation_metadata() or ():
        if key == name and isinstance(value, str):
            return value
    return ""


@cache
def is_connection(method_name: str) -> bool:
    """Whether an RPC is a connection, open for days, rather than a call: both sides stream, or one service watches
    another. Raises KeyError."""
    method = find_method(method_name)
    return bool(method.server_streaming and (method.client_streaming or policy_of(method).internal))
