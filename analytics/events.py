"""Reads usage events from the queue and holds each to what its contract promises; it never stores or counts one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from google.protobuf.message import DecodeError

from aiaas.type.v1.usage_event_pb2 import Endpoint, Outcome, UsageEvent, UsageEventBatch
from analytics.charges import cost_parts

SCHEMA_VERSION = 1
"""The meaning of events that is understood here."""

BATCH_BYTES = 1024 * 1024
"""Size of a batch; an honest one has at most about a quarter of it."""

EVENT_BYTES = 64 * 1024
"""Size of an event; an honest one has about a hundredth of it."""

TEXT_BYTES = 256
"""Size of an id or a name: six of them fit into one entry of a PostgreSQL index."""

TOKENS = 1_000_000_000
"""Tokens of one request, each kind: no engine comes near it, and sums stay far from the end of a bigint."""

COST_MICROS = 1_000_000_000_000
"""Cost of one request in micro-dollars: a million dollars."""

AGE = timedelta(days=400)
"""How old an event may be: as long as events are kept."""

AHEAD = timedelta(hours=1)
"""How far the clock of a router may run ahead."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OUTCOMES = frozenset(Outcome.values()) - {Outcome.OUTCOME_UNSPECIFIED}
# Looked up in the enum, these take a tenth of the time that an event takes.
_REFUSED = Outcome.OUTCOME_REFUSED
_NO_ENDPOINT = Endpoint.ENDPOINT_UNSPECIFIED
_REASON = re.compile(r"[a-z0-9_]{1,64}")
# What is no stable reason must not make a row of the sums for each of its texts.
_OTHER_REASON = "other"


class UnacceptableEvent(Exception):
    """No usage event that can be counted, or no batch at all. Says what is wrong, and repeats nothing of it."""


class Event(NamedTuple):
    """One usage event: the columns of usage_events in their order, and after `body` what only sums know of it.

    A duration of 0 is none: what was refused took no time, and only streams have a first byte.
    """

    request_id: str
    admit_time: datetime
    organization_id: str
    api_key_id: str
    user_id: str
    service_account_id: str
    model: str
    backend_id: str
    endpoint: int
    outcome: int
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    cost_micros: int
    body: bytes
    reason: str
    prompt_cost_micros: int
    cached_prompt_cost_micros: int
    completion_cost_micros: int
    latency_micros: int
    ttft_micros: int


def read_batch(body: bytes) -> Sequence[bytes]:
    """The events in `body`, a serialized UsageEventBatch; each is still serialized. Raises UnacceptableEvent."""
    if len(body) > BATCH_BYTES:
        raise UnacceptableEvent("batch is too large")
    try:
        events = UsageEventBatch.FromString(body).events
    except DecodeError:
        raise UnacceptableEvent("body is no UsageEventBatch") from None
    # Much that is no batch reads as one without events.
    if not events:
        raise UnacceptableEvent("batch is empty")
    return events


def read_event(body: bytes, now: datetime, age: timedelta = AGE) -> Event:
    """The event in `body`, a serialized UsageEvent, at most `age` old. Raises UnacceptableEvent.

    Only what would make sums wrong, or the database refuse a whole batch, is refused. An endpoint that is newer than
    this code is not; an outcome is, since it decides what is a failure and what is billed.
    """
    if len(body) > EVENT_BYTES:
        raise UnacceptableEvent("event is too large")
    try:
        message = UsageEvent.FromString(body)
    except DecodeError:
        raise UnacceptableEvent("event is no UsageEvent") from None
    if message.schema_version != SCHEMA_VERSION:
        raise UnacceptableEvent("schema_version is unknown")
    outcome, usage, cost_micros = message.outcome, message.usage, message.cost_micros
    prompt_tokens, completion_tokens = usage.prompt_tokens, usage.completion_tokens
    reason, refused = message.reason, outcome == _REFUSED
    # By position: names would take a twelfth of the time that all of this takes.
    event = Event(
        _text(message.request_id, "request_id", required=True),
        _admit_time(message, now, age),
        _text(message.organization_id, "organization_id", required=True),
        _text(message.api_key_id, "api_key_id"),
        _text(message.user_id, "user_id"),
        _text(message.service_account_id, "service_account_id"),
        # A request can be refused because its model or endpoint is none.
        _text(message.model, "model", required=not refused),
        _text(message.backend_id, "backend_id"),
        message.endpoint,
        outcome,
        _amount(prompt_tokens, TOKENS, "prompt_tokens"),
        _amount(usage.cached_prompt_tokens, prompt_tokens, "cached_prompt_tokens"),
        _amount(completion_tokens, TOKENS, "completion_tokens"),
        _amount(cost_micros, COST_MICROS, "cost_micros"),
        body,
        reason if not reason or _REASON.fullmatch(reason) else _OTHER_REASON,
        *cost_parts(message.price, usage, cost_micros),
        0 if refused else max(message.duration_micros, 0),
        max(message.ttft_micros, 0) if message.streamed and not refused else 0,
    )
    if outcome not in _OUTCOMES:
        raise UnacceptableEvent("outcome is unknown")
    if not (0 <= event.endpoint < 2**15) or (event.endpoint == _NO_ENDPOINT and not refused):
        raise UnacceptableEvent("endpoint is unknown")
    if refused and (prompt_tokens or completion_tokens or cost_micros):
        raise UnacceptableEvent("a refused request bills something")
    return event


def _text(value: str, field: str, *, required: bool = False) -> str:
    if required and not value:
        raise UnacceptableEvent(f"{field} is missing")
    # PostgreSQL has no NUL in text. A character takes four bytes at most.
    if "\0" in value or (len(value) * 4 > TEXT_BYTES and len(value.encode()) > TEXT_BYTES):
        raise UnacceptableEvent(f"{field} is no id")
    return value


def _amount(value: int, most: int, field: str) -> int:
    if not 0 <= value <= most:
        raise UnacceptableEvent(f"{field} is absurd")
    return value


def _admit_time(message: UsageEvent, now: datetime, age: timedelta) -> datetime:
    if not message.HasField("admit_time"):
        raise UnacceptableEvent("admit_time is missing")
    seconds, nanos = message.admit_time.seconds, message.admit_time.nanos
    try:
        moment = _EPOCH + timedelta(0, seconds, nanos // 1000)
    except OverflowError:
        raise UnacceptableEvent("admit_time is absurd") from None
    if not (now - age <= moment <= now + AHEAD and 0 <= nanos < 1_000_000_000):
        raise UnacceptableEvent("admit_time is absurd")
    return moment
