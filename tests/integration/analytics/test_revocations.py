"""Revocations reach analytics, and one that it may have missed is made up for."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest
from redis.asyncio import Redis

from aiaas.analytics.v1 import usage_service_pb2 as pb
from aiaas.analytics.v1 import usage_service_pb2_grpc
from aiaas.identity.v1.auth_service_pb2 import AuthenticateResponse, WatchRevocationsResponse
from aiaas.type.v1.principal_pb2 import PRINCIPAL_KIND_API_KEY, Principal
from analytics.config import AnalyticsConfig
from analytics.server import serve
from mesh.errors import PlatformError, Reason, from_rpc_error
from mesh.revocations import CHANNEL
from tests.doubles.peer import PeerDouble
from tests.doubles.tcp_gate import TcpGate
from tests.integration.analytics.harness import wait_until

REVOKED = PlatformError(Reason.API_KEY_INVALID)


class Analytics:
    """A client of a running analytics, before an identity that knows every credential until it is told otherwise."""

    def __init__(self, channel: grpc.aio.Channel, identity: PeerDouble) -> None:
        self._stub = usage_service_pb2_grpc.UsageServiceStub(channel)
        self.identity = identity

    async def refusal(self, credential: str) -> Reason | None:
        """Why a call with this credential is refused, None if it is not."""
        request = pb.QueryUsageRequest(organization_id="org_1")
        request.start_time.GetCurrentTime()
        request.start_time.seconds -= 3600
        metadata = (("authorization", f"Bearer {credential}"),)
        try:
            await self._stub.QueryUsage(request, metadata=metadata, timeout=10, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error).reason
        return None

    async def is_refused(self, credential: str) -> bool:
        """Whether the credential was judged and refused."""
        return await self.refusal(credential) is Reason.API_KEY_INVALID


@asynccontextmanager
async def analytics(database_url: str, redis_url: str, folder: Path) -> AsyncIterator[Analytics]:
    principal = Principal(
        kind=PRINCIPAL_KIND_API_KEY,
        principal_id="key_1",
        api_key_id="key_1",
        organization_id="org_1",
        permissions=["usage.query"],
    )
    identity = PeerDouble(f"unix:{folder}/identity", {"Authenticate": AuthenticateResponse(principal=principal)})
    config = AnalyticsConfig(
        database_url=database_url,
        redis_url=redis_url,
        amqp_url="amqp://127.0.0.1:1/",
        identity_target=identity.address,
        router_target="unix:nowhere",
        secret_key=base64.b64encode(bytes(32)).decode(),
        grpc_address=f"unix:{folder}/analytics",
        ops_address="127.0.0.1:0",
        drain_s=1.0,
    )
    stop = asyncio.Event()
    await identity.start()
    serving = asyncio.create_task(serve(config, stop))
    try:
        async with grpc.aio.insecure_channel(config.grpc_address) as channel:
            yield Analytics(channel, identity)
    finally:
        stop.set()
        async with asyncio.timeout(10):
            await serving
        await identity.stop()


@asynccontextmanager
async def gated(url: str) -> AsyncIterator[tuple[TcpGate, str]]:
    """A gate before the server at `url`, and the address through it."""
    address = urlsplit(url)
    async with TcpGate(address.hostname or "", address.port or 0) as gate:
        yield gate, address._replace(netloc=f":{address.password}@127.0.0.1:{gate.port}").geturl()


async def hear(redis: Any, revocation: WatchRevocationsResponse) -> None:
    """Publish until somebody has heard it."""

    async def is_heard() -> bool:
        return bool(await redis.publish(CHANNEL, revocation.SerializeToString()))

    await wait_until(is_heard, 10, "the revocation is heard")


@pytest.mark.parametrize(
    "revocation", [WatchRevocationsResponse(api_key_id="key_1"), WatchRevocationsResponse(organization_id="org_1")]
)
async def test_revoked_key_is_refused_within_a_second(
    database_url: str, redis_url: str, tmp_path: Path, revocation: WatchRevocationsResponse
) -> None:
    async with analytics(database_url, redis_url, tmp_path) as running, Redis.from_url(redis_url) as redis:
        await hear(redis, WatchRevocationsResponse(api_key_id="key_other"))
        assert await running.refusal("token") is None
        running.identity.answers["Authenticate"] = REVOKED
        await hear(redis, WatchRevocationsResponse(api_key_id="key_other"))
        assert await running.refusal("token") is None
        assert await running.refusal("another token") is Reason.API_KEY_INVALID
        await hear(redis, revocation)
        await wait_until(lambda: running.is_refused("token"), 1, "the key is refused")


async def test_message_that_cannot_be_read_has_everybody_asked_for_again(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    async with analytics(database_url, redis_url, tmp_path) as running, Redis.from_url(redis_url) as redis:
        await hear(redis, WatchRevocationsResponse(api_key_id="key_other"))
        assert await running.refusal("token") is None
        running.identity.answers["Authenticate"] = REVOKED
        await redis.publish(CHANNEL, b"\xff")
        await wait_until(lambda: running.is_refused("token"), 1, "the key is refused")


async def test_revocation_during_an_outage_of_redis_counts_when_it_is_back(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    async with (
        gated(redis_url) as (gate, gated_url),
        analytics(database_url, gated_url, tmp_path) as running,
        Redis.from_url(redis_url) as redis,
    ):
        await hear(redis, WatchRevocationsResponse(api_key_id="key_other"))
        assert await running.refusal("token") is None
        await gate.shut()
        running.identity.answers["Authenticate"] = REVOKED
        assert await running.refusal("token") is None
        await gate.open()
        await wait_until(lambda: running.is_refused("token"), 5, "the key is refused")


async def test_key_keeps_working_when_redis_comes_back_while_identity_is_away(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    async with (
        gated(redis_url) as (gate, gated_url),
        analytics(database_url, gated_url, tmp_path) as running,
        Redis.from_url(redis_url) as redis,
    ):
        await hear(redis, WatchRevocationsResponse(api_key_id="key_other"))
        assert await running.refusal("token") is None
        await gate.shut()
        await running.identity.stop()
        await gate.open()
        await hear(redis, WatchRevocationsResponse(api_key_id="key_other"))
        assert await running.refusal("token") is None
        assert await running.refusal("unknown token") is Reason.AUTH_UNAVAILABLE
