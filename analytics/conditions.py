"""Where the rows of a question about usage are, and which; values never become part of a statement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analytics.usage import Filter
from analytics.usage_range import Span


class Conditions:
    """The conditions of a WHERE and the values of its parameters."""

    def __init__(self) -> None:
        self.parameters: list[Any] = []
        self._conditions: list[str] = []

    def __str__(self) -> str:
        return " AND ".join(self._conditions)

    def parameter(self, value: Any) -> str:
        """The placeholder of a value."""
        self.parameters.append(value)
        return f"${len(self.parameters)}"

    def add(self, condition: str, *values: Any) -> None:
        """A condition whose {} stand for values."""
        self._conditions.append(condition.format(*map(self.parameter, values)))

    def add_filter(self, usage_filter: Filter) -> None:
        """The conditions of a filter."""
        for column, values in (
            ("api_key_id", usage_filter.api_key_ids),
            ("user_id", usage_filter.user_ids),
            ("service_account_id", usage_filter.service_account_ids),
            ("model", usage_filter.models),
            ("backend_id", usage_filter.backend_ids),
            ("endpoint", usage_filter.endpoints),
            ("outcome", usage_filter.outcomes),
        ):
            if values:
                self.add(f"{column} = ANY({{}})", values)

    def sums(self, organization_id: str, days: Sequence[Span], hours: Sequence[Span]) -> str:
        """The sums of an organization's days and hours, as a part of FROM named sums, `start` being their day or hour.

        Their keys are compared as rows, so that no index fits but that of the keys: PostgreSQL expects too much of the
        one by time alone, and would read all organizations.
        """
        organization = self.parameter(organization_id)
        tables = []
        for table, period, spans in (("usage_daily", "day", days), ("usage_hourly", "hour", hours)):
            starts, ends = (self.parameter([span[index] for span in spans]) for index in (0, 1))
            tables.append(
                f"SELECT {period} AS start, {table}.*"  # noqa: S608
                f" FROM unnest({starts}::timestamptz[], {ends}::timestamptz[]) AS span (since, until)"
                f" JOIN {table} ON (organization_id, {period}) >= ({organization}, since)"
                f" AND (organization_id, {period}) < ({organization}, until) WHERE {self}"
            )
        return f"({' UNION ALL '.join(tables)}) AS sums"
