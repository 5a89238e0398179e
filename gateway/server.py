"""What the gateway is made of: a router, and an edge whose relay to it is plain calls; it adds nothing to either.

Both are what they are in processes of their own, and speak the same frames; only the way between them is another. All
other calls of the edge go through the router's gRPC server as ever.
"""

from __future__ import annotations

import asyncio
import logging

import edge.server
import router.server
from aiaas.router.v1 import inference_service_pb2 as pb
from gateway.config import GatewayConfig
from mesh.errors import PlatformError
from router.relay import Relays

logger = logging.getLogger(__name__)


async def serve(config: GatewayConfig, stop: asyncio.Event) -> None:
    """Serve until `stop` is set; then first the edge drains, and after it the router.

    Raises the group of what `edge.server.serve` or `router.server.serve` raised.
    """
    edge_has_stopped = asyncio.Event()
    announced: asyncio.Future[Relays] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(router.server.serve(config.router, edge_has_stopped, announce=announced.set_result))
        relays = await announced
        await edge.server.serve(config.edge, stop, dial=lambda _: MemoryStream(relays), window_s=0)
        edge_has_stopped.set()


class MemoryStream:
    """A relay within the process: what one end sends, the other has."""

    def __init__(self, relays: Relays) -> None:
        self._relays = relays
        self._relay = relays.open(window_s=0)
        self._batches = self._relay.batches()

    async def write(self, batch: pb.RelayBatch) -> None:
        """See `edge.relay.RelayStream.write`."""
        self._relay.receive(batch)

    async def read(self) -> pb.RelayBatch | None:
        """See `edge.relay.RelayStream.read`."""
        try:
            return await anext(self._batches, None)
        except PlatformError as error:
            logger.warning("a relay has ended: %s", error.reason.value)
            return None

    async def close(self) -> None:
        """See `edge.relay.RelayStream.close`."""
        await self._relays.close(self._relay)
