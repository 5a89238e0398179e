"""What all dashboards are built of: graphs, numbers, rows; it knows no metric."""

import itertools
import string
from collections.abc import Mapping, Sequence

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh

Panel = timeseries.Panel | stat.Panel

_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")


def graph(title: str, meaning: str, unit: str, queries: Mapping[str, str], *, stacked: bool = False) -> Panel:
    """Lines over time: PromQL by the legend of its lines. `meaning` says what is seen, and what is bad."""
    panel = timeseries.Panel().title(title).description(meaning).unit(unit).datasource(_SOURCE).span(8).height(8)
    panel.axis_soft_min(0).legend(common.VizLegendOptions().show_legend(True))
    if stacked:
        panel.fill_opacity(20).stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for ref_id, (legend, query) in zip(string.ascii_uppercase, queries.items(), strict=False):
        target = prometheus.Dataquery().ref_id(ref_id).expr(query).legend_format(legend).range()
        # From a slow request to its trace: the router's histograms carry trace ids.
        panel.with_target(target.exemplar("histogram_quantile" in query))
    return panel


def number(title: str, meaning: str, unit: str, query: str) -> Panel:
    """One number: the last value of a query with one result."""
    panel = stat.Panel().title(title).description(meaning).unit(unit).datasource(_SOURCE).span(4).height(4)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.with_target(prometheus.Dataquery().ref_id("A").expr(query).instant())


def quantiles(histogram: str, by: str = "", matchers: str = "") -> dict[str, str]:
    """The quantiles that matter of a histogram, each with its legend, by a label if one is named."""
    buckets = rate(f"{histogram}_bucket", f"le, {by}" if by else "le", matchers)
    legend = f"{{{{{by}}}}} " if by else ""
    return {f"{legend}p{q}": f"histogram_quantile({q / 100:g}, {buckets})" for q in (50, 95, 99)}


def rate(counter: str, by: str = "", matchers: str = "") -> str:
    """What a counter grows by in a second, summed over all processes."""
    return f"sum{_by(by)}(rate({counter}{matchers}[$__rate_interval]))"


def increase(counter: str, matchers: str = "") -> str:
    """What a counter has grown by in the time that is looked at, summed over all processes."""
    return f"sum(increase({counter}{matchers}[$__range]))"


def share(counter: str, part: str) -> str:
    """The share of a counter that has these matchers; 0 where none has had them yet."""
    return f"({rate(counter, matchers=part)} or vector(0)) / {rate(counter)}"


def board(uid: str, title: str, meaning: str, rows: Mapping[str, Sequence[Panel]]) -> dashboard.Dashboard:
    """A dashboard of rows of panels."""
    made = (
        dashboard.Dashboard(f"aiaas: {title}")
        .uid(f"aiaas-{uid}")
        .description(meaning)
        .tags(["aiaas"])
        .time("now-6h", "now")
        .refresh("30s")
        .timezone("utc")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    ids = itertools.count(1)
    for name, panels in rows.items():
        made.with_row(dashboard.Row(name).id(next(ids)))
        for panel in panels:
            made.with_panel(panel.id(next(ids)))
    return made


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""


def choice(made: dashboard.Dashboard, name: str, label: str, metric: str) -> dashboard.Dashboard:
    """Let people choose among the values of a metric's label; at first all of them."""
    return made.with_variable(
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(f"label_values({metric}, {name})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )
