"""What the edge is made of, from top to bottom: channels to its peers, the application, a listening socket, uvicorn."""

import asyncio
import contextlib
import functools
import gc
import logging
import socket
from collections.abc import Iterator
from typing import Any, cast

import uvicorn

from edge.app import build_app
from edge.config import EdgeConfig
from edge.exchange import Limits
from edge.peers import Peers, linked_services, services_of
from edge.protocol import ConnectionLimits, EdgeProtocol
from mesh.channel import connect

logger = logging.getLogger(__name__)

_BACKLOG = 2048
# Longer than the pools of most clients and proxies keep a connection, so that they are the ones to close it.
_KEEP_ALIVE_S = 75
# What cancelled requests get to tell their clients.
_LAST_WORDS_S = 1.0


async def serve(config: EdgeConfig, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then let running requests end within `drain_s`.

    Raises OSError if the address is taken, and ValueError if a contract cannot be offered as REST.
    """
    peers = Peers(
        {
            "identity": connect(config.identity_target, *services_of("identity")),
            "router": connect(config.router_target, *services_of("router")),
            "analytics": connect(config.analytics_target, *services_of("analytics")),
        }
    )
    try:
        app = build_app(
            peers,
            linked_services(),
            Limits(config.max_body_bytes, config.idle_timeout_s, config.request_timeout_s),
        )
        limits = ConnectionLimits(header_timeout_s=config.header_timeout_s, write_timeout_s=config.idle_timeout_s)
        server = HttpServer(app, limits, config.drain_s)
        with listen(*config.host_and_port, idle_timeout_s=config.idle_timeout_s) as listener:
            logger.info("the edge serves on %s:%s", *listener.getsockname()[:2])
            # What start-up made stays; the collector need not look at it again.
            gc.collect()
            gc.freeze()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(server.serve(sockets=[listener]))
                await stop.wait()
                server.should_exit = True
        await server.end_cancelled_requests()
    finally:
        await peers.close()


class HttpServer(uvicorn.Server):
    """uvicorn as a part of this process: it handles no signals, and writes no log line for each request."""

    def __init__(self, app: Any, limits: ConnectionLimits, drain_s: int) -> None:
        protocol = functools.partial(EdgeProtocol, limits=limits)
        super().__init__(
            uvicorn.Config(
                app,
                http=cast(type[asyncio.Protocol], protocol),
                ws="none",
                interface="asgi3",
                lifespan="off",
                log_config=None,
                log_level="info",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=drain_s,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield

    async def end_cancelled_requests(self) -> None:
        """Wait until the requests that the end of the drain time cancelled have said so to their clients."""
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_LAST_WORDS_S)


def listen(host: str, port: int, *, idle_timeout_s: float) -> socket.socket:
    """A listening socket. What is set on it holds for every connection: a client that vanished without a word is found
    within 20 s, one that acknowledges nothing within `idle_timeout_s`.

    Raises OSError if the address is taken or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    listener.setblocking(False)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 10),
        (socket.TCP_KEEPINTVL, 3),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, round(idle_timeout_s * 1000)),
    ):
        listener.setsockopt(socket.IPPROTO_TCP, option, value)
    return listener
