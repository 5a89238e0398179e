"""Servicers whose every answer a test gives, behind the platform's real interceptors, server and channel."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from aiaas.identity.v1 import api_key_service_pb2 as keys
from aiaas.identity.v1 import api_key_service_pb2_grpc as keys_grpc
from aiaas.router.v1 import inference_service_pb2 as inference
from aiaas.router.v1 import inference_service_pb2_grpc as inference_grpc
from aiaas.router.v1 import model_service_pb2 as models
from aiaas.router.v1 import model_service_pb2_grpc as models_grpc
from mesh.auth import Principal
from mesh.channel import connect
from mesh.errors import PlatformError, Reason, from_rpc_error
from mesh.interceptors import chain
from mesh.server import GrpcServer

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it

MODELS = models.DESCRIPTOR.services_by_name["ModelService"]
INFERENCE = inference.DESCRIPTOR.services_by_name["InferenceService"]
KEYS = keys.DESCRIPTOR.services_by_name["ApiKeyService"]

DEVELOPER = Principal(
    kind="api_key",
    id="key_1",
    organization_id="org_1",
    api_key_id="key_1",
    permissions=frozenset({"inference.create", "models.get", "models.update", "models.delete", "api_keys.get"}),
)
VISITOR = Principal(kind="user", id="user_2", organization_id="org_2")
CREDENTIALS = {"developer": DEVELOPER, "visitor": VISITOR}

Answer = Callable[[Any, Any], Any]


class KnownCredentials:
    """An authenticator that knows some credentials by heart."""

    async def authenticate(self, credential: str) -> Principal:
        """The principal of `CREDENTIALS`."""
        if credential not in CREDENTIALS:
            raise PlatformError(Reason.API_KEY_INVALID)
        return CREDENTIALS[credential]


@dataclass
class Servicer(
    models_grpc.ModelServiceServicer, inference_grpc.InferenceServiceServicer, keys_grpc.ApiKeyServiceServicer
):
    """Answers each RPC by the function that `answers` holds under its name; the others it lacks."""

    answers: Mapping[str, Answer] = field(default_factory=dict)

    async def GetModel(self, request: Any, context: Any) -> Any:
        """A read."""
        if "GetModel" not in self.answers:
            return models.GetModelResponse()
        return await self.answers["GetModel"](request, context)

    async def DeleteModel(self, request: Any, context: Any) -> Any:
        """A write."""
        return await self.answers["DeleteModel"](request, context)

    async def GetApiKey(self, request: Any, context: Any) -> Any:
        """A read within an organization."""
        return keys.GetApiKeyResponse()

    def Infer(self, request: Any, context: Any) -> Any:
        """A stream of answers."""
        return self.answers["Infer"](request, context)

    def Relay(self, request_iterator: Any, context: Any) -> Any:
        """Two streams."""
        return self.answers["Relay"](request_iterator, context)


def server(address: str, answers: Mapping[str, Answer] | None = None, **options: Any) -> GrpcServer:
    """A server that is not started yet; `options` go to `chain` and to `GrpcServer`."""
    servicer: Any = Servicer(answers or {})  # type: ignore[abstract]  # what it lacks is unimplemented
    chained = {name: options.pop(name) for name in ("traced", "stream_timeout_s", "trusted_proxies") if name in options}
    return GrpcServer(
        address,
        [
            (MODELS, models_grpc.add_ModelServiceServicer_to_server, servicer),
            (INFERENCE, inference_grpc.add_InferenceServiceServicer_to_server, servicer),
            (KEYS, keys_grpc.add_ApiKeyServiceServicer_to_server, servicer),
        ],
        chain(KnownCredentials(), **chained),
        **options,
    )


class Client:
    """Stubs on a channel of the mesh, and short ways to call."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.models = models_grpc.ModelServiceStub(channel)
        self.inference = inference_grpc.InferenceServiceStub(channel)
        self.keys = keys_grpc.ApiKeyServiceStub(channel)

    async def get_model(self, credential: str = "developer", **options: Any) -> models.GetModelResponse:
        """The one read that every test can use."""
        options.setdefault("timeout", 5)
        return await self.models.GetModel(models.GetModelRequest(), metadata=bearer(credential), **options)

    def infer(self, **options: Any) -> Any:
        """A call of the streaming RPC."""
        return self.inference.Infer(inference.InferRequest(), metadata=bearer("developer"), **options)


@asynccontextmanager
async def serving(address: str, answers: Mapping[str, Answer] | None = None, **options: Any) -> AsyncIterator[Client]:
    """A client of a running server."""
    running = server(address, answers, **{"drain_s": 0.5, **options})
    await running.start()
    try:
        async with connect(address, MODELS, INFERENCE, KEYS) as channel:
            yield Client(channel)
    finally:
        await running.stop()


def bearer(credential: str) -> tuple[tuple[str, str], ...]:
    """The metadata that carries a credential."""
    return (("authorization", f"Bearer {credential}"),)


async def error_of(call: Any) -> PlatformError:
    """The PlatformError that a call fails with, whether it answers once or streams."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await _to_end(call)
    return from_rpc_error(raised.value)


async def _to_end(call: Any) -> None:
    if not hasattr(call, "read"):
        await call
        return
    while await call.read() is not EOF:
        pass


async def until(condition: Callable[[], Any], within_s: float = 5.0) -> float:
    """Polls until the condition holds; returns the seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < within_s, "the condition does not hold in time"
        await asyncio.sleep(0.01)
    return time.monotonic() - started


async def _serve(address: str) -> None:
    running = server(address)
    await running.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    # A process of its own, for a test to kill.
    asyncio.run(_serve(sys.argv[1]))
