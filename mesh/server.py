"""A gRPC server with health, reflection and a drain; it never knows what it serves."""

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_reflection.v1alpha import reflection

from mesh.interceptors.peer import PeerInterceptor
from mesh.tls import Tls

MESSAGE_BYTES = 8 << 20

# From "not serving" to the end of listening.
_FAREWELL_S = 0.3

_OPTIONS = [
    # Two servers on one address would share its calls at random, and nobody would notice.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    # Peers that vanish are noticed within 15 s, and clients may ask as often as `mesh.channel` does.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


class AddServicer(Protocol):
    """A generated `add_XServicer_to_server`."""

    def __call__(self, servicer: Any, server: grpc.aio.Server) -> None:
        """Registers the servicer."""


class AddressInUseError(Exception):
    """The address cannot be listened on; the sentence names it."""


class GrpcServer:
    """A server for `services`: (descriptor, generated add function, servicer) each.

    `address` is "host:port" or "unix:/path". `drain_s` is how long running calls may take to end. With `tls` only
    services that have a certificate are let in, each to the RPCs that are for it; at `public_address`, which wants
    `tls`, clients without one, to the RPCs that are for tools.
    """

    def __init__(
        self,
        address: str,
        services: Sequence[tuple[ServiceDescriptor, AddServicer, Any]],
        interceptors: "Sequence[grpc.aio.ServerInterceptor[Any, Any]]",
        *,
        reflect: bool = False,
        drain_s: float = 30.0,
        tls: Tls | None = None,
        public_address: str = "",
    ) -> None:
        self._address = address
        self._public_address = public_address
        self._drain_s = drain_s
        self._tls = tls
        judges = [] if tls is None else [PeerInterceptor()]
        self._server = grpc.aio.server(interceptors=[*interceptors, *judges], options=_OPTIONS)
        for _, add, servicer in services:
            add(servicer, self._server)
        # The empty name stands for the whole server; channels watch it.
        self._names = ["", *(descriptor.full_name for descriptor, _, _ in services)]
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if reflect:
            names = [*self._names[1:], HEALTH_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, self._server)

    async def start(self) -> None:
        """Listen and serve. Raises AddressInUseError."""
        if self._tls is None:
            self._listen(self._address, None)
        else:
            self._listen(self._address, self._tls.server_credentials())
            if self._public_address:
                self._listen(self._public_address, self._tls.server_credentials(is_public=True))
        await self._server.start()
        await self.set_serving(True)

    def _listen(self, address: str, credentials: grpc.ServerCredentials | None) -> None:
        try:
            if credentials is None:
                self._server.add_insecure_port(address)
            else:
                self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise AddressInUseError(
                f"{address} cannot be listened on: another process uses it, or it is not an address of this host."
            ) from error

    async def set_serving(self, serving: bool) -> None:
        """Tell channels whether to send calls here."""
        states = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._health.set(name, states.SERVING if serving else states.NOT_SERVING)

    async def stop(self) -> None:
        """Send new calls elsewhere, let running ones end within the drain, then end them."""
        await self.set_serving(False)
        # gRPC cancels what arrives while it shuts down; channels that watch the health have gone elsewhere by then.
        await asyncio.sleep(min(_FAREWELL_S, self._drain_s))
        await self._server.stop(self._drain_s)
