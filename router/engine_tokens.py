"""Reads the engines' own token counters off their metrics and keeps how far they moved; it never bills anybody by it.

Of vLLM (0.32) `vllm:prompt_tokens_total` counts whole prompts, cached tokens included, at a request's first token, and
`vllm:prompt_tokens_cached_total` those of them that came from a cache. Of llama.cpp `llamacpp:prompt_tokens_total`
leaves cached tokens out and `llamacpp:prompt_tokens_cached_total` counts them, so here both are added up. An engine
that serves none of these has no windows.

An engine is read every ten seconds by one replica, whichever moves its row to the new slot first, and what it read is
compared with the last reading of all replicas, which lies in PostgreSQL. So no window is there twice, none is lost with
a replica, and the windows of an engine follow one another without a gap. A lock held while reading would do the same at
the price of a connection; windows of each replica by itself would have to be matched by whoever sums them.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from mesh.clock import Clock
from mesh.errors import PlatformError
from router.backends import Backend, Registry
from router.http1 import UpstreamError

logger = logging.getLogger(__name__)

INTERVAL_S = 10
"""Seconds of a slot, in which each engine is read once."""

KEPT = timedelta(days=7)
"""How long windows are kept: more than twice as long as journals remember requests."""

METRICS_PATH = "/metrics"
"""Where vLLM and llama.cpp both tell their counters."""

_READ_TIMEOUT_S = 5.0
_METRICS_BYTES = 4 << 20
_READS_AT_ONCE = 8
# So soon is an engine read that was not there before.
_LOOK_S = 1.0
_FORGET_S = 3600.0
_INSTANT = timedelta(microseconds=1)

# By hand, since a parser of all the metrics of an engine takes tens of milliseconds, in which no request moves. Each
# engine of a data parallel vLLM has a line of its own.
_COUNTERS = re.compile(
    rb"^(vllm:prompt_tokens_total|vllm:prompt_tokens_cached_total|vllm:generation_tokens_total"
    rb"|llamacpp:prompt_tokens_total|llamacpp:prompt_tokens_cached_total|llamacpp:tokens_predicted_total"
    rb"|process_start_time_seconds)(?:\{[^\n]*\})? ([0-9.eE+]+)",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Counters:
    """What an engine has counted since it started. `process_start_time_s`, in seconds since the epoch, is None where it
    does not tell; llama.cpp does not."""

    process_start_time_s: float | None
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Reading:
    """The counters of the engine at `base_url` as they were read at `read_time`."""

    base_url: str
    read_time: datetime
    counters: Counters


@dataclass(frozen=True, slots=True)
class Window:
    """How far the counters of a backend's engine moved from `start_time` until `end_time`; with `reset` the engine
    restarted in between, and tokens may be missing."""

    backend_id: str
    start_time: datetime
    end_time: datetime
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    reset: bool


def read_counters(body: bytes) -> Counters | None:
    """The counters in an engine's metrics, in Prometheus' text format; None where it has none."""
    sums: Counter[str] = Counter()
    process_start_time_s = None
    for name, number in _COUNTERS.findall(body):
        try:
            value = float(number)
        except ValueError:
            return None
        if name == b"process_start_time_seconds":
            process_start_time_s = value
        else:
            sums[name.decode()] += round(value)
    cached = sums["llamacpp:prompt_tokens_cached_total"]
    if "vllm:generation_tokens_total" in sums:
        return Counters(
            process_start_time_s,
            sums["vllm:prompt_tokens_total"],
            sums["vllm:prompt_tokens_cached_total"],
            sums["vllm:generation_tokens_total"],
        )
    if "llamacpp:tokens_predicted_total" in sums:
        return Counters(
            process_start_time_s,
            sums["llamacpp:prompt_tokens_total"] + cached,
            cached,
            sums["llamacpp:tokens_predicted_total"],
        )
    return None


def window_between(backend_id: str, before: Reading | None, after: Reading) -> Window | None:
    """How far the counters moved between two readings; None for the first, which is what the next is compared with.

    A counter that fell, another start of the process or another address is a restart: then what the engine counted
    since is what it counts now. Only if it says that it ran before the first reading, at another address, nobody knows.
    """
    if before is None:
        return None
    old, new = before.counters, after.counters
    moved = before.base_url != after.base_url
    reset = (
        moved
        or (
            None not in (old.process_start_time_s, new.process_start_time_s)
            and old.process_start_time_s != new.process_start_time_s
        )
        or new.prompt_tokens < old.prompt_tokens
        or new.cached_prompt_tokens < old.cached_prompt_tokens
        or new.completion_tokens < old.completion_tokens
    )
    if moved and new.process_start_time_s is not None and new.process_start_time_s < before.read_time.timestamp():
        old = new
    elif reset:
        old = Counters(None, 0, 0, 0)
    return Window(
        backend_id=backend_id,
        start_time=before.read_time,
        # The clocks of two replicas may disagree.
        end_time=max(after.read_time, before.read_time + _INSTANT),
        prompt_tokens=new.prompt_tokens - old.prompt_tokens,
        cached_prompt_tokens=new.cached_prompt_tokens - old.cached_prompt_tokens,
        completion_tokens=new.completion_tokens - old.completion_tokens,
        reset=reset,
    )


class Turn(Protocol):
    """The right to read an engine for one slot."""

    @property
    def before(self) -> Reading | None:
        """The last reading, by whichever replica; None before the first."""


class WindowStore(Protocol):
    """Where readings and windows are kept. Every method raises PlatformError(UNAVAILABLE)."""

    async def claim(self, backend_id: str, slot_time: datetime) -> Turn | None:
        """The turn to read a backend for a slot; None if somebody else has it, or a later one."""

    async def record(self, backend_id: str, slot_time: datetime, reading: Reading, window: Window | None) -> bool:
        """Keep what was read and how far it is from the last; False if the turn was lost meanwhile, and then it does
        nothing."""

    async def forget(self, before: datetime) -> None:
        """Remove windows that ended before."""


class MetricsSource(Protocol):
    """How an engine's metrics are asked for."""

    async def get(self, backend: Backend, path: str, timeout_s: float, limit_bytes: int) -> bytes:
        """The body of its answer. Raises UpstreamError."""


