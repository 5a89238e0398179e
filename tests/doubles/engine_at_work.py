"""An engine that answers chats at the pace of a real one, queues what is too much, fails now and then and tells all of
it in vLLM's metrics; it holds no model, so that a load needs no processor for one."""

from __future__ import annotations

import asyncio
import json
import time
from random import Random
from typing import Any, Self

from aiohttp import web
from prometheus_client import generate_latest

from tests.doubles.engine_metrics import EngineMetrics
from tests.doubles.scripted_backend import chunk, sse, usage_chunk

# Of each request, in seconds.
_PREFILL_S, _TOKEN_S = (0.02, 0.08), (0.008, 0.02)
_TOKENS = (8, 40)
_CACHED = (0.3, 0.7)
# Shares of requests that end with 500, and of streams that break off.
_FAILED, _BROKEN = 0.02, 0.01


class EngineAtWork:
    """Use as an async context manager. While `is_ill`, every request fails."""

    def __init__(self, model: str, seed: int, *, slots: int = 4) -> None:
        self.is_ill = False
        self.port = 0
        self._metrics = EngineMetrics(model)
        self._random = Random(seed)
        self._slots = asyncio.Semaphore(slots)
        self._share_of_cache = 0.9 / slots

    @property
    def address(self) -> str:
        """host:port of everything that it serves, /metrics included."""
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        application = web.Application()
        application.router.add_get("/health", self._health)
        application.router.add_get("/metrics", self._tell)
        application.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _tell(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._metrics.registry), content_type="text/plain")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        if self.is_ill or self._random.random() < _FAILED:
            return web.json_response({"error": {"message": "out of memory", "code": 500}}, status=500)
        gauges, histograms = self._metrics.gauges, self._metrics.histograms
        came = time.monotonic()
        reason = "abort"
        try:
            with gauges["num_requests_waiting"].track_inprogress():
                await self._slots.acquire()
            try:
                gauges["kv_cache_usage_perc"].inc(self._share_of_cache)
                histograms["request_queue_time_seconds"].observe(time.monotonic() - came)
                with gauges["num_requests_running"].track_inprogress():
                    response = await self._generate(request, asked, came)
                reason = "length" if self._random.random() < 0.1 else "stop"
                return response
            finally:
                gauges["kv_cache_usage_perc"].dec(self._share_of_cache)
                self._slots.release()
        finally:
            self._metrics.finished[reason].inc()
            histograms["e2e_request_latency_seconds"].observe(time.monotonic() - came)

    async def _generate(self, request: web.Request, asked: dict[str, Any], came: float) -> web.StreamResponse:
        counters, histograms, random = self._metrics.counters, self._metrics.histograms, self._random
        prompt_tokens = len(json.dumps(asked["messages"])) // 4
        prefill_s = random.uniform(*_PREFILL_S)
        await asyncio.sleep(prefill_s)
        cached = int(prompt_tokens * random.uniform(*_CACHED))
        for name in ("prompt_tokens", "prefix_cache_queries"):
            counters[name].inc(prompt_tokens)
        for name in ("prompt_tokens_cached", "prefix_cache_hits"):
            counters[name].inc(cached)
        histograms["request_prefill_time_seconds"].observe(prefill_s)
        histograms["time_to_first_token_seconds"].observe(time.monotonic() - came)
        response = web.StreamResponse()
        streamed = bool(asked.get("stream"))
        if streamed:
            response.content_type = "text/event-stream"
            await response.prepare(request)
        tokens, broken = random.randint(*_TOKENS), random.random() < _BROKEN
        began = time.monotonic()
        for _ in range(tokens):
            token_s = random.uniform(*_TOKEN_S)
            await asyncio.sleep(token_s)
            counters["generation_tokens"].inc()
            histograms["inter_token_latency_seconds"].observe(token_s)
            if streamed:
                await response.write(sse(chunk("word "), done=False)[0])
                if broken and request.transport is not None:
                    request.transport.abort()
        histograms["request_decode_time_seconds"].observe(time.monotonic() - began)
        told = usage_chunk(prompt_tokens, tokens)
        if not streamed:
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": "word " * tokens},
                "finish_reason": "stop",
            }
            return web.json_response(told | {"object": "chat.completion", "choices": [choice]})
        for event in sse(chunk(finish_reason="stop"), told):
            await response.write(event)
        await response.write_eof()
        return response
