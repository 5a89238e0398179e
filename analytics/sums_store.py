"""All SQL that reads sums: of usage, spend and reliability, by days and hours together; it never writes one."""

from __future__ import annotations

from typing import Any, TypeVar

from aiaas.analytics.v1.usage_service_pb2 import UsageDimension
from analytics.conditions import Conditions
from analytics.reliability import FAILURES, QUANTILES, OutcomeCount, Percentiles, ReliabilityTotals
from analytics.rollups import SKETCHES
from analytics.sketches import COUNT_BITS, COUNT_MASK
from analytics.spend import SpendTotals
from analytics.usage import Bucket, BucketPlace, Totals, UsageQuery
from analytics.usage_range import Coverage, spans_of
from mesh.database import Connection, Database

T = TypeVar("T", Totals, SpendTotals)

# Outcomes by their number in the contract: 1 succeeded, 2 refused.
_ADMITTED = "coalesce(sum(requests) FILTER (WHERE outcome <> 2), 0)::bigint AS requests"
_USAGE = f"""
    {_ADMITTED},
    coalesce(sum(requests) FILTER (WHERE outcome NOT IN (1, 2)), 0)::bigint AS failed_requests,
    coalesce(sum(requests) FILTER (WHERE outcome = 2), 0)::bigint AS refused_requests,
    sum(prompt_tokens)::bigint AS prompt_tokens,
    sum(cached_prompt_tokens)::bigint AS cached_prompt_tokens,
    sum(completion_tokens)::bigint AS completion_tokens,
    sum(cost_micros)::bigint AS cost_micros
"""
_SPEND = f"""
    sum(cost_micros)::bigint AS cost_micros,
    sum(prompt_cost_micros)::bigint AS prompt_cost_micros,
    sum(cached_prompt_cost_micros)::bigint AS cached_prompt_cost_micros,
    sum(completion_cost_micros)::bigint AS completion_cost_micros,
    {_ADMITTED}
"""
_FAILED = f"coalesce(sum(requests) FILTER (WHERE outcome IN ({', '.join(map(str, FAILURES))})), 0)::bigint AS failed"

_GROUPS = {
    UsageDimension.USAGE_DIMENSION_API_KEY: "api_key_id",
    UsageDimension.USAGE_DIMENSION_USER: "user_id",
    UsageDimension.USAGE_DIMENSION_SERVICE_ACCOUNT: "service_account_id",
    UsageDimension.USAGE_DIMENSION_MODEL: "model",
    UsageDimension.USAGE_DIMENSION_BACKEND: "backend_id",
    UsageDimension.USAGE_DIMENSION_ENDPOINT: 'endpoint::text COLLATE "C"',
    UsageDimension.USAGE_DIMENSION_OUTCOME: 'outcome::text COLLATE "C"',
}


