"""Names what analytics measures; it never decides anything by it."""

from prometheus_client import Counter, Gauge, Histogram

EVENTS = Counter(
    "aiaas_analytics_events_total",
    "Usage events by what became of them; one that is rejected counts at each delivery.",
    ["result"],
)
BATCH_SECONDS = Histogram(
    "aiaas_analytics_batch_seconds",
    "Seconds to read, insert and sum one batch of usage events.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
LAG_SECONDS = Gauge("aiaas_analytics_lag_seconds", "Seconds since usage was last known to be complete; NaN if never.")
QUEUED_EVENTS = Gauge(
    "aiaas_analytics_queued_events", "Usage events that wait in the queue, about; NaN while the broker is away."
)
DEAD_LETTERED_EVENTS = Gauge(
    "aiaas_analytics_dead_lettered_events", "Usage events that were put aside, at least; NaN while the broker is away."
)
CONSUMERS = Gauge("aiaas_analytics_consumers", "Processes that take usage events; NaN while the broker is away.")

PLATFORM_EVENTS = Counter(
    "aiaas_platform_events_total",
    "Events for people by what became of them; one that is refused counts at each delivery.",
    ["result"],
)
WEBHOOK_DELIVERIES = Counter(
    "aiaas_webhook_deliveries_total",
    "Attempts to send an event to a webhook: succeeded, retried (to be tried again), failed (given up).",
    ["outcome"],
)
WEBHOOK_PENDING = Gauge(
    "aiaas_webhook_pending", "Deliveries that are not accepted yet, of all processes together; ten seconds old at most."
)

STATEMENTS = Counter(
    "aiaas_analytics_statements_total", "Statements by what became of them: issued, failed.", ["outcome"]
)

RECONCILIATION_DIFFERENCES = Gauge(
    "aiaas_reconciliation_differences",
    "Lines on which another record (journal, ledger, engines) and analytics differ, in the last hour compared.",
    ["kind"],
)
RECONCILIATION_HOUR = Gauge(
    "aiaas_reconciliation_hour_timestamp_seconds", "Start of the last hour that was compared.", ["kind"]
)
ENGINE_RESIDUAL_TOKENS = Gauge(
    "aiaas_reconciliation_engine_residual_tokens",
    "Tokens of the last hour that engines counted and nobody was billed, or the reverse, and that nothing explains.",
    ["kind"],
)

ANOMALIES = Counter(
    "aiaas_anomalies_total",
    "Hours of an organization that were unlike its hours before, by what was (spend, error_rate).",
    ["kind"],
)

INSERTED = EVENTS.labels("inserted")
DUPLICATE = EVENTS.labels("duplicate")
REJECTED = EVENTS.labels("rejected")
EVENTS_KEPT = PLATFORM_EVENTS.labels("kept")
EVENTS_REPEATED = PLATFORM_EVENTS.labels("repeated")
EVENTS_REFUSED = PLATFORM_EVENTS.labels("refused")
EXPORTS = Counter("aiaas_analytics_exports_total", "Exports that ended, by how.", ["outcome"])
EXPORT_BYTES = Counter("aiaas_analytics_export_bytes_total", "Bytes of exports that were written to object storage.")
