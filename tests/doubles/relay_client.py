"""The other end of a router's relay, frame by frame: each inference reads and ends like a call of Infer."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.rpc import status_pb2

from aiaas.router.v1 import inference_service_pb2 as pb
from mesh.errors import from_status

CREDIT_BYTES = 64 << 10


class RelayClient:
    """One relay. `batches` is what the router sends, `send` gives it a batch."""

    def __init__(self, batches: AsyncIterator[pb.RelayBatch], send: Callable[[pb.RelayBatch], Any]) -> None:
        self._send = send
        self._calls: dict[int, RelayedCall] = {}
        self.drained = asyncio.Event()
        self.pongs = 0
        self.is_silent = False
        self.has_ended = False
        self._outgoing: asyncio.Queue[pb.RelayFrame] = asyncio.Queue()
        self._tasks = [
            asyncio.create_task(work) for work in (self._read(batches), self._write(), self._show_signs_of_life())
        ]

    def say(self, frame: pb.RelayFrame) -> None:
        """Send one frame."""
        self._outgoing.put_nowait(frame)

    def infer(self, opened: pb.RelayOpen) -> "RelayedCall":
        """Open an inference with the first read."""
        inference_id = len(self._calls) + 1
        call = self._calls[inference_id] = RelayedCall(self, inference_id, opened)
        return call

    async def close(self) -> None:
        """Stop reading and writing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _write(self) -> None:
        while True:
            sent = self._send(pb.RelayBatch(frames=[await self._outgoing.get()]))
            if asyncio.iscoroutine(sent):
                await sent

    async def _show_signs_of_life(self) -> None:
        while True:
            if not self.is_silent:
                self.say(pb.RelayFrame(ping=pb.RelayPing()))
            await asyncio.sleep(0.5)

    async def _read(self, batches: AsyncIterator[pb.RelayBatch]) -> None:
        try:
            async for batch in batches:
                for frame in batch.frames:
                    match frame.WhichOneof("kind"):
                        case "ping":
                            self.pongs += 1
                        case "drain":
                            self.drained.set()
                        case _:
                            self._calls[frame.inference_id].frames.put_nowait(frame)
        finally:
            # A router that has nothing left to do may be gone before it has said that the relay ended well.
            self.has_ended = True


class RelayedCall:
    """One inference on a relay."""

    def __init__(self, client: RelayClient, inference_id: int, opened: pb.RelayOpen) -> None:
        self._client = client
        self._id = inference_id
        self._opened: pb.RelayOpen | None = opened
        self.frames: asyncio.Queue[pb.RelayFrame] = asyncio.Queue()

    async def read(self) -> pb.InferResponse | None:
        """The next part; None after the tail. Raises PlatformError."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            opened.credit_bytes = CREDIT_BYTES
            self._client.say(pb.RelayFrame(inference_id=self._id, open=opened))
        if self._id < 0:
            return None
        frame = await self.frames.get()
        kind = frame.WhichOneof("kind")
        if kind == "status":
            raise from_status(status_pb2.Status.FromString(frame.status))
        if kind == "data":
            credit = pb.RelayCredit(bytes=len(frame.data))
            self._client.say(pb.RelayFrame(inference_id=self._id, credit=credit))
            return pb.InferResponse(data=frame.data)
        if kind == "tail":
            self._id = -1
            return pb.InferResponse(tail=frame.tail)
        assert kind == "head"
        return pb.InferResponse(head=frame.head)

    def cancel(self) -> None:
        """Tell the router that nobody reads any more."""
        frame = pb.RelayFrame(inference_id=self._id, cancel=pb.RelayCancel())
        self._client.say(frame)

    async def __aiter__(self) -> AsyncIterator[pb.InferResponse]:
        while (part := await self.read()) is not None:
            yield part
