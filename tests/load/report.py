"""Results as a table for people and as rows for programs; it never measures."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tests.load.bar import judge
from tests.load.native import CHECKOUT
from tests.load.peers import PEERS
from tests.load.rows import Row
from tests.load.targets import DIRECT, ONE_PROCESS, TWO_PROCESSES
from tests.load.workloads import WORKLOADS

DOES = {
    DIRECT: "the fake engine itself, on the load's core",
    TWO_PROCESSES: "edge and router; authentication, limits, usage, metrics, access log, traces at 1 %",
    ONE_PROCESS: "edge and router in one process; the same",
} | {name: peer.does for name, peer in PEERS.items()}


@dataclass(frozen=True)
class Report:
    """What a run found."""

    rows: Sequence[Row]
    # Targets that were not measured, and why; tests that were left out for a target, and why.
    missing: dict[str, str]
    left_out: dict[tuple[str, str], str]
    rounds: int


def keep(report: Report, folder: Path) -> str:
    """Writes latest.md and latest.jsonl into the folder; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(report)
    (folder / "latest.md").write_text(text)
    encoder = msgspec.json.Encoder()
    (folder / "latest.jsonl").write_bytes(b"".join(encoder.encode(row) + b"\n" for row in report.rows))
    return text


def markdown(report: Report) -> str:
    """The whole report."""
    parts = ["# Benchmark\n", _circumstances(report)]
    for test in dict.fromkeys(row.test for row in report.rows):
        parts.append(f"\n## {test}: {WORKLOADS[test].meaning}\n")
        parts.append(_table([row for row in report.rows if row.test == test], report, test))
    parts.append("\n## The bar\n")
    parts.append(_bar(report))
    return "\n".join(parts) + "\n"


def _circumstances(report: Report) -> str:
    lines = [
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, commit {_commit()}, Python {platform.python_version()}, "
        f"{_processor()}, load {os.getloadavg()[2]:.1f} over 15 minutes. Medians of {report.rounds} interleaved "
        "rounds. Targets have core 1, everything else core 0. How, and what it cannot tell: docs/benchmark.md.",
        "",
        "| target | what it does |",
        "| --- | --- |",
    ]
    names = dict.fromkeys(row.target for row in report.rows)
    lines += [f"| {name} | {DOES[name]} |" for name in names]
    lines += [f"| {name} | **not measured**: {reason} |" for name, reason in report.missing.items()]
    return "\n".join(lines)


def _table(rows: Sequence[Row], report: Report, test: str) -> str:
    streams = WORKLOADS[test].stream
    titles = ["target", "requests/s", "a core", "us CPU a request"]
    if streams:
        titles = ["target", "chunks/s", "us CPU a chunk"]
    titles += ["latency p50 / p99 ms"] if not streams else ["TTFB p50 / p99 ms", "chunk lag p50 / p99 ms", "stall ms"]
    titles += ["core used", "RSS MB", "by process, us", "errors", "load"]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for row in rows:
        if streams:
            cells = [f"{row.chunks_per_s:,.0f}", _number(row.cpu_us_per_chunk, 1)]
            cells += [_times(row, "ttfb_ms"), _times(row, "lag_ms"), f"{row.stall_ms:,.0f}"]
        else:
            cells = [f"{row.requests_per_s:,.0f}", f"{row.requests_per_s_per_core:,.0f}"]
            cells += [_number(row.cpu_us_per_request, 1), _times(row, "latency_ms")]
        split = (
            ", ".join(f"{name} {value:.1f}" for name, value in row.split_us.items()) if len(row.split_us) > 1 else ""
        )
        limit = " **limit**" if row.load_limited else ""
        cells += [f"{row.core_share:.0%}", f"{row.rss_mb:.0f}", split, str(row.errors)]
        cells += [f"{row.generator_share:.0%} + {row.engine_share:.0%}{limit}"]
        lines.append(f"| {row.target} | " + " | ".join(cells) + " |")
    for (left_test, name), reason in report.left_out.items():
        if left_test == test:
            lines.append(f"| {name} | not run: {reason} |" + " |" * (len(titles) - 2))
    return "\n".join(lines)


def _times(row: Row, name: str) -> str:
    times = getattr(row, name)
    text = f"{times.p50:.2f} / {times.p99:.2f}"
    if times.added_p50 is not None and row.target != DIRECT:
        text += f" (added {times.added_p50:+.2f} / {times.added_p99:+.2f})"
    return text


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _bar(report: Report) -> str:
    lines = ["| wanted | found | |", "| --- | --- | --- |"]
    for line in judge(report.rows):
        verdict = {True: "met", False: "**missed**", None: "not judged"}[line.met]
        lines.append(f"| {line.wanted} | {line.found} | {verdict} |")
    return "\n".join(lines)


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if git("status", "--short") else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{os.cpu_count()} cores of {line.partition(': ')[2].strip()}"
    return f"{os.cpu_count()} cores ({sys.platform})"
