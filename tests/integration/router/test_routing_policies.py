"""Routing policies through a real router over gRPC: what may be asked, and that requests follow."""

from typing import Any

import pytest

from aiaas.router.v1 import model_service_pb2 as models
from aiaas.router.v1 import routing_policy_service_pb2 as pb
from aiaas.router.v1.routing_policy_service_pb2_grpc import RoutingPolicyServiceStub
from mesh.errors import PlatformError, Reason
from tests.doubles.scripted_backend import ScriptedBackend, failure
from tests.integration.router.conftest import Router

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


class Policies:
    """Calls about the policy of the model m."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._stub = RoutingPolicyServiceStub(router.channel)

    async def get(self, model_id: str = "m") -> pb.RoutingPolicy:
        request = pb.GetRoutingPolicyRequest(model_id=model_id)
        policy: pb.RoutingPolicy = (await self._router.call(self._stub.GetRoutingPolicy, request)).routing_policy
        return policy

    async def update(self, *paths: str, make: bool = True, **fields: Any) -> pb.RoutingPolicy:
        request = pb.UpdateRoutingPolicyRequest(
            model_id="m", routing_policy=pb.RoutingPolicy(**fields), allow_missing=make
        )
        request.update_mask.paths.extend(paths)
        policy: pb.RoutingPolicy = (await self._router.call(self._stub.UpdateRoutingPolicy, request)).routing_policy
        return policy

    async def refused(self, **fields: Any) -> PlatformError:
        with pytest.raises(PlatformError) as caught:
            await self.update(**fields)
        return caught.value

    async def list(self, **fields: Any) -> pb.ListRoutingPoliciesResponse:
        response: pb.ListRoutingPoliciesResponse = await self._router.call(
            self._stub.ListRoutingPolicies, pb.ListRoutingPoliciesRequest(**fields)
        )
        return response

    async def delete(self, etag: str = "") -> None:
        await self._router.call(self._stub.DeleteRoutingPolicy, pb.DeleteRoutingPolicyRequest(model_id="m", etag=etag))


@pytest.fixture
async def policies(router: Router) -> Policies:
    await router.add_model("m")
    await router.add_model("other")
    return Policies(router)


async def test_model_has_the_defaults_until_it_has_a_policy_of_its_own(policies: Policies) -> None:
    defaults = await policies.get()
    assert defaults.built_in
    assert (defaults.model_id, defaults.strategy) == ("m", pb.ROUTING_STRATEGY_LEAST_LOADED)
    assert (defaults.retry.limit_attempts, defaults.retry.budget_percent) == (2, 20)
    assert (defaults.breaker.failure_percent, defaults.breaker.least_attempts, defaults.breaker.open_millis) == (
        50,
        10,
        5000,
    )
    with pytest.raises(PlatformError, match="not_found"):
        await policies.update(strategy="ROUTING_STRATEGY_WEIGHTED", make=False)
    stored = await policies.update(strategy="ROUTING_STRATEGY_WEIGHTED", fallback_model_ids=["other"])
    assert not stored.built_in
    assert stored == await policies.get()
    assert stored.strategy == pb.ROUTING_STRATEGY_WEIGHTED
    assert stored.fallback_model_ids == ["other"]
    await policies.delete(stored.etag)
    assert await policies.get() == defaults
    with pytest.raises(PlatformError, match="not_found"):
        await policies.delete()
    with pytest.raises(PlatformError, match="not_found"):
        await policies.get("absent")


async def test_mask_decides_what_is_changed(policies: Policies) -> None:
    await policies.update(retry=pb.RetryPolicy(limit_attempts=4, budget_percent=0), fallback_model_ids=["other"])
    changed = await policies.update("hedge", hedge=pb.HedgePolicy(enabled=True), fallback_model_ids=[])
    assert (changed.retry.limit_attempts, changed.retry.budget_percent) == (4, 0)
    assert changed.hedge.enabled
    assert changed.fallback_model_ids == ["other"]
    assert not (await policies.update("*")).fallback_model_ids


async def test_stale_etag_is_refused(policies: Policies) -> None:
    first = await policies.update(strategy="ROUTING_STRATEGY_WEIGHTED")
    await policies.update(strategy="ROUTING_STRATEGY_PREFIX_AFFINITY")
    assert (await policies.refused(etag=first.etag)).field == "routing_policy.etag"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"strategy": 99}, "strategy"),
        ({"weights": [pb.BackendWeight(backend_id="absent", weight=1)]}, "weights[0].backend_id"),
        ({"weights": [pb.BackendWeight(backend_id="b", weight=1001)]}, "weights[0].weight"),
        ({"weights": [pb.BackendWeight(backend_id="b")] * 2}, "weights[1].backend_id"),
        ({"retry": pb.RetryPolicy(limit_attempts=0)}, "retry.limit_attempts"),
        ({"retry": pb.RetryPolicy(budget_percent=101)}, "retry.budget_percent"),
        ({"hedge": pb.HedgePolicy(delay_millis=-1)}, "hedge.delay_millis"),
        ({"timeouts": pb.InferenceTimeouts(total_millis=-1)}, "timeouts.total_millis"),
        ({"breaker": pb.BreakerPolicy(failure_percent=101)}, "breaker.failure_percent"),
        ({"fallback_model_ids": ["m"]}, "fallback_model_ids[0]"),
        ({"fallback_model_ids": ["other", "absent"]}, "fallback_model_ids[1]"),
    ],
)
async def test_wrong_policy_is_refused_by_field(policies: Policies, fields: dict[str, Any], field: str) -> None:
    error = await policies.refused(**fields)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, f"routing_policy.{field}")


async def test_pages_hold_every_policy_once(router: Router, policies: Policies) -> None:
    stub = RoutingPolicyServiceStub(router.channel)
    for model_id in ("other", "m"):
        policy = pb.RoutingPolicy(strategy=pb.ROUTING_STRATEGY_WEIGHTED)
        request = pb.UpdateRoutingPolicyRequest(model_id=model_id, routing_policy=policy, allow_missing=True)
        await router.call(stub.UpdateRoutingPolicy, request)
    first = await policies.list(page_size=1)
    second = await policies.list(page_size=1, page_token=first.next_page_token)
    assert [policy.model_id for page in (first, second) for policy in page.routing_policies] == ["m", "other"]
    assert not second.next_page_token


async def test_policy_goes_with_its_model(router: Router, policies: Policies) -> None:
    await policies.update(strategy="ROUTING_STRATEGY_WEIGHTED")
    await router.call(router.models.DeleteModel, models.DeleteModelRequest(model_id="m"))
    assert not (await policies.list()).routing_policies


async def test_requests_follow_a_policy_as_soon_as_it_is_answered(router: Router, policies: Policies) -> None:
    async with ScriptedBackend() as broken, ScriptedBackend() as well:
        broken.default = failure(500)
        await router.add_backend("broken", broken.base_url, "m")
        await router.add_backend("well", well.base_url, "other")
        assert (await router.answer(CHAT)).error is not None
        await policies.update(fallback_model_ids=["other"])
        answer = await router.answer(CHAT)
        assert answer.error is None
        assert answer.head is not None
        assert (answer.head.model, answer.head.backend_id) == ("other", "well")
