"""What the benchmark asks of every target, by name; it never says of whom."""

from __future__ import annotations

from dataclasses import dataclass

from tests.load.native import Load, chat_body


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One test: so many connections, whole answers or streams, at a rate or as fast as answers come."""

    name: str
    meaning: str
    connections: int
    stream: bool = True
    tokens: int = 200
    pace_ms: int = 20
    # Tokens of all streams come at the same time, as from one batch of an engine.
    step: bool = False
    # Requests a second on a schedule; 0: each connection sends its next request when it has its answer.
    rate: float = 0
    spread_s: float = 0
    warm_s: float = 1
    window_s: float = 5

    def load(self, port: int, headers: tuple[str, ...], processes: dict[str, list[int]]) -> Load:
        """The load for one target."""
        return Load(
            port=port,
            headers=headers,
            processes=processes,
            body=chat_body(tokens=self.tokens, stream=self.stream, pace_ms=self.pace_ms, step=self.step),
            connections=self.connections,
            rate=self.rate,
            spread_s=self.spread_s,
            warm_s=self.warm_s,
            window_s=self.window_s,
        )


def _streams(count: int, *, step: bool = False) -> Workload:
    # A stream takes 4 s; begun within 4 s they stay spread evenly.
    return Workload(
        name=f"s{count}-step" if step else f"s{count}",
        meaning=f"{count} streams of 200 tokens, one each 20 ms" + (", all at the same time" if step else ""),
        connections=count,
        step=step,
        spread_s=4,
        warm_s=4.5,
    )


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="unary",
            meaning="whole answers, 64 connections, as fast as they come",
            stream=False,
            connections=64,
            warm_s=2,
        ),
        Workload(
            name="latency",
            meaning="whole answers, 100 a second",
            stream=False,
            connections=64,
            rate=100,
            window_s=8,
        ),
        Workload(name="ttfb", meaning="50 streams of 50 tokens", connections=50, tokens=50, spread_s=1, warm_s=1.5),
        _streams(50),
        _streams(200),
        _streams(1000),
        _streams(50, step=True),
        _streams(200, step=True),
        _streams(1000, step=True),
        Workload(
            name="saturation",
            meaning="1000 streams of 200 tokens, one each 10 ms: 100,000 chunks a second are offered",
            connections=1000,
            pace_ms=10,
            spread_s=2,
            warm_s=4,
        ),
    )
}
