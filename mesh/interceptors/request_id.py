"""Gives every call the id that its caller chose, or a new one; it never trusts the caller's text as it is."""

import re
from typing import Any

import grpc
from grpc_interceptor import AsyncServerInterceptor

from mesh import context as call
from mesh.ids import new_request_id
from mesh.interceptors.handler import Handler, metadata_value, proceed

METADATA = "x-request-id"
_SANE = re.compile(r"[A-Za-z0-9_.-]{1,128}")


class RequestIdInterceptor(AsyncServerInterceptor):
    """Sets `mesh.context.request_id`."""

    async def intercept(
        self, method: Handler, request: Any, context: grpc.aio.ServicerContext[Any, Any], method_name: str
    ) -> Any:
        """Passes the call on under its id."""
        given = metadata_value(context, METADATA)
        call.request_id.set(given if _SANE.fullmatch(given) else new_request_id())
        return await proceed(method, request, context)
