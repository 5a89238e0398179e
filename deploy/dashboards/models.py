"""How fast models answer and what their engines are short of: the router's view beside vLLM's own."""

from deploy.dashboards.panels import board, choice, graph, quantiles, rate

_OURS = '{model=~"$model"}'
_VLLM = '{model_name=~"$model"}'
_FOUND = (
    f"{rate('vllm:prefix_cache_hits_total', 'model_name', _VLLM)}"
    f" / {rate('vllm:prefix_cache_queries_total', 'model_name', _VLLM)}"
)

DASHBOARD = choice(
    board(
        "models",
        "model performance",
        "Time to the first token, speed, queues, caches. Panels of vLLM need its /metrics scraped; the router's know "
        "of every engine.",
        {
            "As clients see it": [
                graph(
                    "Time to the first token",
                    "From admission to the first byte of the answer, by the router's clock.",
                    "s",
                    quantiles("aiaas_router_time_to_first_token_seconds", "model", _OURS),
                ),
                graph(
                    "Whole answers",
                    "From admission to the last byte.",
                    "s",
                    quantiles("aiaas_router_request_duration_seconds", "model", _OURS),
                ),
                graph(
                    "Outcomes",
                    "Of each model.",
                    "reqps",
                    {"{{model}} {{outcome}}": rate("aiaas_router_requests_total", "model, outcome", _OURS)},
                ),
                graph(
                    "Tokens/s",
                    "As billed: generated ones are what an engine is for.",
                    "short",
                    {"{{model}} {{kind}}": rate("aiaas_router_tokens_total", "model, kind", _OURS)},
                ),
                graph(
                    "In flight",
                    "Requests that each backend works on; a flat line far above the others is an engine that hangs.",
                    "short",
                    {"{{backend}}": "sum by (backend) (aiaas_router_requests_in_flight)"},
                ),
                graph(
                    "Healthy",
                    "1 where every router finds the backend healthy, less where some do not.",
                    "short",
                    {"{{backend}}": "avg by (backend) (aiaas_router_backend_healthy)"},
                ),
            ],
            "vLLM: speed": [
                graph(
                    "Time to the first token, by vLLM",
                    "Where it is far below the router's, the time is lost before the engine.",
                    "s",
                    quantiles("vllm:time_to_first_token_seconds", "model_name", _VLLM),
                ),
                graph(
                    "Between two tokens",
                    "What a reader of a stream feels.",
                    "s",
                    quantiles("vllm:inter_token_latency_seconds", "model_name", _VLLM),
                ),
                graph(
                    "Tokens/s, by vLLM",
                    "Prompts that it reads and tokens that it generates.",
                    "short",
                    {
                        "{{model_name}} prompt": rate("vllm:prompt_tokens_total", "model_name", _VLLM),
                        "{{model_name}} generated": rate("vllm:generation_tokens_total", "model_name", _VLLM),
                    },
                ),
            ],
            "vLLM: queue and cache": [
                graph(
                    "Queue",
                    "Waiting ones want another replica; KEDA scales by them.",
                    "short",
                    {
                        "{{model_name}} running": f"sum by (model_name) (vllm:num_requests_running{_VLLM})",
                        "{{model_name}} waiting": f"sum by (model_name) (vllm:num_requests_waiting{_VLLM})",
                    },
                ),
                graph(
                    "Time in the queue",
                    "Before an engine begins with a request.",
                    "s",
                    quantiles("vllm:request_queue_time_seconds", "model_name", _VLLM),
                ),
                graph(
                    "KV cache in use",
                    "Near 1 requests wait, or are preempted and begun again.",
                    "percentunit",
                    {"{{model_name}} {{instance}}": f"max by (model_name, instance) (vllm:kv_cache_usage_perc{_VLLM})"},
                ),
                graph(
                    "Found in the prefix cache",
                    "Share of prompt tokens that need not be computed again.",
                    "percentunit",
                    {"{{model_name}}": _FOUND},
                ),
                graph(
                    "Preemptions",
                    "Requests that lost their place in the KV cache: it is too small for what is asked.",
                    "short",
                    {"{{model_name}}": rate("vllm:num_preemptions_total", "model_name", _VLLM)},
                ),
                graph(
                    "Why answers ended",
                    "By vLLM; length is a limit of tokens, abort a client that went.",
                    "reqps",
                    {"{{finished_reason}}": rate("vllm:request_success_total", "finished_reason", _VLLM)},
                ),
            ],
        },
    ),
    "model",
    "Model",
    "aiaas_router_requests_total",
)