class SumsStore:
    """The tables of sums. Every method raises PlatformError(UNAVAILABLE) when PostgreSQL is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def coverage(self) -> Coverage:
        """What sums there are. Days may be closed meanwhile: hours of a closed day are not gone for long after."""
        ((closed_until, hourly_since),) = await self._database.fetch(
            "SELECT closed_until, hourly_since FROM usage_rollups"
        )
        return Coverage(closed_until, hourly_since)

    async def usage(self, query: UsageQuery) -> tuple[list[Bucket[Totals]], Totals]:
        """Buckets in the order of time, then group, at most one more than the page holds, and the sums over all."""
        return await self._sums(query, _USAGE, Totals)

    async def spend(self, query: UsageQuery) -> tuple[list[Bucket[SpendTotals]], SpendTotals]:
        """The same of cost."""
        return await self._sums(query, _SPEND, SpendTotals)

    async def top_spend(self, query: UsageQuery) -> tuple[list[tuple[str, SpendTotals]], SpendTotals]:
        """The costliest groups, which are of one dimension, costliest first, as many as the page holds; and the sums
        over all. What costs nothing is not among them."""
        question = _Question(query)
        rows = await self._database.fetch(
            f"""
            WITH buckets AS MATERIALIZED (
                SELECT {question.places}, {_SPEND} FROM {question.source} GROUP BY {question.place}
            ), top AS (
                SELECT * FROM buckets WHERE cost_micros > 0
                ORDER BY cost_micros DESC, g0 LIMIT {question.where.parameter(query.page_size)}
            )
            SELECT 0 AS bucket, '' AS g0, {_over_all(SpendTotals)} FROM buckets
            UNION ALL
            SELECT * FROM top ORDER BY bucket, cost_micros DESC, g0
            """,  # noqa: S608
            *question.where.parameters,
        )
        (_, _, *totals), *top = rows
        return [(row[1], SpendTotals(*row[2:])) for row in top], SpendTotals(*totals)

    async def reliability(
        self, query: UsageQuery, before: UsageQuery | None
    ) -> tuple[list[Bucket[ReliabilityTotals]], ReliabilityTotals, ReliabilityTotals | None]:
        """Buckets as those of usage, the totals over all, and over the time `before` if that is given; all of one
        moment."""
        async with self._database.transaction() as connection:
            # PostgreSQL expects two rows where there are thousands, and would compare each with each.
            await connection.execute(
                "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET LOCAL enable_nestloop = off"
            )
            totals, buckets = await _reliability(connection, query)
            previous = (await _reliability(connection, before))[0] if before else None
        return buckets, totals, previous

    async def _sums(self, query: UsageQuery, sums: str, kind: type[T]) -> tuple[list[Bucket[T]], T]:
        question = _Question(query)
        place, groups = question.place, "".join(f", '' AS {group}" for group in question.groups)
        # Made of constants of this file; values are parameters.
        sql = f"""
            WITH buckets AS MATERIALIZED (
                SELECT {question.places}, {sums} FROM {question.source} GROUP BY {place}
            ), page AS (
                {question.paged("buckets")}
            )
            SELECT 0 AS bucket{groups}, {_over_all(kind)} FROM buckets
            UNION ALL
            SELECT * FROM page ORDER BY {place}
        """  # noqa: S608
        totals, *rows = await self._database.fetch(sql, *question.where.parameters)
        width = 1 + len(question.groups)
        buckets = [Bucket(BucketPlace(row[0], tuple(row[1:width])), kind(*row[width:])) for row in rows]
        return buckets, kind(*totals[width:])


class _Question:
    """The parts of a statement that every question has: which rows, in which places."""

    def __init__(self, query: UsageQuery) -> None:
        self._query = query
        self.where = where = Conditions()
        edges = where.parameter(query.edges[:-1])
        where.add("organization_id = {}", query.organization_id)
        where.add_filter(query.filter)
        self.source = where.sums(query.organization_id, *spans_of(query.edges, query.coverage.closed_until))
        self.groups = [f"g{index}" for index in range(len(query.group_by))]
        self.place = ", ".join(["bucket", *self.groups])
        selected = [
            f"{_GROUPS[dimension]} AS {group}" for group, dimension in zip(self.groups, query.group_by, strict=True)
        ]
        self.places = ", ".join([f"width_bucket(start, {edges}::timestamptz[]) AS bucket", *selected])

    def paged(self, rows: str) -> str:
        """The page of some rows that have places, and one more."""
        after = self._query.after or BucketPlace(0, ("",) * len(self.groups))
        start = ", ".join([f"{self.where.parameter(after.bucket)}::int", *map(self.where.parameter, after.group)])
        limit = self.where.parameter(self._query.page_size + 1)
        return f"SELECT * FROM {rows} WHERE ({self.place}) > ({start}) ORDER BY {self.place} LIMIT {limit}"  # noqa: S608


async def _reliability(
    connection: Connection, query: UsageQuery
) -> tuple[ReliabilityTotals, list[Bucket[ReliabilityTotals]]]:
    """The totals over all, and the page. Places are numbered, since what is counted by numbers is counted fast: 0 is
    what lies beyond the page, and in the end all of it."""
    question = _Question(query)
    place = question.place
    # Made of constants of this file; values are parameters.
    sql = f"""
        WITH sums AS MATERIALIZED (
            SELECT {question.places}, outcome, reason, requests, latency, ttft FROM {question.source}
        ), buckets AS MATERIALIZED (
            SELECT {place}, {_ADMITTED}, {_FAILED} FROM sums GROUP BY {place}
        ), page AS MATERIALIZED (
            SELECT row_number() OVER (ORDER BY {place}) AS number, * FROM ({question.paged("buckets")}) AS found
        ), numbered AS MATERIALIZED (
            SELECT coalesce(number, 0) AS number, outcome, reason, sums.requests, latency, ttft
            FROM sums LEFT JOIN page USING ({place})
        ), {_with_all("ends", "outcome, reason", "numbered")}, outcomes AS (
            SELECT number, array_agg((outcome, reason, requests) ORDER BY outcome, reason) AS outcomes
            FROM ends GROUP BY number
        ), {", ".join(map(_percentiles, SKETCHES))}, answer AS (
            SELECT * FROM page
            UNION ALL
            SELECT 0, 0{", ''" * len(question.groups)}, sum(requests)::bigint, sum(failed)::bigint FROM buckets
        )
        SELECT {place}, answer.requests, failed, outcomes,
            {", ".join(f"{name}.buckets, {name}.samples" for name in SKETCHES)}
        FROM answer {" ".join(f"LEFT JOIN {name} USING (number)" for name in ("outcomes", *SKETCHES))}
        ORDER BY number
    """  # noqa: S608
    width = 1 + len(question.groups)
    totals, *rows = await connection.fetch(sql, *question.where.parameters)
    return _totals(*totals[width:]), [
        Bucket(BucketPlace(row[0], tuple(row[1:width])), _totals(*row[width:])) for row in rows
    ]


def _with_all(name: str, columns: str, rows: str) -> str:
    """A common table expression of the requests by number and columns, those of all numbers together under 0."""
    return f"""
        {name}_by_number AS MATERIALIZED (
            SELECT number, {columns}, sum(requests)::bigint AS requests FROM {rows} GROUP BY number, {columns}
        ), {name} AS (
            SELECT * FROM {name}_by_number WHERE number > 0
            UNION ALL
            SELECT 0, {columns}, sum(requests)::bigint FROM {name}_by_number GROUP BY {columns}
        )
    """  # noqa: S608


def _percentiles(name: str) -> str:
    """Common table expressions of which the last, `name`, has the buckets of the QUANTILES of each number."""
    ranks = ", ".join(f"min(cell) FILTER (WHERE upto > {quantile} * (samples - 1))" for quantile in QUANTILES)
    counted = f"""(
        SELECT number, cell >> {COUNT_BITS} AS cell, cell & {COUNT_MASK} AS requests
        FROM (SELECT number, unnest({name}) AS cell FROM numbered) AS unnested
    ) AS counted"""  # noqa: S608
    return f"""
        {_with_all(f"{name}_cells", "cell", counted)}, {name}_ranks AS (
            SELECT number, cell, sum(requests) OVER (PARTITION BY number ORDER BY cell) AS upto,
                sum(requests) OVER (PARTITION BY number) AS samples
            FROM {name}_cells
        ), {name} AS (
            SELECT number, ARRAY[{ranks}] AS buckets, max(samples)::bigint AS samples FROM {name}_ranks GROUP BY number
        )
    """  # noqa: S608


def _totals(
    requests: int | None,
    failed: int | None,
    outcomes: list[Any] | None,
    latency: list[int] | None,
    timed: int | None,
    ttft: list[int] | None,
    streamed: int | None,
) -> ReliabilityTotals:
    return ReliabilityTotals(
        requests or 0,
        failed or 0,
        tuple(OutcomeCount(*outcome) for outcome in outcomes or ()),
        Percentiles(tuple(latency or ()), timed or 0),
        Percentiles(tuple(ttft or ()), streamed or 0),
    )


def _over_all(kind: type[Totals] | type[SpendTotals]) -> str:
    return ", ".join(f"coalesce(sum({name}), 0)::bigint AS {name}" for name in kind._fields)
