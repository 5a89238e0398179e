"""Reads an engine's token counts and builds the one usage event of a request; it never stores or sends one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, cast

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp
from msgspec import Meta

from aiaas.type.v1 import usage_event_pb2
from aiaas.type.v1.usage_event_pb2 import TokenUsage, UsageEvent
from mesh.auth import Principal
from router.leases import Reservation
from router.prices import Price, cost_micros

SCHEMA_VERSION = 1
"""The meaning of the events built here; consumers refuse a version they do not know."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

# No request of any engine comes near it: a count beyond is garbage, and never billed.
_MOST = 1_000_000_000
_Count = Annotated[int, Meta(ge=0, le=_MOST)]
_Part = Annotated[int, Meta(le=_MOST)]


class _PromptDetails(msgspec.Struct):
    cached_tokens: _Part | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: _Part | None = None


class _ChatUsage(msgspec.Struct):
    """`usage` of chat completions, completions and embeddings."""

    prompt_tokens: _Count
    completion_tokens: _Count | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Timings(msgspec.Struct):
    """`timings` of llama.cpp, as far as they count tokens: those of the prompt that it still had, those that it did
    not have, and those that it has generated."""

    cache_n: _Count
    prompt_n: _Count
    predicted_n: _Count


class _ResponseUsage(msgspec.Struct):
    """`usage` of responses."""

    input_tokens: _Count
    output_tokens: _Count
    input_tokens_details: _PromptDetails | None = None
    output_tokens_details: _CompletionDetails | None = None


_DECODER = msgspec.json.Decoder(_ChatUsage | None)
_TIMINGS_DECODER = msgspec.json.Decoder(_Timings)
_RESPONSE_DECODER = msgspec.json.Decoder(_ResponseUsage | None)


def read_usage(raw: msgspec.Raw | bytes) -> TokenUsage | None:
    """The counts of an OpenAI `usage` object in JSON; None where it is null or garbage."""
    try:
        usage = _DECODER.decode(raw)
    except ValueError:
        return None
    if usage is None:
        return None
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    return _counts(
        usage.prompt_tokens,
        prompt and prompt.cached_tokens,
        usage.completion_tokens,
        completion and completion.reasoning_tokens,
    )


def read_timings(raw: msgspec.Raw | bytes) -> TokenUsage | None:
    """The counts of llama.cpp's `timings` object in JSON; None where it is garbage."""
    try:
        timings = _TIMINGS_DECODER.decode(raw)
    except ValueError:
        return None
    return _counts(timings.cache_n + timings.prompt_n, timings.cache_n, timings.predicted_n, 0)


def read_response_usage(raw: msgspec.Raw | bytes) -> TokenUsage | None:
    """The counts of the Responses API's `usage` object in JSON; None where it is null or garbage."""
    try:
        usage = _RESPONSE_DECODER.decode(raw)
    except ValueError:
        return None
    if usage is None:
        return None
    prompt, completion = usage.input_tokens_details, usage.output_tokens_details
    return _counts(
        usage.input_tokens,
        prompt and prompt.cached_tokens,
        usage.output_tokens,
        completion and completion.reasoning_tokens,
    )


def _counts(prompt: int, cached_prompt: int | None, completion: int | None, reasoning: int | None) -> TokenUsage:
    """An engine's counts, held to what a usage event may say: no part is negative, nor above its whole."""
    completion = completion or 0
    return TokenUsage(
        prompt_tokens=prompt,
        cached_prompt_tokens=min(max(0, cached_prompt or 0), prompt),
        completion_tokens=completion,
        reasoning_tokens=min(max(0, reasoning or 0), completion),
    )


def clamp_usage(
    usage: TokenUsage, ceiling_prompt_tokens: int, ceiling_completion_tokens: int, *, counted_tokens: int = 0
) -> tuple[TokenUsage, bool]:
    """What is billed of `usage`, and whether that differs from it: an answer has at least the tokens that were counted
    as they passed, and no request uses more than its ceiling."""
    if 0 <= usage.prompt_tokens <= ceiling_prompt_tokens and (
        counted_tokens <= usage.completion_tokens <= ceiling_completion_tokens
    ):
        return usage, False
    prompt = min(max(0, usage.prompt_tokens), ceiling_prompt_tokens)
    completion = min(max(usage.completion_tokens, counted_tokens), ceiling_completion_tokens)
    clamped = _counts(prompt, usage.cached_prompt_tokens, completion, usage.reasoning_tokens)
    return clamped, clamped != usage


@dataclass(slots=True)
class AttemptRecord:
    """One attempt at a backend, while and after it runs. Times are monotonic seconds."""

    backend_id: str
    started: float
    ended: float | None = None
    failure_reason: str = ""


