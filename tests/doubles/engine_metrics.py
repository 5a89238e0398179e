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
    """The metrics of one engine with one model."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._values: list[Gauge | Counter | Histogram] = []
        kinds: tuple[tuple[type[Gauge | Counter | Histogram], tuple[str, ...]], ...] = (
            (Gauge, GAUGES),
            (Counter, COUNTERS),
            (Histogram, HISTOGRAMS),
        )
        for kind, names in kinds:
            for name in names:
                self._values.append(kind(f"vllm:{name}", name, _LABELS, registry=self.registry).labels(model, "0"))
        finished = Counter("vllm:request_success", "Finished.", (*_LABELS, "finished_reason"), registry=self.registry)
        self._values.append(finished.labels(model, "0", "stop"))

    def work(self) -> None:
        """One more request."""
        for value in self._values:
            if isinstance(value, Histogram):
                value.observe(0.1)
            else:
                value.inc()


def names() -> set[str]:
    """Every series that the page has, as a query names it."""
    return {sample.name for family in EngineMetrics("m").registry.collect() for sample in family.samples}
