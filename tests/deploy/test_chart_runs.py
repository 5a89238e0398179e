"""The pods of the chart, started here as their manifests say: they migrate, serve on the ports that they declare, and
end within their grace period without losing a stream."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import pytest

from tests.conftest import Servers
from tests.deploy.node import Node, Pod, spare
from tests.deploy.release import QUESTION, SERVICES, bootstrap, priced, secrets_of
from tests.deploy.tools import NAMESPACE, Manifest, one, pod_specs, render
from tests.deploy.values import ENGINES
from tests.doubles.scripted_backend import Answer, ScriptedBackend, chat_document, chunk, sse, usage_chunk

HELD_S = 2.0


@dataclass
class Platform:
    pods: dict[str, Pod]
    base_url: str
    key: str
    engine: ScriptedBackend
    session: aiohttp.ClientSession
    manifests: list[Manifest]


async def databases(servers: Servers) -> dict[str, str]:
    """Made anew, as for a first installation: the database, its owner, and whom the service works as."""
    servers.start(servers.postgres)
    await servers.ready(servers.postgres)
    made = {}
    for service in ("identity", "router", "analytics"):
        await servers.drop_database(service)
        future = servers.portal.start_task_soon(servers.postgres.database, service)
        made[service] = await asyncio.wrap_future(future)
    connection = await asyncpg.connect(servers.postgres.admin_url)
    try:
        # Another test's server may have made it, and then only an administrator gives it away.
        if await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = 'aiaas_identity'"):
            await connection.execute(f'GRANT aiaas_identity TO "{urlsplit(made["identity"]).username}"')
    finally:
        await connection.close()
    return made


@pytest.fixture
async def platform(servers: Servers, redis_url: str, amqp_url: str, tmp_path: Path) -> AsyncIterator[Platform]:
    manifests = render({"engines": ENGINES, "registration": {"existingSecret": "platform-key"}}, tmp_path)
    specs = pod_specs(manifests)
    urls = await databases(servers)
    secrets = secrets_of(manifests, urls, redis_url, amqp_url)
    addresses = {service: f"127.77.{spare()}.{number}" for number, service in enumerate(SERVICES, start=1)}
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(Node(tmp_path, secrets))
        for service, address in addresses.items():
            node.name(f"aiaas-{service}.{NAMESPACE}.svc.cluster.local", address)
        # The chart's own order: migrations, then all at once.
        for service in urls:
            migration = await node.start(f"migrate-{service}", specs[f"Job/aiaas-migrate-{service}"])
            assert await migration.ended() == 0, migration.log.read_text()
        kinds = {"router": "StatefulSet"}
        pods = {
            service: await node.start(
                f"aiaas-{service}-0", specs[f"{kinds.get(service, 'Deployment')}/aiaas-{service}"], address
            )
            for service, address in addresses.items()
        }
        await asyncio.gather(*(pod.started() for pod in pods.values()))
        engine = await stack.enter_async_context(ScriptedBackend(chat_document("Hello")))
        made = await bootstrap(node, specs)
        base_url = f"http://{addresses['edge']}:8080"
        session = aiohttp.ClientSession(base_url, headers={"Authorization": f"Bearer {made}"})
        await stack.enter_async_context(session)
        yield Platform(pods, base_url, made, engine, session, manifests)


async def register(platform: Platform, folder: Path) -> None:
    """The registration's own command, on the chart's own list, whose engines are all the one that runs here."""
    listed = json.loads(one(platform.manifests, "ConfigMap", "aiaas-engines")["data"]["engines.json"])
    for backend in listed:
        backend["base_url"] = platform.engine.base_url
    path = folder / "engines.json"
    path.write_text(json.dumps(listed[-1:] + [b for b in listed if b["backend_id"] == "smollm2-0"]))
    (container,) = pod_specs(platform.manifests)["Job/aiaas-registration"]["containers"]
    command = container["command"]
    assert command[3:] == ["http://aiaas-edge", "/etc/aiaas/engines/engines.json"]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command[1:3],
        platform.base_url,
        str(path),
        env={"AIAAS_KEY": platform.key},
        stdout=asyncio.subprocess.PIPE,
    )
    assert await asyncio.wait_for(process.wait(), 30) == 0
    await priced(platform.session)


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
