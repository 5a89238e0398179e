"""Channels to other services: balanced, health-checked, retrying only what the contract calls a read; it never holds
a stub.

Each call carries the request id, the credential, the trace and what is left of the deadline of the call that caused it.
"""

import asyncio
import functools
import json
from collections import Counter
from collections.abc import AsyncIterable, Callable
from typing import Any, Self

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from opentelemetry import propagate

from mesh import context as call
from mesh.request_signatures import METADATA as SIGNATURE_METADATA
from mesh.server import MESSAGE_BYTES
from mesh.tls import Tls, dns_name

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
    # A peer that restarts is found again within a quarter of a second: what is asked of it meanwhile and tried again
    # finds it there. Under its name, when its address is a new one, within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 250),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # For all its name, this is how long one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 1),
    # A proxy of the environment is for the outside, never for the mesh.
    ("grpc.enable_http_proxy", 0),
]


def connect(target: str, *services: ServiceDescriptor, tls: Tls | None = None) -> grpc.aio.Channel:
    """A channel to `target` ("host:port", "dns:///name:port" or "unix:/path") for calls of `services`, all of one peer.

    It connects when it is first used, and again whenever the peer was away. With `tls` the peer must have the
    certificate of the service whose contracts these are, and calls that begin after a renewal of ours have the new one.
    """
    options: list[tuple[str, Any]] = [*_OPTIONS, ("grpc.service_config", json.dumps(service_config(*services)))]
    interceptors: list[Any] = [_UnaryUnary(), _UnaryStream()]
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
    # Whatever it is called in the target: an address says nothing of who is there.
    options.append(("grpc.ssl_target_name_override", dns_name(_peer_of(*services))))
    return _RenewedChannel(
        lambda: grpc.aio.secure_channel(target, tls.channel_credentials(), options=options, interceptors=interceptors),
        tls,
    )


def _peer_of(*services: ServiceDescriptor) -> str:
    """The service of the platform that serves contracts: the one that their package is named after."""
    (name,) = {service.full_name.split(".")[1] for service in services}
    return name


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


class _RenewedChannel(grpc.aio.Channel):
    """A channel whose calls begin with the newest certificate, and end on the connection that they began on: gRPC's
    own keep the certificate that they were made with."""

    def __init__(self, open_channel: Callable[[], grpc.aio.Channel], tls: Tls) -> None:
        self._open = open_channel
        self._tls = tls
        self._generation = tls.generation
        self._newest = open_channel()
        self._calls: Counter[grpc.aio.Channel] = Counter()
        self._farewells: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def newest(self) -> grpc.aio.Channel:
        """The channel for calls that begin now."""
        if self._generation != self._tls.generation and not self._is_closed:
            self._generation = self._tls.generation
            former, self._newest = self._newest, self._open()
            self._leave(former)
        return self._newest

    def begin(self, channel: grpc.aio.Channel, call: Any) -> None:
        """Keep a channel open until a call on it has ended."""
        self._calls[channel] += 1
        call.add_done_callback(functools.partial(self._end, channel))

    def _end(self, channel: grpc.aio.Channel, _: object) -> None:
        self._calls[channel] -= 1
        if channel is not self._newest:
            self._leave(channel)

    def _leave(self, former: grpc.aio.Channel) -> None:
        if self._calls[former]:
            return
        del self._calls[former]
        farewell = asyncio.get_running_loop().create_task(former.close(None))
        self._farewells.add(farewell)
        farewell.add_done_callback(self._farewells.discard)

    async def close(self, grace: float | None = None) -> None:
        self._is_closed = True
        await asyncio.gather(*(channel.close(grace) for channel in {self._newest, *self._calls}), *self._farewells)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.newest().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self.newest().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.newest().channel_ready()

    def unary_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        return _Rpc(self, lambda channel: channel.unary_unary(method, *arguments, **options))

    def unary_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        return _Rpc(self, lambda channel: channel.unary_stream(method, *arguments, **options))

    def stream_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        return _Rpc(self, lambda channel: channel.stream_unary(method, *arguments, **options))

    def stream_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        return _Rpc(self, lambda channel: channel.stream_stream(method, *arguments, **options))


class _Rpc:
    """An RPC of a channel that is another one after a renewal."""

    def __init__(self, renewed: _RenewedChannel, bind: Callable[[grpc.aio.Channel], Callable[..., Any]]) -> None:
        self._renewed = renewed
        self._bind = bind
        self._channel = renewed.newest()
        self._call = bind(self._channel)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        channel = self._renewed.newest()
        if channel is not self._channel:
            self._channel, self._call = channel, self._bind(channel)
        call = self._call(*arguments, **options)
        self._renewed.begin(channel, call)
        return call
