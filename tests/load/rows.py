"""Rows of results: one measurement of a target by a test, and the median of several; it never prints or judges."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import msgspec

from tests.load.native import Measurement, ProcessUse
from tests.load.targets import Target

US_PER_S = 1e6
BYTES_PER_MB = 1 << 20


class Percentiles(msgspec.Struct, frozen=True):
    """Milliseconds; `added` is what lies above a direct run to the engine in the same round, None without one."""

    p50: float
    p99: float
    added_p50: float | None = None
    added_p99: float | None = None


class Row(msgspec.Struct, frozen=True):
    """One target under one test."""

    target: str
    test: str
    rounds: int
    requests_per_s: float
    # What one core would do, were it the target's alone: 1 s / CPU of a request.
    requests_per_s_per_core: float
    chunks_per_s: float
    # CPU of the counted processes; None where nothing of the kind was answered.
    cpu_us_per_request: float | None
    cpu_us_per_chunk: float | None
    latency_ms: Percentiles
    ttfb_ms: Percentiles
    lag_ms: Percentiles
    stall_ms: float
    rss_mb: float
    # Share of the core that the counted processes ran.
    core_share: float
    # CPU by process, those that do not count included, a request or, with streams, a chunk.
    split_us: dict[str, float]
    errors: int
    error_sample: str
    # How much of the window generator and engine ran or waited to run; above 0.9 the figures are theirs.
    generator_share: float
    engine_share: float
    load_limited: bool


def row_of(target: Target, test: str, seen: Measurement, engine: ProcessUse, direct: Row | None) -> Row:
    """The row of one measurement; `direct` is the engine's own in the same round."""
    counted = [use for name, use in seen.processes.items() if name in target.counted]
    cpu_s = sum(use.cpu_s for use in counted)
    cpu_us_per_request = cpu_s * US_PER_S / seen.requests if seen.requests else None
    engine_share = (engine.cpu_s + engine.waited_s) / seen.window_s
    events = seen.chunks or seen.requests

    def percentiles(name: str) -> Percentiles:
        spread = getattr(seen, name)
        if direct is None:
            return Percentiles(spread.p50, spread.p99)
        base: Percentiles = getattr(direct, name)
        return Percentiles(spread.p50, spread.p99, spread.p50 - base.p50, spread.p99 - base.p99)

    return Row(
        target=target.name,
        test=test,
        rounds=1,
        requests_per_s=seen.requests / seen.window_s,
        requests_per_s_per_core=US_PER_S / cpu_us_per_request if cpu_us_per_request else 0.0,
        chunks_per_s=seen.chunks / seen.window_s,
        cpu_us_per_request=cpu_us_per_request,
        cpu_us_per_chunk=cpu_s * US_PER_S / seen.chunks if seen.chunks else None,
        latency_ms=percentiles("latency_ms"),
        ttfb_ms=percentiles("ttfb_ms"),
        lag_ms=percentiles("lag_ms"),
        stall_ms=seen.stall_ms,
        rss_mb=sum(use.rss_bytes for use in counted) / BYTES_PER_MB,
        core_share=cpu_s / seen.window_s,
        split_us={name: use.cpu_s * US_PER_S / events for name, use in seen.processes.items()} if events else {},
        errors=seen.errors,
        error_sample=seen.error_sample,
        generator_share=seen.generator_share,
        engine_share=engine_share,
        load_limited=seen.generator_limits or engine_share > 0.9,
    )


def median_row(rows: Sequence[Row]) -> Row:
    """The median of each figure over the rounds; errors are summed, the longest stall and any limit stay."""

    def median(read: Callable[[Row], float | None]) -> float | None:
        values = [value for row in rows if (value := read(row)) is not None]
        return statistics.median(values) if values else None

    def certain(read: Callable[[Row], float]) -> float:
        return statistics.median(read(row) for row in rows)

    def percentiles(read: Callable[[Row], Percentiles]) -> Percentiles:
        return Percentiles(
            p50=certain(lambda row: read(row).p50),
            p99=certain(lambda row: read(row).p99),
            added_p50=median(lambda row: read(row).added_p50),
            added_p99=median(lambda row: read(row).added_p99),
        )

    return Row(
        target=rows[0].target,
        test=rows[0].test,
        rounds=len(rows),
        requests_per_s=certain(lambda row: row.requests_per_s),
        requests_per_s_per_core=certain(lambda row: row.requests_per_s_per_core),
        chunks_per_s=certain(lambda row: row.chunks_per_s),
        cpu_us_per_request=median(lambda row: row.cpu_us_per_request),
        cpu_us_per_chunk=median(lambda row: row.cpu_us_per_chunk),
        latency_ms=percentiles(lambda row: row.latency_ms),
        ttfb_ms=percentiles(lambda row: row.ttfb_ms),
        lag_ms=percentiles(lambda row: row.lag_ms),
        stall_ms=max(row.stall_ms for row in rows),
        rss_mb=certain(lambda row: row.rss_mb),
        core_share=certain(lambda row: row.core_share),
        split_us={
            name: statistics.median(row.split_us[name] for row in rows if name in row.split_us)
            for name in rows[0].split_us
        },
        errors=sum(row.errors for row in rows),
        error_sample=next((row.error_sample for row in rows if row.error_sample), ""),
        generator_share=certain(lambda row: row.generator_share),
        engine_share=certain(lambda row: row.engine_share),
        load_limited=any(row.load_limited for row in rows),
    )
