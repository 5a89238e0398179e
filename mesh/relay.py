"""Frames on their way out of one end of a relay: gathered into batches, and sent at most once a millisecond; it never
knows what a frame is about.

A message of a gRPC stream costs some 100 us of CPU whatever it holds, so what arrives within a millisecond travels
together. The first frame after a pause leaves at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from aiaas.router.v1.inference_service_pb2 import RelayBatch, RelayFrame

WINDOW_S = 0.001
"""The least time between two batches; half of it costs more, and ten times as much is felt by a reader."""

BATCH_BYTES = 1 << 20
"""A batch that holds so much takes no further frame. One frame may be larger by itself, up to gRPC's own limit."""


class Outbox:
    """What one end has to say. `window_s` is 0 where a batch costs nothing, within one process."""

    def __init__(self, *, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._loop = asyncio.get_running_loop()
        self._full: deque[RelayBatch] = deque()
        # Set when there may be something to send: a window has passed, a batch is full, or there will be no more.
        self._due = asyncio.Event()
        self._due_from = 0.0
        self._closed = False
        self._renew()

    def add(self, inference_id: int, size_bytes: int = 0) -> RelayFrame:
        """A new frame, to be filled in before the event loop turns; `size_bytes` is about what it will hold."""
        self._make_room(size_bytes)
        return self._frame(inference_id=inference_id)

    def add_data(self, inference_id: int, data: bytes) -> None:
        """A frame of an answer's bytes."""
        if self._size_bytes and self._size_bytes + len(data) <= BATCH_BYTES:
            self._size_bytes += len(data)
        else:
            self._make_room(len(data))
        # Made in place: a frame of its own would be copied into the batch, at twice the cost.
        self._frame(inference_id=inference_id, data=data)

    def hurry(self) -> None:
        """Send what is there without waiting for the window's end."""
        self._due.set()

    def close(self) -> None:
        """Nothing more comes; what is there still goes out."""
        self._closed = True
        self._due.set()

    async def batches(self) -> AsyncIterator[RelayBatch]:
        """The batches, until the outbox is closed and empty. For one reader, who asks for the next when it is rid of
        the last: as long as it is not, frames gather here."""
        while True:
            await self._due.wait()
            while self._full:
                yield self._full.popleft()
            if not self._closed:
                self._due.clear()
            if self._size_bytes:
                batch = self._batch
                self._renew()
                self._due_from = self._loop.time() + self._window_s
                yield batch
            elif self._closed:
                return

    def _make_room(self, size_bytes: int) -> None:
        if self._size_bytes + size_bytes > BATCH_BYTES and self._size_bytes:
            self._full.append(self._batch)
            self._renew()
            self._due.set()
        if not self._size_bytes:
            if self._due_from <= self._loop.time():
                self._due.set()
            else:
                self._loop.call_at(self._due_from, self._due.set)
        # A frame without bytes counts too, so that a batch that holds any is never taken for an empty one.
        self._size_bytes += size_bytes + 1

    def _renew(self) -> None:
        self._batch = RelayBatch()
        self._frame = self._batch.frames.add
        self._size_bytes = 0
