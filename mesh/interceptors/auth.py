"""Holds every call to the policy that its contract declares; it never knows how a credential is checked."""

from collections.abc import Collection
from functools import cache
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from grpc_interceptor import AsyncServerInterceptor

from aiaas.type.v1 import options_pb2
from mesh import context as call
from mesh import policies
from mesh.auth import Authenticator, authorize, credential_of, find_method, policy_of
from mesh.interceptors.handler import Handler, metadata_value, proceed
from mesh.networks import check_network
from mesh.policies import Decider
from mesh.request_signatures import METADATA, SignatureVerifier, check, from_metadata

_WITHOUT_PRINCIPAL = ("public", "internal")


class AuthInterceptor(AsyncServerInterceptor):
    """Resolves the principal, checks permission, organization and the organization's policies, and sets
    `mesh.context.principal`."""

    def __init__(
        self,
        authenticator: Authenticator,
        signatures: SignatureVerifier | None,
        decider: Decider | None = None,
        asking_policies: Collection[str] = (),
    ) -> None:
        self._authenticator = authenticator
        self._signatures = signatures
        self._decider = decider
        self._asking_policies = asking_policies

    async def intercept(
        self, method: Handler, request: Any, context: grpc.aio.ServicerContext[Any, Any], method_name: str
    ) -> Any:
        """Passes the call on, if its caller may make it. Raises PlatformError as `mesh.auth.authorize` does."""
        if not method_name.startswith("/aiaas."):
            # gRPC's own services: health and reflection.
            return await proceed(method, request, context)
        policy = _policy(method_name)
        if policy.WhichOneof("access") not in _WITHOUT_PRINCIPAL:
            credential = credential_of(metadata_value(context, "authorization"))
            principal = await self._authenticator.authenticate(credential)
            # Set first, so that whoever sees a refusal knows whose it is.
            call.principal.set(principal)
            check_network(principal.allowed_networks, call.client_address.get())
            if principal.signature_required:
                await check(principal, from_metadata(_signature(context)), self._signatures)
            # A stream of requests is judged by permission alone; its handler judges each message.
            judged = request if isinstance(request, Message) else Empty()
            authorize(principal, policy, judged)
            if principal.policy_bound and method_name not in self._asking_policies:
                await policies.check(
                    self._decider,
                    principal,
                    method_name,
                    policy.permission,
                    policies.resource_of(judged),
                    call.client_address.get(),
                )
            call.credential.set(credential)
        return await proceed(method, request, context)


def _signature(context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    for key, value in context.invocation_metadata() or ():
        if key == METADATA and isinstance(value, bytes):
            return value
    return b""


@cache
def _policy(method_name: str) -> options_pb2.MethodPolicy:
    return policy_of(find_method(method_name))
