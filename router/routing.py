"""Chooses the backend of a request, and says whether there may be another attempt; it never sends anything.

A backend is chosen among those that are healthy, not draining, below their limit and not left alone by their breaker,
as the model's policy says.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Collection
from random import Random

from aiaas.router.v1.routing_policy_service_pb2 import ROUTING_STRATEGY_PREFIX_AFFINITY, ROUTING_STRATEGY_WEIGHTED
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from router import metrics
from router.backends import Served, Snapshot
from router.models import ENDPOINT_NAMES, Model
from router.recent import Recent
from router.routing_policies import RoutingPolicy

RETRY_AFTER_S = 1.0
"""When a client may ask again that found no backend: probes come every two seconds and requests end all the time."""

LEAST_RETRIES = 10
"""So many retries in ten seconds are made however few requests there are: a share of few would be none."""

LEAST_SAMPLES = 20
"""How many first bytes must have been seen before their 95th percentile says when to hedge."""

_SAMPLES = 200
# How much more than its share a backend may hold for the sake of prefixes (Mirrokni et al., "Consistent Hashing with
# Bounded Loads", 2016).
_OVERLOAD = 1.25


class _Traffic:
    """What a model's requests were like lately."""

    __slots__ = ("first_bytes", "hedges", "retries")

    def __init__(self) -> None:
        self.retries, self.hedges = Recent(), Recent()
        self.first_bytes: dict[bool, deque[float]] = {}


class Routing:
    """The choices of one router. `random` decides between equally good backends."""

    def __init__(self, random: Random, clock: Clock) -> None:
        self._random = random
        self._clock = clock
        self._traffic: dict[str, _Traffic] = {}

    def choose(self, snapshot: Snapshot, model: Model, tried: Collection[str], prefix: bytes = b"") -> Served:
        """The backend for the next attempt at a request for `model`, none of those `tried` already. `prefix` is what
        requests have in common that do well on the same backend.

        Raises PlatformError(NO_BACKEND_AVAILABLE) if none is left.
        """
        policy = snapshot.policy_of(model.model_id)
        now = self._clock.monotonic()
        candidates = [
            served
            for served in snapshot.served.get(model.model_id, ())
            if served.state.healthy
            and not served.backend.draining
            and served.backend.backend_id not in tried
            and not _is_full(served)
            and served.breaker.lets_pass(now)
            and _weight(served, policy)
        ]
        if not candidates:
            raise PlatformError(Reason.NO_BACKEND_AVAILABLE, retry_after_s=RETRY_AFTER_S)
        if len(candidates) == 1:
            return candidates[0]
        if policy.strategy == ROUTING_STRATEGY_WEIGHTED:
            return self._drawn(candidates, policy)
        if policy.strategy == ROUTING_STRATEGY_PREFIX_AFFINITY and prefix:
            return _nearest(candidates, policy, prefix)
        # The load that a backend has, not the one it would get: else an idle system would always take the heaviest.
        loads = [served.state.in_flight / _weight(served, policy) for served in candidates]
        least = min(loads)
        tied = [served for served, load in zip(candidates, loads, strict=True) if load == least]
        return tied[0] if len(tied) == 1 else self._drawn(tied, policy)

    def admitted(self, model_id: str, policy: RoutingPolicy) -> None:
        """A request for the model is to be answered: what retries and hedges are in relation to."""
        traffic = self._traffic.get(model_id)
        if traffic is None:
            traffic = self._traffic[model_id] = _Traffic()
        now = self._clock.monotonic()
        traffic.retries.count(now)
        if policy.hedged:
            traffic.hedges.count(now)

    def may_retry(self, model_id: str, policy: RoutingPolicy) -> bool:
        """Whether a failed request may be tried again; then it counts as if it were. Retries are bounded over the last
        ten seconds, so that a failing engine is not asked ever more."""
        return self._may(self._traffic[model_id].retries, model_id, "retry", policy.retry_budget_percent, LEAST_RETRIES)

    def may_hedge(self, model_id: str, policy: RoutingPolicy) -> bool:
        """Whether a second backend may be asked for a request; then it counts as if it were."""
        return self._may(self._traffic[model_id].hedges, model_id, "hedge", policy.hedge_budget_percent, 1)

    def hedge_after_s(self, model_id: str, policy: RoutingPolicy, *, streamed: bool) -> float | None:
        """Seconds of silence after which a second backend is asked; None where none is."""
        if not policy.hedged:
            return None
        if policy.hedge_delay_millis:
            return policy.hedge_delay_millis / 1000
        samples = self._traffic[model_id].first_bytes.get(streamed, ())
        if len(samples) < LEAST_SAMPLES:
            return None
        return sorted(samples)[len(samples) * 95 // 100]

    def heard(self, model_id: str, after_s: float, *, streamed: bool) -> None:
        """A backend's first byte came so many seconds after it was asked."""
        self._traffic[model_id].first_bytes.setdefault(streamed, deque(maxlen=_SAMPLES)).append(after_s)

    def _may(self, recent: Recent, model_id: str, kind: str, percent: int, least: int) -> bool:
        now = self._clock.monotonic()
        recent.look(now)
        if not percent or recent.marked >= max(least, recent.all * percent // 100):
            metrics.ATTEMPTS_REFUSED.labels(model_id, kind).inc()
            return False
        recent.mark(now)
        metrics.EXTRA_ATTEMPTS.labels(model_id, kind).inc()
        return True

    def _drawn(self, candidates: list[Served], policy: RoutingPolicy) -> Served:
        return self._random.choices(candidates, [_weight(served, policy) for served in candidates])[0]


def check_endpoint(model: Model, endpoint: int) -> None:
    """Raises PlatformError(INVALID_ARGUMENT) if the model is not to be used on the endpoint."""
    if endpoint not in model.endpoints:
        raise PlatformError(
            Reason.INVALID_ARGUMENT,
            field="model",
            description=f"The model '{model.model_id}' cannot be used with the endpoint {ENDPOINT_NAMES[endpoint]}.",
        )


def _nearest(candidates: list[Served], policy: RoutingPolicy, prefix: bytes) -> Served:
    """The one that a prefix always leads to (weighted rendezvous hashing), unless it holds too much; then the next."""
    most = _OVERLOAD * (1 + sum(served.state.in_flight for served in candidates))
    weights = sum(_weight(served, policy) for served in candidates)

    def distance(served: Served) -> float:
        key = hashlib.blake2b(served.backend.backend_id.encode() + b"\0" + prefix, digest_size=8).digest()
        return -math.log((int.from_bytes(key) + 1) / 2.0**64) / _weight(served, policy)

    ranked = sorted(candidates, key=distance)
    for served in ranked:
        if served.state.in_flight < math.ceil(most * _weight(served, policy) / weights):
            return served
    return ranked[0]


def _weight(served: Served, policy: RoutingPolicy) -> int:
    return (
        policy.weights.get(served.backend.backend_id, served.backend.weight)
        if policy.weights
        else served.backend.weight
    )


def _is_full(served: Served) -> bool:
    limit = served.backend.limit_concurrent_requests
    return limit > 0 and served.state.in_flight >= limit
