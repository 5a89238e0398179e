"""Probes every backend's health and notes what it finds in its state; it never routes by it."""

from __future__ import annotations

import asyncio
from typing import Protocol

from router.backends import Backend, BackendState, Registry
from router.http1 import UpstreamError


class Probe(Protocol):
    """How a backend is probed."""

    async def probe(self, backend: Backend, timeout_s: float) -> None:
        """Raises UpstreamError if the backend is not well."""


class HealthProber:
    """Asks each backend every `interval_s`, all at once, and new ones as soon as they are in the registry."""

    def __init__(self, registry: Registry, probe: Probe, *, interval_s: float = 2.0, timeout_s: float = 1.0) -> None:
        self._registry = registry
        self._probe = probe
        self._interval_s = interval_s
        self._timeout_s = timeout_s

    async def run(self) -> None:
        """Probe until cancelled."""
        while True:
            self._registry.changed.clear()
            await self.probe_all()
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._registry.changed.wait()
            except TimeoutError:
                pass

    async def probe_all(self) -> None:
        """Probe every backend once; takes the probe's timeout at most."""
        async with asyncio.TaskGroup() as probes:
            for backend, state in self._registry.probe_targets():
                probes.create_task(self._probe_one(backend, state))

    async def _probe_one(self, backend: Backend, state: BackendState) -> None:
        try:
            await self._probe.probe(backend, self._timeout_s)
        except UpstreamError as error:
            state.failed(str(error))
        else:
            state.succeeded()
