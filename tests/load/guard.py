"""Holds this checkout against an older commit: both platforms side by side, round by round, and the ratios of what
they cost; it never changes the checkout.

By hand and before a release: a machine that others use is too noisy to refuse a change by it.

    BASE=v0.1.0 python -m tests.load.guard
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from tests.load.bench import measure, settle
from tests.load.native import CHECKOUT, LoadError, fake_engine, probe
from tests.load.rows import Row
from tests.load.targets import LOAD_CORE, running_platform, take_core
from tests.load.workloads import WORKLOADS

BASE = "HEAD~1"
ROUNDS = 5
TESTS = "unary,latency,ttfb,s200,s1000"
MOST = 1.15
# What is compared of each test; the far percentiles differ from run to run by more than a change does.
FIGURES = {
    "unary": ("cpu_us_per_request", "rss_mb"),
    "latency": ("cpu_us_per_request", "latency_ms.p50"),
    "ttfb": ("ttfb_ms.p50",),
}
FIGURES_OF_STREAMS = ("cpu_us_per_chunk", "rss_mb")


@contextlib.contextmanager
def tree_of(reference: str) -> Iterator[Path]:
    """The files of a commit in a folder that everybody may read, until the end of the block.

    Raises LoadError if there is no such commit.
    """
    done = subprocess.run(["git", "archive", reference], cwd=CHECKOUT, capture_output=True, check=False)
    if done.returncode:
        raise LoadError(f"There is no {reference}: {done.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory(prefix="aiaas-base-") as folder:
        Path(folder).chmod(0o755)
        subprocess.run(["tar", "-x", "-C", folder], input=done.stdout, check=True)
        yield Path(folder)


def ratios(base: list[Row], ours: list[Row], test: str) -> dict[str, float | None]:
    """The median over the rounds of ours / base, by figure; None where a side answered nothing in a round."""
    found: dict[str, float | None] = {}
    for name in FIGURES.get(test, FIGURES_OF_STREAMS):
        pairs = [(attrgetter(name)(old), attrgetter(name)(new)) for old, new in zip(base, ours, strict=True)]
        found[name] = statistics.median(new / old for old, new in pairs) if all(map(all, pairs)) else None
    return found


def run(reference: str, tests: list[str], rounds: int) -> bool:
    """Measures both, prints the table, and tells whether nothing is worse than it may be."""
    rows: dict[tuple[str, str], tuple[list[Row], list[Row]]] = {}
    with (
        fake_engine(LOAD_CORE) as engine,
        tree_of(reference) as tree,
        running_platform(engine.port, tree) as old,
        running_platform(engine.port) as new,
    ):
        sides = (old.targets(), new.targets())
        names = sorted(sides[0].keys() & sides[1].keys())
        for targets, whose in zip(sides, (reference, "this checkout"), strict=True):
            for name in names:
                try:
                    probe(targets[name].port, targets[name].headers)
                except LoadError as error:
                    raise LoadError(f"{name} of {whose}: {error}") from error
        for number in range(rounds):
            for test in tests:
                for name in names:
                    both = rows.setdefault((test, name), ([], []))
                    for side in (0, 1) if number % 2 else (1, 0):
                        settle()
                        both[side].append(measure(sides[side][name], WORKLOADS[test], engine, None))
    print(f"\n| test | target | figure | {reference} | now | ratio | |\n|" + " --- |" * 7)
    good = True
    for (test, name), (base, ours) in rows.items():
        errors = sum(row.errors for row in ours)
        if errors:
            good = False
            print(f"| {test} | {name} | errors | {sum(row.errors for row in base)} | {errors} | | **failed** |")
        found = ratios(base, ours, test)
        for figure, ratio in found.items():
            if ratio is None:
                good = False
                print(f"| {test} | {name} | {figure} | | | | **nothing was answered** |")
                continue
            before, now = (statistics.median(map(attrgetter(figure), rows)) for rows in (base, ours))
            worse = ratio > MOST
            good = good and not worse
            print(f"| {test} | {name} | {figure} | {before:.2f} | {now:.2f} | {ratio:.2f} | {'**worse**' * worse} |")
    return good


def main() -> None:
    """Raises SystemExit: 0 when nothing is worse, 1 when something is, 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.guard", description="Compares with an older commit.")
    environ = os.environ
    parser.add_argument("--base", default=environ.get("BASE") or BASE, help=f"the commit (BASE, {BASE})")
    parser.add_argument("--rounds", type=int, default=environ.get("ROUNDS") or ROUNDS, help="of everything (ROUNDS)")
    parser.add_argument("--tests", default=environ.get("TESTS") or TESTS, help=f"of {','.join(WORKLOADS)} (TESTS)")
    arguments = parser.parse_args()
    try:
        take_core()
        good = run(arguments.base, arguments.tests.split(","), arguments.rounds)
    except LoadError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
