"""GET /v1/organization/usage/* and /v1/organization/costs: analytics' buckets in OpenAI's words; it adds up nothing.

OpenAI's pages are cut by time, so a page here is a range of time: its cursor is where the next one begins.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from aiaas.analytics.v1 import spend_service_pb2, spend_service_pb2_grpc, usage_service_pb2, usage_service_pb2_grpc
from aiaas.identity.v1 import auth_service_pb2, auth_service_pb2_grpc
from aiaas.type.v1 import usage_event_pb2
from edge.exchange import exchange_of
from edge.openai.organization.query import Query, wrong
from edge.openai.organization.shapes import (
    Amount,
    Bucket,
    BucketPage,
    CompletionsResult,
    CostsResult,
    EmbeddingsResult,
    Result,
)
from edge.peers import Peer, Peers
from mesh.clock import Clock, SystemClock

COSTS = "/v1/organization/costs"
"""The path of the costs."""

_HOUR_S, _DAY_S = 3600, 86400
_TIMEOUT_S = 30.0
_ROWS = 10_000
_LAST_S = 253_402_300_799
_CURSOR = "page_"
_JSON = (b"content-type", b"application/json")
_NO_STORE = (b"cache-control", b"no-store")
_INTERVALS: Mapping[int, usage_service_pb2.UsageInterval.ValueType] = {
    _HOUR_S: usage_service_pb2.USAGE_INTERVAL_HOUR,
    _DAY_S: usage_service_pb2.USAGE_INTERVAL_DAY,
}
# A dimension that analytics knows, or none: what is grouped by that has one value here.
_DIMENSIONS: Mapping[str, usage_service_pb2.UsageDimension.ValueType | None] = {
    "project_id": None,
    "user_id": usage_service_pb2.USAGE_DIMENSION_USER,
    "api_key_id": usage_service_pb2.USAGE_DIMENSION_API_KEY,
    "model": usage_service_pb2.USAGE_DIMENSION_MODEL,
    "batch": None,
    "service_tier": None,
    "api_source": None,
}
_COST_DIMENSIONS: Mapping[str, usage_service_pb2.UsageDimension.ValueType | None] = {
    "project_id": None,
    "user_id": usage_service_pb2.USAGE_DIMENSION_USER,
    "api_key_id": usage_service_pb2.USAGE_DIMENSION_API_KEY,
    "line_item": usage_service_pb2.USAGE_DIMENSION_MODEL,
    "api_source": None,
}


@dataclass(frozen=True, slots=True)
class Width:
    """How many buckets of one width a page has, and how many it can have."""

    seconds: int
    default: int
    most: int


_USAGE_WIDTHS = {"1d": Width(_DAY_S, 7, 31), "1h": Width(_HOUR_S, 24, 168)}
_COST_WIDTHS = {"1d": Width(_DAY_S, 7, 180)}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of usage: the endpoints that it counts, none where this platform has nothing of the kind."""

    endpoints: tuple[usage_event_pb2.Endpoint.ValueType, ...] = ()
    result: type[CompletionsResult] | type[EmbeddingsResult] = CompletionsResult


USAGE: Mapping[str, Kind] = {
    "/v1/organization/usage/completions": Kind(
        (
            usage_event_pb2.ENDPOINT_CHAT_COMPLETIONS,
            usage_event_pb2.ENDPOINT_COMPLETIONS,
            usage_event_pb2.ENDPOINT_RESPONSES,
            usage_event_pb2.ENDPOINT_MESSAGES,
        )
    ),
    "/v1/organization/usage/embeddings": Kind((usage_event_pb2.ENDPOINT_EMBEDDINGS,), EmbeddingsResult),
    **{
        f"/v1/organization/usage/{name}": Kind()
        for name in (
            "audio_speeches",
            "audio_transcriptions",
            "code_interpreter_sessions",
            "decisions",
            "file_search_calls",
            "images",
            "moderations",
            "vector_stores",
            "web_search_calls",
        )
    },
}
"""Paths, and what they count."""

_COMMON = ("start_time", "end_time", "bucket_width", "limit", "page", "group_by", "project_ids", "api_key_ids")
USAGE_PARAMETERS = (*_COMMON, "user_ids", "models", "batch")
"""What a query for usage can have."""
COST_PARAMETERS = (*_COMMON, "line_items")
"""What a query for costs can have."""


@dataclass(frozen=True, slots=True)
class Range:
    """The buckets of one page. All times are Unix seconds; `until` is where the last bucket is cut off."""

    start: int
    width: int
    count: int
    until: int
    has_more: bool

    @property
    def next_page(self) -> str | None:
        """The cursor of the page after this one."""
        return f"{_CURSOR}{self.start + self.count * self.width}" if self.has_more else None


