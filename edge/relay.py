"""The edge's end of a relay to one router: inferences out, answers back; it never looks into a body or an answer.

A relay whose router says nothing for a second and a half is given up: all its answers end with an error, and it is
opened again, with pauses.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from random import Random
from typing import Protocol

from google.rpc import status_pb2

from aiaas.router.v1 import inference_service_pb2 as pb
from mesh.errors import PlatformError, Reason, from_status
from mesh.relay import WINDOW_S, Outbox

logger = logging.getLogger(__name__)

CREDIT_BYTES = 256 << 10
"""What a router may send of one answer before its client has taken any of it."""

_PING_S = 0.5
_UNANSWERED_PINGS = 3
# After its deadline a router has this long to say so itself.
_OVERTIME_S = 1.0
_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class RelayStream(Protocol):
    """The way to one router. What has been ended or broken off reads None and writes nothing."""

    async def write(self, batch: pb.RelayBatch) -> None:
        """Send a batch; returns when the next one may be sent."""

    async def read(self) -> pb.RelayBatch | None:
        """The next batch; None when there will be no more."""

    async def close(self) -> None:
        """End it, on both sides."""


class Answer:
    """What comes back of one inference, for one reader."""

    __slots__ = (
        "_chunks",
        "_ended",
        "_error",
        "_head",
        "_link",
        "_passed_on_bytes",
        "_waiter",
        "_write",
        "deadline",
        "id",
        "last_chunk",
        "tokens",
    )

    def __init__(self, link: Link, inference_id: int, tokens: int, deadline: float) -> None:
        self._link = link
        self.id = inference_id
        self.tokens = tokens
        self.deadline = deadline
        self._head: pb.InferHead | None = None
        self._chunks: list[bytes] = []
        self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._passed_on_bytes = 0
        self._write: Callable[[bytes], bool] | None = None
        self.last_chunk = b""
        """What was passed on last."""

    async def head(self) -> pb.InferHead:
        """What the router knows before the first byte. Raises what `abandon` was given, and PlatformError."""
        while self._head is None:
            if self._error is not None:
                raise self._error
            if self._ended or self._chunks:
                logger.error("a router began an answer without its head")
                raise PlatformError(Reason.INTERNAL)
            await self._arrival()
        return self._head

    async def data(self) -> bytes | None:
        """What has arrived since the last time, as much as there is; None when the answer is whole. To ask for more
        says that all before has been passed on. Raises what `abandon` was given, and PlatformError."""
        self._give_credit()
        chunks = self._chunks
        while not chunks:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            await self._arrival()
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self._passed_on_bytes += len(data)
        self.last_chunk = data
        return data

    def write_through(self, write: Callable[[bytes], bool]) -> None:
        """Have what arrives while the reader waits written at once, by `write`, instead of waking the reader, which
        costs as much as all else that is done for a chunk here. What `write` does not take, the reader gets."""
        self._write = write

    @property
    def is_whole(self) -> bool:
        """Whether everything has arrived, so that the next data are the last."""
        return self._ended and self._error is None

    def abandon(self, error: Exception) -> None:
        """Nobody wants the answer any more: tell the router, unless it has ended, and raise `error` to its reader."""
        if not self._ended:
            self._link.cancel(self)
            self.end(error)

    def begin(self, head: pb.InferHead) -> None:
        """Take the head."""
        self._head = head
        self._wake()

    def add(self, data: bytes) -> None:
        """Take bytes."""
        if self._write is not None and self._waiter is not None and not self._chunks and self._write(data):
            self._passed_on_bytes += len(data)
            self.last_chunk = data
            self._give_credit()
            return
        self._chunks.append(data)
        self._wake()

    def end(self, error: Exception | None) -> None:
        """Take the end: None for the tail of a whole answer."""
        self._ended = True
        self._error = error
        self._wake()

    def _give_credit(self) -> None:
        if self._passed_on_bytes > CREDIT_BYTES // 2 and not self._ended:
            self._link.give_credit(self.id, self._passed_on_bytes)
            self._passed_on_bytes = 0

    async def _arrival(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Link:
    """The relay to one router replica, opened again whenever it ends."""

    def __init__(self, dial: Callable[[], RelayStream], random: Random, *, window_s: float = WINDOW_S) -> None:
        self._dial = dial
        self._random = random
        self._window_s = window_s
        self._outbox = Outbox()
        self._answers: dict[int, Answer] = {}
        self._last_id = 0
        self._unanswered_pings = 0
        self._retired = False
        self.takes_requests = False
        self.in_flight_tokens = 0

    def open(self, tokens: int, timeout_s: float, size_bytes: int) -> tuple[Answer, pb.RelayOpen]:
        """Start an inference; only while the link takes requests. The message is to be filled in with a request of
        about `size_bytes` before the event loop turns: made in its place it costs a third of one that is copied."""
        self._last_id += 1
        deadline = asyncio.get_running_loop().time() + timeout_s + _OVERTIME_S
        answer = self._answers[self._last_id] = Answer(self, self._last_id, tokens, deadline)
        self.in_flight_tokens += tokens
        opened = self._outbox.add(self._last_id, size_bytes).open
        opened.timeout_millis = int(timeout_s * 1000)
        opened.credit_bytes = CREDIT_BYTES
        return answer, opened

    def give_credit(self, inference_id: int, size_bytes: int) -> None:
        """Let the router send more of an answer."""
        self._outbox.add(inference_id).credit.bytes = size_bytes

    def cancel(self, answer: Answer) -> None:
        """Have the router stop an inference."""
        self._outbox.add(answer.id).cancel.SetInParent()
        self._forget(answer)

    def retire(self) -> None:
        """Take no more requests, for good; what runs goes on."""
        self._retired = True
        self.takes_requests = False

    @property
    def is_done(self) -> bool:
        """Whether it was retired and nothing runs any more."""
        return self._retired and not self._answers

    async def run(self) -> None:
        """Keep a relay open until cancelled."""
        pause = 0
        while True:
            was_open = await self._live()
            pause = 0 if was_open else min(pause + 1, len(_PAUSES_S) - 1)
            await asyncio.sleep(_PAUSES_S[pause] * self._random.uniform(0.5, 1.0))

    async def _live(self) -> bool:
        """One life of the relay; returns whether its router ever answered."""
        self._outbox = Outbox(window_s=self._window_s)
        self._unanswered_pings = 0
        stream = self._dial()
        was_open = False
        tasks = [asyncio.create_task(self._write(stream)), asyncio.create_task(self._watch(stream))]
        try:
            while (batch := await stream.read()) is not None:
                self._unanswered_pings = 0
                if not was_open and not self._retired:
                    was_open = self.takes_requests = True
                self._receive(batch)
        finally:
            self.takes_requests = False
            for task in tasks:
                task.cancel()
            self._lose_answers()
            await stream.close()
            await asyncio.wait(tasks)
        return was_open

    async def _write(self, stream: RelayStream) -> None:
        async for batch in self._outbox.batches():
            await stream.write(batch)

    async def _watch(self, stream: RelayStream) -> None:
        """Ask the router for signs of life, and hold answers to their deadlines."""
        loop = asyncio.get_running_loop()
        while self._unanswered_pings < _UNANSWERED_PINGS:
            self._unanswered_pings += 1
            self._outbox.add(0).ping.SetInParent()
            await asyncio.sleep(_PING_S)
            now = loop.time()
            for answer in [answer for answer in self._answers.values() if answer.deadline < now]:
                answer.abandon(PlatformError(Reason.DEADLINE_EXCEEDED))
        logger.warning("a router fell silent; its relay is given up")
        await stream.close()

    def _receive(self, batch: pb.RelayBatch) -> None:
        answers = self._answers
        for frame in batch.frames:
            kind = frame.WhichOneof("kind")
            answer = answers.get(frame.inference_id)
            if answer is None:
                # Of an answer that was abandoned, or of the stream itself.
                if kind == "drain":
                    self._drain()
            elif kind == "data":
                answer.add(frame.data)
            elif kind == "head":
                answer.begin(frame.head)
            elif kind == "tail":
                self._forget(answer)
                answer.end(None)
            elif kind == "status":
                self._forget(answer)
                error = from_status(status_pb2.Status.FromString(frame.status))
                # What a router cancelled by itself was cut off by its end; the client is still there.
                answer.end(PlatformError(Reason.UNAVAILABLE) if error.reason is Reason.CANCELLED else error)

    def _drain(self) -> None:
        self.takes_requests = False
        self._outbox.add(0).drain.SetInParent()

    def _forget(self, answer: Answer) -> None:
        del self._answers[answer.id]
        self.in_flight_tokens -= answer.tokens

    def _lose_answers(self) -> None:
        for answer in self._answers.values():
            answer.end(PlatformError(Reason.UNAVAILABLE))
        self._answers.clear()
        self.in_flight_tokens = 0
