"""InferenceService over gRPC: Infer, Relay and the list of served models; what an inference is lies in `inference`."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc

from aiaas.router.v1 import inference_service_pb2 as pb
from aiaas.router.v1 import inference_service_pb2_grpc
from mesh import context as call
from mesh import tracing
from mesh.auth import Principal
from mesh.errors import PlatformError, Reason
from router.answers import Head, InferenceRequest, Tail
from router.backends import Registry, is_allowed
from router.inference import Engine, Inference
from router.models import Model
from router.relay import Relay, Relays, write_head, write_tail

logger = logging.getLogger(__name__)

SILENCE_S = 10.0
"""An edge that has not said anything for so long is gone; it is to speak every half second."""

_HELD_BYTES = 256 << 10

_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_service_pb2_grpc.InferenceServiceServicer):
    """Runs inference for the principal of the call, or for those of a relay's frames."""

    def __init__(self, engine: Engine, registry: Registry, relays: Relays) -> None:
        self._engine = engine
        self._registry = registry
        self._relays = relays
        self._running: dict[Inference, str] = {}

    def running(self) -> Iterator[tuple[str, Inference]]:
        """What Infer runs now, with the credential it was asked for with."""
        for inference, credential in self._running.items():
            yield credential, inference

    async def Infer(self, request: pb.InferRequest, context: _Context) -> AsyncIterator[pb.InferResponse]:
        """Run one request."""
        deadline = call.deadline.get()
        now = self._engine.clock.monotonic()
        reader = _Reader()
        losses = self._engine.journal.losses
        inference = self._engine.begin(
            InferenceRequest(
                request_id=call.request_id.get(),
                endpoint=request.endpoint,
                body=request.body,
                principal=_principal(),
                # Who calls by network is not theirs to say.
                client_address=call.client_address.get() or request.client_address,
                idempotency_key=request.idempotency_key,
                deadline=None if deadline is None else now + deadline - asyncio.get_running_loop().time(),
                span=tracing.current(),
            ),
            reader,
        )
        # A client that goes away while an answer waits to be read leaves this generator suspended at its yield, where
        # no cancellation arrives: without this, closing the connection would be left to the garbage collector.
        context.add_done_callback(lambda _: inference.abandon())  # type: ignore[arg-type]  # stubs want a subclass
        self._running[inference] = call.credential.get() or ""
        running = asyncio.create_task(reader.run(inference))
        try:
            async for response in reader.responses():
                # Nothing leaves before the journal has it.
                self._engine.journal.secure(losses)
                yield response
        finally:
            self._running.pop(inference, None)
            inference.abandon()
            await asyncio.wait([running])

    async def Relay(self, requests: AsyncIterator[pb.RelayBatch], context: _Context) -> AsyncIterator[pb.RelayBatch]:
        """Carry the inferences of one edge worker, until it or this router goes."""
        relay = self._relays.open()
        reading = asyncio.create_task(_read(relay, requests))
        try:
            async for batch in relay.batches():
                yield batch
        finally:
            reading.cancel()
            await self._relays.close(relay)

    async def ListServedModels(
        self, request: pb.ListServedModelsRequest, context: _Context
    ) -> pb.ListServedModelsResponse:
        """List the models that the caller may use. Asked for one that he may not, the error is MODEL_NOT_FOUND."""
        await self._registry.check_loaded()
        snapshot = self._registry.snapshot
        allowed_models = _principal().allowed_models
        if request.model:
            models = [snapshot.find_model(request.model, allowed_models)]
            if models[0].model_id not in snapshot.served:
                raise PlatformError(Reason.MODEL_NOT_FOUND, field="model", model=request.model)
        else:
            models = [
                snapshot.models[model_id]
                for model_id in sorted(snapshot.served)
                if is_allowed(snapshot.models[model_id], allowed_models)
            ]
        return pb.ListServedModelsResponse(models=map(_served_model, models))


def _principal() -> Principal:
    principal = call.principal.get()
    if principal is None:
        raise PlatformError(Reason.MISSING_CREDENTIALS)
    return principal


def _served_model(model: Model) -> pb.ServedModel:
    message = pb.ServedModel(model=model.model_id, owner=model.owner)
    message.create_time.FromDatetime(model.create_time)
    return message


async def _read(relay: Relay, requests: AsyncIterator[pb.RelayBatch]) -> None:
    """Hand on what the edge sends; when it goes, or falls silent, so does the relay."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(SILENCE_S) as silence:
            async for batch in requests:
                silence.reschedule(loop.time() + SILENCE_S)
                relay.receive(batch)
    except TimeoutError:
        logger.warning("an edge fell silent; its inferences are abandoned")
    finally:
        relay.abandon()


class _Reader:
    """Holds the parts of one answer until they are written; an answer of which too much is held is paused."""

    def __init__(self) -> None:
        self._responses: deque[pb.InferResponse] = deque()
        self._held_bytes = 0
        self._arrived = asyncio.Event()
        self._inference: Inference | None = None
        self._error: Exception | None = None
        self._ended = False

    async def run(self, inference: Inference) -> None:
        """Run the inference; what it raises, `responses` raises."""
        self._inference = inference
        try:
            await inference.run()
        except Exception as error:
            self._error = error
        finally:
            self._ended = True
            self._arrived.set()

    async def responses(self) -> AsyncIterator[pb.InferResponse]:
        """What the inference answers. Raises PlatformError as it does."""
        while True:
            while self._responses:
                response = self._responses.popleft()
                yield response
                if self._held_bytes > _HELD_BYTES >= self._held_bytes - len(response.data) and self._inference:
                    self._inference.resume()
                self._held_bytes -= len(response.data)
            if self._error is not None:
                raise self._error
            if self._ended:
                return
            self._arrived.clear()
            await self._arrived.wait()

    def head(self, head: Head) -> None:
        """Take the head."""
        message = pb.InferResponse()
        write_head(message.head, head)
        self._put(message)

    def data(self, data: bytes) -> None:
        """Take bytes of the answer."""
        self._held_bytes += len(data)
        self._put(pb.InferResponse(data=data))
        if self._held_bytes > _HELD_BYTES and self._inference is not None:
            self._inference.pause()

    def tail(self, tail: Tail) -> None:
        """Take the tail."""
        message = pb.InferResponse()
        write_tail(message.tail, tail)
        self._put(message)

    def _put(self, response: pb.InferResponse) -> None:
        self._responses.append(response)
        self._arrived.set()
