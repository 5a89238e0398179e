"""How fresh an answer is, in one word."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiaas.analytics.v1.usage_service_pb2 import FreshnessState
from analytics.events import UnacceptableEvent, read_batch
from analytics.freshness import Freshness, read_mark, write_mark
from tests.doubles.usage_events import NOW, usage_batch, usage_event

FRESH, STALE, DELAYED = (
    FreshnessState.FRESHNESS_STATE_FRESH,
    FreshnessState.FRESHNESS_STATE_STALE,
    FreshnessState.FRESHNESS_STATE_DELAYED,
)


@pytest.mark.parametrize(
    ("lag_s", "state"), [(-5, FRESH), (0, FRESH), (299.9, FRESH), (300, STALE), (599.9, STALE), (600, DELAYED)]
)
def test_state_follows_the_lag(lag_s: float, state: FreshnessState.ValueType) -> None:
    freshness = Freshness(NOW - timedelta(seconds=lag_s), NOW)
    assert freshness.state == state
    assert freshness.lag == timedelta(seconds=max(0, lag_s))


def test_unknown_is_unknown_and_never_fresh() -> None:
    freshness = Freshness(None, NOW)
    assert freshness.state == FreshnessState.FRESHNESS_STATE_UNSPECIFIED
    assert freshness.lag is None


def test_mark_is_read_as_it_was_written() -> None:
    assert read_mark(write_mark(NOW)) == NOW


@given(st.binary(max_size=30))
def test_no_event_is_taken_for_a_mark(body: bytes) -> None:
    assert read_mark(body) is None or body.startswith(b"\0complete_v1")
    assert read_mark(usage_batch(usage_event())) is None


def test_mark_of_an_absurd_time_is_none() -> None:
    assert read_mark(b"\0complete_v1" + b"\x7f" * 8) is None


def test_mark_is_never_taken_for_an_event() -> None:
    with pytest.raises(UnacceptableEvent):
        read_batch(write_mark(NOW))
