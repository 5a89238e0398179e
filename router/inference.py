"""Runs one inference from the client's body to the answer's last byte; it speaks neither gRPC nor HTTP.

Every RPC that infers ends here. Whatever way a request goes out, answered, refused, failed, cancelled, past its
deadline or broken off, its upstream connection is closed, what it reserved is settled, and exactly one usage event is
written. All of it happens without awaiting anything, so that no cancellation can come between. The journal hears of a
request before its engine does; whoever sends an answer has it write that down first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Any, Protocol

import msgspec

from aiaas.router.v1.routing_policy_service_pb2 import ROUTING_STRATEGY_PREFIX_AFFINITY
from aiaas.type.v1 import usage_event_pb2
from aiaas.type.v1.usage_event_pb2 import TokenUsage, UsageEvent
from mesh import policies
from mesh.auth import Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.networks import check_network
from mesh.policies import Decider
from router import gen_ai, metrics, requests, sse
from router.answer_stream import AnswerStream, EngineFaultError
from router.answers import EVENT_STREAM, Head, InferenceRequest, Reader, Tail
from router.attempt import OUTRUN, Attempt
from router.backends import Registry, Served, is_allowed
from router.ceilings import Ceiling, ceiling_of
from router.engine_failures import BackendFailedError, failed, judge
from router.hedging import first_answer
from router.http1 import (
    ConnectionRefusedUpstreamError,
    UpstreamAnswer,
    UpstreamError,
    UpstreamTimeoutError,
)
from router.idempotency import Claim, Idempotency
from router.journal import Entry, Journal
from router.leases import Reservation
from router.models import ENDPOINT_NAMES, Model
from router.rate_limits import Permit
from router.requests import ParsedRequest
from router.routing import RETRY_AFTER_S, Routing, check_endpoint
from router.routing_policies import RoutingPolicy
from router.upstream import Timeouts, Upstream
from router.usage import UsageRecord, clamp_usage, close_event, open_event

logger = logging.getLogger(__name__)

INFER = "/aiaas.router.v1.InferenceService/Infer"
"""What policies know every inference by, however it came."""

_ANSWER_BYTES = 64 << 20
_FAULT_BYTES = 64 << 10
# gRPC takes messages of at most 8 MiB.
_PIECE_BYTES = 1 << 20
# A call's deadline reaches its caller as an error of its own; what ends so shortly before it ended by it.
_DEADLINE_SLACK_S = 0.05
_OUTCOME_NAMES = {number: name.removeprefix("OUTCOME_").lower() for name, number in usage_event_pb2.Outcome.items()}
_JSON = "application/json"
# What another model may help with, where the policy names one.
_BACKENDS_FAULT = frozenset({Reason.NO_BACKEND_AVAILABLE, Reason.BACKEND_ERROR, Reason.BACKEND_TIMEOUT})
_UNBILLED = frozenset({usage_event_pb2.OUTCOME_REFUSED, usage_event_pb2.OUTCOME_FAILED})


class Limiter(Protocol):
    """Who says whether there is room for a request."""

    async def admit(self, principal: Principal, model: str, ceiling_tokens: int) -> Permit:
        """Reserve room for a request of so many tokens. Raises PlatformError(RATE_LIMIT_EXCEEDED)."""


class Treasury(Protocol):
    """Who says whether there is money for a request."""

    async def reserve(
        self, principal: Principal, model: str, ceiling: Ceiling, admit_time: datetime, stop: Callable[[], None]
    ) -> Reservation | None:
        """Reserve what a request can use at most; None where nobody counts it. `stop` is called if it has to end.
        Raises PlatformError(INSUFFICIENT_QUOTA, UNAVAILABLE)."""


class Engine:
    """What every inference needs, made once."""

    def __init__(
        self,
        registry: Registry,
        routing: Routing,
        limiter: Limiter,
        treasury: Treasury,
        upstream: Upstream,
        journal: Journal,
        clock: Clock,
        timeouts: Timeouts,
        router_id: str,
        idempotency: Idempotency,
        decider: Decider | None = None,
    ) -> None:
        self.registry = registry
        self.routing = routing
        self.limiter = limiter
        self.treasury = treasury
        self.upstream = upstream
        self.journal = journal
        self.clock = clock
        self.timeouts = timeouts
        self.router_id = router_id
        self.idempotency = idempotency
        self.decider = decider

    def begin(self, request: InferenceRequest, reader: Reader, task: asyncio.Task[None] | None = None) -> Inference:
        """An inference that begins now, and goes on when it is run; in `task`, if that is known already."""
        return Inference(self, request, reader, task)


class Inference:
    """One request on its way. Await `run()`; whoever does not, or cannot wait for its end, calls `abandon()`."""

    __slots__ = (
        "_answer",
        "_attempt",
        "_ceiling",
        "_claim",
        "_cut",
        "_engine",
        "_entry",
        "_event",
        "_parsed",
        "_permit",
        "_prompt_tokens",
        "_reader",
        "_record",
        "_request",
        "_settled",
        "_task",
        "_timer",
        "_watch",
    )

    def __init__(
        self, engine: Engine, request: InferenceRequest, reader: Reader, task: asyncio.Task[None] | None
    ) -> None:
        self._engine = engine
        self._request = request
        self._reader = reader
        self._record = UsageRecord(
            request_id=request.request_id,
            endpoint=request.endpoint,
            principal=request.principal,
            admit_time=engine.clock.now(),
            admitted=engine.clock.monotonic(),
            idempotency_key=request.idempotency_key,
            traceparent="" if request.span is None else request.span.traceparent,
        )
        self._task = task
        self._parsed: ParsedRequest | None = None
        self._prompt_tokens = 0
        self._claim: Claim | None = None
        self._permit: Permit | None = None
        self._ceiling: Ceiling | None = None
        self._entry: Entry | None = None
        self._event: UsageEvent | None = None
        self._attempt: Attempt | None = None
        self._answer: UpstreamAnswer | None = None
        self._watch: sse.EventWatch | None = None
        self._timer: asyncio.TimerHandle | None = None
        # Why the task that runs it is being cancelled, if it is not its caller who does so.
        self._cut: PlatformError | None = None
        self._settled = False

    async def run(self) -> None:
        """Give the reader its answer; returns when it has the tail.

        Raises PlatformError: before the head for what is the client's fault (INVALID_JSON, UNKNOWN_FIELD,
        INVALID_ARGUMENT, MODEL_NOT_FOUND, PERMISSION_DENIED, IDEMPOTENCY_KEY_REUSED, IDEMPOTENCY_KEY_IN_USE), for want
        of room or money (RATE_LIMIT_EXCEEDED, INSUFFICIENT_QUOTA), for what is the platform's (UNAVAILABLE,
        MODEL_NOT_PRICED, USAGE_UNRECORDABLE, NO_BACKEND_AVAILABLE, BACKEND_ERROR, BACKEND_TIMEOUT); after it
        BACKEND_ERROR or BACKEND_TIMEOUT for an answer that broke off, UNAVAILABLE for one whose budget can be charged
        no longer, whatever `revoke` was told; DEADLINE_EXCEEDED at any time.
        """
        if self._task is None:
            self._task = asyncio.current_task()
        remaining_s = self._remaining_s()
        if remaining_s is not None:
            # What asyncio.timeout does, at a fifth of its cost.
            self._timer = asyncio.get_running_loop().call_later(max(0.0, remaining_s), self._expire)
        try:
            model = self._check()
            if self._request.principal.policy_bound:
                await self._ask_policies(model)
            if self._request.idempotency_key and not await self._claim_key(model):
                return
            await self._serve(model)
            self._settle(usage_event_pb2.OUTCOME_SUCCEEDED, "")
        except PlatformError as error:
            self._settle(self._outcome_of(error), error.reason.value)
            raise
        except asyncio.CancelledError:
            self._give_up()
            if self._cut is not None and self._task is not None and self._task.uncancel() == 0:
                raise self._cut from None
            raise
        except BaseException:
            self._settle(self._outcome_of(PlatformError(Reason.INTERNAL)), Reason.INTERNAL.value)
            raise
        if self._claim is not None:
            await self._claim.kept()
        self._reader.tail(Tail(self._record.usage, self._record.finish_reason, usage_event_pb2.OUTCOME_SUCCEEDED))

    def abandon(self) -> None:
        """Nobody waits for the answer any more: close and record, unless that has happened, and cancel who runs it. Not
        for whoever runs it."""
        if not self._settled:
            self._give_up()
            if self._task is not None:
                self._task.cancel()

    def revoke(self, why: PlatformError) -> None:
        """Whoever asked for it may not have it any more: end it, with this error. Not for whoever runs it."""
        self._end_early(why)

    @property
    def principal(self) -> Principal:
        """Who asked for it, as they were when it began."""
        return self._request.principal

    def _give_up(self) -> None:
        if self._watch is not None and self._watch.complete:
            # Clients hang up at the closing marker; they have had everything by then.
            self._settle(usage_event_pb2.OUTCOME_SUCCEEDED, "")
        elif self._cut is not None and self._cut.reason is not Reason.DEADLINE_EXCEEDED:
            self._settle(self._outcome_of(self._cut), self._cut.reason.value)
        elif self._is_past_deadline():
            self._settle(usage_event_pb2.OUTCOME_DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED.value)
        else:
            self._settle(usage_event_pb2.OUTCOME_CANCELLED, Reason.CANCELLED.value)

    def pause(self) -> None:
        """The reader does not keep up: let the engine wait, until `resume`."""
        if self._answer is not None:
            self._answer.pause()

    def resume(self) -> None:
        """The reader has caught up."""
        if self._answer is not None:
            self._answer.resume()

    def _check(self) -> Model:
        """Read the body, and find its model."""
        request = self._request
        if not self._engine.registry.loaded:
            # Which models there are is not known: to say that one does not exist would be a lie.
            raise PlatformError(Reason.UNAVAILABLE, retry_after_s=RETRY_AFTER_S)
        check_network(request.principal.allowed_networks, request.client_address)
        parsed = self._parsed = requests.parse(request.endpoint, request.body)
        self._prompt_tokens = requests.estimate_tokens(request.body)
        self._record.streamed = parsed.stream
        self._record.choices = parsed.prompt_choices
        model = self._engine.registry.snapshot.find_model(parsed.model, request.principal.allowed_models)
        self._record.model = model.model_id
        check_endpoint(model, request.endpoint)
        return model

    async def _ask_policies(self, model: Model) -> None:
        """Hold the request to its organization's policies; they see the model and never the prompt."""
        request = self._request
        resource = {"model": model.model_id, "endpoint": usage_event_pb2.Endpoint.Name(request.endpoint)}
        await policies.check(
            self._engine.decider,
            request.principal,
            INFER,
            "inference.create",
            msgspec.json.encode(resource).decode(),
            request.client_address,
        )

    async def _claim_key(self, model: Model) -> bool:
        """Have the request's Idempotency-Key for it; False where it has been answered as it was before.

        That is no new request: nothing is admitted, so there is nothing to settle, and no usage event.
        """
        claim = await self._engine.idempotency.claim(self._request, model.model_id, self._reader)
        if claim is None:
            self._settled = True
            if self._timer is not None:
                self._timer.cancel()
            return False
        self._reader = self._claim = claim
        return True

    async def _admit(self, model: Model) -> None:
        """Find room and money for the request, and write down that it runs."""
        engine, record, principal, parsed = self._engine, self._record, self._request.principal, self._asked
        price = engine.registry.snapshot.price_of(model.model_id, record.admit_time)
        if price is None:
            raise PlatformError(Reason.MODEL_NOT_PRICED, model=model.model_id)
        body_bytes = None if parsed.has_media else len(self._request.body)
        ceiling = ceiling_of(
            body_bytes, parsed.prompts, parsed.completion_tokens, parsed.choices, model.context_tokens, price
        )
        self._permit = await engine.limiter.admit(principal, model.model_id, parsed.estimated_tokens)
        reservation = await engine.treasury.reserve(principal, model.model_id, ceiling, record.admit_time, self._stop)
        record.price = price
        record.reservation = reservation
        if reservation is not None and reservation.ceiling is not ceiling:
            ceiling = reservation.ceiling
            parsed.shorten(ceiling.completion_tokens)
        self._ceiling = ceiling
        self._event = open_event(record, engine.router_id)
        event = self._event.SerializeToString()
        if self._entry is not None:
            self._entry.begin_again(event)
            return
        self._entry = engine.journal.begin(event)
        self._entry.progress = self._progress

    @property
    def _asked(self) -> ParsedRequest:
        """What is asked; until the answer begins. Nobody keeps it: a stream lasts for minutes, and its prompt may be
        megabytes."""
        if self._parsed is None:
            raise PlatformError(Reason.INTERNAL)
        return self._parsed

    async def _serve(self, model: Model) -> None:
        """Have the model answer or, where none of its backends can, those that its policy names instead."""
        snapshot = self._engine.registry.snapshot
        policy = snapshot.policy_of(model.model_id)
        if policy.total_millis:
            self._limit_time(policy.total_millis / 1000)
        await self._admit(model)
        try:
            await self._answer_with(model, policy)
            return
        except PlatformError as error:
            if not policy.fallback_model_ids or error.reason not in _BACKENDS_FAULT or self._has_begun:
                raise
            failure = error
        record, price = self._record, self._record.price
        for model_id in policy.fallback_model_ids:
            fallback = snapshot.models.get(model_id)
            if fallback is None or not self._may_use(fallback):
                continue
            try:
                await self._admit_again(fallback)
                metrics.EXTRA_ATTEMPTS.labels(model.model_id, "fallback").inc()
                await self._answer_with(fallback, snapshot.policy_of(model_id))
                return
            except PlatformError:
                if self._has_begun:
                    raise
        self._release()
        record.model, record.price = model.model_id, price
        raise failure

    @property
    def _has_begun(self) -> bool:
        """Whether the client has had a byte: then nobody else can help any more."""
        return self._record.first_byte is not None

    def _may_use(self, model: Model) -> bool:
        request = self._request
        return request.endpoint in model.endpoints and is_allowed(model, request.principal.allowed_models)

    async def _admit_again(self, model: Model) -> None:
        """Go on with another model, at its own price. Raises what `_admit` does."""
        self._release()
        self._record.model = model.model_id
        if self._request.principal.policy_bound:
            await self._ask_policies(model)
        await self._admit(model)

    def _release(self) -> None:
        """Give room and money back: what was admitted has used nothing."""
        if self._record.reservation is not None:
            self._record.reservation.settle(0, 0, 0)
        if self._permit is not None:
            self._permit.settle(0)
        self._record.reservation = self._permit = self._ceiling = self._event = None

    async def _answer_with(self, model: Model, policy: RoutingPolicy) -> None:
        """Try backends until one has answered to the end, or failed where no other can help."""
        routing, snapshot = self._engine.routing, self._engine.registry.snapshot
        routing.admitted(model.model_id, policy)
        prefix = self._asked.prefix if policy.strategy == ROUTING_STRATEGY_PREFIX_AFFINITY else b""
        tried: list[str] = []
        failure: PlatformError | None = None
        for _ in range(policy.limit_attempts):
            try:
                served = routing.choose(snapshot, model, tried, prefix)
            except PlatformError as none_left:
                raise failure or none_left from None
            if failure is not None and not routing.may_retry(model.model_id, policy):
                raise failure
            tried.append(served.backend.backend_id)
            try:
                await self._try(served, model, policy, tried)
                return
            except BackendFailedError as error:
                logger.warning("an attempt on backend %s failed: %s", self._record.backend_id, error.reason)
                failure = error.answer
        raise failure or PlatformError(Reason.INTERNAL)

    async def _try(self, served: Served, model: Model, policy: RoutingPolicy, tried: list[str]) -> None:
        self._attempt = attempt = self._begin_attempt(served, policy)
        self._record.backend_id = served.backend.backend_id
        try:
            after_s = self._engine.routing.hedge_after_s(model.model_id, policy, streamed=self._record.streamed)
            if after_s is None:
                self._answer = await self._open(attempt, policy)
            else:
                attempt = await self._race(attempt, model, policy, tried, after_s)
            await self._pass_on(attempt.served)
            attempt.failed = False
            return
        except UpstreamError as error:
            failure = self._failure_of(error, served)
        except sse.EventTooLongError:
            failure = failed("backend_garbage")
        except BackendFailedError as error:
            failure = error
        if self._attempt is not None:
            self._attempt.failed = True
        if self._has_begun:
            raise PlatformError(
                Reason.BACKEND_TIMEOUT if failure.answer.reason is Reason.BACKEND_TIMEOUT else Reason.BACKEND_ERROR
            )
        self._end_attempt(failure.reason)
        self._watch = None
        raise failure

    async def _race(
        self, first: Attempt, model: Model, policy: RoutingPolicy, tried: list[str], after_s: float
    ) -> Attempt:
        """Have the answer of the first attempt or, where that is silent for too long, of another; returns whose."""
        engine, loser = self._engine, None

        def ask_another() -> Coroutine[Any, Any, UpstreamAnswer] | None:
            nonlocal loser
            try:
                served = engine.routing.choose(engine.registry.snapshot, model, tried)
            except PlatformError:
                return None
            if not engine.routing.may_hedge(model.model_id, policy):
                return None
            tried.append(served.backend.backend_id)
            loser = self._begin_attempt(served, policy)
            return self._open(loser, policy)

        winner = first
        try:
            self._answer, is_second = await first_answer(self._open(first, policy), after_s, ask_another)
            if is_second and loser is not None:
                winner, loser = loser, first
                self._attempt = winner
                self._record.backend_id = winner.record.backend_id
        finally:
            if loser is not None:
                loser.end(engine.clock.monotonic(), OUTRUN)
        return winner

    async def _pass_on(self, served: Served) -> None:
        """Give the reader what comes after the first byte."""
        answer, parsed, streamed = self._answer, self._asked, self._record.streamed
        if answer is None:
            raise PlatformError(Reason.INTERNAL)
        if answer.content_type != (EVENT_STREAM if streamed else _JSON):
            raise failed("backend_misconfigured")
        if not streamed:
            document = await answer.read(_ANSWER_BYTES)
            self._read_usage(document)
            self._begin(_JSON)
            for start in range(0, len(document), _PIECE_BYTES):
                self._reader.data(document[start : start + _PIECE_BYTES])
            return
        self._watch = watch = sse.EventWatch(
            responses=self._record.endpoint == usage_event_pb2.ENDPOINT_RESPONSES,
            strip_usage=not parsed.wants_usage,
            strip_interim_usage=parsed.strips_interim_usage(served.backend.engine),
            choices=parsed.prompt_choices,
        )
        del parsed
        if self._claim is not None:
            self._claim.watch = watch
        try:
            await AnswerStream(answer, watch, self._begin_stream, self._reader.data).run()
        except EngineFaultError as error:
            raise judge(error.fault.status, error.fault) from None

    async def _open(self, attempt: Attempt, policy: RoutingPolicy) -> UpstreamAnswer:
        """The answer, once its first byte has come. Raises what `judge` makes of an error of the engine."""
        engine, parsed, served = self._engine, self._asked, attempt.served
        timeouts = engine.timeouts
        first_byte_millis = policy.first_byte_millis or served.backend.first_byte_timeout_millis
        if first_byte_millis or policy.connect_millis or policy.idle_millis:
            timeouts = Timeouts(
                policy.connect_millis / 1000 or timeouts.connect_s,
                first_byte_millis / 1000 or timeouts.first_byte_s,
                timeouts.answer_s,
                policy.idle_millis / 1000 or timeouts.idle_s,
            )
        body = parsed.upstream_body(served.upstream_model, served.backend.engine)
        traceparent = "" if attempt.span is None else attempt.span.traceparent
        asked_at = engine.clock.monotonic()
        answer = await engine.upstream.open(
            served.backend, parsed.path, body, timeouts, streamed=parsed.stream, traceparent=traceparent
        )
        if answer.status != 200:
            try:
                raise judge(answer.status, sse.read_fault(await answer.read(_FAULT_BYTES), answer.status))
            finally:
                answer.close()
        if policy.hedged:
            after_s = engine.clock.monotonic() - asked_at
            engine.routing.heard(self._record.model, after_s, streamed=self._record.streamed)
        return answer

    def _begin_attempt(self, served: Served, policy: RoutingPolicy) -> Attempt:
        attempt = Attempt(served, policy, self._engine.clock.monotonic())
        self._record.attempts.append(attempt.record)
        if self._request.span is not None:
            attempt.span = gen_ai.begin_attempt(self._request.span, self._record, served)
        return attempt

    def _begin(self, content_type: str) -> None:
        """Send the head. Raises PlatformError(USAGE_UNRECORDABLE), and then has sent nothing."""
        self._engine.journal.check()
        # No other backend will be asked.
        self._parsed = None
        self._request.body = b""
        if self._attempt is not None:
            self._attempt.served.state.heard()
        record = self._record
        record.first_byte = self._engine.clock.monotonic()
        endpoint = ENDPOINT_NAMES[record.endpoint]
        metrics.time_to_first_token(endpoint, record.model, record.streamed).observe(
            record.first_byte - record.admitted, self._exemplar()
        )
        metrics.overhead(endpoint).observe(record.attempts[0].started - record.admitted)
        headers = () if self._permit is None else self._permit.headers
        self._reader.head(Head(record.request_id, content_type, record.model, record.backend_id, headers))

    def _begin_stream(self) -> None:
        self._begin(EVENT_STREAM)

    def _read_usage(self, document: bytes) -> None:
        record = self._record
        try:
            usage, record.finish_reason = sse.read_answer(
                document, responses=record.endpoint == usage_event_pb2.ENDPOINT_RESPONSES
            )
        except ValueError:
            raise failed("backend_garbage") from None
        if usage is not None:
            record.usage, record.usage_source = usage, usage_event_pb2.USAGE_SOURCE_ENGINE
        else:
            record.usage_source = usage_event_pb2.USAGE_SOURCE_COUNTED
            logger.warning("backend %s answered without usage", record.backend_id)

    def _failure_of(self, error: UpstreamError, served: Served) -> BackendFailedError:
        if isinstance(error, ConnectionRefusedUpstreamError):
            served.state.failed(str(error))
            return failed(error.reason, PlatformError(Reason.NO_BACKEND_AVAILABLE, retry_after_s=RETRY_AFTER_S))
        if isinstance(error, UpstreamTimeoutError):
            return failed(error.reason, PlatformError(Reason.BACKEND_TIMEOUT))
        return failed(error.reason)

    def _limit_time(self, total_s: float) -> None:
        """It may take no longer, whatever its caller says."""
        end = self._record.admitted + total_s
        if self._request.deadline is None or end < self._request.deadline:
            self._request.deadline = end
            if self._timer is not None:
                self._timer.cancel()
            delay_s = max(0.0, end - self._engine.clock.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        self._end_early(PlatformError(Reason.DEADLINE_EXCEEDED))

    def _stop(self) -> None:
        self._end_early(PlatformError(Reason.UNAVAILABLE, retry_after_s=RETRY_AFTER_S))

    def _end_early(self, cut: PlatformError) -> None:
        if self._cut is None and not self._settled and self._task is not None:
            self._cut = cut
            self._task.cancel()

    def _remaining_s(self) -> float | None:
        deadline = self._request.deadline
        return None if deadline is None else deadline - self._engine.clock.monotonic()

    def _is_past_deadline(self) -> bool:
        remaining_s = self._remaining_s()
        return remaining_s is not None and remaining_s <= _DEADLINE_SLACK_S

    def _outcome_of(self, error: PlatformError) -> usage_event_pb2.Outcome.ValueType:
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
        if self._attempt is not None:
            self._attempt.end(self._engine.clock.monotonic(), failure_reason)
            self._attempt = None

    def _settle(self, outcome: usage_event_pb2.Outcome.ValueType, reason: str) -> None:
        if self._settled:
            return
        self._settled = True
        if self._timer is not None:
            self._timer.cancel()
        self._end_attempt(reason)
        record = self._record
        self._take_usage()
        if outcome in _UNBILLED:
            record.usage = TokenUsage()
        elif self._ceiling is not None:
            ceiling = self._ceiling
            record.usage, record.usage_clamped = clamp_usage(
                record.usage,
                ceiling.prompt_tokens,
                ceiling.all_completion_tokens,
                counted_tokens=0 if self._watch is None else self._watch.counted,
            )
        ended = self._engine.clock.monotonic()
        endpoint = ENDPOINT_NAMES.get(record.endpoint, "unknown")
        metrics.requests(endpoint, record.model, _OUTCOME_NAMES[outcome]).inc()
        metrics.request_duration(endpoint, record.model).observe(ended - record.admitted, self._exemplar())
        if self._permit is not None:
            used_tokens = record.usage.prompt_tokens + record.usage.completion_tokens
            if self._watch is not None and not record.usage.prompt_tokens:
                # The engine had the whole prompt, even where it did not come to tell of it.
                used_tokens += self._prompt_tokens
            self._permit.settle(used_tokens)
        if self._request.span is not None:
            gen_ai.describe(self._request.span, record, _OUTCOME_NAMES[outcome], reason)
        event = self._event if self._event is not None else open_event(record, self._engine.router_id)
        close_event(event, record, outcome, reason, ended)
        if outcome not in _UNBILLED:
            billed = metrics.billed(record.model)
            billed.prompt_tokens.inc(record.usage.prompt_tokens)
            billed.completion_tokens.inc(record.usage.completion_tokens)
            billed.cost_micros.inc(event.cost_micros)
        if self._entry is not None:
            self._entry.end(event.SerializeToString())
        else:
            self._engine.journal.record(event.SerializeToString())
        if self._claim is not None:
            self._end_claim(self._claim, succeeded=outcome == usage_event_pb2.OUTCOME_SUCCEEDED)

    def _end_claim(self, claim: Claim, *, succeeded: bool) -> None:
        try:
            # An answer that is kept has left the router: it is not to be had for nothing after a crash.
            self._engine.journal.commit()
        except PlatformError:
            succeeded = False
        claim.end(succeeded=succeeded)

    def _take_usage(self) -> None:
        """What the stream has told of usage so far, if there is one."""
        record, watch = self._record, self._watch
        if watch is None:
            return
        record.finish_reason = watch.finish_reason
        if watch.usage is not None:
            record.usage, record.usage_source = watch.usage, usage_event_pb2.USAGE_SOURCE_ENGINE
        else:
            record.usage = TokenUsage(completion_tokens=watch.counted)
            record.usage_source = usage_event_pb2.USAGE_SOURCE_COUNTED

    def _progress(self) -> bytes | None:
        """What a crash must not make forgotten, as a part of the event; None before there is anything."""
        if self._watch is None or not any(self._watch.progress):
            return None
        self._take_usage()
        record = self._record
        return UsageEvent(usage=record.usage, usage_source=record.usage_source).SerializeToString()

    def _exemplar(self) -> dict[str, str] | None:
        span = self._request.span
        return None if span is None else {"trace_id": span.trace_id}
