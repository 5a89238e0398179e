"""Alerts on a router that really runs: a real Prometheus reads its metrics while what it needs is taken away."""

import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from deploy.local.ports import free_port
from router.config import RouterConfig
from tests.doubles.peer import PeerDouble
from tests.doubles.prometheus import Prometheus, impatient, watching
from tests.doubles.scripted_backend import ScriptedBackend, chat_stream
from tests.doubles.tcp_gate import TcpGate
from tests.integration.router.conftest import PRINCIPAL, Router, until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


async def test_alerts_fire_when_backends_the_broker_and_the_router_are_away_and_end_when_they_are_back(
    config: RouterConfig, identity: PeerDouble, amqp_url: str, tmp_path: Path
) -> None:
    rabbitmq, address = urlsplit(amqp_url), f"127.0.0.1:{free_port()}"
    async with (
        TcpGate(rabbitmq.hostname or "", rabbitmq.port or 0) as gate,
        ScriptedBackend(chat_stream("a")) as engine,
    ):
        through = rabbitmq._replace(netloc=f"{rabbitmq.username}:{rabbitmq.password}@127.0.0.1:{gate.port}").geturl()
        environment = {
            "PATH": os.environ["PATH"],
            "AIAAS_ROUTER_DATABASE_URL": config.database_url,
            "AIAAS_ROUTER_REDIS_URL": config.redis_url,
            "AIAAS_ROUTER_AMQP_URL": through,
            "AIAAS_ROUTER_IDENTITY_TARGET": config.identity_target,
            "AIAAS_ROUTER_JOURNAL_PATH": config.journal_path,
            "AIAAS_ROUTER_GRPC_ADDRESS": config.grpc_address,
            "AIAAS_ROUTER_OPS_ADDRESS": address,
        }
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "router", env=environment)
        router = Router(replace(config, amqp_url=through), identity)
        router.act_as(PRINCIPAL)
        try:
            await asyncio.wait_for(router.channel.channel_ready(), 20)
            async with watching(impatient(tmp_path), {"aiaas-router": address}, tmp_path) as prometheus:

                async def fires(name: str) -> None:
                    await until(lambda: is_firing(prometheus, name), 20)

                async def ends(name: str) -> None:
                    await until(lambda: is_silent(prometheus, name), 20)

                await fires("RouterWithoutBackends")
                await router.add_model("m")
                await router.add_backend("only", engine.base_url, "m")
                await ends("RouterWithoutBackends")
                assert (await router.answer(CHAT)).error is None
                assert not await prometheus.firing() & {"JournalAge", "TargetDown"}

                await gate.shut()
                assert (await router.answer(CHAT)).error is None
                await fires("JournalAge")
                await gate.open()
                await ends("JournalAge")

                process.kill()
                await fires("TargetDown")
        finally:
            await router.close()
            if process.returncode is None:
                process.kill()
            await process.wait()


async def is_firing(prometheus: Prometheus, name: str) -> bool:
    return name in await prometheus.firing()


async def is_silent(prometheus: Prometheus, name: str) -> bool:
    return name not in await prometheus.firing()
