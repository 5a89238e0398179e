"""Turns exceptions into gRPC statuses by the catalog; it tells nothing of an exception it does not know."""

import logging
from typing import Any, NoReturn

import grpc
from grpc_interceptor import AsyncServerInterceptor
from grpc_status import rpc_status

from mesh.errors import PlatformError, Reason, to_status
from mesh.interceptors.handler import Handler, proceed

logger = logging.getLogger(__name__)


class ErrorsInterceptor(AsyncServerInterceptor):
    """Aborts the call with google.rpc.Status (ErrorInfo and what else applies), before or in the middle of a stream."""

    async def intercept(
        self, method: Handler, request: Any, context: grpc.aio.ServicerContext[Any, Any], method_name: str
    ) -> Any:
        """Passes the call on; cancellation passes through untouched."""
        try:
            return await proceed(method, request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, method_name, error)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], method_name: str, error: Exception) -> NoReturn:
    if isinstance(error, NotImplementedError):
        # What the generated base class of a servicer raises for a method that the servicer lacks.
        error = PlatformError(Reason.UNIMPLEMENTED)
    if not isinstance(error, PlatformError | grpc.aio.AioRpcError):
        logger.error("%s failed", method_name, exc_info=error)
    status: Any = rpc_status.to_status(to_status(error))
    try:
        # `abort_with_status` would pass by the instrumentation, which sees only `abort`.
        await context.abort(status.code, status.details, status.trailing_metadata)
    except grpc.aio.AbortError as aborted:
        # A span records the exception with what caused it, and that may hold a secret.
        raise aborted from None
    raise AssertionError("abort raises")
