"""Reading events: what is counted as it came, and what is refused before it can spoil a batch."""

from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from aiaas.type.v1.usage_event_pb2 import Endpoint, Outcome, TokenUsage, UsageEvent
from analytics.events import BATCH_BYTES, TEXT_BYTES, UnacceptableEvent, read_batch, read_event
from tests.doubles.usage_events import NOW, usage_batch, usage_event


def refusal(event: UsageEvent | bytes) -> str:
    with pytest.raises(UnacceptableEvent) as caught:
        read_event(event if isinstance(event, bytes) else event.SerializeToString(), NOW)
    return str(caught.value)


def test_event_is_read_with_its_body_as_it_came() -> None:
    body = usage_event().SerializeToString() + b"\xfa\x07\x03new"  # a field of tomorrow
    event = read_event(body, NOW)
    assert event.admit_time == NOW
    assert (event.organization_id, event.model, event.endpoint, event.outcome) == ("org_a", "smollm2", 1, 1)
    assert (event.prompt_tokens, event.cached_prompt_tokens, event.completion_tokens, event.cost_micros) == (
        10,
        4,
        5,
        25,
    )
    assert event.body == body


def test_admit_time_is_cut_to_microseconds_so_that_the_key_is_always_the_same() -> None:
    event = usage_event()
    event.admit_time.nanos += 999
    assert read_event(event.SerializeToString(), NOW).admit_time == NOW


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"schema_version": 0}, "schema_version"),
        ({"schema_version": 2}, "schema_version"),
        ({"request_id": ""}, "request_id"),
        ({"organization_id": ""}, "organization_id"),
        ({"model": ""}, "model"),
        ({"outcome": Outcome.OUTCOME_UNSPECIFIED}, "outcome"),
        ({"outcome": 99}, "outcome"),
        ({"endpoint": Endpoint.ENDPOINT_UNSPECIFIED}, "endpoint"),
        ({"endpoint": 2**20}, "endpoint"),
        ({"endpoint": -1}, "endpoint"),
        ({"usage": TokenUsage(prompt_tokens=-1)}, "prompt_tokens"),
        ({"usage": TokenUsage(completion_tokens=-1)}, "completion_tokens"),
        ({"usage": TokenUsage(completion_tokens=2**62)}, "completion_tokens"),
        ({"usage": TokenUsage(prompt_tokens=3, cached_prompt_tokens=4)}, "cached_prompt_tokens"),
        ({"cost_micros": -1}, "cost_micros"),
        ({"cost_micros": 2**62}, "cost_micros"),
        ({"user_id": "a\0b"}, "user_id"),
        ({"api_key_id": "k" * (TEXT_BYTES + 1)}, "api_key_id"),
        ({"outcome": Outcome.OUTCOME_REFUSED}, "refused"),
    ],
)
def test_field_that_would_spoil_the_sums_is_refused_by_name(fields: dict[str, Any], wrong: str) -> None:
    assert wrong in refusal(usage_event(**fields))


@pytest.mark.parametrize(
    "admit_time",
    [
        Timestamp(seconds=int((NOW + timedelta(hours=2)).timestamp())),
        Timestamp(seconds=int((NOW - timedelta(days=401)).timestamp())),
        Timestamp(seconds=2**62),
        Timestamp(seconds=-(2**62)),
        Timestamp(seconds=int(NOW.timestamp()), nanos=2_000_000_000),
        Timestamp(seconds=int(NOW.timestamp()), nanos=-1),
    ],
)
def test_absurd_time_is_refused(admit_time: Timestamp) -> None:
    event = usage_event()
    event.admit_time.CopyFrom(admit_time)
    assert "admit_time" in refusal(event)


def test_missing_time_is_refused() -> None:
    event = usage_event()
    event.ClearField("admit_time")
    assert "admit_time" in refusal(event)


def test_event_that_is_late_by_two_days_or_from_a_clock_ahead_is_read() -> None:
    for offset in (timedelta(hours=-48), timedelta(seconds=90)):
        assert read_event(usage_event(admit_time=NOW + offset).SerializeToString(), NOW).admit_time == NOW + offset


def test_only_what_was_measured_is_a_duration() -> None:
    answered: dict[str, Any] = {"duration_micros": 900, "ttft_micros": 90}
    for fields, durations in (
        ({"streamed": True}, (900, 90)),
        ({"streamed": False}, (900, 0)),
        ({"streamed": True, "ttft_micros": 0}, (900, 0)),
        ({"streamed": True, "duration_micros": -1, "ttft_micros": -1}, (0, 0)),
        ({"streamed": True, "outcome": Outcome.OUTCOME_REFUSED, "usage": None, "cost_micros": 0}, (0, 0)),
    ):
        event = read_event(usage_event(**{**answered, **fields}).SerializeToString(), NOW)
        assert (event.latency_micros, event.ttft_micros) == durations


def test_reason_that_is_no_stable_one_is_another() -> None:
    for told, kept in (
        ("", ""),
        ("backend_timeout", "backend_timeout"),
        ("Model x is gone", "other"),
        ("x" * 65, "other"),
    ):
        assert read_event(usage_event(reason=told).SerializeToString(), NOW).reason == kept


def test_refused_request_needs_no_model_and_no_endpoint() -> None:
    event = usage_event(outcome=Outcome.OUTCOME_REFUSED, model="", endpoint=0, usage=None, cost_micros=0)
    assert read_event(event.SerializeToString(), NOW).outcome == Outcome.OUTCOME_REFUSED


def test_endpoint_of_a_newer_router_is_read() -> None:
    assert read_event(usage_event(endpoint=77).SerializeToString(), NOW).endpoint == 77


@pytest.mark.parametrize("body", [b"", b"\xff", b"{}", b"\x0a\x03\xff\xfe\xfd", b"\0" * (1 << 20)])
def test_garbage_is_refused(body: bytes) -> None:
    refusal(body)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_and_never_fail_otherwise(body: bytes) -> None:
    try:
        event = read_event(body, NOW)
    except UnacceptableEvent:
        return
    assert event.request_id


def test_refusal_repeats_nothing_of_the_event() -> None:
    assert "canary" not in refusal(usage_event(organization_id="canary\0"))


def test_batch_holds_its_events_as_they_came() -> None:
    events = [usage_event().SerializeToString(), b"\xff\xff", b"", usage_event("req_2").SerializeToString()]
    assert list(read_batch(usage_batch(*events))) == events


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        usage_event().SerializeToString(),
        usage_batch(b"x" * (1 << 16)) * (1 + BATCH_BYTES // (1 << 16)),
    ],
    ids=["nothing", "garbage", "event of version 1", "too large"],
)
def test_body_that_is_no_batch_is_refused(body: bytes) -> None:
    with pytest.raises(UnacceptableEvent):
        read_batch(body)
