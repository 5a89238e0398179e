"""The router as a process: what it needs to start, what it says of itself, how it stops."""

import asyncio
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from aiaas.router.v1.inference_service_pb2 import ListServedModelsRequest
from mesh.errors import PlatformError, Reason
from router.config import RouterConfig
from router.server import serve
from tests.doubles.peer import PeerDouble
from tests.doubles.scripted_backend import ScriptedBackend, chat_stream
from tests.integration.router.conftest import Router, running, until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


@pytest.fixture
def ops_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def get(port: int, path: str) -> tuple[int, str]:
    """Status and body of an operations page."""

    def ask() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    return await asyncio.to_thread(ask)


@pytest.fixture
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.server._FLUSH_S", 0.0)


@pytest.mark.usefixtures("no_flush")
async def test_router_without_its_registry_is_unavailable_and_not_ready(
    config: RouterConfig, identity: PeerDouble, ops_port: int
) -> None:
    away = replace(config, database_url="postgresql://app@127.0.0.1:1/none", ops_address=f"127.0.0.1:{ops_port}")
    async with running(away, identity) as router:
        assert (await get(ops_port, "/health"))[0] == 200
        assert (await get(ops_port, "/ready"))[0] == 503
        error = (await router.answer(CHAT)).error
        assert error is not None
        assert error.reason is Reason.UNAVAILABLE
        with pytest.raises(PlatformError) as caught:
            await router.call(router.inference.ListServedModels, ListServedModelsRequest())
        assert caught.value.reason is Reason.UNAVAILABLE


@pytest.mark.usefixtures("no_flush")
async def test_router_serves_at_once_what_it_served_before_it_restarted(
    config: RouterConfig, identity: PeerDouble, ops_port: int
) -> None:
    config = replace(config, ops_address=f"127.0.0.1:{ops_port}")
    async with ScriptedBackend(chat_stream("a")) as engine:
        async with running(config, identity) as router:
            await router.add_model("m")
            await router.add_backend("only", engine.base_url, "m")
        async with running(config, identity) as router:
            assert (await router.answer(CHAT)).error is None
            assert (await get(ops_port, "/ready"))[0] == 200
            _, metrics = await get(ops_port, "/metrics")
    for name in (
        'aiaas_router_requests_total{endpoint="chat.completions",model="m",outcome="succeeded"}',
        'aiaas_router_time_to_first_token_seconds_count{endpoint="chat.completions",model="m",streamed="true"}',
        'aiaas_router_overhead_seconds_count{endpoint="chat.completions"}',
        'aiaas_router_request_duration_seconds_count{endpoint="chat.completions",model="m"}',
        'aiaas_router_requests_in_flight{backend="only"} 0.0',
        'aiaas_router_backend_healthy{backend="only"} 1.0',
        "aiaas_router_usage_queue_events",
    ):
        assert name in metrics


@pytest.mark.usefixtures("no_flush")
async def test_traced_router_answers_as_well(config: RouterConfig, identity: PeerDouble) -> None:
    config = replace(config, otlp_endpoint="http://127.0.0.1:1")
    async with running(config, identity) as router, ScriptedBackend(chat_stream("a")) as engine:
        await router.add_model("m")
        await router.add_backend("only", engine.base_url, "m")
        assert (await router.answer(CHAT)).error is None


async def test_running_stream_ends_before_the_router_does(router: Router) -> None:
    go_on = asyncio.Event()
    script = chat_stream("a", "b")
    async with ScriptedBackend(replace(script, steps=[script.steps[0], go_on, *script.steps[1:]])) as engine:
        await router.add_model("m")
        await router.add_backend("only", engine.base_url, "m")
        answer = asyncio.create_task(router.answer(CHAT))
        await until(lambda: bool(engine.received) and engine.received[0].sent_bytes > 0)
        router.stop.set()

        async def refuses() -> bool:
            try:
                await router.inference.ListServedModels(ListServedModelsRequest(), metadata=router.metadata, timeout=2)
            except grpc.aio.AioRpcError as error:
                return error.code() is grpc.StatusCode.UNAVAILABLE
            return False

        await until(refuses)
        go_on.set()
        answered = await answer
        assert answered.error is None
        assert answered.data.endswith(b"data: [DONE]\n\n")


async def test_failing_background_task_ends_the_router(config: RouterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("router.server._FLUSH_S", 0.0)
    monkeypatch.setattr("router.health.HealthProber.run", fail)
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(serve(config, asyncio.Event()), 10)
    assert caught.group_contains(RuntimeError, match="broken")


async def test_process_starts_and_stops_on_a_signal(config: RouterConfig, ops_port: int, tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "AIAAS_ROUTER_DATABASE_URL": config.database_url,
        "AIAAS_ROUTER_REDIS_URL": config.redis_url,
        "AIAAS_ROUTER_AMQP_URL": config.amqp_url,
        "AIAAS_ROUTER_IDENTITY_TARGET": config.identity_target,
        "AIAAS_ROUTER_JOURNAL_PATH": config.journal_path,
        "AIAAS_ROUTER_GRPC_ADDRESS": config.grpc_address,
        "AIAAS_ROUTER_OPS_ADDRESS": f"127.0.0.1:{ops_port}",
    }
    checkout = Path(__file__).parents[3]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "router"), env=environment, cwd=checkout, stderr=asyncio.subprocess.PIPE
    )

    async def ready() -> bool:
        return (await get(ops_port, "/ready"))[0] == 200

    await until(ready, within_s=20)
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(20):
        _, logs = await process.communicate()
    assert process.returncode == 0, logs
    assert b"Traceback" not in logs


async def test_wrong_configuration_is_named(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "AIAAS_ROUTER_DRAIN_S": "soon", "AIAAS_ROUTER_OPS_ADDRESS": "nowhere"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "router", "check-config"),
        env=environment,
        cwd=Path(__file__).parents[3],
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    assert process.returncode == 2
    for variable in (b"DRAIN_S", b"OPS_ADDRESS", b"DATABASE_URL", b"REDIS_URL", b"AMQP_URL", b"IDENTITY_TARGET"):
        assert b"AIAAS_ROUTER_" + variable in errors
