"""Measures what requests, chunks and batches cost each process, and holds what the model of deploy/capacity says of
other loads against a run of them; it never changes the platform.

    ROUNDS=2 python -m tests.load.capacity     # loads, costs from them, then two loads that they were not made from
    python -m tests.load.capacity costs        # deploy/capacity/costs.json from the rows that are kept

Fails where the CPU of edge and router together is more than 20 % off what was predicted before the run. The
rows are kept in .bench/results; with KEEP=1 in tests/load/results, where `costs` reads them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from deploy.capacity.costs import PARTS, Cost, Costs, Traffic
from tests.load.bench import settle
from tests.load.native import CHECKOUT, HERE, WORKSHOP, LoadError, fake_engine, probe, run_load
from tests.load.targets import LOAD_CORE, TWO_PROCESSES, Platform, running_platform, take_core
from tests.load.verdict import Verdict
from tests.load.workloads import Workload

ROUNDS = 2
MOST_OFF = 0.2
REST_S = 5.0
KEYS = 150
KEPT = HERE / "results" / "capacity.jsonl"
COSTS = CHECKOUT / "deploy" / "capacity" / "costs.json"
# In PostgreSQL, by `make bench-usage`: bytes of a usage event with its indexes.
EVENT_BYTES = 1190.0


def _unary(rate: float) -> Workload:
    return Workload(name=f"u{rate:g}", meaning="whole answers", stream=False, connections=64, rate=rate, window_s=5)


def _streams(count: int, pace_ms: int) -> Workload:
    stream_s = 200 * pace_ms / 1000
    return Workload(
        name=f"s{count}-{pace_ms}ms",
        meaning="streams of 200 tokens",
        connections=count,
        pace_ms=pace_ms,
        spread_s=stream_s,
        warm_s=stream_s + 0.5,
    )


CALIBRATED = (_unary(100), _unary(300), _unary(900), _streams(50, 20), _streams(200, 20), _streams(500, 40))
HELD_OUT = (_unary(600), _streams(500, 25))


class LoadRow(msgspec.Struct, frozen=True):
    """One load; at rest everything but the cores is 0."""

    test: str
    requests_per_s: float
    chunks_per_s: float
    lookups_per_s: float
    connections: int
    bytes_per_s: float
    # By part, and of edge and router together.
    cores: dict[str, float]
    rss_bytes: int
    errors: int
    date: str = msgspec.field(default_factory=lambda: time.strftime("%Y-%m-%d", time.gmtime()))

    @property
    def traffic(self) -> Traffic:
        """What the model is told of it."""
        return Traffic.of(self.requests_per_s, self.chunks_per_s, lookups=self.lookups_per_s)


def cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds of all threads of processes that live."""
    total_ns = 0
    for pid in pids:
        for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            total_ns += int(file.read_text().split()[0])
    return total_ns / 1e9


def processes(platform: Platform) -> dict[str, list[int]]:
    """Those of all parts; edge and router have their core."""
    platform.targets()[TWO_PROCESSES].pids()
    return {part: platform.pids(part) for part in PARTS}


def loaded(platform: Platform, load: Workload) -> LoadRow:
    """One run of a load."""
    settle()
    target = platform.targets()[TWO_PROCESSES]
    seen = run_load(load.load(target.port, target.headers, processes(platform)), LOAD_CORE)
    return LoadRow(
        load.name,
        seen.requests / seen.window_s,
        seen.chunks / seen.window_s,
        0.0,
        load.connections,
        seen.bytes / seen.window_s,
        {part: use.cpu_s / seen.window_s for part, use in seen.processes.items()},
        sum(seen.processes[part].rss_bytes for part in ("edge", "router")),
        seen.errors,
    )


def rest(platform: Platform) -> LoadRow:
    """What everything takes when nothing is asked."""
    settle()
    pids = processes(platform)
    before = {part: cpu_s(found) for part, found in pids.items()}
    time.sleep(REST_S)
    cores = {part: (cpu_s(found) - before[part]) / REST_S for part, found in pids.items()}
    return LoadRow("rest", 0, 0, 0, 0, 0, cores, 0, 0)


def lookups(platform: Platform) -> LoadRow:
    """One request of each of many keys that nobody knows yet."""
    secrets = [_new_key(platform) for _ in range(KEYS)]
    settle()
    pids = processes(platform)
    before, began = {part: cpu_s(found) for part, found in pids.items()}, time.monotonic()
    for secret in secrets:
        probe(platform.port, (f"Authorization: Bearer {secret}",))
    # Until the usage is counted, too.
    time.sleep(1)
    seconds = time.monotonic() - began
    cores = {part: (cpu_s(found) - before[part]) / seconds for part, found in pids.items()}
    return LoadRow("lookups", KEYS / seconds, 0, KEYS / seconds, 1, 0, cores, 0, 0)


