"""What the edge is made of, from top to bottom: channels to its peers, relays to the routers, the application, a
listening socket, uvicorn. It is one process of the edge; several of them are started by `edge.workers`."""

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Callable, Iterator
from random import SystemRandom
from typing import Any, cast

import uvicorn

from edge.access_log import AccessLog
from edge.app import build_app
from edge.config import EdgeConfig
from edge.exchange import Limits
from edge.peers import Peers, linked_services, services_of
from edge.protocol import ConnectionLimits, EdgeProtocol
from edge.routers import Dial, GrpcStream, Routers
from mesh.channel import connect
from mesh.process import spare_collector
from mesh.relay import WINDOW_S
from mesh.tls import Tls, opened

logger = logging.getLogger(__name__)

_BACKLOG = 2048
# Longer than the pools of most clients and proxies keep a connection, so that they are the ones to close it.
_KEEP_ALIVE_S = 75
# What cancelled requests get to tell their clients.
_LAST_WORDS_S = 1.0


async def serve(
    config: EdgeConfig,
    stop: asyncio.Event,
    *,
    dial: Dial | None = None,
    window_s: float = WINDOW_S,
    shares_port: bool = False,
    on_serving: Callable[[], object] = lambda: None,
) -> None:
    """Serve until `stop` is set, then let running requests end within `drain_s`.

    `dial` opens the relays to the routers (None: over gRPC), which send what they have every `window_s`. With
    `shares_port` other processes of this user may listen on the same address. `on_serving` is called when clients can
    connect.

    Raises mesh.tls.CertificateError, OSError if the address is taken, and ValueError if a contract cannot be offered as
    REST.
    """
    async with opened(config.tls) as tls:
        routers = Routers(
            config.router_target, dial or functools.partial(GrpcStream, tls=tls), SystemRandom(), window_s=window_s
        )
        await _serve(config, stop, tls, routers, shares_port, on_serving)


async def _serve(
    config: EdgeConfig,
    stop: asyncio.Event,
    tls: Tls | None,
    routers: Routers,
    shares_port: bool,
    on_serving: Callable[[], object],
) -> None:
    peers = Peers(
        {
            "identity": connect(config.identity_target, *services_of("identity"), tls=tls),
            "router": connect(config.router_target, *services_of("router"), tls=tls),
            "analytics": connect(config.analytics_target, *services_of("analytics"), tls=tls),
        }
    )
    access_log = AccessLog("edge") if logger.isEnabledFor(logging.INFO) else None
    try:
        app = build_app(
            peers,
            routers,
            linked_services(),
            Limits(
                config.max_body_bytes,
                config.idle_timeout_s,
                config.request_timeout_s,
                config.proxies.trusted_proxies,
            ),
            access_log,
        )
        limits = ConnectionLimits(
            header_timeout_s=config.header_timeout_s,
            write_timeout_s=config.idle_timeout_s,
            max_connections=config.max_connections,
        )
        server = HttpServer(app, limits, config.drain_s)
        host, port = config.host_and_port
        with listen(host, port, idle_timeout_s=config.idle_timeout_s, shares_port=shares_port) as listener:
            spare_collector()
            async with asyncio.TaskGroup() as tasks:
                relays = tasks.create_task(routers.run())
                serving = tasks.create_task(server.serve(sockets=[listener]))
                logger.info("the edge serves on %s:%s", *listener.getsockname()[:2])
                on_serving()
                await stop.wait()
                server.should_exit = True
                await serving
                await server.end_cancelled_requests()
                relays.cancel()
    finally:
        await peers.close()
        if access_log is not None:
            access_log.close()


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


def listen(host: str, port: int, *, idle_timeout_s: float, shares_port: bool = False) -> socket.socket:
    """A listening socket. What is set on it holds for every connection: a client that vanished without a word is found
    within 20 s, one that acknowledges nothing within `idle_timeout_s`. With `shares_port` the kernel spreads
    connections over all sockets on the address that were made so.

    Raises OSError if the address is taken or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=_BACKLOG, reuse_port=shares_port)
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
