"""How requests for a model find a backend, and what such a policy may say; it never chooses one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from aiaas.router.v1.routing_policy_service_pb2 import RoutingStrategy
from mesh.errors import PlatformError
from mesh.fields import invalid, refuse

MOST_WEIGHTS = 256
MOST_FALLBACKS = 8

_MOST_WEIGHT = 1000
_MOST_ATTEMPTS = 5
_HOUR_MILLIS = 3_600_000
_NEVER = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """One model's policy; the defaults are those of a model that has none. Of times, 0 means that another rule says.

    `weights` are by backend. The time and the etag are the store's; they are empty until it is stored.
    """

    model_id: str = ""
    strategy: int = RoutingStrategy.ROUTING_STRATEGY_LEAST_LOADED
    weights: Mapping[str, int] = field(default_factory=dict)
    limit_attempts: int = 2
    retry_budget_percent: int = 20
    hedged: bool = False
    hedge_delay_millis: int = 0
    hedge_budget_percent: int = 5
    connect_millis: int = 0
    first_byte_millis: int = 0
    idle_millis: int = 0
    total_millis: int = 0
    failure_percent: int = 50
    least_attempts: int = 10
    open_millis: int = 5000
    fallback_model_ids: tuple[str, ...] = ()
    update_time: datetime = field(default=_NEVER, compare=False)
    etag: str = field(default="", compare=False)


DEFAULT = RoutingPolicy()
"""What holds for a model without a policy."""


def check_routing_policy(policy: RoutingPolicy) -> None:
    """Hold a policy to the contract's rules. Raises PlatformError(INVALID_ARGUMENT) that names the fields."""
    refuse(_problems(policy))


def _problems(policy: RoutingPolicy) -> Iterator[PlatformError]:
    if policy.strategy not in RoutingStrategy.values() or not policy.strategy:
        yield _invalid("strategy", "must be a known strategy")
    if len(policy.weights) > MOST_WEIGHTS:
        yield _invalid("weights", f"may name {MOST_WEIGHTS} backends")
    for index, weight in enumerate(policy.weights.values()):
        if not 0 <= weight <= _MOST_WEIGHT:
            yield _invalid(f"weights[{index}].weight", f"must be 0 to {_MOST_WEIGHT}")
    for name, least, value, most in (
        ("retry.limit_attempts", 1, policy.limit_attempts, _MOST_ATTEMPTS),
        ("retry.budget_percent", 0, policy.retry_budget_percent, 100),
        ("hedge.delay_millis", 0, policy.hedge_delay_millis, _HOUR_MILLIS),
        ("hedge.budget_percent", 0, policy.hedge_budget_percent, 100),
        ("timeouts.connect_millis", 0, policy.connect_millis, _HOUR_MILLIS),
        ("timeouts.first_byte_millis", 0, policy.first_byte_millis, _HOUR_MILLIS),
        ("timeouts.idle_millis", 0, policy.idle_millis, _HOUR_MILLIS),
        ("timeouts.total_millis", 0, policy.total_millis, _HOUR_MILLIS),
        ("breaker.failure_percent", 1, policy.failure_percent, 100),
        ("breaker.least_attempts", 1, policy.least_attempts, 1_000_000),
        ("breaker.open_millis", 1, policy.open_millis, _HOUR_MILLIS),
    ):
        if not least <= value <= most:
            yield _invalid(name, f"must be {least} to {most}")
    if len(policy.fallback_model_ids) > MOST_FALLBACKS:
        yield _invalid("fallback_model_ids", f"may name {MOST_FALLBACKS} models")
    for index, model_id in enumerate(policy.fallback_model_ids):
        if model_id == policy.model_id or model_id in policy.fallback_model_ids[:index]:
            yield _invalid(f"fallback_model_ids[{index}]", "repeats a model")


def unknown_backend(index: int) -> PlatformError:
    """The error for the backend at `index` of the weights, which is not registered."""
    return _invalid(f"weights[{index}].backend_id", "is not a registered backend")


def unknown_fallback(index: int) -> PlatformError:
    """The error for the fallback at `index`, which is not a registered model."""
    return _invalid(f"fallback_model_ids[{index}]", "is not the id of a registered model")


def _invalid(name: str, rule: str) -> PlatformError:
    return invalid(f"routing_policy.{name}", rule)
