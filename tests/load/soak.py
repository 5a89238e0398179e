"""Many streams for a long time, slow readers among them, then a router that is killed: what only shows with time.

    DURATION_S=600 TARGET=aiaas python -m tests.load.soak

Prints a table against the bar and ends with status 1 if a line is missed. It never measures what a request costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.load.native import FakeEngine, Load, LoadError, Measurement, chat_body, fake_engine, run_load
from tests.load.targets import LOAD_CORE, ONE_PROCESS, TWO_PROCESSES, Platform, Target, running_platform, take_core
from tests.load.verdict import Verdict

DURATION_S = 600
STREAMS = 1000
SLOW_READERS = 200
# A token every 50 ms of each: half of what a core is to carry, so that waiting is somebody's fault.
PACE_MS = 50
TOKENS = 2000
# 5,000 are made. After half a minute all buffers on the way are full, and the engine itself has to wait for them.
SLOW_BYTES_PER_S = 2000
FAST_ONLY_SHARE = 0.2
SPREAD_S = 10.0
WARM_S = 45.0

MOST_STALL_MS = 1000.0
# Lag of the fast readers beside slow ones, over their lag without any.
MOST_LAG_RATIO = 1.5
# Memory and open files at the end, over those at the beginning.
MOST_GROWTH = 1.05
SPARE_RSS_MB = 4
SPARE_FILES = 8

KILL_STREAMS = 100
KILL_ENDED_WITHIN_S = 2.0
KILL_BACK_WITHIN_S = 10.0
CLOSED_WITHIN_S = 30.0
COUNTED_WITHIN_S = 300.0


@dataclass
class Watch:
    """Memory and open files of some processes, second by second."""

    rss_mb: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def look(self, pids: list[int]) -> None:
        """Adds one sample."""
        pages, files = 0, 0
        for pid in pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                files += len(os.listdir(f"/proc/{pid}/fd"))
        self.rss_mb.append(pages * os.sysconf("SC_PAGESIZE") / 2**20)
        self.files.append(files)

    @staticmethod
    def ends(values: list[float]) -> tuple[float, float]:
        """The medians of the first and the last quarter."""
        quarter = max(1, len(values) // 4)
        return statistics.median(values[:quarter]), statistics.median(values[-quarter:])


@contextlib.contextmanager
def watching(target: Target, after_s: float) -> Iterator[dict[str, Watch]]:
    """Samples each counted process of the target, from `after_s` on until the end of the block."""
    watches = {name: Watch() for name in target.counted}
    over = threading.Event()

    def watch() -> None:
        if over.wait(after_s):
            return
        while not over.wait(1.0):
            pids = target.pids()
            for name, seen in watches.items():
                seen.look(pids[name])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield watches
    finally:
        over.set()
        thread.join()


def streams(target: Target, connections: int, slow: int, window_s: float) -> Measurement:
    """So many streams for so long, of which some are read at a trickle."""
    load = Load(
        port=target.port,
        headers=target.headers,
        body=chat_body(tokens=TOKENS, pace_ms=PACE_MS),
        connections=connections,
        slow=slow,
        slow_bytes_per_s=SLOW_BYTES_PER_S,
        spread_s=SPREAD_S,
        warm_s=WARM_S,
        window_s=window_s,
        timeout_s=TOKENS * PACE_MS / 1000 + 60,
    )
    return run_load(load, LOAD_CORE)


def soak(target: Target, duration_s: float, verdict: Verdict) -> int:
    """The long load: first without slow readers, then with them. Returns the errors there were."""
    before = Watch()
    for name, pids in target.pids().items():
        if name in target.counted:
            before.look(pids)
    alone = streams(target, STREAMS - SLOW_READERS, 0, duration_s * FAST_ONLY_SHARE)
    with watching(target, WARM_S) as watches:
        mixed = streams(target, STREAMS, SLOW_READERS, duration_s)
    verdict.line("chunks/s", f"{mixed.chunks / mixed.window_s:,.0f}")
    verdict.line("the load was the limit", "yes" if mixed.generator_limits else "no")
    verdict.line("longest stall between two chunks", f"{mixed.stall_ms:.0f} ms", mixed.stall_ms <= MOST_STALL_MS)
    ratio = mixed.lag_ms.p99 / alone.lag_ms.p99 if alone.lag_ms.p99 else 0.0
    verdict.line("chunk lag, fast readers only", f"p50 {alone.lag_ms.p50:.2f}, p99 {alone.lag_ms.p99:.2f} ms")
    verdict.line(
        f"chunk lag of the fast readers beside {SLOW_READERS} slow ones",
        f"p50 {mixed.lag_ms.p50:.2f}, p99 {mixed.lag_ms.p99:.2f} ms ({ratio:.2f} times)",
        ratio <= MOST_LAG_RATIO,
    )
    verdict.line("slow readers that were cut off", f"{mixed.slow_cut}")
    errors = alone.errors + mixed.errors
    verdict.line("errors", f"{errors} {mixed.error_sample or alone.error_sample}".strip(), errors == 0)
    for name, watch in watches.items():
        if not watch.rss_mb:
            continue
        first_mb, last_mb = watch.ends(watch.rss_mb)
        flat = last_mb <= first_mb * MOST_GROWTH + SPARE_RSS_MB
        verdict.line(
            f"memory of {name}", f"{first_mb:.0f} MB, at the end {last_mb:.0f}, most {max(watch.rss_mb):.0f}", flat
        )
        # A slow reader that was cut off has none until it comes again, so how many there are changes; no leak is what
        # never has more than the streams need.
        most = max(watch.files)
        verdict.line(f"open files of {name}", f"at most {most}", most <= sum(before.files) + STREAMS + SPARE_FILES)
    closed_s, left = _time_until_closed(target, sum(before.files))
    verdict.line(
        "open files once all is over",
        f"{left} ({sum(before.files)} before), {closed_s:.1f} s later",
        left <= sum(before.files) + SPARE_FILES,
    )
    return errors


def _time_until_closed(target: Target, files_before: int) -> tuple[float, int]:
    began = time.monotonic()
    while True:
        watch = Watch()
        pids = target.pids()
        for name in target.counted:
            watch.look(pids[name])
        left = sum(watch.files)
        if left <= files_before + SPARE_FILES or time.monotonic() > began + CLOSED_WITHIN_S:
            return time.monotonic() - began, left
        time.sleep(0.2)


async def counted(platform: Platform, engine: FakeEngine, errors: int, verdict: Verdict) -> None:
    """Analytics must come to know every request that the engine had; those that never reached it count as well."""
    answered = engine.stats()["requests"]
    path = f"/analytics/v1/organizations/{platform.organization_id}/usage"
    headers = {"Authorization": f"Bearer {platform.admin_key}"}
    since = time.strftime("%Y-%m-%dT00:00:00Z", time.gmtime(time.time() - 86_400))
    began = time.monotonic()
    found = 0
    async with aiohttp.ClientSession(f"http://127.0.0.1:{platform.port}", headers=headers) as session:
        while time.monotonic() < began + COUNTED_WITHIN_S:
            async with session.get(path, params={"start_time": since}) as response:
                document = await response.json()
            if response.status != 200:
                raise LoadError(f"Usage cannot be read, status {response.status}: {document}")
            found = int(document["totals"]["requests"])
            if found >= answered:
                break
            await asyncio.sleep(1)
    verdict.line(
        "requests that analytics counts",
        f"{found:,} of {answered:,}, {time.monotonic() - began:.0f} s later",
        found >= answered if errors else found == answered,
    )


async def router_is_killed(platform: Platform, target: Target, verdict: Verdict) -> None:
    """Every stream of a router that is killed ends soon, and with an error; once it is back requests are answered."""
    headers = dict(header.split(": ", 1) for header in target.headers)
    body = chat_body(tokens=10_000, pace_ms=PACE_MS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        f"http://127.0.0.1:{target.port}", headers=headers, connector=connector, timeout=aiohttp.ClientTimeout(60)
    ) as session:
        flowing = [asyncio.Event() for _ in range(KILL_STREAMS)]

        async def stream(number: int) -> tuple[float, str]:
            said = "nothing"
            try:
                async with session.post("/v1/chat/completions", json=body) as response:
                    async for line in response.content:
                        flowing[number].set()
                        if line.startswith(b'data: {"error"'):
                            said = "an error"
                        elif line.startswith(b"data: [DONE]"):
                            said = "[DONE]"
            except aiohttp.ClientError as error:
                said = said if said == "an error" else type(error).__name__
            return time.monotonic(), said

        tasks = [asyncio.create_task(stream(number)) for number in range(KILL_STREAMS)]
        async with asyncio.timeout(30):
            for event in flowing:
                await event.wait()
        killed = time.monotonic()
        for pid in platform.pids("router"):
            os.kill(pid, signal.SIGKILL)
        refused = 0
        while True:
            async with session.post("/v1/chat/completions", json=chat_body(tokens=1, stream=False)) as response:
                status, text = response.status, await response.text()
            answered = time.monotonic()
            if status == 200 or answered > killed + 6 * KILL_BACK_WITHIN_S:
                break
            refused += 1
            await asyncio.sleep(0.1)
        ends = await asyncio.gather(*tasks)
    last_s = max(moment for moment, _ in ends) - killed
    words = sorted({said for _, said in ends})
    verdict.line(
        f"router killed: {KILL_STREAMS} streams ended",
        f"within {last_s:.2f} s, with {' or '.join(words)}",
        last_s <= KILL_ENDED_WITHIN_S and words == ["an error"],
    )
    verdict.line(
        "router killed: the first request that is answered",
        f"{answered - killed:.2f} s after, {refused} refused before it" + ("" if status == 200 else f": {text[:200]}"),
        status == 200 and answered - killed <= KILL_BACK_WITHIN_S,
    )


def main() -> None:
    """Raises SystemExit: 0 when every line is met, 1 when one is missed, 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.soak", description="The long load; docs/benchmark.md.")
    environ = os.environ
    parser.add_argument(
        "--duration_s", type=float, default=environ.get("DURATION_S") or DURATION_S, help="of the load (DURATION_S)"
    )
    parser.add_argument(
        "--target",
        choices=(TWO_PROCESSES, ONE_PROCESS),
        default=environ.get("TARGET") or TWO_PROCESSES,
        help="what is loaded (TARGET)",
    )
    arguments = parser.parse_args()
    verdict = Verdict()
    try:
        take_core()
        with fake_engine(LOAD_CORE) as engine, running_platform(engine.port) as platform:
            target = platform.targets().get(arguments.target)
            if target is None:
                raise LoadError(f"There is no {arguments.target} that starts.")
            print(f"| {STREAMS} streams, {arguments.duration_s:.0f} s, {target.name} | found | |\n| --- | --- | --- |")
            errors = soak(target, arguments.duration_s, verdict)
            asyncio.run(counted(platform, engine, errors, verdict))
            if target.name == TWO_PROCESSES:
                asyncio.run(router_is_killed(platform, target, verdict))
    except LoadError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if verdict.met else 1)


if __name__ == "__main__":
    main()
