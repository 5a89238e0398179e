"""GET /v1/models and /v1/models/{id}: the models that the caller may use, as the router lists them; it adds none."""

import msgspec
from starlette.types import Receive, Scope, Send

from aiaas.router.v1 import inference_service_pb2, inference_service_pb2_grpc
from edge.exchange import exchange_of
from edge.peers import Peer
from mesh.errors import PlatformError, Reason

_TIMEOUT_S = 30.0
_JSON = (b"content-type", b"application/json")


class ModelsEndpoint:
    """An ASGI endpoint for the list, and with `{model:path}` in its route for one model; ids may contain slashes."""

    def __init__(self, route: str, router: Peer) -> None:
        self._route = route
        self._router = router
        self._stub = inference_service_pb2_grpc.InferenceServiceStub(router.channel)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises PlatformError."""
        exchange = exchange_of(scope)
        exchange.route = self._route
        exchange.allow("GET")
        exchange.take_credential()
        model: str | None = scope["path_params"].get("model")
        if model == "":
            raise PlatformError(Reason.ROUTE_NOT_FOUND)
        request = inference_service_pb2.ListServedModelsRequest(model=model or "")
        response = await self._router.call(self._stub.ListServedModels, request, _TIMEOUT_S)
        models = [_as_openai(served) for served in response.models]
        if model is None:
            await exchange.respond(200, [_JSON], msgspec.json.encode({"object": "list", "data": models}))
            return
        if not models:
            raise PlatformError(Reason.MODEL_NOT_FOUND, field="model", model=model)
        await exchange.respond(200, [_JSON], msgspec.json.encode(models[0]))


def _as_openai(served: inference_service_pb2.ServedModel) -> dict[str, object]:
    return {
        "id": served.model,
        "object": "model",
        "created": served.create_time.seconds,
        "owned_by": served.owner,
    }
