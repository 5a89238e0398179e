"""Kills every part of the platform while money moves, and holds all books against each other.

    LINES=router,redis LONG=1 SEED=7 WITHOUT=journal python -m tests.money
    WITHOUT=journal,fence python -m tests.money switches

Prints a table and ends with status 1 if a line is missed; of switches, if taking away a protection is not noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import sys
import time

from deploy.local.errors import LocalError
from tests.load.native import LoadError
from tests.money import kills, outages
from tests.money.kills import Matrix, MissedError, matrix_on
from tests.money.platform import running_platform
from tests.money.without import SWITCHES

LINES = kills.LINES | outages.LINES


async def run(names: list[str], without: str, seed: int, *, is_brief: bool = False) -> list[str]:
    """Runs some lines; what was missed."""
    print(f"| seed {seed}{f', without {without}' if without else ''} | found | |\n| --- | --- | --- |", flush=True)
    async with running_platform(without) as platform, matrix_on(platform, seed, is_brief=is_brief) as matrix:
        with contextlib.suppress(MissedError):
            await run_lines(names, matrix)
        return matrix.verdict.missed


async def run_lines(names: list[str], matrix: Matrix) -> None:
    """Runs some lines. Raises MissedError where one miss is enough."""
    verdict, sampler = matrix.verdict, matrix.platform.sampler
    began = time.monotonic()
    for name in names:
        line_began = time.monotonic()
        try:
            await LINES[name](matrix)
        except (TimeoutError, AssertionError, LocalError, OSError) as error:
            verdict.line(f"{name}: could not go on", repr(error)[:200], met=False)
        verdict.line(f"{name} took", f"{time.monotonic() - line_began:.0f} s")
    verdict.line(
        f"spent + leased of every hard budget, {sampler.looks:,} times looked",
        f"at least {sampler.least:,} left" if sampler.least is not None else "there was none",
        sampler.least is not None and sampler.least >= 0,
    )
    verdict.line("all took", f"{time.monotonic() - began:.0f} s")


def run_switches(names: list[str], seed: int) -> bool:
    """Takes away one protection after the other; whether each was missed by the line that looks for it."""
    print("| without | line | what was missed |\n| --- | --- | --- |", flush=True)
    all_missed = True
    for name in names:
        line = SWITCHES[name].line
        with contextlib.redirect_stdout(io.StringIO()):
            missed = asyncio.run(run([line], name, seed, is_brief=True))
        all_missed = all_missed and bool(missed)
        print(f"| {name} | {line} | {missed[0] if missed else '**nothing**'} |", flush=True)
    return all_missed


def main() -> None:
    """Raises SystemExit: 0 when every line is met, 1 when one is missed, 2 when it cannot run."""
    lines, switches = (
        [name for name in os.environ.get(variable, "").split(",") if name] for variable in ("LINES", "WITHOUT")
    )
    if set(lines) - LINES.keys() or set(switches) - SWITCHES.keys():
        print(f"LINES are some of {','.join(LINES)}; WITHOUT is one of {','.join(SWITCHES)}.", file=sys.stderr)
        sys.exit(2)
    seed = int(os.environ.get("SEED") or time.time())
    try:
        if sys.argv[1:] == ["switches"]:
            is_met = run_switches(switches or list(SWITCHES), seed)
        else:
            is_met = not asyncio.run(run(lines or list(LINES), "".join(switches[:1]), seed))
    except (LocalError, LoadError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if is_met else 1)


if __name__ == "__main__":
    main()
