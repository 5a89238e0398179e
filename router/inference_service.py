"""InferenceService over gRPC: Infer and the list of served models; what an inference is lies in `inference`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from aiaas.router.v1 import inference_service_pb2 as pb
from aiaas.router.v1 import inference_service_pb2_grpc
from mesh import context as call
from mesh.auth import Principal
from mesh.errors import PlatformError, Reason
from router.backends import Registry, is_allowed
from router.inference import Engine, Head, InferenceRequest, Part, Tail
from router.models import Model

_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_service_pb2_grpc.InferenceServiceServicer):
    """Runs inference for the principal of the call."""

    def __init__(self, engine: Engine, registry: Registry) -> None:
        self._engine = engine
        self._registry = registry

    async def Infer(self, request: pb.InferRequest, context: _Context) -> AsyncIterator[pb.InferResponse]:
        """Run one request."""
        deadline = call.deadline.get()
        now = self._engine.clock.monotonic()
        inference = self._engine.begin(
            InferenceRequest(
                request_id=call.request_id.get(),
                endpoint=request.endpoint,
                body=request.body,
                principal=_principal(),
                client_address=request.client_address,
                idempotency_key=request.idempotency_key,
                deadline=None if deadline is None else now + deadline - asyncio.get_running_loop().time(),
            )
        )
        # A client that goes away while an answer waits to be read leaves this generator suspended at its yield, where
        # no cancellation arrives: without this, closing the connection would be left to the garbage collector.
        context.add_done_callback(lambda _: inference.abandon())  # type: ignore[arg-type]  # stubs want a subclass
        async with aclosing(inference.parts()) as parts:
            async for part in parts:
                yield _response(part)

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


def _response(part: Part) -> pb.InferResponse:
    if isinstance(part, bytes):
        return pb.InferResponse(data=part)
    if isinstance(part, Head):
        head = pb.InferHead(
            request_id=part.request_id,
            content_type=part.content_type,
            model=part.model,
            backend_id=part.backend_id,
        )
        return pb.InferResponse(head=head)
    return pb.InferResponse(tail=_tail(part))


def _tail(part: Tail) -> pb.InferTail:
    return pb.InferTail(usage=part.usage, finish_reason=part.finish_reason, outcome=part.outcome)
