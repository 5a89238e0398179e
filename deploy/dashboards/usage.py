"""What is used and spent; never by organization, as no metric has a label for one."""

from deploy.dashboards.panels import board, graph, increase, number, rate

_DOLLARS = " / 1e6"

DASHBOARD = board(
    "usage",
    "organizations' usage and spend",
    "Tokens, money and refusals of all organizations together. A metric never names one: for that ask /analytics/v1 "
    "or export. Bills come from journal and ledger; these are counters, which start anew with their process.",
    {
        "In this time": [
            number("Requests", "Inferences that ended.", "short", increase("aiaas_router_requests_total")),
            number(
                "Tokens",
                "Prompt and completion, as billed.",
                "short",
                increase("aiaas_router_tokens_total"),
            ),
            number(
                "Spend",
                "What they cost by the prices that applied.",
                "currencyUSD",
                f"{increase('aiaas_router_cost_micros_total')}{_DOLLARS}",
            ),
            number(
                "Refused for money",
                "Requests that budgets refused or stopped.",
                "short",
                f"{increase('aiaas_router_budget_refusals_total')} or vector(0)",
            ),
            number(
                "Thresholds passed",
                "Budgets that passed 50, 80 or 100 percent.",
                "short",
                f"{increase('aiaas_budget_thresholds_crossed_total')} or vector(0)",
            ),
            number(
                "Behind by", "How old the usage is that people can ask for.", "s", "max(aiaas_analytics_lag_seconds)"
            ),
        ],
        "Usage": [
            graph(
                "Tokens/s",
                "As billed, by model and kind.",
                "short",
                {"{{model}} {{kind}}": rate("aiaas_router_tokens_total", "model, kind")},
                stacked=True,
            ),
            graph(
                "Spend an hour",
                "In dollars, at the pace of the moment.",
                "currencyUSD",
                {"{{model}}": f"{rate('aiaas_router_cost_micros_total', 'model')} * 3600{_DOLLARS}"},
                stacked=True,
            ),
            graph(
                "Requests by model",
                "Inferences that ended.",
                "reqps",
                {"{{model}}": rate("aiaas_router_requests_total", "model")},
                stacked=True,
            ),
        ],
        "Limits": [
            graph(
                "Budgets that said no",
                "spent: a hard budget is used up. Anything else is the ledger, not the client.",
                "reqps",
                {"{{cause}}": rate("aiaas_router_budget_refusals_total", "cause")},
            ),
            graph(
                "Thresholds passed",
                "Owners are told by webhooks.",
                "short",
                {"{{percent}} percent": rate("aiaas_budget_thresholds_crossed_total", "percent")},
            ),
            graph(
                "Repeated requests",
                "What became of those with an Idempotency-Key.",
                "reqps",
                {"{{decision}}": rate("aiaas_router_idempotency_decisions_total", "decision")},
            ),
        ],
        "Reports": [
            graph(
                "Exports",
                "That ended, by how.",
                "short",
                {"{{outcome}}": rate("aiaas_analytics_exports_total", "outcome")},
            ),
            graph("Written to storage", "By exports.", "Bps", {"bytes": rate("aiaas_analytics_export_bytes_total")}),
            graph(
                "Webhooks",
                "Attempts by outcome; failed ones are given up.",
                "short",
                {
                    "{{outcome}}": rate("aiaas_webhook_deliveries_total", "outcome"),
                    "pending": "max(aiaas_webhook_pending)",
                },
            ),
        ],
    },
)
