"""A gateway: clients' HTTP in, engines' HTTP out, and between the edge and the router nothing but calls."""

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator

import httpx
import pytest

import gateway.server
from deploy.local.ports import free_port
from edge.config import EdgeConfig
from gateway.config import GatewayConfig
from mesh.config import ConfigError, load
from router.config import RouterConfig
from tests.doubles.peer import PeerDouble
from tests.doubles.scripted_backend import Answer, ScriptedBackend, chat_stream, chunk, sse
from tests.integration.router.conftest import PRINCIPAL, Router, config, database_url, identity, until

__all__ = ["config", "database_url", "identity"]

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
STREAM = CHAT | {"stream": True}


class Gateway(Router):
    """A running gateway: a router that clients reach over HTTP, too."""

    http: httpx.AsyncClient

    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.credential}"}


@pytest.fixture
async def engine() -> AsyncIterator[ScriptedBackend]:
    async with ScriptedBackend() as engine:
        yield engine


@pytest.fixture
def grpc_relays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses to which a relay was opened over gRPC."""
    dialled: list[str] = []
    monkeypatch.setattr("edge.routers.GrpcStream.__init__", lambda _, address: dialled.append(address))
    return dialled


@pytest.fixture
async def served(
    config: RouterConfig,
    identity: PeerDouble,
    engine: ScriptedBackend,
    grpc_relays: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Gateway]:
    monkeypatch.setattr("router.server._FLUSH_S", 0.0)
    port = free_port()
    edge = EdgeConfig(
        address=f"127.0.0.1:{port}",
        identity_target=identity.address,
        router_target=config.grpc_address,
        analytics_target=identity.address,
        drain_s=5,
    )
    made = Gateway(config, identity)
    task = asyncio.create_task(gateway.server.serve(GatewayConfig(edge, config), made.stop))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as made.http:
            await made.channel.channel_ready()
            made.act_as(PRINCIPAL)
            await made.add_model("m")
            await made.add_backend("only", engine.base_url, "m")
            await until(functools.partial(is_ready, made.http))
            yield made
    finally:
        await made.close()
        made.stop.set()
        async with asyncio.timeout(20):
            await task


async def is_ready(client: httpx.AsyncClient) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return (await client.get("/ready")).status_code == 200
    return False


async def test_answers_pass_and_no_relay_is_spoken_over_grpc(
    served: Gateway, engine: ScriptedBackend, grpc_relays: list[str]
) -> None:
    engine.script.append(chat_stream("Hel", "lo"))
    streamed = await served.http.post("/v1/chat/completions", json=STREAM, headers=served.headers())
    assert streamed.content.endswith(b"data: [DONE]\n\n")
    whole = await served.http.post("/v1/chat/completions", json=CHAT, headers=served.headers())
    assert json.loads(whole.content)["choices"]
    refused = await served.http.post("/v1/chat/completions", json=CHAT | {"x": 1}, headers=served.headers())
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x")
    metrics = (await served.http.get("/metrics")).text
    assert "aiaas_router_requests_total" in metrics
    assert "aiaas_edge_requests_total" in metrics
    assert grpc_relays == []


async def test_running_stream_ends_before_the_gateway_does(served: Gateway, engine: ScriptedBackend) -> None:
    go_on = asyncio.Event()
    engine.script.append(
        Answer([*sse(chunk("a"), done=False), go_on, *chat_stream("b").steps], content_type="text/event-stream")
    )
    async with served.http.stream("POST", "/v1/chat/completions", json=STREAM, headers=served.headers()) as response:
        arriving = response.aiter_raw()
        await anext(arriving)
        served.stop.set()
        await until(functools.partial(is_closed, served))
        go_on.set()
        rest = b"".join([piece async for piece in arriving])
    assert rest.endswith(b"data: [DONE]\n\n")


async def is_closed(served: Gateway) -> bool:
    """Whether it takes no more connections."""
    async with httpx.AsyncClient(base_url=served.http.base_url, trust_env=False) as client:
        return not await is_ready(client)


def test_wrong_configuration_of_either_half_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load(GatewayConfig, {})
    named = {problem.variable for problem in caught.value.problems}
    assert {"AIAAS_EDGE_ROUTER_TARGET", "AIAAS_ROUTER_DATABASE_URL"} <= named


def test_gateway_has_one_worker() -> None:
    environ = {
        f"AIAAS_{name}": "127.0.0.1:1"
        for name in (
            "EDGE_IDENTITY_TARGET",
            "EDGE_ROUTER_TARGET",
            "EDGE_ANALYTICS_TARGET",
            "ROUTER_DATABASE_URL",
            "ROUTER_REDIS_URL",
            "ROUTER_AMQP_URL",
            "ROUTER_IDENTITY_TARGET",
            "ROUTER_JOURNAL_PATH",
        )
    }
    assert load(GatewayConfig, environ).edge.workers == 1
    with pytest.raises(ConfigError, match="AIAAS_EDGE_WORKERS"):
        load(GatewayConfig, environ | {"AIAAS_EDGE_WORKERS": "2"})
