"""A real router: its gRPC on a unix socket, its registry in PostgreSQL, an identity that answers as a test says."""

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from aiaas.identity.v1.auth_service_pb2 import AuthenticateResponse
from aiaas.router.v1 import backend_service_pb2, inference_service_pb2, model_service_pb2, price_service_pb2
from aiaas.router.v1.backend_service_pb2_grpc import BackendServiceStub
from aiaas.router.v1.inference_service_pb2_grpc import InferenceServiceStub
from aiaas.router.v1.model_service_pb2_grpc import ModelServiceStub
from aiaas.router.v1.price_service_pb2_grpc import PriceServiceStub
from aiaas.type.v1.usage_event_pb2 import (
    ENDPOINT_CHAT_COMPLETIONS,
    ENDPOINT_COMPLETIONS,
    ENDPOINT_EMBEDDINGS,
    ENDPOINT_RESPONSES,
    Endpoint,
)
from mesh import tokens
from mesh.auth import Principal
from mesh.errors import PlatformError, from_rpc_error
from router.config import RouterConfig
from router.relay import Relays
from router.server import serve
from tests.conftest import Servers, migrated_database
from tests.doubles.peer import PeerDouble
from tests.doubles.relay_client import RelayClient

PERMISSIONS = frozenset(
    f"{resource}.{verb}"
    for resource in ("models", "backends", "routing_policies")
    for verb in ("create", "get", "list", "update", "delete")
) | {"inference.create", "inference.list_models", "prices.create", "prices.list"}
PRINCIPAL = Principal(
    "api_key", "key_1", "org_1", api_key_id="key_1", user_id="user_1", permissions=PERMISSIONS, platform=True
)
# A dollar for a million prompt tokens, a half for cached ones, two for completion: a token costs 1, 0.5 and 2 micros.
PRICE = price_service_pb2.Price(
    prompt_micros_per_million=1_000_000,
    cached_prompt_micros_per_million=500_000,
    completion_micros_per_million=2_000_000,
)
ALL_ENDPOINTS = (ENDPOINT_CHAT_COMPLETIONS, ENDPOINT_COMPLETIONS, ENDPOINT_EMBEDDINGS, ENDPOINT_RESPONSES)


async def until(condition: Callable[[], Any], within_s: float = 5.0) -> None:
    """Returns as soon as `condition`, which may be a coroutine function, holds."""
    async with asyncio.timeout(within_s):
        while True:
            held = condition()
            if await held if asyncio.iscoroutine(held) else held:
                return
            await asyncio.sleep(0.01)


@dataclass
class Answer:
    """What came of an inference: its parts, and the error that ended it, if one did."""

    head: inference_service_pb2.InferHead | None = None
    data: bytes = b""
    tail: inference_service_pb2.InferTail | None = None
    error: PlatformError | None = None


