"""Histograms: every duration within 1 %, whatever its size, and merged by adding."""

import random

from hypothesis import given
from hypothesis import strategies as st

from analytics.sketches import COUNT_BITS, COUNT_MASK, bucket_of, cells_of, micros_of


@given(st.integers(1, 10**13))
def test_the_middle_of_a_bucket_is_within_one_percent_of_what_it_takes(micros: int) -> None:
    # The contract wants whole microseconds, which is half of one more.
    assert abs(micros_of(bucket_of(micros)) - micros) <= 0.01 * micros + 0.5


@given(st.integers(1, 10**13), st.integers(1, 10**13))
def test_longer_durations_are_in_later_buckets(one: int, other: int) -> None:
    assert bucket_of(min(one, other)) <= bucket_of(max(one, other))


def test_cells_are_in_the_order_of_their_buckets_and_tell_bucket_and_count() -> None:
    counts = {bucket: random.Random(bucket).randrange(1, 10**9) for bucket in (700, 0, 3, 1200)}
    cells = cells_of(counts)
    assert cells == sorted(cells)
    assert {cell >> COUNT_BITS: cell & COUNT_MASK for cell in cells} == counts
