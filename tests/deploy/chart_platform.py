"""The platform of the chart on this machine: its pods as their manifests say, on real data servers made anew, and one
scripted engine; it knows nothing of what is tested."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import asyncpg

from deploy.local.certificates import Authority
from tests.conftest import Servers
from tests.deploy.node import Node, Pod, spare
from tests.deploy.release import SERVICES, bootstrap, priced, secrets_of
from tests.deploy.tools import NAMESPACE, Manifest, one, pod_specs, render
from tests.deploy.values import ENGINES
from tests.doubles.scripted_backend import ScriptedBackend, chat_document


@dataclass
class Platform:
    pods: dict[str, Pod]
    base_url: str
    key: str
    engine: ScriptedBackend
    session: aiohttp.ClientSession
    manifests: list[Manifest]
    authority: Authority


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


@asynccontextmanager
async def running(servers: Servers, values: Mapping[str, Any], folder: Path) -> AsyncIterator[Platform]:
    """The chart with these values, installed on empty data servers, and one engine that is not registered yet."""
    manifests = render({"engines": ENGINES, "registration": {"existingSecret": "platform-key"}, **values}, folder)
    specs = pod_specs(manifests)
    redis_url, amqp_url = await servers.empty_redis(), await servers.empty_amqp()
    urls = await databases(servers)
    authority = Authority.make()
    secrets = secrets_of(manifests, authority, urls, redis_url, amqp_url)
    addresses = {service: f"127.77.{spare()}.{number}" for number, service in enumerate(SERVICES, start=1)}
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(Node(folder, secrets))
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
        yield Platform(pods, base_url, made, engine, session, manifests, authority)


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