def read_range(query: Query, widths: Mapping[str, Width], now_s: int) -> Range:
    """The buckets that a query asks for; they begin where a bucket begins in UTC, as OpenAI's do.

    Raises PlatformError(INVALID_ARGUMENT) naming the parameter.
    """
    width = widths[query.choice("bucket_width", widths, "1d")]
    start = query.number("start_time", 0, _LAST_S)
    if start is None:
        raise wrong("start_time", "Unix seconds")
    end = query.number("end_time", 0, _LAST_S)
    end = now_s if end is None else end
    if end < start:
        raise wrong("end_time", "Unix seconds, not before start_time")
    limit = query.number("limit", 1, width.most) or width.default
    first = start - start % width.seconds
    cursor = query.text("page")
    if cursor is not None:
        first = _read_cursor(cursor, first, width.seconds)
    count = min(limit, max(0, -(-(end - first) // width.seconds)))
    last = first + count * width.seconds
    return Range(first, width.seconds, count, min(last, end), last < end)


def _read_cursor(cursor: str, first: int, width: int) -> int:
    digits = cursor.removeprefix(_CURSOR)
    if not (cursor.startswith(_CURSOR) and digits.isascii() and digits.isdigit() and len(digits) < 13):
        raise wrong("page", "the next_page of an answer")
    place = int(digits)
    if place < first or place % width:
        raise wrong("page", "the next_page of an answer to the same question")
    return place


class _Report:
    """What usage and costs have in common: whose they are, their filter, their buckets."""

    def __init__(self, path: str, peers: Peers, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._identity = peers["identity"]
        self._analytics = peers["analytics"]
        self._auth = auth_service_pb2_grpc.AuthServiceStub(self._identity.channel)
        self._usage = usage_service_pb2_grpc.UsageServiceStub(self._analytics.channel)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises PlatformError."""
        exchange = exchange_of(scope)
        exchange.route = self._path
        exchange.allow("GET")
        exchange.take_credential()
        page = await self._page(scope["query_string"])
        await exchange.respond(200, [_JSON, _NO_STORE], msgspec.json.encode(page))

    async def _page(self, encoded: bytes) -> BucketPage:
        raise NotImplementedError

    async def _project(self, query: Query) -> str:
        """The project that is asked for, else the caller's own; whether it may be seen, analytics decides."""
        projects = list(dict.fromkeys(query.texts("project_ids")))
        if len(projects) > 1 or projects == [""]:
            raise wrong("project_ids", "the id of one project")
        if projects:
            return projects[0]
        request = auth_service_pb2.GetCurrentPrincipalRequest()
        answer = await self._identity.call(self._auth.GetCurrentPrincipal, request, _TIMEOUT_S)
        return answer.principal.organization_id

    async def _nothing(self, project: str, buckets: Range) -> BucketPage:
        """Empty buckets, for whoever may see that there is nothing: analytics decides that too."""
        request = usage_service_pb2.QueryUsageRequest(organization_id=project, page_size=1)
        request.start_time.FromSeconds(buckets.start)
        request.end_time.FromSeconds(buckets.start + buckets.width)
        await self._analytics.call(self._usage.QueryUsage, request, _TIMEOUT_S)
        return _page_of(buckets, {})

    def _now_s(self) -> int:
        return int(self._clock.now().timestamp())


class UsageEndpoint(_Report):
    """An ASGI endpoint for one path of `USAGE`."""

    def __init__(self, path: str, peers: Peers, clock: Clock | None = None) -> None:
        super().__init__(path, peers, clock or SystemClock())
        self._kind = USAGE[path]

    async def _page(self, encoded: bytes) -> BucketPage:
        query = Query(encoded, USAGE_PARAMETERS)
        buckets = read_range(query, _USAGE_WIDTHS, self._now_s())
        group_by = query.choices("group_by", _DIMENSIONS) if self._kind.endpoints else []
        project = await self._project(query)
        # Nothing runs in batches here.
        if not self._kind.endpoints or query.boolean("batch") or not buckets.count:
            return await self._nothing(project, buckets)
        request = usage_service_pb2.QueryUsageRequest(
            organization_id=project,
            interval=_INTERVALS[buckets.width],
            group_by=_asked(group_by, _DIMENSIONS),
            filter=usage_service_pb2.UsageFilter(
                api_key_ids=query.texts("api_key_ids"),
                user_ids=query.texts("user_ids"),
                models=query.texts("models"),
                endpoints=self._kind.endpoints,
            ),
            page_size=_ROWS,
        )
        rows = await _all_rows(self._analytics, self._usage.QueryUsage, request, buckets)
        constants: dict[str, Any] = {"project_id": project}
        if self._kind.result is CompletionsResult:
            constants |= {"batch": False, "api_source": "unlabeled"}
        fixed = {name: constants[name] for name in group_by if name in constants}
        return _page_of(buckets, {start: [self._result(row, fixed) for row in group] for start, group in rows.items()})

    def _result(self, row: usage_service_pb2.UsageBucket, fixed: Mapping[str, Any]) -> Result:
        totals = row.totals
        said = {**fixed, **_group(row, _DIMENSIONS)}
        if self._kind.result is EmbeddingsResult:
            return EmbeddingsResult(
                input_tokens=totals.prompt_tokens,
                num_model_requests=totals.requests,
                **{name: value for name, value in said.items() if name in EmbeddingsResult.__struct_fields__},
            )
        return CompletionsResult(
            input_tokens=totals.prompt_tokens,
            output_tokens=totals.completion_tokens,
            input_cached_tokens=totals.cached_prompt_tokens,
            input_uncached_tokens=totals.prompt_tokens - totals.cached_prompt_tokens,
            num_model_requests=totals.requests,
            **said,
        )


class CostsEndpoint(_Report):
    """An ASGI endpoint for `COSTS`. A line item is a model and what was paid for, for example "smollm2, input"."""

    def __init__(self, peers: Peers, clock: Clock | None = None) -> None:
        super().__init__(COSTS, peers, clock or SystemClock())
        self._stub = spend_service_pb2_grpc.SpendServiceStub(self._analytics.channel)

    async def _page(self, encoded: bytes) -> BucketPage:
        query = Query(encoded, COST_PARAMETERS)
        buckets = read_range(query, _COST_WIDTHS, self._now_s())
        group_by = query.choices("group_by", _COST_DIMENSIONS)
        line_items = frozenset(query.texts("line_items"))
        project = await self._project(query)
        if not buckets.count:
            return await self._nothing(project, buckets)
        request = spend_service_pb2.QuerySpendRequest(
            organization_id=project,
            interval=_INTERVALS[buckets.width],
            group_by=_asked(group_by, _COST_DIMENSIONS),
            filter=usage_service_pb2.UsageFilter(
                api_key_ids=query.texts("api_key_ids"),
                models=sorted({item.rpartition(", ")[0] for item in line_items}),
            ),
            page_size=_ROWS,
        )
        rows = await _all_rows(self._analytics, self._stub.QuerySpend, request, buckets)
        constants = {"project_id": project, "api_source": "unlabeled"}
        fixed = {name: constants[name] for name in group_by if name in constants}
        by_item = "line_item" in group_by
        return _page_of(
            buckets,
            {
                start: [result for row in group for result in _costs(row, fixed, line_items, by_item=by_item)]
                for start, group in rows.items()
            },
        )


def _costs(
    row: spend_service_pb2.SpendBucket, fixed: Mapping[str, Any], wanted: frozenset[str], *, by_item: bool
) -> Iterable[CostsResult]:
    """The results of one row: one, or one for each line item that cost something."""
    said = {**fixed, **_group(row, _COST_DIMENSIONS)}
    if not by_item:
        yield CostsResult(amount=_dollars(row.totals.cost_micros), **said)
        return
    model = said.pop("line_item") or ""
    for what, cost_micros in (
        ("input", row.totals.prompt_cost_micros),
        ("cached input", row.totals.cached_prompt_cost_micros),
        ("output", row.totals.completion_cost_micros),
    ):
        item = f"{model}, {what}"
        if cost_micros and (not wanted or item in wanted):
            yield CostsResult(amount=_dollars(cost_micros), line_item=item, **said)


def _dollars(micros: int) -> Amount:
    return Amount(value=micros / 1_000_000)


def _asked(
    group_by: list[str], dimensions: Mapping[str, usage_service_pb2.UsageDimension.ValueType | None]
) -> list[usage_service_pb2.UsageDimension.ValueType]:
    return [dimension for name in group_by if (dimension := dimensions[name]) is not None]


def _group(
    row: usage_service_pb2.UsageBucket | spend_service_pb2.SpendBucket,
    dimensions: Mapping[str, usage_service_pb2.UsageDimension.ValueType | None],
) -> dict[str, str | None]:
    """The values of a row's group under OpenAI's names; None where there is no value."""
    names = {dimension: name for name, dimension in dimensions.items() if dimension is not None}
    return {names[value.dimension]: value.value or None for value in row.group}


async def _all_rows(
    analytics: Peer, rpc: Callable[..., Awaitable[Any]], request: Any, buckets: Range
) -> dict[int, list[Any]]:
    """Every row of the answer, all its pages together, by the Unix second where its bucket begins."""
    request.start_time.FromSeconds(buckets.start)
    request.end_time.FromSeconds(buckets.until)
    rows: dict[int, list[Any]] = {}
    while True:
        answer = await analytics.call(rpc, request, _TIMEOUT_S)
        for row in answer.buckets:
            rows.setdefault(row.start_time.seconds, []).append(row)
        if not answer.next_page_token:
            return rows
        request.page_token = answer.next_page_token


def _page_of(buckets: Range, results: Mapping[int, list[Result]]) -> BucketPage:
    starts = (buckets.start + number * buckets.width for number in range(buckets.count))
    data = [
        Bucket(start_time=start, end_time=start + buckets.width, results=results.get(start, [])) for start in starts
    ]
    return BucketPage(data=data, has_more=buckets.has_more, next_page=buckets.next_page)
