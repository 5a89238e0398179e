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

INSERTED = EVENTS.labels("inserted")
DUPLICATE = EVENTS.labels("duplicate")
REJECTED = EVENTS.labels("rejected")
