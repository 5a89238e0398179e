"""How long `aiaas --help` takes, whole processes from start to exit: `python -m tests.load.command_line`, RUNS=20.

Fails where the median is above 300 ms. What it must not import is held by tests/unit/cli.
"""

import os
import statistics
import subprocess
import sys
import time

LIMIT_MS = 300
LINES = ("--help", "keys --help", "keys create --help", "--version")


def measured_ms(line: str, runs: int) -> list[float]:
    """Milliseconds of each run, the first one, which may compile, put aside."""
    taken = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        command = [sys.executable, "-m", "cli", *line.split()]
        subprocess.run(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, check=True)
        taken.append((time.perf_counter() - began) * 1000)
    return taken[1:]


def main() -> None:
    """Print a line for each command. Raises SystemExit: 1 where one is too slow."""
    runs = int(os.environ.get("RUNS", "20"))
    too_slow = False
    for line in LINES:
        taken = measured_ms(line, runs)
        median = statistics.median(taken)
        too_slow |= median > LIMIT_MS
        print(f"aiaas {line:<22}{median:6.0f} ms median, {min(taken):.0f} to {max(taken):.0f} over {runs} runs")
    sys.exit(1 if too_slow else 0)


if __name__ == "__main__":
    main()
