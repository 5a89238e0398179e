"""Reads one inference part by part, as tests like to."""

import asyncio
from collections.abc import AsyncGenerator

from router.answers import Head, Tail
from router.inference import Inference

Part = Head | bytes | Tail


class QueueReader:
    """A reader that keeps what it gets until it is asked for."""

    def __init__(self) -> None:
        self._parts: asyncio.Queue[Part | None] = asyncio.Queue()

    def head(self, head: Head) -> None:
        self._parts.put_nowait(head)

    def data(self, data: bytes) -> None:
        self._parts.put_nowait(data)

    def tail(self, tail: Tail) -> None:
        self._parts.put_nowait(tail)

    async def parts(self, inference: Inference) -> AsyncGenerator[Part, None]:
        """Run the inference; closed before its end, it is abandoned. Raises what the inference raises."""
        running = asyncio.create_task(inference.run())
        running.add_done_callback(lambda _: self._parts.put_nowait(None))
        try:
            while (part := await self._parts.get()) is not None:
                yield part
            await running
        finally:
            inference.abandon()
            await asyncio.wait([running])
