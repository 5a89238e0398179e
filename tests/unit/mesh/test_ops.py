"""The operators' server: health, readiness, metrics."""

import asyncio
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
from prometheus_client import Counter

from mesh import ops
from mesh.errors import PlatformError, Reason
from mesh.ops import OpsServer


async def fine() -> None: ...


async def away() -> None:
    raise PlatformError(Reason.UNAVAILABLE, description="PostgreSQL does not answer.")


async def broken() -> None:
    raise ConnectionError("postgresql://u:hunter2@db/x refused")


async def hangs() -> None:
    await asyncio.Event().wait()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as opened:
        yield opened


async def get(session: aiohttp.ClientSession, server: OpsServer, path: str) -> tuple[int, str]:
    async with session.get(f"http://127.0.0.1:{server.port}{path}") as response:
        return response.status, await response.text()


async def test_health_answers_even_when_nothing_is_ready(session: aiohttp.ClientSession) -> None:
    server = OpsServer(0, {"postgresql": away})
    await server.start()
    try:
        assert await get(session, server, "/health") == (200, '{"status": "ok"}')
        assert (await get(session, server, "/other"))[0] == 404
    finally:
        await server.stop()


async def test_ready_when_every_dependency_is(session: aiohttp.ClientSession) -> None:
    server = OpsServer(0, {"postgresql": fine, "redis": fine})
    await server.start()
    try:
        status, body = await get(session, server, "/ready")
        assert (status, body) == (200, '{"status": "ready", "checks": {"postgresql": "ok", "redis": "ok"}}')
    finally:
        await server.stop()


async def test_not_ready_names_each_failing_dependency_and_no_secret(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_CHECK_TIMEOUT_S", 0.05)
    server = OpsServer(0, {"postgresql": away, "rabbitmq": broken, "identity": hangs, "redis": fine})
    await server.start()
    try:
        async with session.get(f"http://127.0.0.1:{server.port}/ready") as response:
            assert response.status == 503
            assert await response.json() == {
                "status": "not_ready",
                "checks": {
                    "postgresql": "PostgreSQL does not answer.",
                    "rabbitmq": "failed: ConnectionError",
                    "identity": "no answer within 0.05 s",
                    "redis": "ok",
                },
            }
    finally:
        await server.stop()


async def test_metrics_are_those_of_the_default_registry(session: aiohttp.ClientSession) -> None:
    Counter("aiaas_test_ops", "A metric of this test.").inc(3)
    server = OpsServer(0, {})
    await server.start()
    try:
        async with session.get(f"http://127.0.0.1:{server.port}/metrics") as response:
            assert response.content_type == "text/plain"
            assert "aiaas_test_ops_total 3.0" in await response.text()
    finally:
        await server.stop()


async def test_a_taken_port_is_an_error_at_start() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="address already in use"):
            await OpsServer(taken.getsockname()[1], {}).start()
