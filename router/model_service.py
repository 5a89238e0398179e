"""ModelService over gRPC: reads requests, asks the store, writes answers; what a model may be is in `models`."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, cast

import grpc

from aiaas.router.v1 import model_service_pb2 as pb
from aiaas.router.v1 import model_service_pb2_grpc
from aiaas.type.v1.usage_event_pb2 import Endpoint
from mesh.errors import PlatformError
from mesh.pages import IdPlace, cut, read_page_size, read_token
from router.backends import Registry
from router.changes import creation_of, fields_to_change, require, require_same_id
from router.models import Model, check_model
from router.store import Store

_CHANGEABLE = ("aliases", "owner", "context_tokens", "endpoints")
_Context = grpc.aio.ServicerContext[Any, Any]


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """The registry of models. A change is in this router's memory before it is answered."""

    def __init__(self, store: Store, registry: Registry) -> None:
        self._store = store
        self._registry = registry

    async def CreateModel(self, request: pb.CreateModelRequest, context: _Context) -> pb.CreateModelResponse:
        """Register a model."""
        require(request, "model")
        model = _from_proto(request.model)
        check_model(model)
        created = await self._store.create_model(model, creation_of("models", request.request_id, request.model))
        await self._refresh()
        return pb.CreateModelResponse(model=_to_proto(created))

    async def GetModel(self, request: pb.GetModelRequest, context: _Context) -> pb.GetModelResponse:
        """Return one model."""
        return pb.GetModelResponse(model=_to_proto(await self._store.get_model(request.model_id)))

    async def ListModels(self, request: pb.ListModelsRequest, context: _Context) -> pb.ListModelsResponse:
        """Return a page of models."""
        size, after = read_page_size(request.page_size), read_token(request, IdPlace)
        found = await self._store.list_models(after.id if after else "", size + 1)
        models, token = cut(request, found, size, _to_proto, lambda model: IdPlace(model.model_id))
        return pb.ListModelsResponse(models=models, next_page_token=token)

    async def UpdateModel(self, request: pb.UpdateModelRequest, context: _Context) -> pb.UpdateModelResponse:
        """Change what the mask names."""
        require(request, "model")
        require_same_id(request.model_id, request.model.model_id, "model.model_id")
        names = fields_to_change(request.model, request.update_mask, _CHANGEABLE)
        given = dataclasses.replace(_from_proto(request.model), model_id=request.model_id)

        def change(current: Model) -> Model:
            changed = dataclasses.replace(current, **{name: getattr(given, name) for name in names})
            check_model(changed)
            return changed

        def make() -> Model:
            check_model(given)
            return given

        updated = await self._store.update_model(
            request.model_id, request.model.etag, change, make if request.allow_missing else None
        )
        await self._refresh()
        return pb.UpdateModelResponse(model=_to_proto(updated))

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: _Context) -> pb.DeleteModelResponse:
        """Remove a model that no backend serves."""
        await self._store.delete_model(request.model_id, request.etag)
        await self._refresh()
        return pb.DeleteModelResponse()

    async def _refresh(self) -> None:
        # The change is stored; if PostgreSQL went away since, polling will find it.
        with contextlib.suppress(PlatformError):
            await self._registry.refresh()


def _from_proto(message: pb.Model) -> Model:
    return Model(
        model_id=message.model_id,
        aliases=tuple(message.aliases),
        owner=message.owner,
        context_tokens=message.context_tokens,
        endpoints=tuple(message.endpoints),
    )


def _to_proto(model: Model) -> pb.Model:
    message = pb.Model(
        model_id=model.model_id,
        aliases=model.aliases,
        owner=model.owner,
        context_tokens=model.context_tokens,
        endpoints=cast("list[Endpoint.ValueType]", model.endpoints),
        etag=model.etag,
    )
    message.create_time.FromDatetime(model.create_time)
    message.update_time.FromDatetime(model.update_time)
    return message