@dataclass(slots=True)
class UsageRecord:
    """What a request gathers until it ends. `admitted` and `first_byte` are monotonic seconds; `admit_time` is the one
    reading of the wall clock, and every other time of the event is told by its distance from it."""

    request_id: str
    endpoint: usage_event_pb2.Endpoint.ValueType
    principal: Principal
    admit_time: datetime
    admitted: float
    idempotency_key: str = ""
    model: str = ""
    backend_id: str = ""
    streamed: bool = False
    choices: int = 1
    first_byte: float | None = None
    attempts: list[AttemptRecord] = field(default_factory=list)
    usage: TokenUsage = field(default_factory=TokenUsage)
    usage_source: usage_event_pb2.UsageSource.ValueType = usage_event_pb2.USAGE_SOURCE_UNSPECIFIED
    usage_clamped: bool = False
    price: Price | None = None
    reservation: Reservation | None = None
    finish_reason: str = ""
    traceparent: str = ""


def open_event(record: UsageRecord, router_id: str) -> UsageEvent:
    """The event of a request that was admitted, as far as it is known then; `close_event` makes it the terminal one."""
    principal, price = record.principal, record.price
    event = UsageEvent(
        schema_version=SCHEMA_VERSION,
        request_id=record.request_id,
        organization_id=principal.organization_id,
        api_key_id=principal.api_key_id,
        user_id=principal.user_id,
        service_account_id=principal.service_account_id,
        endpoint=record.endpoint,
        model=record.model,
        streamed=record.streamed,
        choices=record.choices,
        router_id=router_id,
        traceparent=record.traceparent,
    )
    if record.idempotency_key:
        event.idempotency_digest = hashlib.sha256(record.idempotency_key.encode()).hexdigest()
    # Nested messages are filled where they lie, and times are integers: FromDatetime and the constructors of nested
    # messages cost twice as much.
    _set_time(event.admit_time, _epoch_micros(record))
    if price is not None:
        snapshot = event.price
        snapshot.price_id = price.price_id
        snapshot.prompt_micros_per_million = price.prompt_micros_per_million
        snapshot.cached_prompt_micros_per_million = price.cached_prompt_micros_per_million
        snapshot.completion_micros_per_million = price.completion_micros_per_million
    if record.reservation is not None:
        for lease, reserved in record.reservation.charges:
            charge = event.budgets.add()
            charge.budget_id = lease.account.budget_id
            charge.budget_lease_id = lease.lease_id
            charge.unit = cast("usage_event_pb2.ChargeUnit.ValueType", lease.account.unit)
            charge.period_start.CopyFrom(lease.period_start)
            charge.reserved = reserved
    return event


def close_event(
    event: UsageEvent, record: UsageRecord, outcome: usage_event_pb2.Outcome.ValueType, reason: str, ended: float
) -> None:
    """Make an opened event the terminal one of a request that ended at `ended`, monotonic seconds. Its reservation is
    settled with it."""
    admitted = record.admitted
    epoch_micros = _epoch_micros(record)
    duration_micros = _micros(ended - admitted)
    event.backend_id = record.backend_id
    event.outcome = outcome
    event.reason = reason
    event.usage.CopyFrom(record.usage)
    event.usage_source = record.usage_source
    event.usage_clamped = record.usage_clamped
    event.duration_micros = duration_micros
    event.ttft_micros = 0 if record.first_byte is None else max(1, _micros(record.first_byte - admitted))
    event.finish_reason = record.finish_reason
    _set_time(event.end_time, epoch_micros + duration_micros)
    for attempt in record.attempts:
        entry = event.attempts.add()
        entry.backend_id = attempt.backend_id
        entry.duration_micros = _micros((ended if attempt.ended is None else attempt.ended) - attempt.started)
        entry.failure_reason = attempt.failure_reason
        _set_time(entry.start_time, epoch_micros + _micros(attempt.started - admitted))
    if record.price is not None:
        event.cost_micros = cost_micros(record.price, record.usage)
    if record.reservation is not None:
        charged = record.reservation.settle(event.cost_micros, _tokens(record.usage), counted_requests(outcome))
        for charge, amount in zip(event.budgets, charged, strict=True):
            charge.charged = amount


def abort_event(event: UsageEvent) -> None:
    """Work out what an opened event costs, whose router died before it could close it, by the usage that it tells."""
    event.cost_micros = cost_micros(event.price, event.usage)
    amounts = {
        usage_event_pb2.CHARGE_UNIT_COST: event.cost_micros,
        usage_event_pb2.CHARGE_UNIT_TOKENS: _tokens(event.usage),
        usage_event_pb2.CHARGE_UNIT_REQUESTS: counted_requests(event.outcome),
    }
    for charge in event.budgets:
        charge.charged = min(charge.reserved, amounts[charge.unit])


def _tokens(usage: TokenUsage) -> int:
    return usage.prompt_tokens + usage.completion_tokens


def counted_requests(outcome: usage_event_pb2.Outcome.ValueType) -> int:
    """What a request counts against a budget of requests: one that brought nothing counts nothing."""
    return 0 if outcome in (usage_event_pb2.OUTCOME_REFUSED, usage_event_pb2.OUTCOME_FAILED) else 1


def _epoch_micros(record: UsageRecord) -> int:
    return (record.admit_time - _EPOCH) // _MICROSECOND


def _set_time(timestamp: Timestamp, epoch_micros: int) -> None:
    seconds, micros = divmod(epoch_micros, 1_000_000)
    timestamp.seconds = seconds
    timestamp.nanos = micros * 1000


def _micros(seconds: float) -> int:
    return round(seconds * 1_000_000)
