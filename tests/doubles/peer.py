"""A service behind the edge: a real gRPC server that answers as a test tells it and remembers what it was asked."""

import functools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_status import rpc_status

from mesh.auth import find_method
from mesh.errors import PlatformError, to_status

Stream = Callable[[Any], AsyncIterator[Message]]


@dataclass(frozen=True)
class Received:
    """One call that arrived."""

    rpc: str
    request: Any
    metadata: dict[str, str | bytes]
    timeout_s: float | None


@dataclass
class PeerDouble(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Serves every RPC of the contracts on one address.

    `answers` holds by the RPC's name what it returns or raises, `streams` what a streaming one yields; an RPC that is
    in neither returns its empty response. `cancelled` holds the names of streams that were cancelled.
    """

    address: str
    answers: dict[str, Message | PlatformError] = field(default_factory=dict)
    streams: dict[str, Stream] = field(default_factory=dict)
    received: list[Received] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    _server: Any = None

    async def start(self) -> None:
        """Listen, on the same address each time."""
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", 8 << 20)])
        servicer = HealthServicer()
        await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        self._server.add_generic_rpc_handlers([self])
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self, grace_s: float | None = None) -> None:
        """Stop listening and end what runs."""
        await self._server.stop(grace_s)

    def service(self, details: Any) -> Any:
        """The handler of an RPC, None for one that no contract has."""
        try:
            method = find_method(details.method)
        except KeyError:
            return None
        deserialize = GetMessageClass(method.input_type).FromString
        if method.server_streaming:
            stream = functools.partial(self._stream, method)
            return grpc.unary_stream_rpc_method_handler(stream, deserialize, _serialized)
        unary = functools.partial(self._unary, method)
        return grpc.unary_unary_rpc_method_handler(unary, deserialize, _serialized)

    def _remember(self, method: MethodDescriptor, request: Message, context: Any) -> None:
        metadata = dict(context.invocation_metadata())
        self.received.append(Received(method.name, request, metadata, context.time_remaining()))

    async def _unary(self, method: MethodDescriptor, request: Message, context: Any) -> Message:
        self._remember(method, request, context)
        answer = self.answers.get(method.name)
        if isinstance(answer, PlatformError):
            await _abort(context, answer)
            raise AssertionError("abort returned")
        return answer or GetMessageClass(method.output_type)()

    async def _stream(self, method: MethodDescriptor, request: Message, context: Any) -> AsyncIterator[Message]:
        self._remember(method, request, context)
        script = self.streams.get(method.name)
        if script is None:
            return
        ended = False
        try:
            async for message in script(request):
                yield message
            ended = True
        except PlatformError as error:
            ended = True
            await _abort(context, error)
        finally:
            # A call that is cancelled while a message is written closes this generator without CancelledError.
            if not ended:
                self.cancelled.append(method.name)


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


async def _abort(context: Any, error: PlatformError) -> None:
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
