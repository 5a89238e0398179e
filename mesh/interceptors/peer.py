"""Holds every call to the services whose certificates its contract lets call; it never looks at who uses them."""

import logging
from functools import cache
from typing import Any

import grpc
from grpc_interceptor import AsyncServerInterceptor

from aiaas.type.v1 import options_pb2
from mesh.auth import find_method, policy_of
from mesh.errors import PlatformError, Reason
from mesh.interceptors.handler import Handler, proceed
from mesh.tls import is_client, peer_services

logger = logging.getLogger(__name__)

# Whoever calls what needs a credential, or is for anybody, comes from the edge or has a tool.
_OUTSIDE = frozenset({"edge", "tool"})


class PeerInterceptor(AsyncServerInterceptor):
    """Lets in who has a right certificate, and clients of a public address where tools are. For servers on TLS."""

    async def intercept(
        self, method: Handler, request: Any, context: grpc.aio.ServicerContext[Any, Any], method_name: str
    ) -> Any:
        """Passes the call on, if its caller may make it. Raises PlatformError(PERMISSION_DENIED)."""
        if is_client(context):
            if not method_name.startswith("/aiaas.") or "tool" not in callers_of(method_name):
                raise PlatformError(Reason.PERMISSION_DENIED, description="This call is not for clients.")
            return await proceed(method, request, context)
        if not method_name.startswith("/aiaas."):
            # gRPC's own services: without health a channel could not learn why its calls are refused.
            return await proceed(method, request, context)
        services = peer_services(context)
        if services.isdisjoint(callers_of(method_name)):
            logger.warning("a caller's certificate is not for %s", method_name, extra={"caller": sorted(services)})
            raise PlatformError(
                Reason.PERMISSION_DENIED, description="The certificate of this caller is not for this call."
            )
        return await proceed(method, request, context)


@cache
def callers_of(method_name: str) -> frozenset[str]:
    """The services that may call an RPC, by what its contract declares; nobody may call an internal one that names
    none. Raises KeyError if no imported stub has it."""
    policy = policy_of(find_method(method_name))
    named = frozenset(options_pb2.Service.Name(caller).removeprefix("SERVICE_").lower() for caller in policy.callers)
    return named if named or policy.internal else _OUTSIDE
