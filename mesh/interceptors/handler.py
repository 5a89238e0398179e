"""The shape of what an interceptor wraps, whether it answers once or streams; it decides nothing."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

Handler = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Any]
"""Takes a request (or an iterator of them) and a context; gives an awaitable answer, or an iterator of answers."""


async def proceed(method: Handler, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    """What the next one in the chain answers: a message, or an async iterator of messages."""
    answer = method(request, context)
    return answer if isinstance(answer, AsyncIterator) else await answer


def metadata_value(context: grpc.aio.ServicerContext[Any, Any], name: str) -> str:
    """The caller's metadata of this name, or an empty string."""
    for key, value in context.invocation_metadata() or ():
        if key == name and isinstance(value, str):
            return value
    return ""
