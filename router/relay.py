"""One end of a relay, the router's: frames in, inferences run side by side, frames out; it never infers by itself.

An inference may send as many bytes as the edge has given it credit for. What goes beyond waits here, and the engine is
not read from any further, so that one slow client costs its neighbours nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Iterator

from aiaas.router.v1 import inference_service_pb2 as pb
from mesh import context, request_signatures, tracing
from mesh.auth import CachedAuthenticator, Principal, authorize, find_method, policy_of
from mesh.errors import PlatformError, Reason, to_status
from mesh.relay import WINDOW_S, Outbox
from mesh.request_signatures import SignatureVerifier
from mesh.tracing import Span
from router.answers import EVENT_STREAM, Head, InferenceRequest, Tail
from router.inference import Engine, Inference

logger = logging.getLogger(__name__)

_POLICY = policy_of(find_method("/aiaas.router.v1.InferenceService/Infer"))


class Relays:
    """All relays of a router."""

    def __init__(
        self, engine: Engine, authenticator: CachedAuthenticator, signatures: SignatureVerifier | None = None
    ) -> None:
        self._engine = engine
        self._authenticator = authenticator
        self._signatures = signatures
        self._open: set[Relay] = set()
        self.draining = False
        """Whether edges are asked to open their next inferences elsewhere."""

    def running(self) -> Iterator[tuple[str, Inference]]:
        """What runs now on all of them, with the credential it was asked for with."""
        for relay in self._open:
            yield from relay.running()

    def open(self, *, window_s: float = WINDOW_S) -> Relay:
        """A new relay; whoever opens it closes it."""
        relay = Relay(self._engine, self._authenticator, self._signatures, window_s)
        self._open.add(relay)
        if self.draining:
            relay.drain()
        return relay

    async def close(self, relay: Relay) -> None:
        """End a relay and what still runs on it."""
        self._open.discard(relay)
        await relay.close()

    def drain(self) -> None:
        """Have every edge open its next inferences elsewhere; what runs goes on."""
        self.draining = True
        for relay in self._open:
            relay.drain()


class Relay:
    """One edge worker's relay."""

    def __init__(
        self,
        engine: Engine,
        authenticator: CachedAuthenticator,
        signatures: SignatureVerifier | None,
        window_s: float,
    ) -> None:
        self._engine = engine
        self._authenticator = authenticator
        self._signatures = signatures
        self._outbox = Outbox(window_s=window_s)
        self._running: dict[int, _Relayed] = {}
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_opened = False
        self._losses = engine.journal.losses

    async def batches(self) -> AsyncIterator[pb.RelayBatch]:
        """What goes to the edge; it ends when the relay was drained and all inferences have finished.

        Nothing leaves before the journal has it: one write for all requests of a batch. Raises
        PlatformError(USAGE_UNRECORDABLE), and what runs on this relay ends.
        """
        async for batch in self._outbox.batches():
            self._engine.journal.secure(self._losses)
            yield batch

    def receive(self, batch: pb.RelayBatch) -> None:
        """Take what came from the edge."""
        for frame in batch.frames:
            kind = frame.WhichOneof("kind")
            if kind == "open":
                self._begin(frame.inference_id, frame.open)
            elif kind == "credit":
                if relayed := self._running.get(frame.inference_id):
                    relayed.give_credit(frame.credit.bytes)
            elif kind == "cancel":
                if relayed := self._running.get(frame.inference_id):
                    relayed.abandon()
                    self._finish(frame.inference_id)
            elif kind == "ping":
                self._outbox.add(0).ping.SetInParent()
            elif kind == "drain":
                self._last_opened = True
                self._end_if_drained()

    def running(self) -> Iterator[tuple[str, Inference]]:
        """What runs now, with the credential it was asked for with."""
        for relayed in self._running.values():
            if relayed.inference is not None:
                yield relayed.credential, relayed.inference

    def drain(self) -> None:
        """Ask the edge to open no more."""
        self._outbox.add(0).drain.SetInParent()

    def abandon(self) -> None:
        """End everything that runs, as nobody is there to read it."""
        self._outbox.close()
        for relayed in self._running.values():
            relayed.abandon()
        self._running.clear()

    async def close(self) -> None:
        """Abandon what runs, and wait until it has ended."""
        self.abandon()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _begin(self, inference_id: int, opened: pb.RelayOpen) -> None:
        relayed = self._running[inference_id] = _Relayed(self, inference_id, opened.credit_bytes, opened.credential)
        run = self._run_traced if opened.traceparent else self._run
        relayed.task = self._loop.create_task(run(relayed, opened))
        self._tasks.add(relayed.task)
        # Not in the task itself: one that is cancelled before its first step has no step to say so in.
        relayed.task.add_done_callback(self._tasks.discard)

    async def _run_traced(self, relayed: _Relayed, opened: pb.RelayOpen) -> None:
        span = tracing.resume("router", opened.traceparent)
        if span is None:
            await self._run(relayed, opened)
            return
        try:
            with span.as_current():
                await self._run(relayed, opened, span)
        finally:
            span.end()

    async def _run(self, relayed: _Relayed, opened: pb.RelayOpen, span: Span | None = None) -> None:
        context.request_id.set(opened.request_id)
        context.credential.set(opened.credential)
        try:
            principal = self._authenticator.cached(opened.credential)
            if principal is None:
                principal = await self._authenticator.authenticate(opened.credential)
            if principal.signature_required:
                await self._check_signature(principal, opened)
            if _POLICY.permission not in principal.permissions:
                # The usual answer is known without this, at a twentieth of the cost.
                authorize(principal, _POLICY, opened.request)
            relayed.inference = self._begin_inference(relayed, opened, principal, span)
            # It keeps alive the batch that it came in, bodies and all.
            del opened
            await relayed.inference.run()
        except Exception as error:
            if not isinstance(error, PlatformError):
                logger.error("an inference failed for an unknown reason", exc_info=error)
                error = PlatformError(Reason.INTERNAL)
            if span is not None:
                span.fail(error.reason.value)
            relayed.end(error)

    async def _check_signature(self, principal: Principal, opened: pb.RelayOpen) -> None:
        signature = opened.signature if opened.HasField("signature") else None
        if signature is not None:
            # Of the body that is here, whatever anybody says of it.
            signature.body_sha256 = hashlib.sha256(opened.request.body).digest()
        await request_signatures.check(principal, signature, self._signatures)

    def _begin_inference(
        self, relayed: _Relayed, opened: pb.RelayOpen, principal: Principal, span: Span | None
    ) -> Inference:
        request = opened.request
        return self._engine.begin(
            InferenceRequest(
                opened.request_id,
                request.endpoint,
                request.body,
                principal,
                request.client_address,
                request.idempotency_key,
                self._engine.clock.monotonic() + opened.timeout_millis / 1000,
                span,
            ),
            relayed,
            relayed.task,
        )

    def _finish(self, inference_id: int) -> None:
        """Forget an inference of which everything has been sent."""
        self._running.pop(inference_id, None)
        self._end_if_drained()

    def _end_if_drained(self) -> None:
        if self._last_opened and not self._running:
            self._outbox.close()


