"""Histograms of durations from which percentiles follow within 1 %, as in DDSketch; they never hold a duration itself.

Bucket i takes durations above 1.02^(i-1) and up to 1.02^i microseconds, so its middle is within 1 % of each (Masson and
others, arXiv 1908.10693). Counts are exact, and two histograms are merged by adding them: whatever comes late, twice
or in another order, the result is the same. A minute and a microsecond are 900 buckets apart, so there is no need to
limit their number.

A cell is one bucket and its count in one number. A stored histogram is cells in any order, and may hold several of one
bucket: to lay one histogram behind the other is the cheapest way to add them. Whoever reads one adds its cells up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

GAMMA = 1.02
"""How far the bounds of a bucket are apart."""

COUNT_BITS = 40
"""The bits of a cell that hold its count; the bucket is above them."""

COUNT_MASK = (1 << COUNT_BITS) - 1
"""These bits."""

_SCALE = 1 / math.log(GAMMA)


def bucket_of(micros: int) -> int:
    """The bucket of a duration of one microsecond or more."""
    return math.ceil(math.log(micros) * _SCALE)


def micros_of(bucket: int) -> int:
    """The duration that stands for all of a bucket, to the microsecond."""
    return round(2 * GAMMA**bucket / (GAMMA + 1))


def cells_of(counts: Mapping[int, int]) -> list[int]:
    """A histogram, given as the count of each bucket, as it is stored."""
    return sorted([(bucket << COUNT_BITS) + count for bucket, count in counts.items()])
