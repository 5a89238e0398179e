"""Draws a dashboard from its own definition and what its queries found, as an SVG; it never asks anything."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tests.doubles.prometheus import Series

# Points: a picture is as wide as a page, and a unit of Grafana's grid so high.
_WIDTH, _UNIT = 1200, 27
_COLUMN = _WIDTH / 24
_GAP, _TITLE, _AXIS, _LEGEND_LINE = 5, 24, 60, 13
_MOST_LINES = 3
_LETTERS_WIDE = 62
_COLOURS = (
    *("#3f8f3a", "#c99a06", "#3274d9", "#d9662b", "#c4162a", "#5f58b5"),
    *("#8f3bb8", "#1f78c1", "#6d4c41", "#0a9396", "#b5179e", "#737a86"),
)
_INK, _FAINT, _EDGE, _PAGE = "#24292e", "#6b7280", "#d8dce2", "#f4f5f8"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    # Text stays text: smaller, and found by those who search.
    "svg.fonttype": "none",
    # The same data makes the same file.
    "svg.hashsalt": "dashboards",
    "path.simplify_threshold": 0.3,
    "axes.edgecolor": _EDGE,
    "text.color": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
}
_PATH = re.compile(r' d="[^"]*"')
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_BREAK = re.compile(r"\s+L ")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LABEL = re.compile(r"{{\s*(\w+)\s*}}")

# Of each of Grafana's units, from the largest step down: from what on, divided by what, and what stands behind.
_STEPS: dict[str, list[tuple[float, float, str]]] = {
    "s": [
        (172800, 86400, " days"),
        (7200, 3600, " h"),
        (120, 60, " min"),
        (1, 1, " s"),
        (0.001, 0.001, " ms"),
        (0, 1e-6, " µs"),
    ],
    "bytes": [(2**30, 2**30, " GiB"), (2**20, 2**20, " MiB"), (2**10, 2**10, " KiB"), (0, 1, " B")],
    "Bps": [(1e6, 1e6, " MB/s"), (1e3, 1e3, " kB/s"), (0, 1, " B/s")],
    "percentunit": [(0, 0.01, " %")],
    "reqps": [(0, 1, "/s")],
    "cps": [(0, 1, "/s")],
    "short": [(1e6, 1e6, " M"), (1e4, 1e3, " k"), (0, 1, "")],
}


def draw(
    document: Mapping[str, Any],
    found: Mapping[tuple[int, str], list[Series]],
    times: tuple[float, float],
    path: Path,
) -> None:
    """Draw a dashboard. `found` is by panel id and refId; `times` are the ends of the axes, in seconds since the
    epoch."""
    panels = document["panels"]
    height = _UNIT * max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) + 46
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72, facecolor=_PAGE)
        canvas = _Canvas(figure, height)
        canvas.text(14, 28, document["title"], size=15, weight="bold")
        for panel in panels:
            place = panel["gridPos"]
            x, y = place["x"] * _COLUMN, 42 + place["y"] * _UNIT
            wide, high = place["w"] * _COLUMN, place["h"] * _UNIT
            if panel["type"] == "row":
                canvas.text(14, y + 18, panel["title"], size=10.5, weight="bold")
                continue
            canvas.box(x + _GAP, y + _GAP / 2, wide - 2 * _GAP, high - _GAP)
            canvas.text(x + 15, y + 18, panel["title"], size=9.5, weight="bold")
            series = [
                (_legend(target.get("legendFormat", ""), one.labels), one)
                for target in panel["targets"]
                for one in found[panel["id"], target["refId"]]
                if any(math.isfinite(value) for _, value in one.values)
            ]
            # The largest first, whose names and colours are the ones to see.
            series.sort(key=lambda named: -max(value for _, value in named[1].values if math.isfinite(value)))
            unit = panel["fieldConfig"]["defaults"]["unit"]
            if panel["type"] == "stat":
                value = told(series[0][1].values[-1][1], unit) if series else "-"
                canvas.text(x + wide / 2, y + high / 2 + 18, value, size=23, colour=_COLOURS[0], centred=True)
            elif series:
                _graph(canvas, (x, y, wide, high), panel, series, times)
            else:
                canvas.text(x + wide / 2, y + high / 2, "nothing", size=9, colour=_FAINT, centred=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
    lines = (line.rstrip() for line in _COMMENT.sub("", _PATH.sub(_short, path.read_text())).splitlines())
    path.write_text("\n".join(filter(None, lines)) + "\n")


def _short(line: re.Match[str]) -> str:
    """A path in as few letters as say it: below tenths of a point no eye sees anything."""
    return _BREAK.sub("L", _NUMBER.sub(lambda number: f"{float(number[0]):.1f}", line[0]))


def told(value: float, unit: str) -> str:
    """A value as Grafana would write it."""
    if not math.isfinite(value):
        return "-"
    if unit == "currencyUSD":
        return f"${value:,.2f}" if abs(value) >= 0.1 or not value else f"${value:.3g}"
    if not value:
        return "0" + {"percentunit": " %", "reqps": "/s", "cps": "/s"}.get(unit, "")
    divisor, behind = _step(value, unit)
    return f"{_brief(value / divisor)}{behind}"


def _step(value: float, unit: str) -> tuple[float, str]:
    """What values of this size are divided by, and what stands behind them."""
    steps = _STEPS.get(unit, [(0, 1, "")])
    return next((divisor, behind) for least, divisor, behind in steps if abs(value) >= least)


def _brief(value: float) -> str:
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.4f}".rstrip("0").rstrip(".") if "e" in text else text


def _legend(pattern: str, labels: Mapping[str, str]) -> str:
    name = _LABEL.sub(lambda label: labels.get(label[1], ""), pattern).strip()
    # What all RPCs begin with says nothing.
    return name.replace("/aiaas.", "").replace(".v1.", ".") or "none"


class _Canvas:
    """A figure in points, from its upper left corner."""

    def __init__(self, figure: Figure, height: float) -> None:
        self._figure = figure
        self._height = height

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float,
        weight: str = "normal",
        colour: str = _INK,
        centred: bool = False,
    ) -> None:
        """Text whose base line is at `y`."""
        self._figure.text(
            x / _WIDTH,
            1 - y / self._height,
            text.replace("$", r"\$"),
            fontsize=size,
            fontweight=weight,
            color=colour,
            ha="center" if centred else "left",
            va="baseline",
        )

    def box(self, x: float, y: float, wide: float, high: float) -> None:
        """The frame of a panel."""
        axes = self.axes(x, y, wide, high)
        axes.set_axis_off()
        axes.set_xlim(0, wide)
        axes.set_ylim(0, high)
        axes.add_patch(
            FancyBboxPatch(
                (0.5, 0.5),
                wide - 1,
                high - 1,
                boxstyle="round,pad=0,rounding_size=4",
                facecolor="white",
                edgecolor=_EDGE,
            )
        )

    def axes(self, x: float, y: float, wide: float, high: float) -> Axes:
        """Room for a graph."""
        place = (x / _WIDTH, 1 - (y + high) / self._height, wide / _WIDTH, high / self._height)
        return self._figure.add_axes(place)


def _graph(
    canvas: _Canvas,
    place: tuple[float, float, float, float],
    panel: Mapping[str, Any],
    series: list[tuple[str, Series]],
    times: tuple[float, float],
) -> None:
    x, y, wide, high = place
    custom, defaults = panel["fieldConfig"]["defaults"].get("custom", {}), panel["fieldConfig"]["defaults"]
    lines = _legend_lines([name for name, _ in series])
    below = _LEGEND_LINE * len(lines) + 24
    axes = canvas.axes(x + _AXIS, y + _TITLE + 8, wide - _AXIS - 26, high - _TITLE - 14 - below)
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color="#eceef2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)
    axes.set_xlim(0, times[1] - times[0])
    axes.set_xticks(range(0, int(times[1] - times[0]) + 1, 60))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at / 60:g} min"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: told(value, defaults["unit"])))
    is_stacked = custom.get("stacking", {}).get("mode") == "normal"
    moments = sorted({at for _, one in series for at, _ in one.values})
    ground = dict.fromkeys(moments, 0.0)
    for number, (_, one) in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        values = {at: value for at, value in one.values if math.isfinite(value)}
        if is_stacked:
            sums = {at: ground[at] + values.get(at, 0.0) for at in moments}
            past = [at - times[0] for at in moments]
            axes.fill_between(past, list(ground.values()), list(sums.values()), color=colour, alpha=0.25, linewidth=0)
            axes.plot(past, list(sums.values()), color=colour, linewidth=1.2)
            ground = sums
        else:
            axes.plot([at - times[0] for at in values], list(values.values()), color=colour, linewidth=1.2)
    low, top = axes.dataLim.y0, axes.dataLim.y1
    # A line along the ground is still a line.
    high_y = top + 0.08 * (top - min(0.0, low)) if top > 0 else 1.0
    axes.set_ylim(min(custom["axisSoftMin"], low), high_y)
    divisor, _ = _step(high_y, defaults["unit"])
    axes.set_yticks([tick * divisor for tick in MaxNLocator(4).tick_values(0, high_y / divisor)])
    axes.set_ylim(min(custom["axisSoftMin"], low), high_y)
    for row, names in enumerate(lines):
        offset = x + 18.0
        for mark, name in names:
            at = y + high - 10 - _LEGEND_LINE * (len(lines) - 1 - row)
            if mark is not None:
                canvas.text(offset, at, "■", size=8, colour=_COLOURS[mark % len(_COLOURS)])
            canvas.text(offset + 11, at, name, size=8, colour=_FAINT)
            offset += 22 + 5.0 * len(name)


def _legend_lines(names: list[str]) -> list[list[tuple[int | None, str]]]:
    """Names with their numbers, as many as fit, and how many more there are."""
    lines: list[list[tuple[int | None, str]]] = [[]]
    used = 0
    for number, name in enumerate(names):
        brief = name if len(name) <= _LETTERS_WIDE else f"{name[: _LETTERS_WIDE - 1]}…"
        if used and used + len(brief) + 4 > _LETTERS_WIDE:
            if len(lines) == _MOST_LINES and number + 1 < len(names):
                lines.append([(None, f"and {len(names) - number} more")])
                break
            lines.append([])
            used = 0
        lines[-1].append((number, brief))
        used += len(brief) + 4
    return lines
