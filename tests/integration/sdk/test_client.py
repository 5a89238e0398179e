"""The channel for programs of others, against the platform's own server: what it adds, and what it never does."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from aiaas.client import Certificate, connect
from aiaas.identity.v1.api_key_service_pb2 import GetApiKeyRequest
from aiaas.router.v1.inference_service_pb2 import InferResponse
from aiaas.router.v1.model_service_pb2 import DeleteModelRequest, GetModelRequest, GetModelResponse, Model
from deploy.local.certificates import Authority
from mesh.errors import Reason
from tests.integration.mesh.certificates import tls_of
from tests.integration.mesh.harness import INFERENCE, KEYS, MODELS, Answer, Client, error_of, server


@pytest.fixture
def address(tmp_path: Path) -> str:
    """A free address."""
    return f"unix:{tmp_path}/s"


@asynccontextmanager
async def serving(address: str, answers: dict[str, Answer] | None = None, **options: Any) -> AsyncIterator[None]:
    running = server(address, answers, drain_s=0, **options)
    await running.start()
    try:
        yield
    finally:
        await running.stop()


class Away:
    """A service that is away for the first calls."""

    def __init__(self, times: int) -> None:
        self.calls = 0
        self._times = times

    async def __call__(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        self.calls += 1
        if self.calls <= self._times:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        return GetModelResponse(model=Model(model_id="here"))


async def test_key_goes_with_every_call_but_where_the_call_has_its_own(address: str) -> None:
    async with serving(address), connect(address, MODELS, api_key="developer") as channel:
        stub = Client(channel).models
        await stub.GetModel(GetModelRequest())
        error = await error_of(stub.GetModel(GetModelRequest(), metadata=(("authorization", "Bearer nobody"),)))
        assert error.reason is Reason.API_KEY_INVALID


async def test_read_is_tried_three_times_and_a_write_once(address: str) -> None:
    read, write = Away(2), Away(1)
    async with (
        serving(address, {"GetModel": read, "DeleteModel": write}),
        connect(address, MODELS, api_key="developer") as channel,
    ):
        stub = Client(channel).models
        assert (await stub.GetModel(GetModelRequest())).model.model_id == "here"
        assert (await error_of(stub.DeleteModel(DeleteModelRequest()))).reason is Reason.UNAVAILABLE
    assert (read.calls, write.calls) == (3, 1)


async def test_read_is_given_up_after_three_times(address: str) -> None:
    away = Away(9)
    async with serving(address, {"GetModel": away}), connect(address, MODELS, api_key="developer") as channel:
        assert (await error_of(Client(channel).models.GetModel(GetModelRequest()))).reason is Reason.UNAVAILABLE
    assert away.calls == 3


async def test_call_ends_in_time_and_a_stream_has_as_long_as_it_takes(address: str) -> None:
    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    async def late(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        left_s = context.time_remaining()
        assert left_s is None or left_s > 60
        yield InferResponse()

    async with (
        serving(address, {"GetModel": never, "Infer": late}),
        connect(address, MODELS, INFERENCE, api_key="developer", timeout_s=0.2) as channel,
    ):
        client = Client(channel)
        assert (await error_of(client.models.GetModel(GetModelRequest()))).reason is Reason.DEADLINE_EXCEEDED
        assert [part async for part in client.infer()] == [InferResponse()]


def made_by(authority: Authority, *services: str) -> Certificate:
    chain, key = authority.issue(*services)
    return Certificate(chain.encode(), key.encode(), authority.certificate.encode())


async def test_service_is_known_by_its_certificate_and_not_by_its_address(tmp_path: Path) -> None:
    authority = Authority.make()
    address = f"unix:{tmp_path}/s"
    ours = made_by(authority, "tool")
    async with serving(address, tls=tls_of(tmp_path / "router", authority.issue("router"), authority)):
        async with connect(address, MODELS, api_key="developer", certificate=ours) as channel:
            await Client(channel).models.GetModel(GetModelRequest())
        async with connect(address, KEYS, api_key="developer", certificate=ours) as channel:
            error = await error_of(Client(channel).keys.GetApiKey(GetApiKeyRequest()))
            assert error.reason is Reason.UNAVAILABLE
        strangers = made_by(Authority.make(), "tool")
        async with connect(address, MODELS, api_key="developer", certificate=strangers) as channel:
            error = await error_of(Client(channel).models.GetModel(GetModelRequest()))
            assert error.reason is Reason.UNAVAILABLE


@pytest.mark.parametrize("target", ["router.example:7002", "dns:///router.example:7002", "10.0.0.7:7002"])
async def test_key_never_leaves_the_machine_in_plain_text(target: str) -> None:
    with pytest.raises(ValueError, match="TLS"):
        connect(target, MODELS, api_key="developer")


async def test_channel_is_for_one_service() -> None:
    for services in ((), (MODELS, KEYS)):
        with pytest.raises(ValueError, match="one package"):
            connect("localhost:1", *services)


def test_private_key_is_not_shown() -> None:
    assert "PRIVATE" not in repr(Certificate(b"chain", b"PRIVATE", b"ca"))
