"""Runs one inference from the client's body to the answer's last byte; it speaks neither gRPC nor HTTP.

Every RPC that infers ends here. Whatever way a request goes out, answered, refused, failed, cancelled, past its
deadline or broken off, its upstream connection is closed and exactly one usage event is recorded. Both happen without
awaiting anything, so that no cancellation can come between.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from functools import lru_cache

from aiaas.type.v1 import usage_event_pb2
from aiaas.type.v1.usage_event_pb2 import TokenUsage
from mesh.auth import Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from router import metrics, requests, sse
from router.backends import Registry, Served
from router.models import ENDPOINT_NAMES, Model
from router.publisher import UsageRecorder
from router.requests import ParsedRequest
from router.routing import RETRY_AFTER_S, Routing, check_endpoint
from router.upstream import (
    ConnectionLostError,
    ConnectionRefusedUpstreamError,
    Timeouts,
    Upstream,
    UpstreamAnswer,
    UpstreamError,
    UpstreamTimeoutError,
)
from router.usage import AttemptRecord, UsageRecord, build_event

logger = logging.getLogger(__name__)

ATTEMPTS = 2
"""A request is tried on so many backends at most: one retry, and that before the first byte only."""

_ANSWER_BYTES = 64 << 20
_FAULT_BYTES = 64 << 10
# gRPC takes messages of at most 4 MiB.
_PIECE_BYTES = 1 << 20
# A call's deadline reaches its caller as an error of its own; what ends so shortly before it ended by it.
_DEADLINE_SLACK_S = 0.05
# After the closing marker an engine has nothing more to say but the end of its answer.
_LAST_WORD_S = 0.25
_STREAM = "text/event-stream"
_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A request of an authenticated principal. `deadline` is in monotonic seconds; None means none."""

    request_id: str
    endpoint: usage_event_pb2.Endpoint.ValueType
    body: bytes
    principal: Principal
    client_address: str = ""
    idempotency_key: str = ""
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """What is known before the first byte."""

    request_id: str
    content_type: str
    model: str
    backend_id: str


@dataclass(frozen=True, slots=True)
class Tail:
    """What is known after the last byte."""

    usage: TokenUsage
    finish_reason: str
    outcome: usage_event_pb2.Outcome.ValueType


Part = Head | bytes | Tail
"""A step of an answer: one head, then data, then one tail."""


class _BackendFailedError(Exception):
    """An attempt failed before the first byte in a way that another backend may not."""

    def __init__(self, reason: str, answer: PlatformError) -> None:
        super().__init__(reason)
        self.reason = reason
        self.answer = answer


class Engine:
    """What every inference needs, made once."""

    def __init__(
        self,
        registry: Registry,
        routing: Routing,
        upstream: Upstream,
        recorder: UsageRecorder,
        clock: Clock,
        timeouts: Timeouts,
        router_id: str,
    ) -> None:
        self.registry = registry
        self.routing = routing
        self.upstream = upstream
        self.recorder = recorder
        self.clock = clock
        self.timeouts = timeouts
        self.router_id = router_id

    def begin(self, request: InferenceRequest) -> Inference:
        """An inference that is admitted now and runs when its parts are asked for."""
        return Inference(self, request)