def _new_key(platform: Platform) -> str:
    request = urllib.request.Request(
        f"http://127.0.0.1:{platform.port}/admin/v1/organizations/{platform.organization_id}/api-keys",
        b'{"display_name": "Load"}',
        {"Authorization": f"Bearer {platform.admin_key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        secret: str = json.load(answer)["secret"]
    return secret


def costs_of(rows: Sequence[LoadRow]) -> Costs:
    """The costs that explain the rows best, none below 0. Rows of one test count as their median."""
    medians = [_median([row for row in rows if row.test == test]) for test in dict.fromkeys(row.test for row in rows)]
    terms = {
        "edge": ("request_us", "chunk_us", "batch_us"),
        "router": ("request_us", "chunk_us", "batch_us"),
        "valkey": ("request_us",),
        "rabbitmq": ("request_us", "message_us"),
        "analytics": ("request_us", "message_us"),
        "postgres": ("request_us", "message_us", "lookup_us"),
        "identity": ("lookup_us",),
    }
    streamed = [row for row in medians if row.chunks_per_s]
    whole = [row for row in medians if row.bytes_per_s and not row.chunks_per_s]
    spread = np.polyfit([row.connections for row in streamed], [row.rss_bytes for row in streamed], 1)
    return Costs(
        measured=rows[0].date,
        parts={part: _fitted(part, names, medians) for part, names in terms.items()},
        answer_bytes=round(statistics.mean(row.bytes_per_s / row.requests_per_s for row in whole)),
        chunk_bytes=round(statistics.mean(row.bytes_per_s / row.chunks_per_s for row in streamed)),
        stream_bytes=round(max(0.0, spread[0])),
        event_bytes=EVENT_BYTES,
    )


def _median(rows: Sequence[LoadRow]) -> LoadRow:
    """Each figure's median; of one test they belong together closely enough."""
    values = {
        field: statistics.median(getattr(row, field) for row in rows)
        for field in ("requests_per_s", "chunks_per_s", "lookups_per_s", "bytes_per_s", "rss_bytes")
    }
    cores = {part: statistics.median(row.cores[part] for row in rows) for part in PARTS}
    return msgspec.structs.replace(rows[0], **values, cores=cores, errors=sum(row.errors for row in rows))


def _fitted(part: str, names: tuple[str, ...], rows: Sequence[LoadRow]) -> Cost:
    """Least squares of the relative errors, with what would be negative left out, worst first."""
    found = np.array([row.cores[part] for row in rows])
    # A hundredth of a core is as much as anything at rest is known to.
    weights = 1 / (found + 0.01)
    left = ["idle_cores", *names]
    while True:
        units = [Cost(**{name: 1.0}) for name in left]
        matrix = np.array([[1.0 if unit.idle_cores else unit.cores(row.traffic) for unit in units] for row in rows])
        values = np.linalg.lstsq(matrix * weights[:, None], found * weights, rcond=None)[0]
        if (values >= 0).all():
            return Cost(**{name: float(f"{value:.4g}") for name, value in zip(left, values, strict=True)})
        left.pop(int(values.argmin()))


def predicted(costs: Costs, load: Workload) -> dict[str, float]:
    """Cores of each part under a load, one process of each."""
    requests = load.rate or load.connections / (load.tokens * load.pace_ms / 1000)
    traffic = Traffic.of(requests, requests * load.tokens if load.stream else 0.0)
    return {part: cost.idle_cores + cost.cores(traffic) for part, cost in costs.parts.items()}


def judge(load: Workload, before: Mapping[str, float], rows: Sequence[LoadRow], verdict: Verdict) -> None:
    """The lines of one load that the costs were not made from."""
    seen = _median(rows)
    front = ("edge", "router")
    said, found = (sum(cores[part] for part in front) for cores in (before, seen.cores))
    off = said / found - 1
    what = f"{load.name}: cores of edge and router, {seen.requests_per_s:,.0f} requests/s"
    text = f"predicted {said:.3f}, measured {found:.3f} ({off:+.0%}), {seen.errors} errors"
    verdict.line(what + f", {seen.chunks_per_s:,.0f} chunks/s", text, abs(off) <= MOST_OFF and not seen.errors)
    for part in PARTS:
        verdict.line(f"{load.name}: {part}", f"predicted {before[part]:.3f}, measured {seen.cores[part]:.3f}")


def run(rounds: int, verdict: Verdict) -> list[LoadRow]:
    """Measures, predicts, measures what was predicted; returns the rows that the costs were made from."""
    rows: list[LoadRow] = []
    with fake_engine(LOAD_CORE) as engine, running_platform(engine.port) as platform:
        probe(platform.port, platform.headers)
        for number in range(rounds):
            rows += [rest(platform)] + ([lookups(platform)] if not number else [])
            for load in CALIBRATED:
                rows.append(loaded(platform, load))
                print(rows[-1].test, {part: round(used, 3) for part, used in rows[-1].cores.items()}, file=sys.stderr)
        costs = costs_of(rows)
        print("| capacity | found | |\n| --- | --- | --- |", flush=True)
        for load in HELD_OUT:
            before = predicted(costs, load)
            judge(load, before, [loaded(platform, load) for _ in range(rounds)], verdict)
    return rows


def main() -> None:
    """Raises SystemExit: 0 when the model is near enough, 1 when not, 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.capacity", description="Costs, and what they foretell.")
    parser.add_argument("what", nargs="?", choices=("run", "costs"), default="run")
    arguments = parser.parse_args()
    if arguments.what == "costs":
        rows = [msgspec.json.decode(line, type=LoadRow) for line in KEPT.read_bytes().splitlines()]
        COSTS.write_bytes(msgspec.json.format(msgspec.json.encode(costs_of(rows)), indent=2) + b"\n")
        return
    verdict = Verdict()
    try:
        take_core()
        rows = run(int(os.environ.get("ROUNDS") or ROUNDS), verdict)
    except LoadError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    file = KEPT if os.environ.get("KEEP") else WORKSHOP / "results" / KEPT.name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    sys.exit(0 if verdict.met else 1)


if __name__ == "__main__":
    main()
