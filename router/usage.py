"""Reads an engine's token counts and builds the one usage event of a request; it never stores or sends one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp
from msgspec import Meta

from aiaas.type.v1 import usage_event_pb2
from aiaas.type.v1.usage_event_pb2 import TokenUsage, UsageEvent
from mesh.auth import Principal

SCHEMA_VERSION = 1
"""The meaning of the events built here; consumers refuse a version they do not know."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

# No request of any engine comes near it: a count beyond is garbage, and never billed.
_Count = Annotated[int, Meta(le=1_000_000_000)]


class _PromptDetails(msgspec.Struct):
    cached_tokens: _Count | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: _Count | None = None


class _ChatUsage(msgspec.Struct):
    """`usage` of chat completions, completions and embeddings."""

    prompt_tokens: _Count
    completion_tokens: _Count | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _ResponseUsage(msgspec.Struct):
    """`usage` of responses."""

    input_tokens: _Count
    output_tokens: _Count
    input_tokens_details: _PromptDetails | None = None
    output_tokens_details: _CompletionDetails | None = None


_DECODER = msgspec.json.Decoder(_ChatUsage | None)
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
    """An engine's counts, held to what a usage event may say: none is negative, and no part is above its whole."""
    prompt, completion = max(0, prompt), max(0, completion or 0)
    return TokenUsage(
        prompt_tokens=prompt,
        cached_prompt_tokens=min(max(0, cached_prompt or 0), prompt),
        completion_tokens=completion,
        reasoning_tokens=min(max(0, reasoning or 0), completion),
    )


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
    first_byte: float | None = None
    attempts: list[AttemptRecord] = field(default_factory=list)
    usage: TokenUsage = field(default_factory=TokenUsage)
    usage_source: usage_event_pb2.UsageSource.ValueType = usage_event_pb2.USAGE_SOURCE_UNSPECIFIED
    finish_reason: str = ""


def build_event(
    record: UsageRecord,
    outcome: usage_event_pb2.Outcome.ValueType,
    reason: str,
    ended: float,
    router_id: str,
) -> UsageEvent:
    """The terminal event of a request that ended at `ended`, monotonic seconds; costs come with prices."""
    principal = record.principal
    admitted = record.admitted
    epoch_micros = (record.admit_time - _EPOCH) // _MICROSECOND
    duration_micros = _micros(ended - admitted)
    event = UsageEvent(
        schema_version=SCHEMA_VERSION,
        request_id=record.request_id,
        organization_id=principal.organization_id,
        api_key_id=principal.api_key_id,
        user_id=principal.user_id,
        service_account_id=principal.service_account_id,
        endpoint=record.endpoint,
        model=record.model,
        backend_id=record.backend_id,
        outcome=outcome,
        reason=reason,
        usage=record.usage,
        usage_source=record.usage_source,
        duration_micros=duration_micros,
        ttft_micros=0 if record.first_byte is None else max(1, _micros(record.first_byte - admitted)),
        streamed=record.streamed,
        router_id=router_id,
        finish_reason=record.finish_reason,
    )
    if record.idempotency_key:
        event.idempotency_digest = hashlib.sha256(record.idempotency_key.encode()).hexdigest()
    # Nested messages are filled where they lie, and times are integers: FromDatetime and the constructors of nested
    # messages cost twice as much.
    _set_time(event.admit_time, epoch_micros)
    _set_time(event.end_time, epoch_micros + duration_micros)
    for attempt in record.attempts:
        entry = event.attempts.add()
        entry.backend_id = attempt.backend_id
        entry.duration_micros = _micros((ended if attempt.ended is None else attempt.ended) - attempt.started)
        entry.failure_reason = attempt.failure_reason
        _set_time(entry.start_time, epoch_micros + _micros(attempt.started - admitted))
    return event


def _set_time(timestamp: Timestamp, epoch_micros: int) -> None:
    seconds, micros = divmod(epoch_micros, 1_000_000)
    timestamp.seconds = seconds
    timestamp.nanos = micros * 1000


def _micros(seconds: float) -> int:
    return round(seconds * 1_000_000)
