"""What is read off an engine's metrics, and how far counters moved between two readings, restarts understood."""

from datetime import UTC, datetime, timedelta

import pytest

from router.engine_tokens import Counters, Reading, Window, read_counters, window_between

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
STARTED = NOW.timestamp() - 3600

# As vLLM 0.32 writes them, with two engines of a data parallel group and what only begins like a counter.
VLLM = b"""# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="a } b"} 1200.0
vllm:prompt_tokens_total{engine="1",model_name="a } b"} 34.0
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.7e+09
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 999.0
vllm:prompt_tokens_cached_total{engine="0",model_name="m"} 48.0
vllm:request_prompt_tokens_sum{engine="0",model_name="m"} 999.0
vllm:generation_tokens_total{engine="0",model_name="m"} 1.5e+06
process_start_time_seconds 1.76363e+09
"""
LLAMACPP = b"""# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 70
llamacpp:prompt_tokens_cached_total 30
llamacpp:tokens_predicted_total 11
llamacpp:tokens_predicted_seconds_total 0.5
"""


def reading(
    prompt: int,
    cached: int = 0,
    completion: int = 0,
    *,
    start: float | None = STARTED,
    url: str = "u",
    after_s: int = 0,
) -> Reading:
    return Reading(url, NOW + timedelta(seconds=after_s), Counters(start, prompt, cached, completion))


def moved(before: Reading | None, after: Reading) -> tuple[int, int, int, bool]:
    window = window_between("b", before, after)
    assert window is not None
    return window.prompt_tokens, window.cached_prompt_tokens, window.completion_tokens, window.reset


def test_vllms_counters_are_summed_over_its_engines() -> None:
    assert read_counters(VLLM) == Counters(1.76363e9, 1234, 48, 1_500_000)


def test_llamacpps_prompt_tokens_hold_the_cached_ones_as_well() -> None:
    assert read_counters(LLAMACPP) == Counters(None, 100, 30, 11)


@pytest.mark.parametrize("body", [b"", b"<html>", b"vllm:prompt_tokens_total ...\nvllm:generation_tokens_total e\n"])
def test_what_is_no_counter_is_none(body: bytes) -> None:
    assert read_counters(body) is None


def test_the_first_reading_is_only_what_the_next_is_compared_with() -> None:
    assert window_between("b", None, reading(500)) is None


def test_a_window_is_how_far_counters_moved() -> None:
    window = window_between("b", reading(500, 50, 7), reading(620, 90, 9, after_s=10))
    assert window == Window("b", NOW, NOW + timedelta(seconds=10), 120, 40, 2, reset=False)


@pytest.mark.parametrize(
    ("after", "counts"),
    [
        # Each counter may be the one that gives the restart away.
        (reading(3, 60, 8, after_s=10), (3, 60, 8, True)),
        (reading(600, 1, 8, after_s=10), (600, 1, 8, True)),
        (reading(600, 60, 2, after_s=10), (600, 60, 2, True)),
        # It counted beyond what it had before, and only its start tells.
        (reading(900, 70, 9, start=STARTED + 3605, after_s=10), (900, 70, 9, True)),
        # Neither tells: nothing says that it restarted.
        (reading(600, 60, 8, start=None, after_s=10), (100, 10, 1, False)),
    ],
)
def test_a_restart_counts_from_zero(after: Reading, counts: tuple[int, int, int, bool]) -> None:
    assert moved(reading(500, 50, 7), after) == counts


def test_another_engine_at_another_address_counts_from_zero_unless_it_ran_before() -> None:
    assert moved(reading(500), reading(900, url="v", start=STARTED + 3605, after_s=10)) == (900, 0, 0, True)
    assert moved(reading(500, start=None), reading(900, url="v", start=None, after_s=10)) == (900, 0, 0, True)
    assert moved(reading(500), reading(900, url="v", start=STARTED - 1, after_s=10)) == (0, 0, 0, True)


def test_a_clock_that_is_behind_makes_a_short_window_and_none_that_ends_before_it_begins() -> None:
    window = window_between("b", reading(500), reading(510, after_s=-3))
    assert window is not None
    assert window.start_time == NOW < window.end_time
    assert window.prompt_tokens == 10
