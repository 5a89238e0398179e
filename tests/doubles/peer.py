"""A service behind the edge: a real gRPC server that answers as a test tells it and remembers what it was asked."""

import asyncio
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

from aiaas.router.v1 import inference_service_pb2 as pb
from mesh.auth import find_method
from mesh.errors import PlatformError, to_status

Stream = Callable[[Any], AsyncIterator[Any]]


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
    in neither returns its empty response. `cancelled` holds the names of streams that were cancelled. An inference on a
    relay counts as a call of Infer; `relayed` holds what came on relays, whose pings are answered while `is_alive`.
    """

    address: str
    answers: dict[str, Message | PlatformError] = field(default_factory=dict)
    streams: dict[str, Stream] = field(default_factory=dict)
    received: list[Received] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    relayed: list[pb.RelayBatch] = field(default_factory=list)
    is_alive: bool = True
    _server: Any = None

    async def start(self) -> None:
        """Listen, on the same address each time."""
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", 8 << 20),
                # Else it refuses the pings of the platform's channels.
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ]
        )
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
        if method.name == "Relay":
            return grpc.stream_stream_rpc_method_handler(self._relay, deserialize, _serialized)
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

    async def _relay(self, batches: AsyncIterator[pb.RelayBatch], context: Any) -> AsyncIterator[pb.RelayBatch]:
        """Serve a relay; each inference on it is an Infer."""
        outgoing: asyncio.Queue[pb.RelayFrame | None] = asyncio.Queue()
        reading = asyncio.create_task(self._read_relay(batches, outgoing))
        try:
            while (frame := await outgoing.get()) is not None:
                yield pb.RelayBatch(frames=[frame])
        finally:
            reading.cancel()
            await asyncio.wait([reading])

    async def _read_relay(
        self, batches: AsyncIterator[pb.RelayBatch], outgoing: "asyncio.Queue[pb.RelayFrame | None]"
    ) -> None:
        running: dict[int, asyncio.Task[None]] = {}
        credits: dict[int, _Credit] = {}
        try:
            async for batch in batches:
                self.relayed.append(batch)
                for frame in batch.frames:
                    inference_id = frame.inference_id
                    match frame.WhichOneof("kind"):
                        case "open":
                            credits[inference_id] = _Credit(frame.open.credit_bytes)
                            running[inference_id] = asyncio.create_task(
                                self._infer(inference_id, frame.open, credits[inference_id], outgoing)
                            )
                        case "credit":
                            credits[inference_id].give(frame.credit.bytes)
                        case "cancel":
                            running[inference_id].cancel()
                        case "ping" if self.is_alive:
                            outgoing.put_nowait(pb.RelayFrame(ping=pb.RelayPing()))
        finally:
            outgoing.put_nowait(None)
            for task in running.values():
                task.cancel()

    async def _infer(
        self,
        inference_id: int,
        opened: pb.RelayOpen,
        credit: "_Credit",
        outgoing: "asyncio.Queue[pb.RelayFrame | None]",
    ) -> None:
        metadata: dict[str, str | bytes] = {
            "authorization": f"Bearer {opened.credential}",
            "x-request-id": opened.request_id,
        }
        if opened.traceparent:
            metadata["traceparent"] = opened.traceparent
        self.received.append(Received("Infer", opened.request, metadata, opened.timeout_millis / 1000))
        try:
            async for part in self.streams.get("Infer", _nothing)(opened.request):
                frame = pb.RelayFrame(inference_id=inference_id)
                kind = part.WhichOneof("part")
                if kind == "data":
                    await credit.take(len(part.data))
                    frame.data = part.data
                elif kind is not None:
                    getattr(frame, kind).CopyFrom(getattr(part, kind))
                outgoing.put_nowait(frame)
        except PlatformError as error:
            status = to_status(error).SerializeToString()
            outgoing.put_nowait(pb.RelayFrame(inference_id=inference_id, status=status))
        except asyncio.CancelledError:
            self.cancelled.append("Infer")


class _Credit:
    """What may still be sent of one answer."""

    def __init__(self, size_bytes: int) -> None:
        self._left_bytes = size_bytes
        self._given = asyncio.Event()

    def give(self, size_bytes: int) -> None:
        self._left_bytes += size_bytes
        self._given.set()

    async def take(self, size_bytes: int) -> None:
        """Returns when there is any."""
        while self._left_bytes <= 0:
            self._given.clear()
            await self._given.wait()
        self._left_bytes -= size_bytes


async def _nothing(_: pb.InferRequest) -> AsyncIterator[pb.InferResponse]:
    yield pb.InferResponse(tail=pb.InferTail())


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


async def _abort(context: Any, error: PlatformError) -> None:
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
