"""Rounds become one row, the bar is judged line by line, and what was not measured is said."""

from __future__ import annotations

import msgspec
import pytest

from tests.load.bar import judge
from tests.load.guard import ratios
from tests.load.native import Measurement, ProcessUse, Spread
from tests.load.report import Report, markdown
from tests.load.rows import Percentiles, Row, median_row, row_of
from tests.load.targets import ONE_PROCESS, TWO_PROCESSES, Target

NOTHING = Spread(0, 0, 0, 0, 0)
IDLE = ProcessUse(0.0, 0.0, 0)


def seen(**changes: object) -> Measurement:
    measurement = Measurement(
        window_s=2.0,
        requests=1000,
        chunks=0,
        bytes=0,
        refused=0,
        broken=0,
        timed_out=0,
        unsent=0,
        slow_cut=0,
        stall_ms=0.0,
        latency_ms=Spread(1000, 3.0, 4.0, 6.0, 9.0),
        ttfb_ms=NOTHING,
        lag_ms=NOTHING,
        slow_lag_ms=NOTHING,
        late_ms=NOTHING,
        generator_cpu=0.1,
        generator_share=0.2,
        generator_limits=False,
        error_sample="",
        processes={
            "edge": ProcessUse(0.1, 0.0, 60 << 20),
            "router": ProcessUse(0.2, 0.0, 40 << 20),
            "valkey": ProcessUse(0.05, 0.0, 10 << 20),
        },
    )
    return msgspec.structs.replace(measurement, **changes)


def target(name: str = TWO_PROCESSES) -> Target:
    return Target(name=name, port=1, pids=dict, counted=("edge", "router"))


def row(name: str, test: str, **changes: object) -> Row:
    made = row_of(target(name), test, seen(), IDLE, None)
    return msgspec.structs.replace(made, **changes)


def test_a_targets_price_is_the_cpu_of_its_own_processes_a_request() -> None:
    made = row("aiaas", "unary")
    assert made.cpu_us_per_request == pytest.approx(300)
    assert made.requests_per_s == 500
    assert round(made.requests_per_s_per_core) == 3333
    assert made.rss_mb == 100
    assert made.core_share == pytest.approx(0.15)
    assert {name: round(value) for name, value in made.split_us.items()} == {"edge": 100, "router": 200, "valkey": 50}


def test_added_is_what_lies_above_a_direct_run_of_the_same_round() -> None:
    direct = row("direct", "latency", latency_ms=Percentiles(1.0, 2.0))
    made = row_of(target(), "latency", seen(), IDLE, direct)
    assert made.latency_ms == Percentiles(3.0, 6.0, 2.0, 4.0)


def test_an_engine_that_could_do_no_more_is_told_as_the_limit() -> None:
    assert not row_of(target(), "unary", seen(), ProcessUse(1.0, 0.2, 0), None).load_limited
    assert row_of(target(), "unary", seen(), ProcessUse(1.0, 0.9, 0), None).load_limited
    assert row_of(target(), "unary", seen(generator_limits=True), IDLE, None).load_limited


def test_of_several_rounds_the_middle_counts_but_every_error_and_the_longest_stall() -> None:
    rows = [
        row("aiaas", "s200", cpu_us_per_chunk=cost, stall_ms=stall, errors=errors, load_limited=limited)
        for cost, stall, errors, limited in ((20.0, 30.0, 0, False), (90.0, 900.0, 2, False), (25.0, 20.0, 1, True))
    ]
    made = median_row(rows)
    assert (made.cpu_us_per_chunk, made.stall_ms, made.errors, made.load_limited, made.rounds) == (25, 900, 3, True, 3)


def test_each_line_of_the_bar_is_met_missed_or_not_judged() -> None:
    rows = [
        row(TWO_PROCESSES, "unary", requests_per_s_per_core=6000.0),
        row("litellm", "unary", requests_per_s_per_core=100.0),
        row("smg", "unary", requests_per_s_per_core=16000.0),
        row(TWO_PROCESSES, "s200", cpu_us_per_chunk=50.0),
        row("vllm-router", "s200", cpu_us_per_chunk=25.0),
        row(TWO_PROCESSES, "s1000", stall_ms=1000.5, rss_mb=200.0),
        row(TWO_PROCESSES, "latency", latency_ms=Percentiles(3.0, 9.0, 2.5, 5.1)),
    ]
    verdicts = {
        line.wanted.partition(", at")[0].removeprefix(f"{TWO_PROCESSES}: "): line.met
        for line in judge(rows)
        if line.wanted.startswith(f"{TWO_PROCESSES}: ")
    }
    assert verdicts == {
        "requests/s a core, beside LiteLLM's": True,
        "requests/s a core, beside SMG's": False,
        "CPU a chunk at 200 streams, beside vLLM Router's": True,
        "CPU a chunk at 1,000 streams, level with vLLM Router's": None,
        "chunks/s on one core": None,
        "latency added at 100/s, p50": True,
        "latency added at 100/s, p99": False,
        "TTFB added at 50 streams, p50": None,
        "longest stall of 1,000 streams": False,
        "errors of 1,000 streams": True,
        "memory with 1,000 streams": True,
    }


def test_a_target_that_answered_nothing_misses_its_line() -> None:
    rows = [row(ONE_PROCESS, "s200", cpu_us_per_chunk=None), row("vllm-router", "s200", cpu_us_per_chunk=25.0)]
    (line,) = [line for line in judge(rows) if "200 streams" in line.wanted and line.wanted.startswith(ONE_PROCESS)]
    assert (line.found, line.met) == ("nothing was answered", False)


def test_the_table_says_what_was_not_measured_and_why() -> None:
    text = markdown(
        Report(
            [row("aiaas", "unary")],
            missing={"envoy": "pip failed"},
            left_out={("unary", "litellm"): "it takes minutes"},
            rounds=1,
        )
    )
    assert "| envoy | **not measured**: pip failed |" in text
    assert "| litellm | not run: it takes minutes |" in text
    assert "| aiaas | 500 | 3,333 | 300.0 |" in text


def test_the_guard_takes_the_middle_of_the_ratios_of_each_round() -> None:
    base = [row("aiaas", "s200", cpu_us_per_chunk=cost, rss_mb=100.0) for cost in (20.0, 40.0, 20.0)]
    ours = [row("aiaas", "s200", cpu_us_per_chunk=cost, rss_mb=120.0) for cost in (22.0, 44.0, 90.0)]
    found = ratios(base, ours, "s200")
    assert found == pytest.approx({"cpu_us_per_chunk": 1.1, "rss_mb": 1.2})


def test_the_guard_makes_no_ratio_of_what_was_not_answered() -> None:
    base = [row("aiaas", "s200", cpu_us_per_chunk=cost) for cost in (20.0, 20.0)]
    ours = [row("aiaas", "s200", cpu_us_per_chunk=cost) for cost in (20.0, None)]
    assert ratios(base, ours, "s200")["cpu_us_per_chunk"] is None
