"""The replicas of the router: a relay to each, and which one takes a request; it never carries an answer.

A request goes to the replica with the fewest tokens in flight, as far as this worker of the edge knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Callable
from random import Random
from typing import Any

import grpc
import msgspec

from aiaas.router.v1 import inference_service_pb2 as pb
from aiaas.router.v1.inference_service_pb2_grpc import InferenceServiceStub
from edge.relay import Answer, Link, RelayStream
from mesh.channel import connect
from mesh.errors import PlatformError, Reason
from mesh.relay import WINDOW_S
from mesh.tls import Tls

logger = logging.getLogger(__name__)

_LOOK_UP_S = 5.0
_OPEN_WAIT_S = 2.0
_OPEN_POLL_S = 0.02
# What a request is taken to produce that does not say how much it wants.
_COMPLETION_TOKENS = 256
_BYTES_PER_TOKEN = 4

_END: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it

Dial = Callable[[str], RelayStream]
"""Opens a relay to an address: a gRPC target that stands for one router."""


class Routers:
    """The relays to all replicas of the router behind a gRPC target. A name is looked up again and again, as replicas
    come and go."""

    def __init__(self, target: str, dial: Dial, random: Random, *, window_s: float = WINDOW_S) -> None:
        self._target = target
        self._dial = dial
        self._random = random
        self._window_s = window_s
        self._links: dict[str, Link] = {}

    async def open(self, body: bytes, timeout_s: float) -> tuple[Answer, pb.RelayOpen]:
        """Start an inference where the least is to be done, as `Link.open` does. A router that restarts is waited for,
        up to two seconds.

        Raises PlatformError(UNAVAILABLE) if there is none then.
        """
        link = self._least_loaded()
        if link is None:
            link = await self._next_to_open()
        return link.open(_tokens_of(body) if len(self._links) > 1 else 0, timeout_s, len(body))

    async def run(self) -> None:
        """Keep a relay open to every replica, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            keepers: dict[str, asyncio.Task[None]] = {}
            while True:
                with contextlib.suppress(OSError):
                    # Without an answer, the replicas that are known go on serving.
                    addresses = await _look_up(self._target)
                    for address in addresses - self._links.keys():
                        link = Link(functools.partial(self._dial, address), self._random, window_s=self._window_s)
                        self._links[address] = link
                        keepers[address] = tasks.create_task(link.run(), name=f"relay to {address}")
                    for address in self._links.keys() - addresses:
                        self._links[address].retire()
                for address in [address for address, link in self._links.items() if link.is_done]:
                    del self._links[address]
                    keepers.pop(address).cancel()
                await asyncio.sleep(_LOOK_UP_S)

    def _least_loaded(self) -> Link | None:
        usable = [link for link in self._links.values() if link.takes_requests]
        if len(usable) > 1:
            least = min(link.in_flight_tokens for link in usable)
            return self._random.choice([link for link in usable if link.in_flight_tokens == least])
        return usable[0] if usable else None

    async def _next_to_open(self) -> Link:
        for _ in range(round(_OPEN_WAIT_S / _OPEN_POLL_S)):
            await asyncio.sleep(_OPEN_POLL_S)
            if link := self._least_loaded():
                return link
        raise PlatformError(Reason.UNAVAILABLE)


class GrpcStream:
    """A relay over gRPC."""

    def __init__(self, address: str, tls: Tls | None = None) -> None:
        self._channel = connect(address, pb.DESCRIPTOR.services_by_name["InferenceService"], tls=tls)
        self._call: Any = InferenceServiceStub(self._channel).Relay()  # type: ignore[call-arg]  # frames are written
        self._is_closed = False

    async def write(self, batch: pb.RelayBatch) -> None:
        """See `RelayStream.write`; that a call has failed, its reader learns."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.write(batch)

    async def read(self) -> pb.RelayBatch | None:
        """See `RelayStream.read`."""
        try:
            batch = await self._call.read()
        except grpc.aio.AioRpcError as error:
            logger.warning("a relay has ended: %s", error.code().name)
            return None
        except asyncio.CancelledError:
            # A call that was cancelled reads as a task that was.
            if self._is_closed:
                return None
            raise
        return None if batch is _END else batch

    async def close(self) -> None:
        """See `RelayStream.close`."""
        self._is_closed = True
        self._call.cancel()
        await self._channel.close(None)


class _Wanted(msgspec.Struct):
    """What of a body says how long its answer may be; each endpoint has a name of its own for it."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None


_WANTED = msgspec.json.Decoder(_Wanted)


def _tokens_of(body: bytes) -> int:
    """About how many tokens a request will keep a router busy with. What is wrong with a body, the router says."""
    try:
        wanted = _WANTED.decode(body)
    except ValueError:
        wanted = _Wanted()
    completion_tokens = wanted.max_completion_tokens or wanted.max_tokens or wanted.max_output_tokens
    return len(body) // _BYTES_PER_TOKEN + (completion_tokens or _COMPLETION_TOKENS)


async def _look_up(target: str) -> set[str]:
    """The replicas behind a gRPC target, each as a target of its own. Raises OSError for a name that has none."""
    scheme, _, rest = target.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return {target}
    if scheme in ("ipv4", "ipv6"):
        return {f"{scheme}:{address}" for address in rest.split(",")}
    host, _, port = target.removeprefix("dns:").rpartition("/")[2].rpartition(":")
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    # A replica with an address of each family must not get two relays.
    family = min(entry[0] for entry in found)
    form = "ipv4:{}:{}" if family is socket.AF_INET else "ipv6:[{}]:{}"
    return {form.format(*entry[4][:2]) for entry in found if entry[0] is family}
