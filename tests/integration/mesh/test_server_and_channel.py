"""Servers and the channels to them: health, drain, balance, retries, outages, and what a call carries on."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from aiaas.router.v1.inference_service_pb2 import InferRequest, InferResponse
from aiaas.router.v1.model_service_pb2 import DeleteModelRequest, GetModelRequest, GetModelResponse, Model
from mesh import context
from mesh.channel import connect, service_config
from mesh.errors import PlatformError, Reason, from_rpc_error
from mesh.server import AddressInUseError, GrpcServer
from tests.integration.mesh.harness import INFERENCE, MODELS, Client, bearer, error_of, server, serving, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def address(tmp_path: Path) -> str:
    """A free address."""
    return f"unix:{tmp_path}/s"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def client_of(*addresses: str) -> AsyncIterator[Client]:
    """A client of several servers behind one name."""
    async with connect(",".join(addresses), MODELS, INFERENCE) as channel:
        yield Client(channel)


class Named:
    """Says which server answered."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def __call__(self, *_: Any) -> Message:
        return GetModelResponse(model=Model(model_id=self.name))


async def names(client: Client, number: int) -> list[str]:
    responses = [await client.get_model() for _ in range(number)]
    return [response.model.model_id for response in responses]


async def answers(client: Client, expected: set[str]) -> None:
    """Returns once exactly these servers answer."""
    for _ in range(1000):
        if set(await names(client, 4)) == expected:
            return
    raise AssertionError(f"{expected} never answered")


@asynccontextmanager
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Client, GrpcServer, GrpcServer]]:
    """Two servers, "a" and "b", and a client of both that has found both."""
    addresses = [f"unix:{tmp_path}/{name}" for name in "ab"]
    servers = [
        server(address, {"GetModel": Named(name)}, drain_s=0.5) for address, name in zip(addresses, "ab", strict=True)
    ]
    target = "unix:" + ",".join(address.removeprefix("unix:") for address in addresses)
    async with AsyncExitStack() as stack:
        for each in servers:
            await each.start()
            stack.push_async_callback(each.stop)
        async with client_of(target) as client:
            await answers(client, {"a", "b"})
            yield client, servers[0], servers[1]


async def test_health_is_told_for_the_server_and_each_service(address: str) -> None:
    running = server(address, drain_s=0)
    await running.start()
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def state(service: str) -> Any:
            response = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            return response.status

        for service in ("", MODELS.full_name, INFERENCE.full_name):
            assert await state(service) == SERVING
        await running.set_serving(False)
        for service in ("", MODELS.full_name, INFERENCE.full_name):
            assert await state(service) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await state("aiaas.unknown")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    await running.stop()


@pytest.mark.parametrize("reflect", [True, False])
async def test_reflection_lists_the_services_where_it_is_wanted(address: str, reflect: bool) -> None:
    async with serving(address, reflect=reflect) as client:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5)
        if not reflect:
            with pytest.raises(grpc.aio.AioRpcError) as missing:
                await call.read()
            assert missing.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert from_rpc_error(missing.value).reason is Reason.UNIMPLEMENTED
            return
        answer = await call.read()
        listed = {service.name for service in answer.list_services_response.service}
        assert {MODELS.full_name, INFERENCE.full_name, "grpc.health.v1.Health"} <= listed
        call.cancel()


async def test_address_in_use_is_a_sentence() -> None:
    address = f"127.0.0.1:{free_port()}"
    first, second = server(address, drain_s=0), server(address)
    await first.start()
    with pytest.raises(AddressInUseError, match=rf"{address} cannot be listened on: another process uses it"):
        await second.start()
    await first.stop()


async def test_calls_go_to_all_healthy_addresses_in_turn(tmp_path: Path) -> None:
    async with pair(tmp_path) as (client, _, _):
        assert sorted(await names(client, 20)) == ["a"] * 10 + ["b"] * 10


async def test_server_that_is_not_serving_gets_no_calls_and_is_found_again(tmp_path: Path) -> None:
    async with pair(tmp_path) as (client, first, _):
        await first.set_serving(False)
        await answers(client, {"b"})
        assert set(await names(client, 10)) == {"b"}
        await first.set_serving(True)
        await answers(client, {"a", "b"})


async def test_stopping_one_of_two_under_load_fails_no_call(tmp_path: Path) -> None:
    async with pair(tmp_path) as (client, first, _):
        stopped = asyncio.Event()
        answered = 0

        async def load() -> None:
            nonlocal answered
            while not stopped.is_set():
                await client.get_model()
                answered += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(load())
            await until(lambda: answered > 50)
            await first.stop()
            seen = answered
            await until(lambda: answered > seen + 50)
            stopped.set()


async def test_running_calls_end_in_the_drain_and_a_stop_waits_for_nothing_else(address: str) -> None:
    started, finish = asyncio.Event(), asyncio.Event()

    async def slow(*_: Any) -> AsyncIterator[InferResponse]:
        started.set()
        await finish.wait()
        yield InferResponse(data=b"whole")

    running = server(address, {"Infer": slow}, drain_s=20)
    await running.start()
    async with connect(address, INFERENCE) as channel:
        call = Client(channel).infer(timeout=10)
        reading = asyncio.ensure_future(call.read())
        await started.wait()
        stopping = asyncio.create_task(running.stop())
        await asyncio.sleep(0.2)
        assert not stopping.done()
        finish.set()
        assert (await reading).data == b"whole"
        began = time.monotonic()
        await stopping
        assert time.monotonic() - began < 3


