"""Idempotency-Key: a request that is repeated with its key is answered with the first one's answer, and billed once; it
never runs two requests of one key at a time, as far as Redis remembers the key.

**What is promised.** A key belongs to its organization, for 24 hours after the request that succeeded. It stands for
one request: the endpoint and the bytes of the body. A repetition gets the same bytes, costs nothing, leaves no usage
event, and is no request to rate limits either, because nothing is admitted. It has to be allowed what the first one
was: its permissions, networks and models are checked before its key is.

Only whole, successful answers are kept. Whatever ends otherwise (refused, failed, truncated, cancelled, past its
deadline) gives its key up at once, and a retry is a new request. So it is where tokens had been produced and billed by
then: the first gave no complete answer, and none can be given for it. A client that hangs up has cancelled its request.

An answer that is too large to be kept has still been given. Its repetition is refused for good (422): running it anew
would bill it twice, and "in use" would have clients try again for nothing.

**What lies in Redis.** Answers of models, compressed but not encrypted, for 24 hours; of keys and bodies SHA-256
digests alone. The names begin with `idempotency:{organization}:`, so that nobody finds what is another organization's.
An answer has 1 MiB at most, an organization 256 MiB; beyond, requests with new keys are refused until older answers
have gone. Whoever may read this Redis may read a day's answers to requests that had a key.

**What Redis may do.** While it is away, a request with a key cannot have what it asks for and is refused (503); others
do not come here. If it goes away while a request runs, the request goes on, and what it cannot keep is run again by a
repetition. A claim ends with its lease, half a minute after its router was killed.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import zlib
from importlib import resources
from typing import TYPE_CHECKING, Any

from aiaas.type.v1.usage_event_pb2 import OUTCOME_SUCCEEDED, TokenUsage
from mesh.errors import PlatformError, Reason
from mesh.scripts import Call, Script, Scripts
from router import metrics
from router.answers import Head, InferenceRequest, Reader, Tail

if TYPE_CHECKING:
    from router.sse import EventWatch

logger = logging.getLogger(__name__)

_LEASE_S = 30.0
_ROUND_S = 10.0
_RENEWALS = 64
_KEEP_LIMIT_S = 0.05
_RETRY_AFTER_S = 1.0
_KEPT_BYTES = 1 << 20
# What a repetition unpacks at once. A stream takes 30 times as much as what is kept of it, JSON of numbers twice.
_ANSWER_BYTES = 8 << 20
_ORGANIZATION_BYTES = 256 << 20
# 64 KiB for each request that is answered, not zlib's 256, at the same speed; a chunk of a stream costs a microsecond.
_COMPRESSION = (1, zlib.DEFLATED, 13, 6)
_PIECE_BYTES = 256 << 10

IDEMPOTENCY = Script(resources.files("router").joinpath("idempotency.lua").read_text())
"""What Redis must know to give keys away."""


class Idempotency:
    """The keys of this router's requests, as long as `run()` runs.

    `scripts` is a connection of its own, since a megabyte must not hold up what admits requests. `router_id` is a new
    one (`mesh.ids`) at each start of a router.
    """

    def __init__(self, scripts: Scripts, router_id: str, *, round_s: float = _ROUND_S) -> None:
        self._scripts = scripts
        self._round_s = round_s
        self._round = 0
        self._prefix = f"{router_id}:".encode()
        self._claimed = 0
        self._running: set[Claim] = set()
        self._decisions = {
            decision: metrics.IDEMPOTENCY_DECISIONS.labels(decision)
            for decision in ("claimed", "replayed", "reused", "in_use", "too_large", "full", "unavailable")
        }

    async def claim(self, request: InferenceRequest, model: str, reader: Reader) -> Claim | None:
        """Take the request's key for it, until `Claim.end`. None when there was nothing to do, as `reader` has been
        given the answer that was kept, from head to tail and without awaiting anything on the way.

        Raises PlatformError(IDEMPOTENCY_KEY_IN_USE) while another request of the key runs, IDEMPOTENCY_KEY_REUSED where
        the key stands for another request, or for one whose answer was too large to keep, RATE_LIMIT_EXCEEDED where the
        organization has as much kept as it may, UNAVAILABLE where Redis is away.
        """
        self._claimed += 1
        claim = Claim(self, request, reader, b"%b%x" % (self._prefix, self._claimed), self._round)
        try:
            answer: list[bytes] = await self._scripts.run(
                claim.call(b"claim", claim.digest, claim.token, _millis(_LEASE_S), b"%d" % _ORGANIZATION_BYTES)
            )
        except PlatformError:
            self._decisions["unavailable"].inc()
            raise PlatformError(
                Reason.UNAVAILABLE,
                description="An Idempotency-Key cannot be honored at the moment. Please try again later.",
                retry_after_s=_RETRY_AFTER_S,
            ) from None
        except asyncio.CancelledError:
            self._release(claim)
            raise
        decision = answer[0].decode()
        self._decisions[decision].inc()
        if decision == "replayed":
            _replay(request, model, answer, reader)
            return None
        if decision != "claimed":
            raise _refusal(decision)
        self._running.add(claim)
        return claim

    async def run(self) -> None:
        """Every few seconds, renew the claims of long requests, and those of all when Redis may have lost them. Until
        cancelled."""
        connections = 0
        while True:
            await self._scripts.connected()
            renew_all = self._scripts.connections != connections
            connections = self._scripts.connections
            try:
                await self._renew(young=renew_all)
            except PlatformError:
                connections = 0
            await asyncio.sleep(self._round_s)

    async def _renew(self, *, young: bool) -> None:
        self._round += 1
        claims = [claim for claim in self._running if young or claim.round < self._round - 1]
        for count, claim in enumerate(claims, 1):
            # One that has ended in the meantime must not come back.
            if claim in self._running:
                self._scripts.tell(claim.call(b"renew", claim.digest, claim.token, _millis(_LEASE_S)))
            if count % _RENEWALS == 0:
                await asyncio.sleep(0)

    def _release(self, claim: Claim) -> None:
        self._running.discard(claim)
        try:
            self._scripts.tell(claim.call(b"release", claim.token))
        except PlatformError:
            # The lease ends by itself.
            logger.warning("an Idempotency-Key could not be given up: Redis is away")

    def _keep(self, claim: Claim, content_type: str, answer: bytes | None) -> asyncio.Future[int] | None:
        self._running.discard(claim)
        arguments = [b"keep", claim.digest, claim.token, content_type.encode(), claim.request_id.encode()]
        if answer is not None:
            arguments.append(answer)
        try:
            keeping: asyncio.Future[int] = self._scripts.run(claim.call(*arguments))
        except PlatformError:
            logger.warning("an answer could not be kept for its Idempotency-Key: Redis is away")
            return None
        keeping.add_done_callback(_log_loss)
        return keeping


class Claim:
    """A request that has its key, and its reader: it passes the answer on and keeps a copy.

    The end of an answer waits here until the tail, so that whoever has seen it finds the answer kept. The end of a
    stream is what comes with its closing marker, as `watch` tells; without one, all of the answer is.
    """

    __slots__ = (
        "_compressor",
        "_content_type",
        "_held",
        "_idempotency",
        "_keeping",
        "_kept",
        "_kept_bytes",
        "_keys",
        "_reader",
        "_size_bytes",
        "digest",
        "request_id",
        "round",
        "token",
        "watch",
    )

    def __init__(
        self, idempotency: Idempotency, request: InferenceRequest, reader: Reader, token: bytes, round_: int
    ) -> None:
        tag = f"idempotency:{{{request.principal.organization_id}}}:"
        key = hashlib.sha256(request.idempotency_key.encode()).hexdigest()
        self._keys = ((tag + key).encode(), (tag + "kept").encode())
        digest = hashlib.sha256(b"%d:" % request.endpoint)
        digest.update(request.body)
        self.digest = digest.digest()
        self.token = token
        self.request_id = request.request_id
        self.round = round_
        self.watch: EventWatch | None = None
        self._idempotency = idempotency
        self._reader = reader
        self._content_type = ""
        self._held: list[Head | bytes] = []
        self._compressor: Any = None
        # None when the answer has become too large.
        self._kept: list[bytes] | None = []
        self._kept_bytes = 0
        self._size_bytes = 0
        self._keeping: asyncio.Future[int] | None = None

    def call(self, *arguments: bytes) -> Call:
        """A call of the script about this key."""
        return IDEMPOTENCY.call(self._keys, arguments)

    def head(self, head: Head) -> None:
        """Take the head."""
        self._content_type = head.content_type
        self._compressor = zlib.compressobj(*_COMPRESSION)
        if self._is_at_its_end():
            self._held.append(head)
        else:
            self._reader.head(head)

    def data(self, data: bytes) -> None:
        """Take bytes of the answer."""
        self._size_bytes += len(data)
        if self._kept is not None:
            self._add(self._kept, self._compressor.compress(data))
        if self._is_at_its_end():
            self._held.append(data)
        else:
            self._reader.data(data)

    def tail(self, tail: Tail) -> None:
        """Take the tail, and pass on what waited for it."""
        for part in self._held:
            if isinstance(part, Head):
                self._reader.head(part)
            else:
                self._reader.data(part)
        self._held.clear()
        self._reader.tail(tail)

    def end(self, *, succeeded: bool) -> None:
        """The request has ended: keep its answer, or give the key up. Returns at once and raises nothing."""
        if not succeeded or not self._content_type:
            self._kept = self._compressor = None
            self._idempotency._release(self)
            return
        if self._kept is not None:
            self._add(self._kept, self._compressor.flush())
        answer = None if self._kept is None else b"".join(self._kept)
        self._kept = self._compressor = None
        self._keeping = self._idempotency._keep(self, self._content_type, answer)

    async def kept(self) -> None:
        """Returns when Redis has the answer, or has not said so in time."""
        if self._keeping is not None:
            await asyncio.wait([self._keeping], timeout=_KEEP_LIMIT_S)

    def _is_at_its_end(self) -> bool:
        return self.watch is None or self.watch.complete

    def _add(self, kept: list[bytes], compressed: bytes) -> None:
        if compressed:
            kept.append(compressed)
            self._kept_bytes += len(compressed)
        if self._kept_bytes > _KEPT_BYTES or self._size_bytes > _ANSWER_BYTES:
            self._kept = self._compressor = None


def _replay(request: InferenceRequest, model: str, answer: list[bytes], reader: Reader) -> None:
    """Give an answer that was kept. It was billed with the request that is named in its head, and is not again."""
    _, content_type, original, compressed = answer
    headers = (("idempotency-replayed", "true"), ("original-request-id", original.decode()))
    reader.head(Head(request.request_id, content_type.decode(), model, "", headers))
    data = zlib.decompress(compressed)
    for start in range(0, len(data), _PIECE_BYTES):
        reader.data(data[start : start + _PIECE_BYTES])
    reader.tail(Tail(TokenUsage(), "", OUTCOME_SUCCEEDED))


def _refusal(decision: str) -> PlatformError:
    if decision == "in_use":
        return PlatformError(Reason.IDEMPOTENCY_KEY_IN_USE, retry_after_s=_RETRY_AFTER_S)
    if decision == "too_large":
        return PlatformError(
            Reason.IDEMPOTENCY_KEY_REUSED,
            description="The request with this Idempotency-Key has succeeded, but its answer was too large to be kept. "
            "Use another key to have it run, and billed, again.",
        )
    if decision == "full":
        details: dict[str, Any] = {"limit": "idempotency", "x-should-retry": "false"}
        return PlatformError(
            Reason.RATE_LIMIT_EXCEEDED,
            description="Your organization has as many answers kept for Idempotency-Keys as it may have in 24 hours. "
            "Please try again later, or without the header.",
            **details,
        )
    return PlatformError(Reason.IDEMPOTENCY_KEY_REUSED)


def _log_loss(keeping: asyncio.Future[int]) -> None:
    if keeping.cancelled():
        return
    if keeping.exception() is not None:
        logger.warning("Redis did not say whether it has kept the answer to an Idempotency-Key")
    elif not keeping.result():
        logger.warning("an answer was not kept, as its claim of an Idempotency-Key had ended")


def _millis(seconds: float) -> bytes:
    return b"%d" % round(seconds * 1000)
