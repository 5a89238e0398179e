"""Tells what a workload needs, by the committed costs; docs/capacity.md. It never asks a running platform.

python -m deploy.capacity workload.json     a table, what limits it first, and how many installations it takes
python -m deploy.capacity < workload.json   the same
python -m deploy.capacity --scales          the table of docs/capacity.md, for 100 to 1,000,000 requests/s
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import msgspec

from deploy.capacity.costs import Costs, measured
from deploy.capacity.plan import Plan, Workload, capacity, plan

SCALES = (100, 1_000, 10_000, 100_000, 1_000_000)


def divided(workload: Workload, costs: Costs) -> tuple[int, Plan]:
    """So many installations carry it, each with its part of organizations, keys and traffic; and one of them."""
    number = math.ceil(workload.requests_per_s / capacity(workload, costs)[0])
    return number, plan(
        msgspec.structs.replace(
            workload,
            requests_per_s=workload.requests_per_s / number,
            keys=math.ceil(workload.keys / number),
            organizations=math.ceil(workload.organizations / number),
        ),
        costs,
    )


def report(workload: Workload, costs: Costs) -> str:
    """Everything about one workload, in Markdown."""
    most, first = capacity(workload, costs)
    number, one = divided(workload, costs)
    lines = [
        f"{workload.requests_per_s:,.0f} requests/s, {workload.chunks_per_s:,.0f} chunks/s. "
        f"One installation carries {most:,.0f} requests/s; the first bottleneck is **{first}**.",
        "",
        f"{number:,} installation{'s' * (number > 1)}, of {one.workload.requests_per_s:,.0f} requests/s. Of each:",
        "",
        "| part | processes | cores | of | headroom | p99 of waiting, ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for need in one.needs:
        there = need.processes if need.most_cores is None else need.most_cores
        headroom = 1 - need.cores / there / workload.utilisation
        lines.append(
            f"| {need.part} | {need.processes:,} | {need.cores:,.2f} | {there:,.0f} | {headroom:.0%} "
            f"| {1000 * need.wait_p99_s:,.2f} |"
        )
    lines += ["", "| figure | each | all |", "| --- | --- | --- |"]
    lines += [f"| {name} | {_short(value)} | {_short(value * number)} |" for name, value in one.figures.items()]
    return "\n".join(lines)


def scales(workload: Workload, costs: Costs) -> str:
    """A row for each of several rates, everything else as the workload says, in Markdown."""
    lines = [
        "| requests/s | chunks/s | installations | edge | router | identity | analytics | Valkey | PostgreSQL cores "
        "| storage a day, TB | clients' network, Gbit/s | tightest in each |",
        "|" + " --- |" * 12,
    ]
    for requests_per_s in SCALES:
        number, one = divided(msgspec.structs.replace(workload, requests_per_s=requests_per_s), costs)
        needs = {need.part: need for need in one.needs}
        counts = [number * needs[part].processes for part in ("edge", "router", "identity", "analytics", "valkey")]
        cells = [requests_per_s, number * one.workload.chunks_per_s, number, *counts, number * needs["postgres"].cores]
        cells += [
            number * one.figures["PostgreSQL storage a day, GB"] / 1000,
            number * one.figures["network of clients, Gbit/s"],
        ]
        tightest = f"{one.tightest.part}, {one.tightest.load:.0%} in use"
        lines.append("| " + " | ".join(map(_short, cells)) + f" | {tightest} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.3g}"


def main() -> None:
    """Raises SystemExit with what is wrong with the workload."""
    parser = argparse.ArgumentParser(prog="python -m deploy.capacity", description="What so many requests need.")
    parser.add_argument("workload", nargs="?", help="a JSON file; standard input without one")
    parser.add_argument("--scales", action="store_true", help="several rates instead of the workload's own")
    arguments = parser.parse_args()
    if arguments.scales and arguments.workload is None:
        print(scales(Workload(requests_per_s=SCALES[0]), measured()))
        return
    try:
        text = Path(arguments.workload).read_bytes() if arguments.workload else sys.stdin.buffer.read()
        workload = msgspec.json.decode(text, type=Workload)
    except (OSError, msgspec.DecodeError) as error:
        sys.exit(f"The workload cannot be read: {error}")
    print((scales if arguments.scales else report)(workload, measured()))


if __name__ == "__main__":
    main()