async def test_call_that_outlasts_the_drain_is_ended_with_its_clean_up(address: str) -> None:
    started, cleaned = asyncio.Event(), asyncio.Event()

    async def endless(*_: Any) -> AsyncIterator[InferResponse]:
        try:
            started.set()
            await asyncio.Event().wait()
            yield InferResponse()
        finally:
            cleaned.set()

    running = server(address, {"Infer": endless}, drain_s=0.2)
    await running.start()
    async with connect(address, INFERENCE) as channel:
        call = Client(channel).infer(timeout=10)
        failing = asyncio.create_task(error_of(call))
        await started.wait()
        await running.stop()
        assert (await failing).reason is Reason.UNAVAILABLE
        await asyncio.wait_for(cleaned.wait(), 1)


async def test_only_reads_are_tried_again_while_the_peer_is_unavailable(address: str) -> None:
    tries: list[str] = []

    async def read(*_: Any) -> Message:
        tries.append("read")
        if tries.count("read") < 3:
            raise PlatformError(Reason.UNAVAILABLE)
        return GetModelResponse()

    async def write(*_: Any) -> Message:
        tries.append("write")
        raise PlatformError(Reason.UNAVAILABLE)

    async with serving(address, {"GetModel": read, "DeleteModel": write}) as client:
        await client.get_model()
        deleting = client.models.DeleteModel(DeleteModelRequest(), metadata=bearer("developer"), timeout=5)
        assert (await error_of(deleting)).reason is Reason.UNAVAILABLE
    assert tries == ["read"] * 3 + ["write"]


def test_service_config_names_reads_alone_for_retries() -> None:
    config = service_config(MODELS, INFERENCE)
    assert config["healthCheckConfig"] == {"serviceName": ""}
    (retried,) = config["methodConfig"]
    assert {(name["service"], name["method"]) for name in retried["name"]} == {
        ("aiaas.router.v1.ModelService", "GetModel"),
        ("aiaas.router.v1.ModelService", "ListModels"),
        ("aiaas.router.v1.InferenceService", "ListServedModels"),
    }
    assert retried["retryPolicy"]["maxAttempts"] == 3


async def spawn(address: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.integration.mesh.harness", address),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=Path(__file__).parents[3],
    )


async def test_killed_peer_is_found_again_on_its_address() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with client_of(address) as client:
        assert (await error_of(client.get_model())).reason is Reason.UNAVAILABLE
        for _ in range(2):
            process = await spawn(address)
            try:
                await client.get_model(wait_for_ready=True, timeout=15)
                await client.get_model()
            finally:
                process.send_signal(signal.SIGKILL)
                await process.wait()
            assert (await error_of(client.get_model())).reason is Reason.UNAVAILABLE


async def test_peer_that_was_long_away_is_found_within_two_seconds(address: str) -> None:
    async with client_of(address) as client:
        async with asyncio.timeout(10):
            for _ in range(8):
                await error_of(client.get_model(wait_for_ready=True, timeout=0.5))
        running = server(address, drain_s=0)
        await running.start()
        began = time.monotonic()
        await client.get_model(wait_for_ready=True)
        assert time.monotonic() - began < 2
        await running.stop()


async def test_slow_way_to_the_peer_is_waited_for() -> None:
    address, port = f"127.0.0.1:{free_port()}", free_port()

    async def relay_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.2)
        onward_reader, onward_writer = await asyncio.open_connection(*address.split(":"))
        await asyncio.gather(copy(reader, onward_writer), copy(onward_reader, writer))

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async with serving(address):
        relay = await asyncio.start_server(relay_late, "127.0.0.1", port)
        async with client_of(f"127.0.0.1:{port}") as client:
            await client.get_model(wait_for_ready=True)
        relay.close()


async def test_call_carries_id_credential_and_shorter_deadline_to_the_next_service(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    async def see(name: str, ctx: Any) -> None:
        seen[name] = (context.request_id.get(), context.credential.get(), ctx.time_remaining())

    async def back(_: Any, ctx: Any) -> Message:
        await see("back", ctx)
        return GetModelResponse()

    async def back_stream(_: Any, ctx: Any) -> AsyncIterator[InferResponse]:
        await see("back stream", ctx)
        yield InferResponse()

    async with serving(f"unix:{tmp_path}/back", {"GetModel": back, "Infer": back_stream}) as onward:

        async def front(_: Any, ctx: Any) -> Message:
            await see("front", ctx)
            async for _ in onward.inference.Infer(InferRequest()):
                pass
            return await onward.models.GetModel(GetModelRequest(), timeout=60)

        async with serving(f"unix:{tmp_path}/front", {"GetModel": front}) as client:
            metadata = (*bearer("developer"), ("x-request-id", "req_mine"))
            await client.models.GetModel(GetModelRequest(), metadata=metadata, timeout=2)
    assert {values[:2] for values in seen.values()} == {("req_mine", "developer")}
    assert seen["front"][2] - 0.5 < seen["back stream"][2] <= seen["front"][2] - 0.015
    assert seen["back"][2] <= seen["front"][2] - 0.015


async def test_calls_outside_of_a_request_get_a_deadline_and_no_credential(address: str) -> None:
    remaining = []

    async def look(_: Any, ctx: Any) -> Message:
        remaining.append(ctx.time_remaining())
        return GetModelResponse()

    async with serving(address, {"GetModel": look}) as client:
        error = await error_of(client.models.GetModel(GetModelRequest()))
        await client.models.GetModel(GetModelRequest(), metadata=bearer("developer"))
    assert error.reason is Reason.MISSING_CREDENTIALS
    assert 5 < remaining[0] < 10.1


async def test_message_beyond_the_limit_is_refused_and_the_channel_lives(address: str) -> None:
    async with serving(address) as client:
        call = client.inference.Infer(InferRequest(body=b"x" * (9 << 20)), metadata=bearer("developer"), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await client.get_model()
