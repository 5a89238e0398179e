"""What the platform has to reach, judged line by line from rows of results; it never measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from tests.load.rows import Row
from tests.load.targets import ONE_PROCESS, TWO_PROCESSES


@dataclass(frozen=True)
class Line:
    """One demand: what is wanted, what was found, and whether that is enough (None: something was not measured)."""

    wanted: str
    found: str
    met: bool | None


@dataclass(frozen=True, kw_only=True)
class _Demand:
    what: str
    # Target and test of each row that `figure` takes.
    rows: tuple[tuple[str, str], ...]
    figure: Callable[..., float | None]
    unit: str
    at_least: float | None = None
    at_most: float | None = None


def judge(rows: Sequence[Row]) -> list[Line]:
    """Every line of the bar."""
    found = {(row.target, row.test): row for row in rows}
    return [_judged(demand, found) for name in (TWO_PROCESSES, ONE_PROCESS) for demand in _demands(name)]


def _demands(name: str) -> list[_Demand]:
    """What one of our targets has to reach."""
    smg_share = 0.4 if name == TWO_PROCESSES else 0.6
    stream = (name, "s1000")
    return [
        _Demand(
            what="requests/s a core, beside LiteLLM's",
            rows=((name, "unary"), ("litellm", "unary")),
            figure=_requests_ratio,
            unit="times",
            at_least=50,
        ),
        _Demand(
            what="requests/s a core, beside SMG's",
            rows=((name, "unary"), ("smg", "unary")),
            figure=_requests_ratio,
            unit="times",
            at_least=smg_share,
        ),
        _Demand(
            what="CPU a chunk at 200 streams, beside vLLM Router's",
            rows=((name, "s200"), ("vllm-router", "s200")),
            figure=_chunk_ratio,
            unit="times",
            at_most=2,
        ),
        _Demand(
            # Level is what one run may differ from the next.
            what="CPU a chunk at 1,000 streams, level with vLLM Router's",
            rows=(stream, ("vllm-router", "s1000")),
            figure=_chunk_ratio,
            unit="times",
            at_most=1.05,
        ),
        _Demand(
            what="chunks/s on one core",
            rows=((name, "saturation"),),
            figure=attrgetter("chunks_per_s"),
            unit="chunks/s",
            at_least=40_000,
        ),
        _Demand(
            what="latency added at 100/s, p50",
            rows=((name, "latency"),),
            figure=attrgetter("latency_ms.added_p50"),
            unit="ms",
            at_most=2.5,
        ),
        _Demand(
            what="latency added at 100/s, p99",
            rows=((name, "latency"),),
            figure=attrgetter("latency_ms.added_p99"),
            unit="ms",
            at_most=5,
        ),
        _Demand(
            what="TTFB added at 50 streams, p50",
            rows=((name, "ttfb"),),
            figure=attrgetter("ttfb_ms.added_p50"),
            unit="ms",
            at_most=2.5,
        ),
        _Demand(
            what="longest stall of 1,000 streams",
            rows=(stream,),
            figure=attrgetter("stall_ms"),
            unit="ms",
            at_most=1000,
        ),
        _Demand(
            what="errors of 1,000 streams",
            rows=(stream,),
            figure=attrgetter("errors"),
            unit="",
            at_most=0,
        ),
        _Demand(
            what="memory with 1,000 streams",
            rows=(stream,),
            figure=attrgetter("rss_mb"),
            unit="MB",
            at_most=200,
        ),
    ]


def _judged(demand: _Demand, found: dict[tuple[str, str], Row]) -> Line:
    limit = f"at least {demand.at_least:,}" if demand.at_least is not None else f"at most {demand.at_most:,}"
    wanted = f"{demand.rows[0][0]}: {demand.what}, {limit} {demand.unit}".rstrip()
    missing = [f"{target} {test}" for target, test in demand.rows if (target, test) not in found]
    if missing:
        return Line(wanted, f"not measured: {', '.join(missing)}", None)
    value = demand.figure(*(found[row] for row in demand.rows))
    if value is None:
        return Line(wanted, "nothing was answered", False)
    enough = (demand.at_least is None or value >= demand.at_least) and (
        demand.at_most is None or value <= demand.at_most
    )
    return Line(wanted, f"{value:,.2f} {demand.unit}".rstrip(), enough)


def _requests_ratio(ours: Row, theirs: Row) -> float | None:
    return ours.requests_per_s_per_core / theirs.requests_per_s_per_core if theirs.requests_per_s_per_core else None


def _chunk_ratio(ours: Row, theirs: Row) -> float | None:
    if ours.cpu_us_per_chunk is None or theirs.cpu_us_per_chunk is None:
        return None
    return ours.cpu_us_per_chunk / theirs.cpu_us_per_chunk
