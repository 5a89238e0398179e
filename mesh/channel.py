"""Channels to other services: balanced, health-checked, retrying only what the contract calls a read; it never holds
a stub.

Each call carries the request id, the credential, the trace and what is left of the deadline of the call that caused it.
"""

import asyncio
import json
from collections.abc import AsyncIterable, Callable
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from opentelemetry import propagate

from mesh import context as call
from mesh.request_signatures import METADATA as SIGNATURE_METADATA
from mesh.server import MESSAGE_BYTES

# So that the callee's own "deadline exceeded", which can say why, is back before ours.
_SHAVED_S = 0.02
_UNARY_TIMEOUT_S = 10.0

_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A peer that restarts is found again within a second, under its name too when its address is a new one.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # For all its name, this is how long one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 1),
    # A proxy of the environment is for the outside, never for the mesh.
    ("grpc.enable_http_proxy", 0),
]


def connect(target: str, *services: ServiceDescriptor) -> grpc.aio.Channel:
    """A channel to `target` ("host:port", "dns:///name:port" or "unix:/path") for calls of `services`.

    It connects when it is first used, and again whenever the peer was away.
    """
    options = [*_OPTIONS, ("grpc.service_config", json.dumps(service_config(*services)))]
    interceptors: list[Any] = [_UnaryUnary(), _UnaryStream()]
    return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)


def service_config(*services: ServiceDescriptor) -> dict[str, Any]:
    """gRPC's service config: every healthy address in turn; reads are tried three times while the peer is away."""
    reads = [
        {"service": service.full_name, "method": method.name}
        for service in services
        for method in service.methods
        if _is_read(method)
    ]
    config: dict[str, Any] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": ""},
    }
    if reads:
        config["methodConfig"] = [
            {
                "name": reads,
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 3,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    return config


def _is_read(method: MethodDescriptor) -> bool:
    return bool(method.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS)


def _with_context(details: grpc.aio.ClientCallDetails, default_timeout_s: float | None) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    carried = {
        "x-request-id": call.request_id.get(),
        "x-client-address": call.client_address.get(),
        "x-client-agent": call.user_agent.get(),
        "authorization": f"Bearer {call.credential.get()}" if call.credential.get() else "",
    }
    signature = call.signature.get()
    if signature is not None:
        metadata.add(SIGNATURE_METADATA, signature.SerializeToString())
    # W3C trace context, where the call belongs to a span.
    propagate.inject(carried)
    for key, value in carried.items():
        if value and key not in metadata:
            metadata.add(key, value)
    timeout_s = details.timeout if details.timeout is not None else default_timeout_s
    deadline = call.deadline.get()
    if deadline is not None:
        left_s = max(0.0, deadline - asyncio.get_running_loop().time() - _SHAVED_S)
        timeout_s = left_s if timeout_s is None else min(timeout_s, left_s)
    return grpc.aio.ClientCallDetails(details.method, timeout_s, metadata, details.credentials, details.wait_for_ready)


class _UnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_with_context(details, _UNARY_TIMEOUT_S), request)


class _UnaryStream(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], details: grpc.aio.ClientCallDetails, request: Any
    ) -> AsyncIterable[Any]:
        answer: AsyncIterable[Any] = await continuation(_with_context(details, None), request)
        return answer
