"""Reading an engine's token counts, and building the event of a request."""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aiaas.type.v1.usage_event_pb2 import (
    ENDPOINT_CHAT_COMPLETIONS,
    OUTCOME_REFUSED,
    OUTCOME_SUCCEEDED,
    USAGE_SOURCE_ENGINE,
    Attempt,
    Outcome,
    TokenUsage,
    UsageEvent,
)
from mesh.auth import Principal
from router.usage import (
    AttemptRecord,
    UsageRecord,
    clamp_usage,
    close_event,
    open_event,
    read_response_usage,
    read_timings,
    read_usage,
)

PRINCIPAL = Principal("api_key", "key_1", "org_1", api_key_id="key_1", user_id="user_1", service_account_id="sa_1")
# Microseconds that no float of seconds holds exactly, and a second that the request crosses.
ADMITTED = datetime(2026, 11, 20, 12, 30, 15, 999_999, tzinfo=UTC)


def both(prompt: int, cached: int | None, completion: int, reasoning: int | None) -> tuple[TokenUsage | None, ...]:
    """What is read of the same counts in both spellings."""
    prompt_details, completion_details = {"cached_tokens": cached}, {"reasoning_tokens": reasoning}
    chat: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": prompt_details,
        "completion_tokens_details": completion_details,
    }
    response: dict[str, Any] = {
        "input_tokens": prompt,
        "output_tokens": completion,
        "input_tokens_details": prompt_details,
        "output_tokens_details": completion_details,
    }
    return read_usage(json.dumps(chat).encode()), read_response_usage(json.dumps(response).encode())


@pytest.mark.parametrize(
    ("told", "read"),
    [
        ((9, 4, 5, 2), (9, 4, 5, 2)),
        ((9, None, 5, None), (9, 0, 5, 0)),
        ((9, 10, 5, 6), (9, 9, 5, 5)),
        ((9, -1, 5, -(10**9)), (9, 0, 5, 0)),
    ],
)
def test_counts_are_held_to_what_a_usage_event_may_say(
    told: tuple[int, int | None, int, int | None], read: tuple[int, int, int, int]
) -> None:
    names = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "reasoning_tokens")
    assert both(*told) == (TokenUsage(**dict(zip(names, read, strict=True))),) * 2


@pytest.mark.parametrize(
    "told", [(10**10, 0, 1, 0), (1, 10**10, 1, 0), (1, 0, 10**30, 0), (-1, 0, 1, 0), (1, 0, -(10**30), 0)]
)
def test_count_that_no_request_has_is_garbage(told: tuple[int, int, int, int]) -> None:
    assert both(*told) == (None, None)


@pytest.mark.parametrize(
    "garbage", [b"null", b"[]", b'"x"', b"{}", b'{"prompt_tokens":1.5}', b'{"prompt_tokens":true}']
)
def test_what_counts_nothing_is_no_usage(garbage: bytes) -> None:
    assert (read_usage(garbage), read_response_usage(garbage), read_timings(garbage)) == (None, None, None)


def test_llamacpps_timings_count_the_whole_prompt() -> None:
    told = b'{"cache_n":32,"prompt_n":1,"prompt_ms":16.1,"predicted_n":4,"predicted_ms":386.5}'
    assert read_timings(told) == TokenUsage(prompt_tokens=33, cached_prompt_tokens=32, completion_tokens=4)
    assert read_timings(told.replace(b":32", b":-32")) is None


@pytest.mark.parametrize(
    ("told", "counted", "billed"),
    [
        ((9, 4, 5, 2), 5, (9, 4, 5, 2)),
        ((10, 4, 20, 2), 0, (10, 4, 20, 2)),
        # An engine that tells less than was seen of it, and one that tells more than it was let use.
        ((9, 4, 5, 2), 7, (9, 4, 7, 2)),
        ((0, 0, 0, 0), 3, (0, 0, 3, 0)),
        ((1000, 999, 5, 5), 5, (10, 10, 5, 5)),
        ((9, 4, 10**9, 30), 5, (9, 4, 20, 20)),
        ((9, 4, 5, 2), 30, (9, 4, 20, 2)),
        # No engine's word reads like this; a mistake of ours might.
        ((-9, -4, -5, -2), 1, (0, 0, 1, 0)),
    ],
)
def test_usage_is_held_between_what_was_counted_and_the_ceiling(
    told: tuple[int, int, int, int], counted: int, billed: tuple[int, int, int, int]
) -> None:
    def usage(counts: tuple[int, int, int, int]) -> TokenUsage:
        names = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "reasoning_tokens")
        return TokenUsage(**dict(zip(names, counts, strict=True)))

    clamped = clamp_usage(usage(told), 10, 20, counted_tokens=counted)
    assert clamped == (usage(billed), told != billed)


