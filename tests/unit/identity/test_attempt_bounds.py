"""How many attempts that changed nothing are recorded."""

from identity.attempts import AttemptBounds
from tests.doubles.clock import ManualClock


def test_caller_has_a_burst_and_then_a_trickle_and_takes_nothing_from_others() -> None:
    clock = ManualClock()
    bounds = AttemptBounds(clock)
    assert sum(bounds.admits("one") for _ in range(100)) == 20
    assert bounds.admits("other")
    clock.advance(60)
    assert sum(bounds.admits("one") for _ in range(100)) == 10


def test_many_callers_together_are_bounded() -> None:
    clock = ManualClock()
    bounds = AttemptBounds(clock)
    assert sum(bounds.admits(str(number)) for number in range(20_000)) == 200
    clock.advance(1)
    assert sum(bounds.admits(str(number)) for number in range(20_000, 20_100)) == 10
