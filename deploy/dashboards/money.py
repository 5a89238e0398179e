"""Whether the books are right: reservations, journals, counting, reconciliation."""

from deploy.dashboards.panels import board, graph, increase, number, rate

DASHBOARD = board(
    "money",
    "money",
    "Whether what is used is written down, counted once and billed: docs/money.md says what each part promises.",
    {
        "Must be zero": [
            number(
                "Cannot be written",
                "Tries to write to a journal that failed, in this time: requests are refused meanwhile.",
                "short",
                increase("aiaas_router_journal_write_failures_total"),
            ),
            number(
                "Died with a router",
                "Requests that ran when a router died, billed to their last checkpoint.",
                "short",
                increase("aiaas_router_journal_aborted_requests_total"),
            ),
            number(
                "Rejected by analytics",
                "Events that cannot be counted; the fifth time they are in the dead-letter queue.",
                "short",
                increase("aiaas_analytics_events_total", matchers='{result="rejected"}'),
            ),
            number(
                "Lines that differ",
                "Between analytics and another record, in the last hour compared.",
                "short",
                "sum(max by (kind) (aiaas_reconciliation_differences))",
            ),
            number("Unpriced models", "They cannot be used.", "short", "max(aiaas_router_unpriced_models)"),
            number(
                "Events dropped",
                "Of refused requests, billed nothing, that a journal had no room for.",
                "short",
                increase("aiaas_router_usage_dropped_events_total"),
            ),
        ],
        "Reservations": [
            graph(
                "Leases",
                "Slices of budgets that routers hold.",
                "short",
                {"{{instance}}": "aiaas_router_budget_leases"},
            ),
            graph(
                "Reports that failed",
                "To the ledger. Leases are not extended meanwhile, and what runs on them ends with them.",
                "short",
                {"failed": rate("aiaas_router_budget_renewal_failures_total")},
            ),
            graph(
                "Refused or stopped",
                "By cause.",
                "reqps",
                {"{{cause}}": rate("aiaas_router_budget_refusals_total", "cause")},
            ),
        ],
        "Journals": [
            graph("Open entries", "Requests that run.", "short", {"{{instance}}": "aiaas_router_journal_open_entries"}),
            graph(
                "Full to",
                "Beyond 0.8 published entries go before their time; at 0.95 no request is admitted.",
                "percentunit",
                {"{{instance}}": "aiaas_router_journal_size_bytes / aiaas_router_journal_limit_bytes"},
            ),
            graph(
                "Publishing",
                "Tries that failed, and what waits.",
                "short",
                {
                    "failures/s": rate("aiaas_router_usage_publish_failures_total"),
                    "waiting": "sum(aiaas_router_usage_queue_events)",
                },
            ),
        ],
        "Counting and reconciliation": [
            graph(
                "Events counted",
                "duplicate ones are told twice and counted once.",
                "short",
                {"{{result}}": rate("aiaas_analytics_events_total", "result")},
            ),
            graph(
                "Differences",
                "Lines on which journal, ledger or engines differ from analytics, in the last hour compared.",
                "short",
                {"{{kind}}": "max by (kind) (aiaas_reconciliation_differences)"},
            ),
            graph(
                "Since the last comparison",
                "From the start of the hour that was compared last; two hours are usual.",
                "s",
                {"{{kind}}": "time() - max by (kind) (aiaas_reconciliation_hour_timestamp_seconds)"},
            ),
            graph(
                "Tokens that nothing explains",
                "That engines counted and nobody was billed (above 0), or the reverse.",
                "short",
                {"{{kind}}": "max by (kind) (aiaas_reconciliation_engine_residual_tokens)"},
            ),
            graph(
                "Spend an hour",
                "In dollars, at the pace of the moment, as routers bill it.",
                "currencyUSD",
                {"all models": f"{rate('aiaas_router_cost_micros_total')} * 3600 / 1e6"},
            ),
            graph(
                "Unpriced models", "As each router knows it.", "short", {"{{instance}}": "aiaas_router_unpriced_models"}
            ),
        ],
    },
)
