"""Gives every call the id that its caller chose, or a new one, and the client that it is for; it never trusts the
caller's text as it is.
"""

import re
from typing import Any
from urllib.parse import unquote

import grpc
from grpc_interceptor import AsyncServerInterceptor

from mesh import context as call
from mesh.ids import new_request_id
from mesh.interceptors.handler import Handler, metadata_value, proceed
from mesh.networks import client_of, written
from mesh.tls import is_client, peer_services

METADATA = "x-request-id"
_SANE = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_PEER = re.compile(r"ipv[46]:(?P<address>.*):\d+")


class OriginInterceptor(AsyncServerInterceptor):
    """Sets `mesh.context.request_id`, `client_address` and `user_agent`.

    The edge says for which client it calls. A tool is its own client, whatever it says; who comes by a public address
    is who the proxies before it say.
    """

    def __init__(self, trusted_proxies: tuple[str, ...] = ()) -> None:
        self._trusted_proxies = trusted_proxies

    async def intercept(
        self, method: Handler, request: Any, context: grpc.aio.ServicerContext[Any, Any], method_name: str
    ) -> Any:
        """Passes the call on under its id."""
        given = metadata_value(context, METADATA)
        call.request_id.set(given if _SANE.fullmatch(given) else new_request_id())
        call.client_address.set(self._client_address(context))
        call.user_agent.set(metadata_value(context, "x-client-agent"))
        return await proceed(method, request, context)

    def _client_address(self, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        if is_client(context):
            told = ",".join(
                str(value) for key, value in context.invocation_metadata() or () if key == "x-forwarded-for"
            )
            return client_of(_peer(context), told, self._trusted_proxies)
        told = metadata_value(context, "x-client-address")
        return written(told) if told and "tool" not in peer_services(context) else _peer(context)


def _peer(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Where the call comes from; empty on a unix socket."""
    found = _PEER.fullmatch(unquote(context.peer() or ""))
    return written(found["address"].strip("[]")) if found else ""
