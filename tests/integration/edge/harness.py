"""Runs a whole edge within a test: its application under uvicorn on a real socket, in front of doubles of its peers."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import httpx

from edge.app import build_app
from edge.exchange import Limits
from edge.peers import Peers, linked_services, services_of
from edge.protocol import ConnectionLimits
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
) -> AsyncIterator[Edge]:
    """An edge in front of the doubles, by peer name, until the end of the block."""
    peers = Peers({name: connect(double.address, *services_of(name)) for name, double in doubles.items()})
    app = build_app(peers, linked_services(), limits or Limits(4 << 20, 30.0, 60.0))
    server = HttpServer(app, connection or ConnectionLimits(), drain_s)
    with listen("127.0.0.1", 0, idle_timeout_s=30.0) as listener:
        port = listener.getsockname()[1]
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", headers=HEADERS, trust_env=False, timeout=10
        ) as client:
            try:
                yield Edge(port, server, client)
            finally:
                await client.aclose()
                server.should_exit = True
                await serving
                await server.end_cancelled_requests()
                await peers.close()


async def until(condition: Callable[[], object], within_s: float = 5.0) -> None:
    """Return once the condition holds; fail if it does not in time."""
    give_up_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up_s, f"not within {within_s} s"
        await asyncio.sleep(0.005)
