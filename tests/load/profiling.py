"""Where a Python target spends its time under a load, by py-spy; never a measurement, as sampling costs time itself.

python -m tests.load.bench --profile --targets aiaas --tests unary
"""

from __future__ import annotations

import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.load.native import WORKSHOP, run_load
from tests.load.peers import installed
from tests.load.targets import LOAD_CORE, Target
from tests.load.workloads import Workload

PACKAGE = "py-spy==0.4.3"
SAMPLES_PER_S = 250
LINES = 30


def profile(target: Target, workload: Workload) -> str:
    """A table for each process that counts: functions by their own share, and by their share with all they call.

    The stacks are kept in .bench/profile, one a line with its count, as flame graph tools read them.
    """
    spy = installed(PACKAGE, "py-spy", WORKSHOP / "py-spy")
    folder = WORKSHOP / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    load = workload.load(target.port, target.headers, {})
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run_load, load, LOAD_CORE)
        recordings = {
            folder / f"{target.name}-{workload.name}-{name}-{pid}.txt": pid
            for name, pids in target.pids().items()
            if name in target.counted
            for pid in pids
        }
        list(
            pool.map(
                lambda path: _record(spy, recordings[path], path, round(workload.warm_s + workload.window_s)),
                recordings,
            )
        )
        running.result()
    return "\n".join(
        f"\n## {path.stem}\n\n{_table(path.read_text()) if path.exists() else 'not a Python process'}"
        for path in recordings
    )


def _record(spy: str, pid: int, path: Path, seconds: int) -> None:
    path.unlink(missing_ok=True)
    subprocess.run(
        [
            *(spy, "record", "--pid", str(pid), "--duration", str(seconds), "--rate", str(SAMPLES_PER_S)),
            # Only who holds the interpreter: threads that wait look busy from outside.
            *("--gil", "--function", "--format", "raw", "--output", str(path)),
        ],
        capture_output=True,
        check=False,
    )


def _table(stacks: str) -> str:
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    total = 0
    for line in stacks.splitlines():
        frames, _, count = line.rpartition(" ")
        names = frames.split(";")
        total += int(count)
        own[names[-1]] += int(count)
        for name in set(names):
            whole[name] += int(count)
    lines = ["| own | with callees | function |", "| --- | --- | --- |"]
    lines += [f"| {count / total:.1%} | {whole[name] / total:.1%} | {name} |" for name, count in own.most_common(LINES)]
    lines += ["", "| with callees | own | function |", "| --- | --- | --- |"]
    lines += [f"| {count / total:.1%} | {own[name] / total:.1%} | {name} |" for name, count in whole.most_common(LINES)]
    return "\n".join(lines)
