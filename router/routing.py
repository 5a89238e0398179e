"""Chooses the backend of a request: healthy, not draining, below its limit, least loaded; it never sends anything."""

from __future__ import annotations

from collections.abc import Collection
from random import Random

from mesh.errors import PlatformError, Reason
from router.backends import Served, Snapshot
from router.models import ENDPOINT_NAMES, Model

RETRY_AFTER_S = 1.0
"""When a client may ask again that found no backend: probes come every two seconds and requests end all the time."""


class Routing:
    """Least load, in relation to the weights. `random` decides between equally loaded backends."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def choose(self, snapshot: Snapshot, model: Model, tried: Collection[str]) -> Served:
        """The backend for the next attempt at a request for `model`, none of those `tried` already.

        Raises PlatformError(NO_BACKEND_AVAILABLE) if none is left.
        """
        candidates = [
            served
            for served in snapshot.served.get(model.model_id, ())
            if served.state.healthy
            and not served.backend.draining
            and served.backend.backend_id not in tried
            and not _is_full(served)
        ]
        if not candidates:
            raise PlatformError(Reason.NO_BACKEND_AVAILABLE, retry_after_s=RETRY_AFTER_S)
        if len(candidates) == 1:
            return candidates[0]
        # The load that a backend has, not the one it would get: else an idle system would always take the heaviest.
        least = min(map(_load, candidates))
        tied = [served for served in candidates if _load(served) == least]
        if len(tied) == 1:
            return tied[0]
        return self._random.choices(tied, [served.backend.weight for served in tied])[0]


def check_endpoint(model: Model, endpoint: int) -> None:
    """Raises PlatformError(INVALID_ARGUMENT) if the model is not to be used on the endpoint."""
    if endpoint not in model.endpoints:
        raise PlatformError(
            Reason.INVALID_ARGUMENT,
            field="model",
            description=f"The model '{model.model_id}' cannot be used with the endpoint {ENDPOINT_NAMES[endpoint]}.",
        )


def _is_full(served: Served) -> bool:
    limit = served.backend.limit_concurrent_requests
    return limit > 0 and served.state.in_flight >= limit


def _load(served: Served) -> float:
    return served.state.in_flight / served.backend.weight
