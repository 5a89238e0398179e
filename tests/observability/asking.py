"""Every query of every dashboard, asked of a Prometheus; it never judges what comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from deploy.dashboards.__main__ import documents
from tests.doubles.prometheus import Prometheus


class Asked(NamedTuple):
    """One query of a panel, and what came of it."""

    dashboard: str
    panel: str
    legend: str
    query: str
    values: list[float]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to see."""
        return all(map(math.isnan, self.values))


def filled(query: str, variables: Mapping[str, str]) -> str:
    """A query with what Grafana puts in the place of its variables."""
    for variable, value in variables.items():
        query = query.replace(variable, value)
    return query


async def ask(prometheus: Prometheus, variables: Mapping[str, str]) -> list[Asked]:
    """All queries. Raises AssertionError for one that Prometheus does not understand."""
    return [
        Asked(
            name,
            panel["title"],
            target.get("legendFormat", ""),
            target["expr"],
            [series.values[0][1] for series in await prometheus.query(filled(target["expr"], variables))],
        )
        for name, document in documents().items()
        for panel in document["panels"]
        for target in panel.get("targets", ())
    ]
