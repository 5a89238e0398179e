"""The services behind the edge: which one serves which contract, and how long a call waits for one that restarts; it
never looks into a message."""

import asyncio
import contextlib
import importlib
import pkgutil
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from edge.exchange import ClientGoneError, Exchange
from mesh.errors import PlatformError, Reason, from_rpc_error

M = TypeVar("M", bound=Message)

PACKAGES: Mapping[str, str] = {
    "aiaas.identity.v1": "identity",
    "aiaas.router.v1": "router",
    "aiaas.analytics.v1": "analytics",
}
"""The peer that serves each package of the contracts; the one place that says so."""

_READY_WAIT_S = 2.0
_READY_POLL_S = 0.05
_HEALTH_TIMEOUT_S = 1.0


class Peer:
    """One service, behind one channel."""

    def __init__(self, name: str, channel: grpc.aio.Channel) -> None:
        self.name = name
        self.channel = channel
        self._health = health_pb2_grpc.HealthStub(channel)

    async def until_ready(self) -> None:
        """Return when the peer can be called; a peer that restarts is waited for, up to two seconds.

        Raises PlatformError(UNAVAILABLE) if it is still away then.
        """
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + _READY_WAIT_S
        while self.channel.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.READY:
            if loop.time() >= give_up_s:
                raise PlatformError(Reason.UNAVAILABLE)
            # Watching the state would leave a watch behind for every caller that gives up or goes away.
            await asyncio.sleep(_READY_POLL_S)

    async def call(self, rpc: Callable[..., Awaitable[M]], request: Message, timeout_s: float) -> M:
        """The answer of a unary RPC of this peer. Raises PlatformError, the peer's own or what the transport met."""
        await self.until_ready()
        try:
            return await rpc(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _as_seen_by_client(error) from error

    async def check_health(self) -> None:
        """Return if the peer says that it serves; raise PlatformError(UNAVAILABLE) otherwise."""
        try:
            answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise PlatformError(Reason.UNAVAILABLE, description=f"no answer ({error.code().name})") from error
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
            raise PlatformError(Reason.UNAVAILABLE, description=state.lower())


class Peers:
    """All peers, by name and by the contract they serve."""

    def __init__(self, channels: Mapping[str, grpc.aio.Channel]) -> None:
        """The channel to each peer, by its name in `PACKAGES`."""
        self._peers = {name: Peer(name, channel) for name, channel in channels.items()}

    def __getitem__(self, name: str) -> Peer:
        """The peer of that name. Raises KeyError."""
        return self._peers[name]

    def __iter__(self) -> Iterator[Peer]:
        """All peers."""
        return iter(self._peers.values())

    def serving(self, service: ServiceDescriptor) -> Peer:
        """The peer that serves a service. Raises KeyError if there is no channel to it."""
        return self._peers[PACKAGES[service.file.package]]

    async def close(self) -> None:
        """End every channel, and what still runs on it."""
        await asyncio.gather(*(peer.channel.close(None) for peer in self))


def services_of(name: str) -> list[ServiceDescriptor]:
    """The services that one peer serves."""
    return [service for service in linked_services() if PACKAGES[service.file.package] == name]


@cache
def linked_services() -> tuple[ServiceDescriptor, ...]:
    """Every service of the contracts, in the order of their names; a new .proto file needs no entry here."""
    services: list[ServiceDescriptor] = []
    for package in PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if module.name.endswith("_pb2"):
                file = importlib.import_module(f"{package}.{module.name}").DESCRIPTOR
                services.extend(file.services_by_name.values())
    return tuple(sorted(services, key=lambda service: service.full_name))


@contextlib.contextmanager
def following(exchange: Exchange, call: grpc.aio.UnaryStreamCall[Any, Any]) -> Iterator[None]:
    """Read a streaming call within this: it is cancelled at once when the client goes away, and at the end in any case.

    Raises ClientGoneError instead of what a cancelled call raises, and PlatformError for a call that failed.
    """
    watch = asyncio.create_task(_cancel_when_gone(exchange, call))
    try:
        yield
    except (asyncio.CancelledError, grpc.aio.AioRpcError) as error:
        if exchange.client_is_gone:
            raise ClientGoneError from None
        if isinstance(error, grpc.aio.AioRpcError):
            raise _as_seen_by_client(error) from error
        raise
    finally:
        watch.cancel()
        call.cancel()


async def _cancel_when_gone(exchange: Exchange, call: grpc.aio.UnaryStreamCall[Any, Any]) -> None:
    await exchange.gone()
    if exchange.client_is_gone:
        call.cancel()


def _as_seen_by_client(error: grpc.aio.AioRpcError) -> PlatformError:
    """A peer's error for a client that is still there: a call that the peer itself cancelled was cut off by its end."""
    known = from_rpc_error(error)
    return PlatformError(Reason.UNAVAILABLE) if known.reason is Reason.CANCELLED else known
