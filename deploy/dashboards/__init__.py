"""Grafana's dashboards as code; `json/` is made from it, for the chart and for whoever imports them by hand. They read
Prometheus alone, and no panel names a metric that is not there (tests/observability)."""
