"""What telemetry costs: two platforms side by side, one with metrics, traces at 1 %, access log and scrapes, one with
none of it, measured on, off, off, on; it never changes the platform.

    ROUNDS=6 TESTS=unary,s200 TARGETS=aiaas WITHOUT=metrics,traces,log python -m tests.load.telemetry

Fails where more than 5 % of what a core can do is lost, by the median over the rounds. WITHOUT names what the other
side lacks, to find out what one of them costs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence

from tests.load.bench import listed, measure, settle
from tests.load.native import CHECKOUT, HERE, FakeEngine, LoadError, fake_engine, probe
from tests.load.rows import Row
from tests.load.targets import LOAD_CORE, ONE_PROCESS, TWO_PROCESSES, Platform, running_platform, take_core
from tests.load.verdict import Verdict
from tests.load.workloads import WORKLOADS, Workload

ROUNDS = 6
TESTS = "unary,s200"
MOST_LOST = 0.05
ON, OFF = "on", "off"
# Drift of the machine falls on both alike.
ORDER = (ON, OFF, OFF, ON)
# What takes each of them away.
WITHOUT = {
    "metrics": {"PYTHONPATH": f"{HERE / 'unmeasured'}:{CHECKOUT}:{CHECKOUT / 'gen' / 'python'}"},
    "traces": {"AIAAS_OTLP_ENDPOINT": ""},
    "log": {"AIAAS_LOG_LEVEL": "WARNING"},
}


def metrics(address: str) -> str:
    """What a process tells Prometheus."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def addresses(platform: Platform, name: str) -> tuple[str, ...]:
    """Where the processes of a target tell their metrics."""
    front = f"127.0.0.1:{platform.targets()[name].port}"
    return (front, platform.router_ops) if name == TWO_PROCESSES else (front,)


def counts(address: str) -> bool:
    """Whether requests are counted there."""
    return any(
        line.startswith(("aiaas_edge_requests_total{", "aiaas_router_requests_total{")) and not line.endswith(" 0.0")
        for line in metrics(address).splitlines()
    )


@contextlib.contextmanager
def scraped(addresses: Sequence[str], every_s: float) -> Iterator[None]:
    """Asks for metrics until the end of the block, as Prometheus does."""
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(every_s):
            for address in addresses:
                metrics(address)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def one_round(platforms: dict[str, Platform], name: str, test: Workload, engine: FakeEngine) -> dict[str, list[Row]]:
    """Two rows of each side."""
    rows: dict[str, list[Row]] = {ON: [], OFF: []}
    for side in ORDER:
        target = platforms[side].targets()[name]
        settle()
        # Once in each window, so more often than the usual 15 s.
        scraping = scraped(addresses(platforms[side], name), test.window_s)
        with scraping if side == ON else contextlib.nullcontext():
            rows[side].append(measure(target, test, engine, None))
    return rows


def work_per_cpu_s(rows: Sequence[Row]) -> float:
    """Requests, or of streams chunks, that a second of the target's CPU does."""
    costs = [row.cpu_us_per_chunk if row.chunks_per_s else row.cpu_us_per_request for row in rows]
    if not all(costs):
        raise LoadError("Nothing was answered.")
    return 1e6 / statistics.mean(cost for cost in costs if cost)


def judge(name: str, test: str, rounds: list[dict[str, list[Row]]], verdict: Verdict) -> None:
    """The lines of one test: what either side did, and their ratio."""
    for side in (ON, OFF):
        rows = [row for one in rounds for row in one[side]]
        done = statistics.median(row.chunks_per_s or row.requests_per_s for row in rows)
        cost_us = 1e6 / statistics.median(work_per_cpu_s(one[side]) for one in rounds)
        what = "chunk" if rows[0].chunks_per_s else "request"
        errors = sum(row.errors for row in rows)
        text = f"{done:,.0f} {what}s/s, {cost_us:.1f} us CPU a {what}, {1e6 / cost_us:,.0f} a CPU second"
        verdict.line(f"{name}, {test}, telemetry {side}", f"{text}, {errors} errors", errors == 0)
    ratios = [work_per_cpu_s(one[ON]) / work_per_cpu_s(one[OFF]) for one in rounds]
    ratio = statistics.median(ratios)
    each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    deviation = f", standard deviation {statistics.stdev(ratios):.3f}" if len(ratios) > 1 else ""
    verdict.line(
        f"{name}, {test}, work a CPU second: on / off, at least {1 - MOST_LOST:.2f}",
        f"{ratio:.3f} (rounds {each}{deviation})",
        ratio >= 1 - MOST_LOST,
    )


def run(names: list[str], tests: list[str], rounds: int, without: list[str], verdict: Verdict) -> None:
    """Measures all and prints the lines. Raises LoadError where a side is not as it should be."""
    lacking = {name: value for what in without for name, value in WITHOUT[what].items()}
    with (
        fake_engine(LOAD_CORE) as engine,
        running_platform(engine.port) as on,
        running_platform(engine.port, settings=lacking) as off,
    ):
        platforms = {ON: on, OFF: off}
        for name in names:
            for side, platform in platforms.items():
                target = platform.targets()[name]
                probe(target.port, target.headers)
                counted = side == ON or "metrics" not in without
                if any(counts(address) != counted for address in addresses(platform, name)):
                    raise LoadError(f"Metrics of {name} are not {side}.")
        print("| telemetry | found | |\n| --- | --- | --- |", flush=True)
        for name in names:
            for test in tests:
                judge(name, test, [one_round(platforms, name, WORKLOADS[test], engine) for _ in range(rounds)], verdict)
    for side, platform in platforms.items():
        spans = sum(platform.spans)
        traced = side == ON or "traces" not in without
        verdict.line(f"spans that the collector got, telemetry {side}", f"{spans:,}", (spans > 0) == traced)


def main() -> None:
    """Raises SystemExit: 0 when telemetry costs little enough, 1 when not, 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.telemetry", description="What telemetry costs.")
    environ = os.environ
    parser.add_argument("--rounds", type=int, default=environ.get("ROUNDS") or ROUNDS, help="of four runs (ROUNDS)")
    parser.add_argument("--targets", default=environ.get("TARGETS") or TWO_PROCESSES, help="of ours (TARGETS)")
    parser.add_argument("--tests", default=environ.get("TESTS") or TESTS, help=f"of {','.join(WORKLOADS)} (TESTS)")
    everything = ",".join(WITHOUT)
    parser.add_argument("--without", default=environ.get("WITHOUT") or everything, help=f"of {everything} (WITHOUT)")
    arguments = parser.parse_args()
    verdict = Verdict()
    try:
        take_core()
        without = listed(arguments.without, tuple(WITHOUT))
        tests = listed(arguments.tests, tuple(WORKLOADS))
        names = listed(arguments.targets, (TWO_PROCESSES, ONE_PROCESS))
        run(names, tests, arguments.rounds, without, verdict)
    except LoadError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if verdict.met else 1)


if __name__ == "__main__":
    main()
