"""Whether processes live, what they need of their machines, and what waits between them."""

from deploy.dashboards.panels import board, graph, quantiles, rate

_SLOWEST = (
    f"topk(10, histogram_quantile(0.99, {rate('aiaas_grpc_server_request_duration_seconds_bucket', 'le, method')}))"
)
_UNTIL_END = "min by (job, certificate) (aiaas_certificate_expiry_timestamp_seconds) - time()"

DASHBOARD = board(
    "infrastructure",
    "infrastructure",
    "Whether processes live, what they need of their machines, what waits between them, and how RPCs between them go.",
    {
        "Processes": [
            graph("Up", "How many of each Prometheus can scrape.", "short", {"{{job}}": "sum by (job) (up)"}),
            graph(
                "Restarts",
                "Starts of a process in the last hour.",
                "short",
                {"{{job}}": "sum by (job) (changes(process_start_time_seconds[1h]))"},
            ),
            graph(
                "CPU",
                "Cores in use. A service is one event loop: near 1 it wants another replica.",
                "short",
                {"{{job}} {{instance}}": "rate(process_cpu_seconds_total[$__rate_interval])"},
            ),
            graph("Memory", "Resident.", "bytes", {"{{job}} {{instance}}": "process_resident_memory_bytes"}),
            graph(
                "File descriptors",
                "Share of those that a process may open: connections of clients, above all.",
                "percentunit",
                {"{{job}} {{instance}}": "process_open_fds / process_max_fds"},
            ),
            graph(
                "Certificates",
                "Until the first one of a process ends, its CAs among them; they are renewed without a restart.",
                "s",
                {"{{job}} {{certificate}}": _UNTIL_END},
            ),
        ],
        "Between them": [
            graph(
                "RPCs that fail",
                "By the code that they end with; UNAVAILABLE is a peer or a server that is away.",
                "reqps",
                {"{{code}}": rate("aiaas_grpc_server_requests_total", "code", '{code!="OK"}')},
            ),
            graph(
                "Slowest RPCs",
                "p99 of the ten slowest.",
                "s",
                {"{{method}}": _SLOWEST},
            ),
            graph(
                "RPCs/s",
                "The ten most frequent.",
                "reqps",
                {"{{method}}": f"topk(10, {rate('aiaas_grpc_server_requests_total', 'method')})"},
            ),
        ],
        "What waits": [
            graph(
                "Usage to be published",
                "Events in routers' journals; they wait while RabbitMQ is away.",
                "short",
                {"{{instance}}": "aiaas_router_usage_queue_events"},
            ),
            graph(
                "Usage to be counted",
                "How far analytics is behind.",
                "s",
                {"behind by": "max(aiaas_analytics_lag_seconds)"},
            ),
            graph(
                "Batches of usage",
                "Time to insert and sum one; a rise is PostgreSQL.",
                "s",
                quantiles("aiaas_analytics_batch_seconds"),
            ),
            graph(
                "Events for people",
                "By what became of them.",
                "short",
                {"{{result}}": rate("aiaas_platform_events_total", "result")},
            ),
            graph(
                "Routers alive",
                "As routers know it, for their share of the limits while Redis is away.",
                "short",
                {"{{instance}}": "aiaas_router_rate_limit_routers"},
            ),
            graph(
                "Limits judged by",
                "redis, or the router alone while Redis is away.",
                "reqps",
                {"{{source}}": rate("aiaas_router_rate_limit_decisions_total", "source")},
            ),
        ],
    },
)
