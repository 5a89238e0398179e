"""Ids: their form, their order, their randomness."""

from datetime import UTC, datetime
from random import Random

import pytest

from mesh.ids import ALPHABET, base62, made_at, new_id, new_request_id
from tests.doubles.clock import ManualClock


def test_an_id_is_its_prefix_and_22_base62_characters() -> None:
    prefix, _, rest = new_id("org").partition("_")
    assert prefix == "org"
    assert len(rest) == 22
    assert set(rest) <= set(ALPHABET)
    assert new_request_id().startswith("req_")


def test_later_ids_sort_after_earlier_ones() -> None:
    clock, ids = ManualClock(), []
    for _ in range(200):
        ids.append(new_id("org", clock=clock))
        clock.advance(0.001)
    assert ids == sorted(ids)


def test_ids_of_one_millisecond_differ() -> None:
    clock = ManualClock()
    assert len({new_id("org", clock=clock) for _ in range(10_000)}) == 10_000


def test_the_same_time_and_randomness_give_the_same_id() -> None:
    clock = ManualClock()
    assert new_id("org", clock=clock, random=Random(1)) == new_id("org", clock=clock, random=Random(1))


def test_base62_is_padded_and_ordered() -> None:
    assert base62(0, 3) == "000"
    assert base62(61, 3) == "00z"
    assert base62(62**3 - 1, 3) == "zzz"
    assert base62(2**128 - 1, 22) <= "z" * 22


def test_id_says_when_it_was_made() -> None:
    clock = ManualClock(datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC))
    assert made_at(new_id("session", clock=clock)) == clock.now()
    with pytest.raises(ValueError, match="substring"):
        made_at("session_!")
