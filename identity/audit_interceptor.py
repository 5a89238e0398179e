"""Sees every call with its caller and its end, and has it recorded in the audit log; it never decides who may do what.

It stands before the interceptor that judges a call, so that what that one refuses is seen as well.
"""

import asyncio
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from grpc_interceptor import AsyncServerInterceptor

from identity import attempts
from identity.attempts import Attempt, AttemptBounds
from identity.audit import Audit
from identity.audit_calls import Call, rpc_of
from mesh import context as call
from mesh.clock import Clock
from mesh.errors import Reason, as_platform_error
from mesh.interceptors.handler import Handler, proceed


class AuditInterceptor(AsyncServerInterceptor):
    """Makes an attempt of each call that people or their programs make. Calls between services are none."""

    def __init__(self, audit: Audit, clock: Clock) -> None:
        self._audit = audit
        self._clock = clock
        self._bounds = AttemptBounds(clock)

    async def intercept(
        self, method: Handler, request: Any, context: grpc.aio.ServicerContext[Any, Any], method_name: str
    ) -> Any:
        """Passes the call on. Raises PlatformError(UNAVAILABLE) for a change whose entry cannot be written: then it is
        not made."""
        if not method_name.startswith("/aiaas.") or (rpc := rpc_of(method_name)).internal:
            return await proceed(method, request, context)
        client_address = call.client_address.get()
        made = Call(rpc, request if isinstance(request, Message) else Empty(), client_address, self._clock)
        attempt = Attempt(made.entry, self._audit, self._bounds, mutates=rpc.mutates)
        if rpc.mutates:
            attempts.current.set(attempt)
        try:
            answer = await proceed(method, request, context)
            await attempt.succeed(answer)
        except BaseException as error:
            principal = call.principal.get()
            # Whoever's credential was refused has attempted nothing that an RPC does.
            if principal is not None or rpc.public:
                await attempt.fail(_reason(error), client_address if principal is None else principal.id)
            raise
        return answer


def _reason(error: BaseException) -> Reason:
    if isinstance(error, Exception):
        return as_platform_error(error).reason
    deadline = call.deadline.get()
    late = deadline is not None and asyncio.get_running_loop().time() >= deadline
    return Reason.DEADLINE_EXCEEDED if late else Reason.CANCELLED
