"""BackendService over gRPC: reads requests, asks the store, writes answers; what a backend may be is in `backends`."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, cast

import grpc

from aiaas.router.v1 import backend_service_pb2 as pb
from aiaas.router.v1 import backend_service_pb2_grpc
from mesh.errors import PlatformError
from mesh.pages import IdPlace, cut, read_page_size, read_token
from router.backends import WEIGHT, Backend, BackendModel, Registry, check_backend
from router.changes import creation_of, fields_to_change, require, require_same_id
from router.store import Store

_CHANGEABLE = (
    "base_url",
    "engine",
    "models",
    "weight",
    "limit_concurrent_requests",
    "draining",
    "first_byte_timeout_millis",
    "credential_variable",
)
_Context = grpc.aio.ServicerContext[Any, Any]


class BackendService(backend_service_pb2_grpc.BackendServiceServicer):
    """The registry of backends. A change is in this router's memory before it is answered."""

    def __init__(self, store: Store, registry: Registry) -> None:
        self._store = store
        self._registry = registry

    async def CreateBackend(self, request: pb.CreateBackendRequest, context: _Context) -> pb.CreateBackendResponse:
        """Register a backend."""
        require(request, "backend")
        backend = _from_proto(request.backend)
        check_backend(backend)
        creation = creation_of("backends", request.request_id, request.backend)
        created = await self._store.create_backend(backend, creation)
        await self._refresh()
        return pb.CreateBackendResponse(backend=self._to_proto(created))

    async def GetBackend(self, request: pb.GetBackendRequest, context: _Context) -> pb.GetBackendResponse:
        """Return one backend."""
        return pb.GetBackendResponse(backend=self._to_proto(await self._store.get_backend(request.backend_id)))

    async def ListBackends(self, request: pb.ListBackendsRequest, context: _Context) -> pb.ListBackendsResponse:
        """Return a page of backends."""
        size, after = read_page_size(request.page_size), read_token(request, IdPlace)
        found = await self._store.list_backends(after.id if after else "", size + 1, request.model_id)
        backends, token = cut(request, found, size, self._to_proto, lambda backend: IdPlace(backend.backend_id))
        return pb.ListBackendsResponse(backends=backends, next_page_token=token)

    async def UpdateBackend(self, request: pb.UpdateBackendRequest, context: _Context) -> pb.UpdateBackendResponse:
        """Change what the mask names."""
        require(request, "backend")
        require_same_id(request.backend_id, request.backend.backend_id, "backend.backend_id")
        names = fields_to_change(request.backend, request.update_mask, _CHANGEABLE)
        given = dataclasses.replace(_from_proto(request.backend), backend_id=request.backend_id)

        def change(current: Backend) -> Backend:
            changed = dataclasses.replace(current, **{name: getattr(given, name) for name in names})
            check_backend(changed)
            return changed

        def make() -> Backend:
            check_backend(given)
            return given

        updated = await self._store.update_backend(
            request.backend_id, request.backend.etag, change, make if request.allow_missing else None
        )
        await self._refresh()
        return pb.UpdateBackendResponse(backend=self._to_proto(updated))

    async def DeleteBackend(self, request: pb.DeleteBackendRequest, context: _Context) -> pb.DeleteBackendResponse:
        """Remove a backend."""
        await self._store.delete_backend(request.backend_id, request.etag)
        await self._refresh()
        return pb.DeleteBackendResponse()

    async def _refresh(self) -> None:
        # The change is stored; if PostgreSQL went away since, polling will find it.
        with contextlib.suppress(PlatformError):
            await self._registry.refresh()

    def _to_proto(self, backend: Backend) -> pb.Backend:
        message = pb.Backend(
            backend_id=backend.backend_id,
            base_url=backend.base_url,
            engine=cast("pb.EngineKind.ValueType", backend.engine),
            models=[
                pb.BackendModel(model_id=model.model_id, upstream_model=model.upstream_model)
                for model in backend.models
            ],
            weight=backend.weight,
            limit_concurrent_requests=backend.limit_concurrent_requests,
            draining=backend.draining,
            first_byte_timeout_millis=backend.first_byte_timeout_millis,
            credential_variable=backend.credential_variable,
            etag=backend.etag,
        )
        message.create_time.FromDatetime(backend.create_time)
        message.update_time.FromDatetime(backend.update_time)
        state = self._registry.state(backend.backend_id)
        if state is not None:
            message.requests_in_flight = state.in_flight
            message.health_reason = state.health_reason
            if state.probed:
                message.health = pb.BACKEND_HEALTH_HEALTHY if state.healthy else pb.BACKEND_HEALTH_UNHEALTHY
        return message


def _from_proto(message: pb.Backend) -> Backend:
    return Backend(
        backend_id=message.backend_id,
        base_url=message.base_url.removesuffix("/"),
        engine=message.engine,
        models=tuple(BackendModel(model.model_id, model.upstream_model) for model in message.models),
        weight=message.weight or WEIGHT,
        limit_concurrent_requests=message.limit_concurrent_requests,
        draining=message.draining,
        first_byte_timeout_millis=message.first_byte_timeout_millis,
        credential_variable=message.credential_variable,
    )
