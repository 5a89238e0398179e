"""Runs a whole edge within a test: its application under uvicorn on a real socket, in front of doubles of its peers."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx
import msgspec

from edge.access_log import AccessLog
from edge.app import build_app
from edge.exchange import Limits
from edge.peers import Peers, linked_services, services_of
from edge.protocol import ConnectionLimits
from edge.routers import GrpcStream, Routers
from edge.server import HttpServer, listen
from mesh.channel import connect
from tests.doubles.peer import PeerDouble

KEY = "aias_test"
HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Edge:
    """A running edge."""

    port: int
    server: HttpServer
    client: httpx.AsyncClient
    access_log: AccessLog
    log_pipe: int

    def access_lines(self) -> list[dict[str, Any]]:
        """The lines that the access log has written since they were last asked for."""
        self.access_log.close()
        written = os.read(self.log_pipe, 1 << 20)
        return [msgspec.json.decode(line) for line in written.splitlines()]

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection to it."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def exchange(self, sent: bytes, within_s: float = 5) -> bytes:
        """What comes back for raw bytes, until the edge closes the connection."""
        reader, writer = await self.open()
        try:
            writer.write(sent)
            async with asyncio.timeout(within_s):
                return await reader.read()
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def running_edge(
    doubles: Mapping[str, PeerDouble],
    *,
    limits: Limits | None = None,
    connection: ConnectionLimits | None = None,
    drain_s: int = 2,
    port: int = 0,
) -> AsyncIterator[Edge]:
    """An edge in front of the doubles, by peer name, until the end of the block; on a free port unless told."""
    peers = Peers({name: connect(double.address, *services_of(name)) for name, double in doubles.items()})
    routers = Routers(doubles["router"].address, GrpcStream, Random(1))
    log_pipe, log_end = os.pipe()
    access_log = AccessLog("edge", log_end)
    app = build_app(peers, routers, linked_services(), limits or Limits(4 << 20, 30.0, 60.0), access_log)
    server = HttpServer(app, connection or ConnectionLimits(), drain_s)
    with listen("127.0.0.1", port, idle_timeout_s=30.0) as listener:
        port = listener.getsockname()[1]
        relays = asyncio.create_task(routers.run())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", headers=HEADERS, trust_env=False, timeout=10
        ) as client:
            try:
                yield Edge(port, server, client, access_log, log_pipe)
            finally:
                await client.aclose()
                server.should_exit = True
                await serving
                await server.end_cancelled_requests()
                relays.cancel()
                await asyncio.wait([relays])
                await peers.close()
                access_log.close()
                os.close(log_pipe)
                os.close(log_end)


async def until(condition: Callable[[], object], within_s: float = 5.0) -> None:
    """Return once the condition holds; fail if it does not in time."""
    give_up_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up_s, f"not within {within_s} s"
        await asyncio.sleep(0.005)
