"""The first dashboard to open: whether clients are served, how fast, and what is refused."""

from deploy.dashboards.panels import board, graph, number, quantiles, rate, share

_INFERENCE = '{route=~"/v1/.*"}'

DASHBOARD = board(
    "system",
    "system",
    "Whether clients are served, how fast, and what is refused. Look here first.",
    {
        "Now": [
            number("Requests/s", "All requests of clients.", "reqps", rate("aiaas_edge_requests_total")),
            number(
                "Failures",
                "Share of requests that failed by our fault (5xx), clients that went away left out.",
                "percentunit",
                share("aiaas_edge_requests_total", '{status_class="5xx"}'),
            ),
            number(
                "p95 to the first token",
                "Of all models, from admission to the first byte of an answer.",
                "s",
                quantiles("aiaas_router_time_to_first_token_seconds")["p95"],
            ),
            number("Running", "Requests that engines work on.", "short", "sum(aiaas_router_requests_in_flight)"),
            number(
                "Healthy backends",
                "Engines that routers may ask.",
                "short",
                "sum(max by (backend) (aiaas_router_backend_healthy))",
            ),
            number("Processes down", "Targets that Prometheus cannot scrape.", "short", "count(up == 0) or vector(0)"),
        ],
        "Requests": [
            graph(
                "Requests by status",
                "4xx is for clients to mend, 5xx for us; 499 (in 4xx) is a client that went away.",
                "reqps",
                {"{{status_class}}": rate("aiaas_edge_requests_total", "status_class")},
                stacked=True,
            ),
            graph(
                "Requests by route",
                "What is asked for.",
                "reqps",
                {"{{route}}": rate("aiaas_edge_requests_total", "route")},
            ),
            graph(
                "Duration of inference",
                "From the headers of a request to the last byte of its answer: streams last as long as they are long.",
                "s",
                quantiles("aiaas_edge_request_duration_seconds", matchers=_INFERENCE),
            ),
        ],
        "Inference": [
            graph(
                "Inferences by outcome",
                "refused: limits, budgets, bad requests. failed: no engine answered. truncated: an answer broke off.",
                "reqps",
                {"{{outcome}}": rate("aiaas_router_requests_total", "outcome")},
                stacked=True,
            ),
            graph(
                "Refused by rate limits",
                "The limit that refused. Where the router judges alone, Redis is away.",
                "reqps",
                {
                    "{{limit}} by {{source}}": rate(
                        "aiaas_router_rate_limit_decisions_total", "limit, source", '{outcome!="admitted"}'
                    )
                },
            ),
            graph(
                "Connections refused by the edge",
                "Clients that are too slow, too big or not HTTP, by cause; a rise may be an attack.",
                "cps",
                {"{{cause}}": rate("aiaas_edge_connections_refused_total", "cause")},
            ),
        ],
    },
)
