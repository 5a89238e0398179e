"""The pods of the chart, started here as their manifests say: they migrate, serve on the ports that they declare, and
end within their grace period without losing a stream."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import Servers
from tests.deploy.chart_platform import Platform, register, running
from tests.deploy.release import QUESTION
from tests.doubles.scripted_backend import Answer, chunk, sse, usage_chunk

HELD_S = 2.0


@pytest.fixture
async def platform(servers: Servers, amqp_url: str, tmp_path: Path) -> AsyncIterator[Platform]:
    async with running(servers, {}, tmp_path) as started:
        yield started


async def test_pods_serve_and_drain(platform: Platform, tmp_path: Path) -> None:
    for service, pod in platform.pods.items():
        assert await pod.probe("livenessProbe") == 200, service
        assert pod.listening() == {port["containerPort"] for port in pod.container["ports"]}, service

    await register(platform, tmp_path)
    assert platform.engine.received[-1].headers["Authorization"] == "Bearer of-the-engine"

    # A stream that is half answered when both of those that carry it are told to stop.
    release = asyncio.Event()
    first, *rest = sse(chunk("One"), chunk("two"), chunk(finish_reason="stop"), usage_chunk(5, 2))
    platform.engine.script.append(Answer([first, release, *rest], content_type="text/event-stream"))
    question = {**QUESTION, "stream": True}
    async with platform.session.post("/v1/chat/completions", json=question) as answer:
        assert answer.status == 200
        received = await answer.content.readuntil(b"\n\n")
        for service in ("edge", "router"):
            platform.pods[service].terminate()
        async with asyncio.timeout(10):
            # Nobody new is sent to them.
            while await platform.pods["edge"].probe("readinessProbe") == 200:
                await asyncio.sleep(0.05)
        async with asyncio.timeout(10):
            while 7003 in platform.pods["router"].listening():
                await asyncio.sleep(0.05)
        # The stream lasts on, well beyond the moment at which whoever does not drain would have ended it.
        held = asyncio.get_running_loop().time() + HELD_S
        while asyncio.get_running_loop().time() < held:
            assert platform.pods["edge"].process.returncode is None
            assert platform.pods["router"].process.returncode is None
            await asyncio.sleep(0.05)
        release.set()
        received += await answer.content.read()
    assert received.endswith(b"data: [DONE]\n\n")
    assert b"two" in received

    for service in ("edge", "router"):
        assert await platform.pods[service].ended() == 0, platform.pods[service].log.read_text()
    for service in ("analytics", "identity"):
        platform.pods[service].terminate()
        assert await platform.pods[service].ended() == 0, platform.pods[service].log.read_text()
