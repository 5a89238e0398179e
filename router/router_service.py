"""RouterService over gRPC: the replicas, and what they read off their engines; it decides nothing itself."""

from __future__ import annotations

from typing import Any

import grpc
import msgspec

from aiaas.router.v1 import router_service_pb2 as pb
from aiaas.router.v1 import router_service_pb2_grpc
from mesh.conversions import from_timestamp, to_timestamp
from mesh.fields import check_filter, invalid
from mesh.pages import Moment, Text, cut, read_page_size, read_token
from router.changes import require
from router.engine_token_store import EngineTokenStore
from router.engine_tokens import Window
from router.router_store import RouterStore
from router.routers import Heartbeat

_Context = grpc.aio.ServicerContext[Any, Any]


class _Place(msgspec.Struct, frozen=True, array_like=True):
    """A place in the order of windows."""

    backend_id: Text
    start_time: Moment


class RouterService(router_service_pb2_grpc.RouterServiceServicer):
    """aiaas.router.v1.RouterService. Every replica answers the same, from the database that they share."""

    def __init__(self, routers: RouterStore, engine_tokens: EngineTokenStore) -> None:
        self._routers = routers
        self._engine_tokens = engine_tokens

    async def ListRouters(self, request: pb.ListRoutersRequest, context: _Context) -> pb.ListRoutersResponse:
        """The replicas that are alive."""
        return pb.ListRoutersResponse(routers=map(_router, await self._routers.list_alive()))

    async def ResolveRouters(self, request: pb.ResolveRoutersRequest, context: _Context) -> pb.ResolveRoutersResponse:
        """The replicas that were alive at some time since a moment."""
        if request.HasField("since_time"):
            found = await self._routers.list_since(from_timestamp(request.since_time, "since_time"))
        else:
            found = await self._routers.list_alive()
        return pb.ResolveRoutersResponse(routers=map(_router, found))

    async def QueryEngineTokens(
        self, request: pb.QueryEngineTokensRequest, context: _Context
    ) -> pb.QueryEngineTokensResponse:
        """A page of movements of the engines' counters."""
        check_filter(request.backend_id, "backend_id")
        require(request, "start_time")
        require(request, "end_time")
        start, end = (from_timestamp(getattr(request, name), name) for name in ("start_time", "end_time"))
        if start >= end:
            raise invalid("start_time", "must be before the end of the range")
        size, after = read_page_size(request.page_size), read_token(request, _Place)
        place = (after.backend_id, after.start_time) if after else None
        found = await self._engine_tokens.list_windows(request.backend_id, start, end, place, size + 1)
        windows, token = cut(
            request, found, size, _engine_tokens, lambda window: _Place(window.backend_id, window.start_time)
        )
        return pb.QueryEngineTokensResponse(windows=windows, next_page_token=token)


def _router(heartbeat: Heartbeat) -> pb.Router:
    replica, condition = heartbeat.replica, heartbeat.condition
    return pb.Router(
        router_id=replica.router_id,
        router_instance_id=replica.router_instance_id,
        address=replica.address,
        version=replica.version,
        draining=condition.draining,
        requests_in_flight=condition.requests_in_flight,
        unpublished_entries=condition.unpublished_entries,
        start_time=to_timestamp(replica.start_time),
        heartbeat_time=to_timestamp(heartbeat.heartbeat_time),
    )


def _engine_tokens(window: Window) -> pb.EngineTokens:
    return pb.EngineTokens(
        backend_id=window.backend_id,
        start_time=to_timestamp(window.start_time),
        end_time=to_timestamp(window.end_time),
        prompt_tokens=window.prompt_tokens,
        cached_prompt_tokens=window.cached_prompt_tokens,
        completion_tokens=window.completion_tokens,
        reset=window.reset,
    )