def record(**fields: Any) -> UsageRecord:
    return UsageRecord("req_1", ENDPOINT_CHAT_COMPLETIONS, PRINCIPAL, ADMITTED, admitted=1000.0, **fields)


def build_event(
    record: UsageRecord, outcome: Outcome.ValueType, reason: str, ended: float, router_id: str
) -> UsageEvent:
    event = open_event(record, router_id)
    close_event(event, record, outcome, reason, ended)
    return event


def test_event_tells_all_of_a_request() -> None:
    told = record(
        idempotency_key="once",
        model="m",
        backend_id="second",
        streamed=True,
        first_byte=1000.25,
        attempts=[
            AttemptRecord("first", started=1000.0, ended=1000.125, failure_reason="backend_error"),
            AttemptRecord("second", started=1000.125),
        ],
        usage=TokenUsage(prompt_tokens=9, completion_tokens=4),
        usage_source=USAGE_SOURCE_ENGINE,
        finish_reason="stop",
    )
    expected = UsageEvent(
        schema_version=1,
        request_id="req_1",
        organization_id="org_1",
        api_key_id="key_1",
        user_id="user_1",
        service_account_id="sa_1",
        endpoint=ENDPOINT_CHAT_COMPLETIONS,
        model="m",
        backend_id="second",
        outcome=OUTCOME_SUCCEEDED,
        usage=TokenUsage(prompt_tokens=9, completion_tokens=4),
        usage_source=USAGE_SOURCE_ENGINE,
        duration_micros=1_500_000,
        ttft_micros=250_000,
        streamed=True,
        attempts=[
            Attempt(backend_id="first", duration_micros=125_000, failure_reason="backend_error"),
            Attempt(backend_id="second", duration_micros=1_375_000),
        ],
        router_id="router-1",
        finish_reason="stop",
        idempotency_digest=hashlib.sha256(b"once").hexdigest(),
        choices=1,
    )
    expected.admit_time.FromDatetime(ADMITTED)
    expected.end_time.FromDatetime(ADMITTED + timedelta(seconds=1.5))
    expected.attempts[0].start_time.FromDatetime(ADMITTED)
    expected.attempts[1].start_time.FromDatetime(ADMITTED + timedelta(seconds=0.125))
    assert build_event(told, OUTCOME_SUCCEEDED, "", 1001.5, "router-1") == expected


def test_event_of_a_refusal_names_no_backend_and_no_first_byte() -> None:
    event = build_event(record(), OUTCOME_REFUSED, "unknown_field", 1000.001, "router-1")
    assert (event.outcome, event.reason, event.ttft_micros, event.duration_micros) == (
        OUTCOME_REFUSED,
        "unknown_field",
        0,
        1000,
    )
    assert (event.usage, event.idempotency_digest, list(event.attempts)) == (TokenUsage(), "", [])


def test_first_byte_in_the_moment_of_admission_is_not_taken_for_none() -> None:
    assert build_event(record(first_byte=1000.0), OUTCOME_SUCCEEDED, "", 1000.0, "router-1").ttft_micros == 1


@pytest.mark.parametrize("micros", [0, 1, 250_000, 999_999])
def test_times_are_exact_to_the_microsecond(micros: int) -> None:
    told = record()
    told.admit_time = ADMITTED.replace(microsecond=micros)
    event = build_event(told, OUTCOME_SUCCEEDED, "", 1000.000_001, "router-1")
    assert event.admit_time.ToDatetime(UTC) == told.admit_time
    assert event.end_time.ToDatetime(UTC) == told.admit_time + timedelta(microseconds=1)
