"""What a routing policy does for requests: retries, breakers, hedges, fallbacks, times, against scripted engines."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from aiaas.router.v1.backend_service_pb2 import ENGINE_KIND_VLLM
from aiaas.type.v1.usage_event_pb2 import (
    ENDPOINT_CHAT_COMPLETIONS,
    OUTCOME_DEADLINE_EXCEEDED,
    OUTCOME_FAILED,
    OUTCOME_SUCCEEDED,
    UsageEvent,
)
from mesh.errors import Reason
from router.backends import Backend, BackendModel
from router.breaker import Breaker
from router.models import Model
from router.prices import Price
from router.rate_limits import Defaults
from router.routing import LEAST_RETRIES, LEAST_SAMPLES
from router.routing_policies import RoutingPolicy
from tests.doubles.scripted_backend import Answer, chat_document, chat_stream, chunk, failure, sse
from tests.unit.router.test_inference_money import OneBudget
from tests.unit.router.world import CHAT, EVENTS, MODEL, PRICE, PRINCIPAL, STREAM, World, until

OTHER = Model("other", endpoints=(ENDPOINT_CHAT_COMPLETIONS,))
OTHER_PRICE = Price("price_2", "other", 7_000_000, 7_000_000, 7_000_000, PRICE.valid_from, PRICE.create_time)


def silent() -> Answer:
    return Answer(before=[asyncio.Event()])


async def use(world: World, policy: RoutingPolicy, *backends: Backend) -> None:
    """Both engines, or those that are named, with this policy for the model, and another model with its price."""
    await world.use(
        *(backends or world.backends.values()),
        models=(MODEL, OTHER),
        prices=(PRICE, OTHER_PRICE),
        policies=(replace(policy, model_id="m"),),
    )


def for_other(world: World, name: str) -> Backend:
    """A backend that serves the other model."""
    return replace(world.backends[name], models=(BackendModel("other", "up"),))


def attempts(world: World, which: int = -1) -> list[tuple[str, str]]:
    return [(attempt.backend_id, attempt.failure_reason) for attempt in world.events[which].attempts]


async def test_request_is_tried_as_often_as_the_policy_says(world: World) -> None:
    world.first.default = world.second.default = failure(500)
    await use(world, RoutingPolicy(limit_attempts=1))
    await world.refusal(CHAT)
    assert len(attempts(world)) == 1
    third = Backend("third", world.first.base_url, ENGINE_KIND_VLLM, models=(BackendModel("m", "up"),))
    await use(world, RoutingPolicy(limit_attempts=3), *world.backends.values(), third)
    await world.refusal(CHAT)
    assert {name for name, _ in attempts(world)} == {"first", "second", "third"}


async def test_retries_are_a_share_of_requests(world: World) -> None:
    world.first.default = world.second.default = failure(500)
    await use(world, RoutingPolicy(least_attempts=1_000_000, retry_budget_percent=20))
    for _ in range(100):
        await world.refusal(CHAT)
    retried = sum(len(event.attempts) == 2 for event in world.events)
    assert LEAST_RETRIES <= retried <= 20


async def test_no_retry_is_made_where_the_policy_gives_none(world: World) -> None:
    world.first.default = world.second.default = failure(500)
    await use(world, RoutingPolicy(retry_budget_percent=0))
    await world.refusal(CHAT)
    assert len(attempts(world)) == 1


async def test_failing_backend_is_left_alone(world: World) -> None:
    await use(world, RoutingPolicy(least_attempts=4, open_millis=3_600_000), world.backends["first"])
    world.first.default = failure(500)
    for _ in range(4):
        assert (await world.refusal(CHAT)).reason is Reason.BACKEND_ERROR
    assert (await world.refusal(CHAT)).reason is Reason.NO_BACKEND_AVAILABLE
    assert len(world.first.received) == 4


def test_open_breaker_lets_one_attempt_find_out_when_its_time_is_over() -> None:
    policy, breaker = RoutingPolicy(least_attempts=1, open_millis=1000), Breaker()
    breaker.end(10.0, failed=True, is_trial=breaker.start(), policy=policy)
    assert not breaker.lets_pass(10.9)
    assert breaker.lets_pass(11.0)
    is_trial = breaker.start()
    assert is_trial
    assert not breaker.lets_pass(11.1), "one at a time"
    breaker.end(11.2, failed=True, is_trial=is_trial, policy=policy)
    assert not breaker.lets_pass(12.1)
    # What began before it opened says nothing, nor does an attempt whose client left.
    breaker.end(12.3, failed=False, is_trial=False, policy=policy)
    breaker.end(12.4, failed=None, is_trial=breaker.start(), policy=policy)
    assert breaker.is_open
    breaker.end(12.6, failed=False, is_trial=breaker.start(), policy=policy)
    assert breaker.lets_pass(12.6)
    assert not breaker.is_open


async def test_clients_own_faults_open_no_breaker(world: World) -> None:
    await use(world, RoutingPolicy(least_attempts=1), world.backends["first"])
    world.first.default = failure(400)
    for _ in range(3):
        assert (await world.refusal(CHAT)).reason is Reason.INVALID_ARGUMENT


async def test_client_that_leaves_says_nothing_of_the_backend(world: World) -> None:
    await use(world, RoutingPolicy(least_attempts=1), world.backends["first"])
    world.first.script.append(silent())
    inference, parts = world.begin(CHAT)
    reading = asyncio.ensure_future(anext(parts))
    await until(lambda: bool(world.first.received))
    inference.abandon()
    await asyncio.gather(reading, return_exceptions=True)
    await world.answer(CHAT)


HEDGED = RoutingPolicy(hedged=True, hedge_delay_millis=30, hedge_budget_percent=100)


async def silent_first(world: World, policy: RoutingPolicy = HEDGED) -> None:
    """Both backends; the first takes the request, and says nothing."""
    await use(world, replace(policy, weights={"first": 1000, "second": 1}))
    state = world.registry.state("second")
    assert state is not None
    state.start_request()
    world.first.default = silent()


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
async def test_second_backend_answers_while_the_first_is_silent(world: World, body: dict[str, Any]) -> None:
    await silent_first(world)
    world.second.default = (
        chat_stream("a", "b", prompt_tokens=5)
        if body is STREAM
        else chat_document("a", prompt_tokens=5, completion_tokens=2)
    )
    head, _, tail = await world.answer(body)
    assert (head.backend_id, tail.usage.prompt_tokens, tail.usage.completion_tokens) == ("second", 5, 2)
    assert attempts(world) == [("first", "outrun"), ("second", "")]
    await until(lambda: world.first.received[0].abandoned.is_set())
    (event,) = world.events
    assert (event.backend_id, event.outcome, event.cost_micros) == ("second", OUTCOME_SUCCEEDED, 5 + 2 * 2)
    states = dict(world.registry.probe_targets())
    assert [state.in_flight for state in states.values()] == [0, 1]


async def test_first_backend_keeps_the_request_that_it_answers_first(world: World) -> None:
    await silent_first(world)
    late = asyncio.Event()
    world.first.default = Answer([*sse(chunk("a"), chunk(finish_reason="stop"))], content_type=EVENTS, before=[late])
    world.second.default = silent()
    answer = asyncio.ensure_future(world.answer(STREAM))
    await until(lambda: bool(world.second.received))
    late.set()
    head, _, _ = await answer
    assert head.backend_id == "first"
    assert attempts(world) == [("first", ""), ("second", "outrun")]
    await until(lambda: world.second.received[0].abandoned.is_set())


async def test_client_that_leaves_a_race_leaves_both(world: World) -> None:
    await silent_first(world)
    world.second.default = silent()
    inference, parts = world.begin(STREAM)
    reading = asyncio.ensure_future(anext(parts))
    await until(lambda: bool(world.second.received))
    inference.abandon()
    await asyncio.gather(reading, return_exceptions=True)
    await until(lambda: world.first.received[0].abandoned.is_set() and world.second.received[0].abandoned.is_set())
    states = dict(world.registry.probe_targets())
    assert [state.in_flight for state in states.values()] == [0, 1]


async def test_race_that_both_lose_is_a_failure(world: World) -> None:
    await silent_first(world, replace(HEDGED, first_byte_millis=100))
    world.second.default = failure(500)
    assert (await world.refusal(STREAM)).reason is Reason.BACKEND_TIMEOUT
    assert world.events[0].outcome == OUTCOME_FAILED


async def test_hedges_are_a_share_of_requests(world: World) -> None:
    await silent_first(world, replace(HEDGED, hedge_budget_percent=10, first_byte_millis=60, limit_attempts=1))
    world.second.default = chat_stream("a", prompt_tokens=1)
    await world.answer(STREAM)
    assert (await world.refusal(STREAM)).reason is Reason.BACKEND_TIMEOUT


async def test_delay_of_a_hedge_is_learnt_where_none_is_given(world: World) -> None:
    await use(world, replace(HEDGED, hedge_delay_millis=0, weights={"first": 1000, "second": 1}))
    policy = world.registry.snapshot.policy_of("m")
    world.first.default = world.second.default = chat_stream("a", prompt_tokens=1)
    for _ in range(LEAST_SAMPLES):
        assert world.routing.hedge_after_s("m", replace(policy, hedged=False), streamed=True) is None
        await world.answer(STREAM)
    delay_s = world.routing.hedge_after_s("m", policy, streamed=True)
    assert delay_s is not None
    assert 0 < delay_s < 1
    assert world.routing.hedge_after_s("m", policy, streamed=False) is None


async def test_another_model_answers_at_its_own_price(world: World) -> None:
    world.treasury = budget = OneBudget()
    world.limit(Defaults(requests_per_second=1000, burst_requests=1000, concurrent_requests=1))
    await use(world, RoutingPolicy(fallback_model_ids=("other",)), world.backends["first"], for_other(world, "second"))
    world.first.default = failure(500)
    world.second.default = chat_document("Hello", prompt_tokens=3, completion_tokens=4)
    head, _, _ = await world.answer(CHAT)
    assert (head.model, head.backend_id) == ("other", "second")
    (event,) = world.events
    assert (event.model, event.price.price_id, event.cost_micros) == ("other", "price_2", 7 * 7)
    assert attempts(world) == [("first", "backend_error"), ("second", "")]
    assert (budget.lease.reserved, budget.lease.spent) == (0, 7)
    assert [charge.charged for charge in event.budgets] == [7]
    # The room of the only request at a time is free again.
    await world.answer(CHAT)


async def test_another_model_answers_where_the_model_has_no_backend(world: World) -> None:
    await use(world, RoutingPolicy(fallback_model_ids=("gone", "other")), for_other(world, "second"))
    head, _, _ = await world.answer(CHAT)
    assert head.model == "other"


async def test_what_began_with_one_model_is_in_the_journal_as_the_other(world: World) -> None:
    await use(world, RoutingPolicy(fallback_model_ids=("other",)), world.backends["first"], for_other(world, "second"))
    world.first.default = failure(500)
    world.second.default = silent()
    reading = asyncio.ensure_future(world.answer(CHAT))
    await until(lambda: bool(world.second.received))
    await world.journal.sync()
    (stored,) = world.journal.store.read_open()
    event = UsageEvent.FromString(stored.event)
    assert (event.model, event.price.price_id) == ("other", "price_2")
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


@pytest.mark.parametrize("why", ["not allowed", "refused", "failed"])
async def test_failure_is_the_first_models_where_no_other_helps(world: World, why: str) -> None:
    world.treasury = budget = OneBudget()
    principal = replace(PRINCIPAL, allowed_models=("m",)) if why == "not allowed" else PRINCIPAL
    await use(world, RoutingPolicy(fallback_model_ids=("other",)), world.backends["first"], for_other(world, "second"))
    world.first.default = failure(503)
    world.second.default = failure(400) if why == "refused" else failure(500)
    assert (await world.refusal(CHAT, principal=principal)).reason is Reason.BACKEND_ERROR
    assert len(world.second.received) == (0 if why == "not allowed" else 1)
    (event,) = world.events
    assert (event.model, event.outcome, event.cost_micros) == ("m", OUTCOME_FAILED, 0)
    assert (budget.lease.reserved, budget.lease.spent) == (0, 0)


async def test_clients_own_fault_is_no_other_models(world: World) -> None:
    await use(world, RoutingPolicy(fallback_model_ids=("other",)), world.backends["first"], for_other(world, "second"))
    world.first.default = failure(400)
    assert (await world.refusal(CHAT)).reason is Reason.INVALID_ARGUMENT
    assert not world.second.received


async def test_whole_of_a_request_takes_no_longer_than_its_policy_says(world: World) -> None:
    await use(world, RoutingPolicy(total_millis=100), world.backends["first"])
    world.first.default = silent()
    assert (await world.refusal(CHAT)).reason is Reason.DEADLINE_EXCEEDED
    assert world.event().outcome == OUTCOME_DEADLINE_EXCEEDED


async def test_policys_first_byte_timeout_is_before_the_backends(world: World) -> None:
    slow = replace(world.backends["first"], first_byte_timeout_millis=5000)
    await use(world, RoutingPolicy(first_byte_millis=50), slow)
    world.first.default = silent()
    assert (await world.refusal(STREAM)).reason is Reason.BACKEND_TIMEOUT
