"""Names what the router measures; it never decides anything by it. Children are bound once and kept."""

from functools import cache
from typing import NamedTuple

from prometheus_client import Counter, Gauge

from mesh.tallies import HotCounter, HotHistogram, Spread, Tally

REQUESTS = HotCounter(
    "aiaas_router_requests", "Inference requests that ended, by outcome.", ["endpoint", "model", "outcome"]
)
TOKENS = HotCounter(
    "aiaas_router_tokens", "Tokens as billed: prompt (cached ones included) or completion.", ["model", "kind"]
)
COST = HotCounter("aiaas_router_cost_micros", "Micro-dollars as billed, by the prices that applied.", ["model"])
TIME_TO_FIRST_TOKEN = HotHistogram(
    "aiaas_router_time_to_first_token_seconds",
    "Seconds from admission to the first byte of the answer, which of one that is not streamed is its end.",
    ["endpoint", "model", "streamed"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2.5, 5, 10, 30, 60),
)
OVERHEAD = HotHistogram(
    "aiaas_router_overhead_seconds",
    "Seconds from admission to the first attempt on a backend: what a request waits for the router itself.",
    ["endpoint"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
)
REQUEST_DURATION = HotHistogram(
    "aiaas_router_request_duration_seconds",
    "Seconds from admission to the end of the request.",
    ["endpoint", "model"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)
REQUESTS_IN_FLIGHT = Gauge("aiaas_router_requests_in_flight", "Requests that a backend is working on.", ["backend"])
BACKEND_HEALTHY = Gauge("aiaas_router_backend_healthy", "1 where the last probes of a backend succeeded.", ["backend"])
BREAKER_OPEN = Gauge(
    "aiaas_router_breaker_open", "1 where a backend is left alone, as it failed too often.", ["backend", "model"]
)
EXTRA_ATTEMPTS = Counter(
    "aiaas_router_extra_attempts",
    "Attempts beyond a request's first: a retry, a hedge, or a fallback to another model.",
    ["model", "kind"],
)
ATTEMPTS_REFUSED = Counter(
    "aiaas_router_refused_attempts",
    "Retries and hedges that were not made, as there had been too many of them.",
    ["model", "kind"],
)
UNPRICED_MODELS = Gauge("aiaas_router_unpriced_models", "Models that cannot be used, since they have no price.")
USAGE_QUEUE = Gauge("aiaas_router_usage_queue_events", "Usage events that wait to be published.")
USAGE_AGE = Gauge(
    "aiaas_router_usage_oldest_event_age_seconds",
    "Seconds that the first of the usage events that wait to be published has waited; 0 if none does.",
)
USAGE_DROPPED = Counter(
    "aiaas_router_usage_dropped_events", "Events of refused requests, billed nothing, that the journal had no room for."
)
USAGE_PUBLISH_FAILURES = Counter(
    "aiaas_router_usage_publish_failures", "Tries to publish a message of usage events that failed."
)
JOURNAL_OPEN = Gauge("aiaas_router_journal_open_entries", "Requests in the journal that run.")
JOURNAL_SIZE = Gauge("aiaas_router_journal_size_bytes", "Bytes of the journal that are in use.")
JOURNAL_LIMIT = Gauge("aiaas_router_journal_limit_bytes", "Size of the journal near which no request is admitted.")
JOURNAL_WRITE_FAILURES = Counter("aiaas_router_journal_write_failures", "Tries to write to the journal that failed.")
JOURNAL_ABORTED = Counter(
    "aiaas_router_journal_aborted_requests", "Requests that ran when the router died, settled at its next start."
)

RATE_LIMIT_DECISIONS = HotCounter(
    "aiaas_router_rate_limit_decisions",
    "Requests judged by rate limits: the limit that refused one, if any, and who judged, Redis or the router alone.",
    ["outcome", "limit", "source"],
)
RATE_LIMIT_ROUTERS = Gauge("aiaas_router_rate_limit_routers", "Live routers, as this one knew last.")

IDEMPOTENCY_DECISIONS = Counter(
    "aiaas_router_idempotency_decisions",
    "Requests with an Idempotency-Key: those that ran, were answered with a kept answer, or were refused, and why.",
    ["decision"],
)

BUDGET_LEASES = Gauge("aiaas_router_budget_leases", "Leases of budgets that this router holds.")
BUDGET_REFUSALS = Counter(
    "aiaas_router_budget_refusals",
    "Requests that budgets refused or stopped: spent, the ledger unavailable, or stopped as a lease ended.",
    ["cause"],
)
BUDGET_RENEWAL_FAILURES = Counter(
    "aiaas_router_budget_renewal_failures", "Reports to the ledger of budgets that failed."
)


@cache
def requests(endpoint: str, model: str, outcome: str) -> Tally:
    """The counter of one endpoint, registered model and outcome."""
    return REQUESTS.labels(endpoint, model, outcome)


class Billed(NamedTuple):
    """What counts a model's bills."""

    prompt_tokens: Tally
    completion_tokens: Tally
    cost_micros: Tally


@cache
def billed(model: str) -> Billed:
    """The counters of one registered model."""
    return Billed(TOKENS.labels(model, "prompt"), TOKENS.labels(model, "completion"), COST.labels(model))


@cache
def time_to_first_token(endpoint: str, model: str, streamed: bool) -> Spread:
    """The histogram of one endpoint and registered model, of answers that are streamed or not."""
    return TIME_TO_FIRST_TOKEN.labels(endpoint, model, "true" if streamed else "false")


@cache
def overhead(endpoint: str) -> Spread:
    """The histogram of one endpoint."""
    return OVERHEAD.labels(endpoint)


@cache
def request_duration(endpoint: str, model: str) -> Spread:
    """The histogram of one endpoint and registered model."""
    return REQUEST_DURATION.labels(endpoint, model)
