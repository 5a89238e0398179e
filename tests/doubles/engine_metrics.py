"""A /metrics page with vLLM's own names, that tells of an engine at work; it holds no model and answers no request."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# As vLLM 0.32 has them (vllm/v1/metrics/loggers.py), those that dashboards, scaling and counting may ask for.
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTERS = (
    "num_preemptions",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
)
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "e2e_request_latency_seconds",
)
_LABELS = ("model_name", "engine")


class EngineMetrics:
    """The metrics of one engine with one model, each by its name without `vllm:`."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.gauges = {
            name: Gauge(f"vllm:{name}", name, _LABELS, registry=registry).labels(model, "0") for name in GAUGES
        }
        self.counters = {
            name: Counter(f"vllm:{name}", name, _LABELS, registry=registry).labels(model, "0") for name in COUNTERS
        }
        self.histograms = {
            name: Histogram(f"vllm:{name}", name, _LABELS, registry=registry).labels(model, "0") for name in HISTOGRAMS
        }
        finished = Counter("vllm:request_success", "Finished.", (*_LABELS, "finished_reason"), registry=self.registry)
        self.finished = {reason: finished.labels(model, "0", reason) for reason in ("stop", "length", "abort")}

    def work(self) -> None:
        """One more request."""
        for histogram in self.histograms.values():
            histogram.observe(0.1)
        for gauge in self.gauges.values():
            gauge.inc()
        for counter in (*self.counters.values(), self.finished["stop"]):
            counter.inc()


def names() -> set[str]:
    """Every series that the page has, as a query names it."""
    return {sample.name for family in EngineMetrics("m").registry.collect() for sample in family.samples}
