"""RoutingPolicyService over gRPC: reads requests, asks the store, writes answers; what a policy may say is in
`routing_policies`."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, cast

import grpc

from aiaas.router.v1 import routing_policy_service_pb2 as pb
from aiaas.router.v1 import routing_policy_service_pb2_grpc
from mesh.errors import PlatformError
from mesh.fields import invalid
from mesh.pages import IdPlace, cut, read_page_size, read_token
from router.backends import Registry
from router.changes import fields_to_change, require, require_same_id
from router.routing_policies import DEFAULT, RoutingPolicy, check_routing_policy
from router.store import Store

# What each field of the contract changes.
_CHANGEABLE = {
    "strategy": ("strategy",),
    "weights": ("weights",),
    "retry": ("limit_attempts", "retry_budget_percent"),
    "hedge": ("hedged", "hedge_delay_millis", "hedge_budget_percent"),
    "timeouts": ("connect_millis", "first_byte_millis", "idle_millis", "total_millis"),
    "breaker": ("failure_percent", "least_attempts", "open_millis"),
    "fallback_model_ids": ("fallback_model_ids",),
}
_Context = grpc.aio.ServicerContext[Any, Any]


class RoutingPolicyService(routing_policy_service_pb2_grpc.RoutingPolicyServiceServicer):
    """The policies of models. A change is in this router's memory before it is answered."""

    def __init__(self, store: Store, registry: Registry) -> None:
        self._store = store
        self._registry = registry

    async def GetRoutingPolicy(
        self, request: pb.GetRoutingPolicyRequest, context: _Context
    ) -> pb.GetRoutingPolicyResponse:
        """Return one model's policy."""
        policy = await self._store.get_routing_policy(request.model_id)
        return pb.GetRoutingPolicyResponse(routing_policy=_to_proto(policy))

    async def ListRoutingPolicies(
        self, request: pb.ListRoutingPoliciesRequest, context: _Context
    ) -> pb.ListRoutingPoliciesResponse:
        """Return a page of policies."""
        size, after = read_page_size(request.page_size), read_token(request, IdPlace)
        found = await self._store.list_routing_policies(after.id if after else "", size + 1)
        policies, token = cut(request, found, size, _to_proto, lambda policy: IdPlace(policy.model_id))
        return pb.ListRoutingPoliciesResponse(routing_policies=policies, next_page_token=token)

    async def UpdateRoutingPolicy(
        self, request: pb.UpdateRoutingPolicyRequest, context: _Context
    ) -> pb.UpdateRoutingPolicyResponse:
        """Change what the mask names."""
        require(request, "routing_policy")
        require_same_id(request.model_id, request.routing_policy.model_id, "routing_policy.model_id")
        masked = fields_to_change(request.routing_policy, request.update_mask, _CHANGEABLE)
        given = _from_proto(request.routing_policy)
        changes = {name: getattr(given, name) for field in masked for name in _CHANGEABLE[field]}

        def change(current: RoutingPolicy) -> RoutingPolicy:
            changed = dataclasses.replace(current, **changes)
            check_routing_policy(changed)
            return changed

        updated = await self._store.update_routing_policy(
            request.model_id, request.routing_policy.etag, change, make=request.allow_missing
        )
        await self._refresh()
        return pb.UpdateRoutingPolicyResponse(routing_policy=_to_proto(updated))

    async def DeleteRoutingPolicy(
        self, request: pb.DeleteRoutingPolicyRequest, context: _Context
    ) -> pb.DeleteRoutingPolicyResponse:
        """Return a model to the defaults."""
        await self._store.delete_routing_policy(request.model_id, request.etag)
        await self._refresh()
        return pb.DeleteRoutingPolicyResponse()

    async def _refresh(self) -> None:
        # The change is stored; if PostgreSQL went away since, polling will find it.
        with contextlib.suppress(PlatformError):
            await self._registry.refresh()


def _from_proto(message: pb.RoutingPolicy) -> RoutingPolicy:
    """Raises PlatformError(INVALID_ARGUMENT) for a backend that has two weights."""
    weights: dict[str, int] = {}
    for index, weight in enumerate(message.weights):
        if weight.backend_id in weights:
            raise invalid(f"routing_policy.weights[{index}].backend_id", "repeats a backend")
        weights[weight.backend_id] = weight.weight
    retry, hedge, timeouts, breaker = message.retry, message.hedge, message.timeouts, message.breaker
    return RoutingPolicy(
        strategy=message.strategy or DEFAULT.strategy,
        weights=weights,
        limit_attempts=retry.limit_attempts if retry.HasField("limit_attempts") else DEFAULT.limit_attempts,
        retry_budget_percent=(
            retry.budget_percent if retry.HasField("budget_percent") else DEFAULT.retry_budget_percent
        ),
        hedged=hedge.enabled,
        hedge_delay_millis=hedge.delay_millis,
        hedge_budget_percent=(
            hedge.budget_percent if hedge.HasField("budget_percent") else DEFAULT.hedge_budget_percent
        ),
        connect_millis=timeouts.connect_millis,
        first_byte_millis=timeouts.first_byte_millis,
        idle_millis=timeouts.idle_millis,
        total_millis=timeouts.total_millis,
        failure_percent=breaker.failure_percent or DEFAULT.failure_percent,
        least_attempts=breaker.least_attempts or DEFAULT.least_attempts,
        open_millis=breaker.open_millis or DEFAULT.open_millis,
        fallback_model_ids=tuple(message.fallback_model_ids),
    )


def _to_proto(policy: RoutingPolicy) -> pb.RoutingPolicy:
    message = pb.RoutingPolicy(
        model_id=policy.model_id,
        strategy=cast("pb.RoutingStrategy.ValueType", policy.strategy),
        weights=[pb.BackendWeight(backend_id=name, weight=weight) for name, weight in policy.weights.items()],
        retry=pb.RetryPolicy(limit_attempts=policy.limit_attempts, budget_percent=policy.retry_budget_percent),
        hedge=pb.HedgePolicy(
            enabled=policy.hedged,
            delay_millis=policy.hedge_delay_millis,
            budget_percent=policy.hedge_budget_percent,
        ),
        timeouts=pb.InferenceTimeouts(
            connect_millis=policy.connect_millis,
            first_byte_millis=policy.first_byte_millis,
            idle_millis=policy.idle_millis,
            total_millis=policy.total_millis,
        ),
        breaker=pb.BreakerPolicy(
            failure_percent=policy.failure_percent,
            least_attempts=policy.least_attempts,
            open_millis=policy.open_millis,
        ),
        fallback_model_ids=policy.fallback_model_ids,
        built_in=not policy.etag,
        etag=policy.etag,
    )
    if policy.etag:
        message.update_time.FromDatetime(policy.update_time)
    return message