class _Relayed:
    """The reader of one inference, as far as its credit goes."""

    __slots__ = (
        "_credit_bytes",
        "_end",
        "_held",
        "_inference_id",
        "_outbox",
        "_relay",
        "credential",
        "inference",
        "task",
    )

    def __init__(self, relay: Relay, inference_id: int, credit_bytes: int, credential: str) -> None:
        self._relay = relay
        self._outbox = relay._outbox
        self._inference_id = inference_id
        self._credit_bytes = credit_bytes
        self.credential = credential
        self._held: list[bytes] = []
        self._end: Tail | PlatformError | None = None
        self.inference: Inference | None = None
        self.task: asyncio.Task[None] | None = None

    def head(self, head: Head) -> None:
        write_head(self._outbox.add(self._inference_id).head, head)
        if head.content_type == EVENT_STREAM:
            # The first token is waited for like no other; there are few first ones, and many that follow.
            self._outbox.hurry()

    def data(self, data: bytes) -> None:
        if self._credit_bytes <= 0 or self._held:
            self._held.append(data)
            return
        self._credit_bytes -= len(data)
        self._outbox.add_data(self._inference_id, data)
        if self._credit_bytes <= 0 and self.inference is not None:
            self.inference.pause()

    def tail(self, tail: Tail) -> None:
        self.end(tail)

    def end(self, end: Tail | PlatformError) -> None:
        """What comes after all data."""
        self._end = end
        if not self._held:
            self._send_end(end)

    def give_credit(self, size_bytes: int) -> None:
        self._credit_bytes += size_bytes
        held, self._held = self._held, []
        for data in held:
            self.data(data)
        if self._held:
            return
        if self._end is not None:
            self._send_end(self._end)
        elif self.inference is not None:
            self.inference.resume()

    def abandon(self) -> None:
        if self.inference is not None:
            self.inference.abandon()
        elif self.task is not None:
            self.task.cancel()

    def _send_end(self, end: Tail | PlatformError) -> None:
        if isinstance(end, PlatformError):
            self._outbox.add(self._inference_id).status = to_status(end).SerializeToString()
        else:
            write_tail(self._outbox.add(self._inference_id).tail, end)
        # They refer to each other; without this, only the collector would free them.
        self.inference = None
        self._relay._finish(self._inference_id)


def write_head(message: pb.InferHead, head: Head) -> None:
    """Put a head into the message that carries it."""
    message.request_id = head.request_id
    message.content_type = head.content_type
    message.model = head.model
    message.backend_id = head.backend_id
    for name, value in head.headers:
        message.headers[name] = value


def write_tail(message: pb.InferTail, tail: Tail) -> None:
    """Put a tail into the message that carries it."""
    message.usage.CopyFrom(tail.usage)
    message.finish_reason = tail.finish_reason
    message.outcome = tail.outcome