class Inference:
    """One request on its way. Iterate `parts()` to its end, or call `abandon()`."""

    def __init__(self, engine: Engine, request: InferenceRequest) -> None:
        self._engine = engine
        self._request = request
        self._record = UsageRecord(
            request_id=request.request_id,
            endpoint=request.endpoint,
            principal=request.principal,
            admit_time=engine.clock.now(),
            admitted=engine.clock.monotonic(),
            idempotency_key=request.idempotency_key,
        )
        self._served: Served | None = None
        self._answer: UpstreamAnswer | None = None
        self._watch: sse.EventWatch | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._settled = False

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The answer: a head, data, a tail.

        Raises PlatformError: before the head for what is the client's fault (INVALID_JSON, UNKNOWN_FIELD,
        INVALID_ARGUMENT, MODEL_NOT_FOUND, PERMISSION_DENIED) or the platform's (UNAVAILABLE, NO_BACKEND_AVAILABLE,
        BACKEND_ERROR, BACKEND_TIMEOUT); after it BACKEND_ERROR or BACKEND_TIMEOUT for an answer that broke off;
        DEADLINE_EXCEEDED at any time.
        """
        try:
            parsed, model = self._admit()
            if self._request.deadline is not None:
                remaining_s = self._request.deadline - self._engine.clock.monotonic()
                self._timer = asyncio.get_running_loop().call_later(max(0.0, remaining_s), self._expire)
            first = await self._open(parsed, model)
            yield self._head(parsed)
            if parsed.stream:
                data: bytes | None = first
                while data is not None:
                    if data:
                        yield data
                    data = await self._next_events()
            else:
                for start in range(0, len(first), _PIECE_BYTES):
                    yield first[start : start + _PIECE_BYTES]
            self._settle(usage_event_pb2.OUTCOME_SUCCEEDED, "")
            yield Tail(self._record.usage, self._record.finish_reason, usage_event_pb2.OUTCOME_SUCCEEDED)
        except PlatformError as error:
            self._settle(self._outcome_of(error), error.reason.value)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self.abandon()
            raise
        except BaseException:
            self._settle(self._outcome_of(PlatformError(Reason.INTERNAL)), Reason.INTERNAL.value)
            raise

    def abandon(self) -> None:
        """Nobody waits for the answer any more: close and record, unless that has happened. Whoever still iterates
        `parts()` is cancelled."""
        if self._watch is not None and self._watch.complete:
            # Clients hang up at the closing marker; they have had everything by then.
            self._settle(usage_event_pb2.OUTCOME_SUCCEEDED, "")
        elif self._is_past_deadline():
            self._settle(usage_event_pb2.OUTCOME_DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED.value)
        else:
            self._settle(usage_event_pb2.OUTCOME_CANCELLED, Reason.CANCELLED.value)

    def _admit(self) -> tuple[ParsedRequest, Model]:
        request = self._request
        if not self._engine.registry.loaded:
            # Which models there are is not known: to say that one does not exist would be a lie.
            raise PlatformError(Reason.UNAVAILABLE, retry_after_s=RETRY_AFTER_S)
        check_network(request.principal.allowed_networks, request.client_address)
        parsed = requests.parse(request.endpoint, request.body)
        self._record.streamed = parsed.stream
        model = self._engine.registry.snapshot.find_model(parsed.model, request.principal.allowed_models)
        self._record.model = model.model_id
        check_endpoint(model, request.endpoint)
        return parsed, model

    def _head(self, parsed: ParsedRequest) -> Head:
        record = self._record
        record.first_byte = self._engine.clock.monotonic()
        endpoint = ENDPOINT_NAMES[record.endpoint]
        metrics.time_to_first_token(endpoint, record.model).observe(record.first_byte - record.admitted)
        return Head(record.request_id, _STREAM if parsed.stream else _JSON, record.model, record.backend_id)

    async def _open(self, parsed: ParsedRequest, model: Model) -> bytes:
        """Try backends until one has sent the first bytes of a stream, or a whole document; returns them."""
        tried: list[str] = []
        failure: PlatformError | None = None
        while len(tried) < ATTEMPTS:
            try:
                served = self._engine.routing.choose(self._engine.registry.snapshot, model, tried)
            except PlatformError as none_left:
                raise failure or none_left from None
            tried.append(served.backend.backend_id)
            try:
                return await self._attempt(parsed, served)
            except _BackendFailedError as error:
                logger.warning("an attempt on backend %s failed: %s", tried[-1], error.reason)
                failure = error.answer
        raise failure or PlatformError(Reason.INTERNAL)

    async def _attempt(self, parsed: ParsedRequest, served: Served) -> bytes:
        clock = self._engine.clock
        self._record.backend_id = served.backend.backend_id
        self._record.attempts.append(AttemptRecord(served.backend.backend_id, clock.now(), clock.monotonic()))
        self._served = served
        served.state.start_request()
        try:
            remaining_s = None if self._request.deadline is None else self._request.deadline - clock.monotonic()
            async with asyncio.timeout(remaining_s):
                return await self._ask(parsed, served)
        except UpstreamError as error:
            if self._is_past_deadline():
                raise PlatformError(Reason.DEADLINE_EXCEEDED) from None
            failure = self._failure_of(error, served)
        except TimeoutError:
            raise PlatformError(Reason.DEADLINE_EXCEEDED) from None
        except _BackendFailedError as error:
            failure = error
        self._end_attempt(failure.reason)
        self._watch = None
        raise failure

    async def _ask(self, parsed: ParsedRequest, served: Served) -> bytes:
        engine = self._engine
        timeouts = engine.timeouts
        if served.backend.first_byte_timeout_millis:
            timeouts = replace(timeouts, first_byte_s=served.backend.first_byte_timeout_millis / 1000)
        body = parsed.upstream_body(served.upstream_model)
        answer = await engine.upstream.open(served.backend, parsed.path, body, timeouts, streamed=parsed.stream)
        if self._settled:
            # Abandoned in the meantime; nobody else knows of this answer.
            answer.close()
            raise asyncio.CancelledError
        self._answer = answer
        if answer.status != 200:
            raise _judge(answer.status, sse.read_fault(await _read_whole(answer, _FAULT_BYTES), answer.status))
        if answer.content_type != (_STREAM if parsed.stream else _JSON):
            raise _failed("backend_misconfigured")
        if not parsed.stream:
            return self._read_document(await _read_whole(answer, _ANSWER_BYTES))
        self._watch = sse.EventWatch(
            responses=parsed.endpoint == usage_event_pb2.ENDPOINT_RESPONSES, strip_usage=not parsed.wants_usage
        )
        data: bytes | None = b""
        while data == b"":
            data = await self._read_events()
        return data or b""

    def _read_document(self, document: bytes) -> bytes:
        record = self._record
        try:
            usage, record.finish_reason = sse.read_answer(
                document, responses=record.endpoint == usage_event_pb2.ENDPOINT_RESPONSES
            )
        except ValueError:
            raise _failed("backend_garbage") from None
        if usage is not None:
            record.usage, record.usage_source = usage, usage_event_pb2.USAGE_SOURCE_ENGINE
        else:
            record.usage_source = usage_event_pb2.USAGE_SOURCE_COUNTED
            logger.warning("backend %s answered without usage", record.backend_id)
        return document

    async def _read_events(self) -> bytes | None:
        """The next events as they go to the client, which may be none; None at the end of a whole stream.

        Raises UpstreamError for a stream that breaks off or never ends an event, _BackendFailedError or PlatformError
        for an error that the engine sent as an event.
        """
        answer, watch = self._answer, self._watch
        if answer is None or watch is None:
            # Abandoned while the client was reading.
            raise asyncio.CancelledError
        if watch.fault is not None:
            raise _judge(watch.fault.status, watch.fault)
        if watch.complete:
            with contextlib.suppress(UpstreamError, TimeoutError, StopAsyncIteration):
                async with asyncio.timeout(_LAST_WORD_S):
                    await anext(answer.chunks)
            return None
        chunk = await anext(answer.chunks, b"")
        if chunk:
            try:
                return watch.feed(chunk)
            except sse.EventTooLongError:
                raise _failed("backend_garbage") from None
        rest = watch.end()
        if rest is None:
            raise ConnectionLostError("it ended its answer too early")
        return rest

    async def _next_events(self) -> bytes | None:
        """`_read_events` once the client has had bytes: no other backend can help any more."""
        try:
            return await self._read_events()
        except UpstreamTimeoutError:
            broken = PlatformError(Reason.BACKEND_TIMEOUT)
        except (UpstreamError, _BackendFailedError):
            broken = PlatformError(Reason.BACKEND_ERROR)
        if self._is_past_deadline():
            broken = PlatformError(Reason.DEADLINE_EXCEEDED)
        raise broken

    def _failure_of(self, error: UpstreamError, served: Served) -> _BackendFailedError:
        if isinstance(error, ConnectionRefusedUpstreamError):
            served.state.failed(str(error))
            return _failed(error.reason, PlatformError(Reason.NO_BACKEND_AVAILABLE, retry_after_s=RETRY_AFTER_S))
        if isinstance(error, UpstreamTimeoutError):
            return _failed(error.reason, PlatformError(Reason.BACKEND_TIMEOUT))
        return _failed(error.reason)

    def _expire(self) -> None:
        # Whoever waits for the engine's next bytes sees the connection end, and finds the deadline past.
        if self._answer is not None:
            self._answer.close()

    def _is_past_deadline(self) -> bool:
        deadline = self._request.deadline
        return deadline is not None and self._engine.clock.monotonic() >= deadline - _DEADLINE_SLACK_S

    def _outcome_of(self, error: PlatformError) -> usage_event_pb2.Outcome.ValueType:
        if error.reason is Reason.DEADLINE_EXCEEDED:
            return usage_event_pb2.OUTCOME_DEADLINE_EXCEEDED
        if self._record.first_byte is not None:
            return usage_event_pb2.OUTCOME_TRUNCATED
        if error.entry.http < 500 or error.reason is Reason.UNIMPLEMENTED:
            return usage_event_pb2.OUTCOME_REFUSED
        return usage_event_pb2.OUTCOME_FAILED

    def _end_attempt(self, failure_reason: str) -> None:
        """Close the connection and count the attempt as ended; again, it does nothing."""
        if self._answer is not None:
            self._answer.close()
            self._answer = None
        if self._served is not None:
            self._served.state.end_request()
            self._served = None
            attempt = self._record.attempts[-1]
            attempt.ended = self._engine.clock.monotonic()
            attempt.failure_reason = failure_reason

    def _settle(self, outcome: usage_event_pb2.Outcome.ValueType, reason: str) -> None:
        if self._settled:
            return
        self._settled = True
        if self._timer is not None:
            self._timer.cancel()
        self._end_attempt(reason)
        record, watch = self._record, self._watch
        if watch is not None:
            record.finish_reason = watch.finish_reason
            if watch.usage is not None:
                record.usage, record.usage_source = watch.usage, usage_event_pb2.USAGE_SOURCE_ENGINE
            else:
                record.usage = TokenUsage(completion_tokens=watch.counted)
                record.usage_source = usage_event_pb2.USAGE_SOURCE_COUNTED
        ended = self._engine.clock.monotonic()
        endpoint = ENDPOINT_NAMES.get(record.endpoint, "unknown")
        outcome_name = usage_event_pb2.Outcome.Name(outcome).removeprefix("OUTCOME_").lower()
        metrics.requests(endpoint, record.model, outcome_name).inc()
        metrics.request_duration(endpoint, record.model).observe(ended - record.admitted)
        self._engine.recorder.record(build_event(record, outcome, reason, ended, self._engine.router_id))


def check_network(allowed_networks: tuple[str, ...], client_address: str) -> None:
    """Raises PlatformError(PERMISSION_DENIED) for a client outside of the networks; none at all means anywhere."""
    if not allowed_networks:
        return
    try:
        address = ipaddress.ip_address(client_address)
    except ValueError:
        address = None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address is None or not any(address in network for network in _networks(allowed_networks)):
        raise PlatformError(
            Reason.PERMISSION_DENIED, description="These credentials cannot be used from your network address."
        )


@lru_cache(maxsize=10_000)
def _networks(allowed_networks: tuple[str, ...]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(ipaddress.ip_network(network, strict=False) for network in allowed_networks)


async def _read_whole(answer: UpstreamAnswer, limit_bytes: int) -> bytes:
    pieces = []
    length = 0
    async for chunk in answer.chunks:
        length += len(chunk)
        if length > limit_bytes:
            raise _failed("backend_garbage")
        pieces.append(chunk)
    return b"".join(pieces)


# Statuses that an engine gives for what the router asked of it, not for what the client wrote.
_ROUTERS_FAULT = frozenset({401, 403, 404, 405, 407, 408, 421})


def _judge(status: int, fault: sse.EngineFault | None) -> Exception:
    """An engine's error: the client's own, in the engine's words, or one that another backend may not make."""
    if status == 429:
        return _failed("backend_overloaded", PlatformError(Reason.NO_BACKEND_AVAILABLE, retry_after_s=RETRY_AFTER_S))
    if status < 400 or status in _ROUTERS_FAULT:
        return _failed("backend_misconfigured")
    if status >= 500:
        return _failed("backend_error")
    return PlatformError(
        Reason.INVALID_ARGUMENT,
        field=(fault and fault.param) or None,
        description=(fault and fault.message) or None,
    )


def _failed(reason: str, answer: PlatformError | None = None) -> _BackendFailedError:
    return _BackendFailedError(reason, answer or PlatformError(Reason.BACKEND_ERROR))