@dataclass
class Router:
    """A running router and a client of it."""

    config: RouterConfig
    identity: PeerDouble
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    credential: str = field(default_factory=lambda: tokens.API_KEY.generate().text)
    way: str = "Infer"
    relays: Relays | None = None

    def __post_init__(self) -> None:
        self.channel = grpc.aio.insecure_channel(
            self.config.grpc_address,
            options=[("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50)],
        )
        self.inference = InferenceServiceStub(self.channel)
        self.models = ModelServiceStub(self.channel)
        self.backends = BackendServiceStub(self.channel)
        self.prices = PriceServiceStub(self.channel)

    @property
    def metadata(self) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self.credential}"), ("x-request-id", "req_test")]

    async def call(self, method: Any, request: Any) -> Any:
        """The answer. Raises the PlatformError that the router raised."""
        try:
            return await method(request, metadata=self.metadata, timeout=10, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    def infer(
        self,
        body: Any,
        endpoint: Endpoint.ValueType = ENDPOINT_CHAT_COMPLETIONS,
        *,
        idempotency_key: str = "",
        timeout_s: float = 60,
    ) -> Any:
        """A call of Infer, or an inference on a relay; to be iterated, read or cancelled."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = inference_service_pb2.InferRequest(
            endpoint=endpoint, body=content, client_address="127.0.0.1", idempotency_key=idempotency_key
        )
        if self.way == "Infer":
            return self.inference.Infer(request, metadata=self.metadata, timeout=timeout_s)
        return self.relay.infer(
            inference_service_pb2.RelayOpen(
                request=request,
                credential=self.credential,
                request_id="req_test",
                timeout_millis=round(timeout_s * 1000),
            )
        )

    @functools.cached_property
    def relay(self) -> RelayClient:
        """A relay to it, over gRPC or within the process."""
        if self.way == "within the process":
            assert self.relays is not None
            relay = self.relays.open(window_s=0)
            return RelayClient(relay.batches(), relay.receive)
        call: Any = self.inference.Relay()  # type: ignore[call-arg]  # frames are written
        return RelayClient(call, call.write)

    async def new_relay(self) -> None:
        """Have the next inferences travel on another relay."""
        await self.relay.close()
        del self.relay

    async def close(self) -> None:
        if "relay" in self.__dict__:
            await self.relay.close()
        await self.channel.close(None)

    async def answer(self, body: Any, endpoint: Endpoint.ValueType = ENDPOINT_CHAT_COMPLETIONS, **more: Any) -> Answer:
        """Everything that comes of an inference."""
        answer = Answer()
        try:
            async for part in self.infer(body, endpoint, **more):
                match part.WhichOneof("part"):
                    case "head":
                        answer.head = part.head
                    case "data":
                        answer.data += part.data
                    case "tail":
                        answer.tail = part.tail
        except grpc.aio.AioRpcError as error:
            answer.error = from_rpc_error(error)
        except PlatformError as error:
            answer.error = error
        return answer

    async def add_model(self, model_id: str, **values: Any) -> model_service_pb2.Model:
        """Register a model and its price."""
        model = model_service_pb2.Model(model_id=model_id, endpoints=ALL_ENDPOINTS, **values)
        response = await self.call(self.models.CreateModel, model_service_pb2.CreateModelRequest(model=model))
        created: model_service_pb2.Model = response.model
        priced = price_service_pb2.CreatePriceRequest(model_id=model_id, price=PRICE)
        await self.call(self.prices.CreatePrice, priced)
        return created

    async def add_backend(self, backend_id: str, base_url: str, *models: str, **values: Any) -> None:
        """Register a backend and wait until it is healthy."""
        backend = backend_service_pb2.Backend(
            backend_id=backend_id,
            base_url=base_url,
            models=[backend_service_pb2.BackendModel(model_id=model) for model in models],
            **{"engine": backend_service_pb2.ENGINE_KIND_VLLM, **values},
        )
        await self.call(self.backends.CreateBackend, backend_service_pb2.CreateBackendRequest(backend=backend))
        await until(lambda: self.has_health(backend_id, backend_service_pb2.BACKEND_HEALTH_HEALTHY))

    async def get_backend(self, backend_id: str) -> backend_service_pb2.Backend:
        request = backend_service_pb2.GetBackendRequest(backend_id=backend_id)
        backend: backend_service_pb2.Backend = (await self.call(self.backends.GetBackend, request)).backend
        return backend

    async def has_health(self, backend_id: str, health: int) -> bool:
        return (await self.get_backend(backend_id)).health == health

    async def update_backend(self, backend_id: str, *paths: str, **values: Any) -> backend_service_pb2.Backend:
        request = backend_service_pb2.UpdateBackendRequest(
            backend_id=backend_id, backend=backend_service_pb2.Backend(**values)
        )
        request.update_mask.paths.extend(paths)
        backend: backend_service_pb2.Backend = (await self.call(self.backends.UpdateBackend, request)).backend
        return backend

    def act_as(self, principal: Principal) -> None:
        """A new credential, of which identity says that it is this principal's."""
        self.credential = tokens.API_KEY.generate().text
        self.identity.answers["Authenticate"] = AuthenticateResponse(principal=principal.to_proto())


@contextlib.asynccontextmanager
async def running(config: RouterConfig, identity: PeerDouble, *, way: str = "Infer") -> AsyncIterator[Router]:
    """A router that serves until the end of the block, and then stops in good order. `way` is how inferences reach it:
    "Infer", "Relay" or "within the process"."""
    router = Router(config, identity, way=way)
    task = asyncio.create_task(serve(config, router.stop, announce=functools.partial(setattr, router, "relays")))
    router.act_as(PRINCIPAL)
    try:
        ready = asyncio.ensure_future(router.channel.channel_ready())
        await asyncio.wait([task, ready], timeout=20, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        yield router
    finally:
        await router.close()
        router.stop.set()
        async with asyncio.timeout(20):
            await task


@pytest.fixture
async def identity(tmp_path: Path) -> AsyncIterator[PeerDouble]:
    peer = PeerDouble(f"unix:{tmp_path}/identity.sock")
    await peer.start()
    yield peer
    await peer.stop()


@pytest.fixture
async def database_url(servers: Servers) -> AsyncIterator[str]:
    """A database of routers, migrated and empty."""
    async with migrated_database(servers, "router.migrations") as url:
        yield url


@pytest.fixture
async def config(database_url: str, tmp_path: Path, identity: PeerDouble) -> RouterConfig:
    """The configuration of a router whose Redis and RabbitMQ are away."""
    return RouterConfig(
        database_url=database_url,
        redis_url="redis://127.0.0.1:1/0",
        amqp_url="amqp://guest:guest@127.0.0.1:1/",
        identity_target=identity.address,
        journal_path=f"{tmp_path}/journal",
        grpc_address=f"unix:{tmp_path}/router.sock",
        ops_address="127.0.0.1:0",
        drain_s=10.0,
        first_byte_timeout_s=60.0,
        idle_timeout_s=60.0,
    )


@pytest.fixture
async def router(config: RouterConfig, identity: PeerDouble, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Router]:
    """A router without Redis and RabbitMQ; nothing that a test does here needs them."""
    # Nobody is there to take the events, so none are waited for.
    monkeypatch.setattr("router.server._FLUSH_S", 0.0)
    async with running(replace(config), identity) as router:
        yield router
