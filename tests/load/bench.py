"""The benchmark: every target under every test, round by round, beside a direct run to the engine; then the table.

    python -m tests.load.bench --rounds 5 --targets aiaas,nginx --tests unary,s200

A run of everything is kept in tests/load/results, any other one in .bench/results. It never changes a target.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.load.native import HERE, WORKSHOP, FakeEngine, LoadError, fake_engine, run_load
from tests.load.profiling import profile
from tests.load.report import Report, keep
from tests.load.rows import Row, median_row, row_of
from tests.load.targets import DIRECT, LOAD_CORE, TARGET_CORE, TARGETS, Target, running_targets, take_core
from tests.load.workloads import WORKLOADS, Workload

ROUNDS = 5
# What a run leaves behind (usage to count, connections to close) is worked off before the next one begins.
SETTLED_SHARE = 0.15
SETTLE_LIMIT_S = 15.0


def measure(target: Target, workload: Workload, engine: FakeEngine, direct: Row | None) -> Row:
    """One run of one test against one target, with the engine's own figures in this round beside it."""
    processes = target.pids()
    load = workload.load(target.port, target.headers, processes | {"engine": [engine.pid]})
    seen = run_load(load, LOAD_CORE)
    engine_use = seen.processes.pop("engine")
    return row_of(target, workload.name, seen, engine_use, direct)


def settle() -> None:
    """Waits until both cores are nearly idle; not for ever, as others may use the machine."""
    deadline = time.monotonic() + SETTLE_LIMIT_S
    while time.monotonic() < deadline:
        before = {core: _busy_ticks(core) for core in (LOAD_CORE, TARGET_CORE)}
        time.sleep(0.25)
        ticks = 0.25 * os.sysconf("SC_CLK_TCK")
        if all(_busy_ticks(core) - before[core] <= SETTLED_SHARE * ticks for core in before):
            return


def _busy_ticks(core: int) -> int:
    # proc_stat(5): user, nice, system, idle, iowait, irq, softirq.
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith(f"cpu{core} "):
            user, nice, system, _, _, irq, softirq = map(int, line.split()[1:8])
            return user + nice + system + irq + softirq
    return 0


def one_round(targets: dict[str, Target], workload: Workload, engine: FakeEngine, *, backwards: bool) -> Iterator[Row]:
    """Each target once under one test, after a direct run to the engine."""
    direct: Row | None = None
    others = [name for name, target in targets.items() if name != DIRECT and workload.name not in target.left_out]
    for name in (DIRECT, *(reversed(others) if backwards else others)):
        settle()
        row = measure(targets[name], workload, engine, direct)
        direct = direct or row
        yield row


def run(names: list[str], tests: list[Workload], rounds: int) -> Report:
    """Measures everything; the order of targets turns around from round to round."""
    rows: dict[tuple[str, str], list[Row]] = {}
    with fake_engine(LOAD_CORE) as engine, running_targets([DIRECT, *names], engine) as (targets, missing):
        for name, reason in missing.items():
            print(f"{name} is not measured: {reason}", file=sys.stderr)
        try:
            for number in range(1, rounds + 1):
                for workload in tests:
                    for row in one_round(targets, workload, engine, backwards=number % 2 == 0):
                        rows.setdefault((row.test, row.target), []).append(row)
                        print(_progress(number, row), file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("Interrupted: what was measured follows.", file=sys.stderr)
    left_out = {
        (test.name, name): target.left_out[test.name]
        for test in tests
        for name, target in targets.items()
        if test.name in target.left_out
    }
    return Report([median_row(measured) for measured in rows.values()], missing, left_out, rounds)


def _progress(number: int, row: Row) -> str:
    per_request = f"{row.cpu_us_per_request:.0f} us/request" if row.cpu_us_per_request and not row.chunks_per_s else ""
    per_chunk = f"{row.cpu_us_per_chunk:.1f} us/chunk" if row.cpu_us_per_chunk else ""
    return (
        f"round {number} {row.test:<12} {row.target:<18} {row.requests_per_s:>8.0f} requests/s "
        f"{row.chunks_per_s:>7.0f} chunks/s  {per_request}{per_chunk}"
        f"{f'  {row.errors} errors {row.error_sample[:160]}' if row.errors else ''}"
        f"{'  the load was the limit' if row.load_limited else ''}"
    )


def listed(text: str, known: tuple[str, ...]) -> list[str]:
    """The names in `text`, or all that are known where it has none. Raises LoadError with those that are unknown."""
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise LoadError(f"There is no {', '.join(unknown)}: choose from {', '.join(known)}.")
    return names or list(known)


def main() -> None:
    """Raises SystemExit with status 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.bench", description="The benchmark; docs/benchmark.md.")
    environ = os.environ
    parser.add_argument("--rounds", type=int, default=environ.get("ROUNDS") or ROUNDS, help="of everything (ROUNDS)")
    parser.add_argument("--targets", default=environ.get("TARGETS", ""), help=f"of {','.join(TARGETS)} (TARGETS)")
    parser.add_argument("--tests", default=environ.get("TESTS", ""), help=f"of {','.join(WORKLOADS)} (TESTS)")
    parser.add_argument("--profile", action="store_true", help="show where Python targets spend their time instead")
    arguments = parser.parse_args()
    try:
        names = [name for name in listed(arguments.targets, TARGETS) if name != DIRECT]
        tests = [WORKLOADS[name] for name in listed(arguments.tests, tuple(WORKLOADS))]
        take_core()
        if arguments.profile:
            with fake_engine(LOAD_CORE) as engine, running_targets(names, engine) as (targets, _):
                for target in targets.values():
                    for workload in tests:
                        print(profile(target, workload))
            return
        report = run(names, tests, arguments.rounds)
    except LoadError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    everything = not arguments.targets and not arguments.tests
    print(keep(report, HERE / "results" if everything else WORKSHOP / "results"))


if __name__ == "__main__":
    main()