class EngineTokenReader:
    """Reads every backend once in each slot of `INTERVAL_S`, as far as no other replica does."""

    def __init__(self, registry: Registry, engines: MetricsSource, store: WindowStore, clock: Clock) -> None:
        self._registry = registry
        self._engines = engines
        self._store = store
        self._clock = clock
        self._tried: dict[tuple[str, str], datetime] = {}
        self._silent: set[str] = set()
        self._at_once = asyncio.Semaphore(_READS_AT_ONCE)

    async def run(self) -> None:
        """Read until cancelled. While PostgreSQL is away nothing is read; the next window then spans the gap."""
        forget_at = self._clock.monotonic()
        while True:
            await self.read_due()
            if self._clock.monotonic() >= forget_at:
                forget_at = self._clock.monotonic() + _FORGET_S
                try:
                    await self._store.forget(self._clock.now() - KEPT)
                except PlatformError as error:
                    logger.warning("old windows could not be removed: %s", error.reason.value)
            # At the full slot, so that windows begin and end with the hours that they are compared with.
            await asyncio.sleep(min(_LOOK_S, INTERVAL_S - self._clock.now().timestamp() % INTERVAL_S))

    async def read_due(self) -> None:
        """Read every backend that this replica has not tried in this slot."""
        slot_time = datetime.fromtimestamp(self._clock.now().timestamp() // INTERVAL_S * INTERVAL_S, UTC)
        backends = self._registry.snapshot.backends.values()
        due = [each for each in backends if self._tried.get((each.backend_id, each.base_url)) != slot_time]
        self._tried = {(each.backend_id, each.base_url): slot_time for each in backends}
        async with asyncio.TaskGroup() as reads:
            for backend in due:
                reads.create_task(self._read(backend, slot_time))

    async def _read(self, backend: Backend, slot_time: datetime) -> None:
        backend_id = backend.backend_id
        async with self._at_once:
            try:
                turn = await self._store.claim(backend_id, slot_time)
                if turn is None:
                    return
                body = await self._engines.get(backend, METRICS_PATH, _READ_TIMEOUT_S, _METRICS_BYTES)
                counters = read_counters(body)
                if counters is None:
                    self._say(backend_id, "it tells no token counters")
                    return
                reading = Reading(backend.base_url, self._clock.now(), counters)
                window = window_between(backend_id, turn.before, reading)
                await self._store.record(backend_id, slot_time, reading, window)
            except UpstreamError as error:
                self._say(backend_id, str(error))
            except PlatformError as error:
                logger.debug("the counters of backend %s cannot be kept: %s", backend_id, error.reason.value)
            else:
                self._silent.discard(backend_id)

    def _say(self, backend_id: str, why: str) -> None:
        """Tell operators once until it is well again; the backend's health is the prober's to tell."""
        if backend_id not in self._silent:
            self._silent.add(backend_id)
            logger.warning("the token counters of backend %s cannot be read: %s", backend_id, why)
