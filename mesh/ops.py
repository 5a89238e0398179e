"""The small HTTP server for operators: /health, /ready and /metrics of one process; it never serves a user."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web
from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder

from mesh.errors import PlatformError

logger = logging.getLogger(__name__)

ReadinessCheck = Callable[[], Awaitable[None]]
"""Returns when its dependency can be used, and raises when it cannot."""

_CHECK_TIMEOUT_S = 2.0


class OpsServer:
    """Answers /health while the process runs, /ready by asking every dependency, /metrics for Prometheus.

    `readiness` names the dependencies without which this process cannot do its work. Port 0 takes a free one.
    """

    def __init__(self, port: int, readiness: Mapping[str, ReadinessCheck], *, host: str = "127.0.0.1") -> None:
        self.port = port
        self._host = host
        self._readiness = readiness
        application = web.Application()
        application.router.add_get("/health", self._health)
        application.router.add_get("/ready", self._ready)
        application.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=1.0)

    async def start(self) -> None:
        """Listen. Raises OSError if the port is taken."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self.port)
        try:
            await site.start()
        except OSError:
            await self._runner.cleanup()
            raise
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening and end what is open."""
        await self._runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, _: web.Request) -> web.Response:
        outcomes = await asyncio.gather(*(_outcome(name, check) for name, check in self._readiness.items()))
        failures = {name: wrong for name, wrong in zip(self._readiness, outcomes, strict=True) if wrong is not None}
        checks = {name: failures.get(name, "ok") for name in self._readiness}
        status = "not_ready" if failures else "ready"
        return web.json_response({"status": status, "checks": checks}, status=503 if failures else 200)

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(REGISTRY), headers={"Content-Type": content_type})


async def _outcome(name: str, check: ReadinessCheck) -> str | None:
    """What is wrong with a dependency, in words without secrets; None if nothing is."""
    try:
        async with asyncio.timeout(_CHECK_TIMEOUT_S):
            await check()
    except PlatformError as error:
        return error.message
    except TimeoutError:
        return f"no answer within {_CHECK_TIMEOUT_S:g} s"
    except Exception as error:
        logger.warning("readiness check failed", extra={"dependency": name}, exc_info=error)
        return f"failed: {type(error).__name__}"
    return None
