"""What a request costs, and that nothing leaves a router that would not be billed."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from aiaas.identity.v1 import budget_service_pb2 as pb
from aiaas.type.v1.usage_event_pb2 import (
    CHARGE_UNIT_TOKENS,
    ENDPOINT_EMBEDDINGS,
    OUTCOME_FAILED,
    OUTCOME_REFUSED,
    OUTCOME_SUCCEEDED,
    OUTCOME_TRUNCATED,
    UsageEvent,
)
from mesh.auth import Principal
from mesh.errors import PlatformError, Reason
from router.answers import Head
from router.backends import RegistryContent
from router.ceilings import Ceiling
from router.inference import Inference
from router.leases import Account, Charge, Lease, Reservation, Spender
from tests.doubles.scripted_backend import Answer, chat_document, chat_stream, chunk, failure, sse
from tests.unit.router.world import CHAT, EVENTS, MODEL, PRICE, STREAM, World, until


class OneBudget:
    """A treasury with a slice of one budget of tokens, which shortens answers to `longest` tokens."""

    def __init__(self, amount: int = 100_000, longest: int | None = None) -> None:
        budget = pb.Budget(budget_id="budget_1", unit=pb.BUDGET_UNIT_TOKENS, enforcement=pb.BUDGET_ENFORCEMENT_HARD)
        message = pb.BudgetLease(
            budget_lease_id="lease_1",
            amount=amount,
            state=pb.BUDGET_LEASE_STATE_ACTIVE,
            valid_for=Duration(seconds=10),
            admit_for=Duration(seconds=10),
        )
        self.lease = Lease(Account(budget), message, 0.0)
        self.longest = longest
        self.refusal: PlatformError | None = None
        self.stop: Callable[[], None] = lambda: None

    async def reserve(
        self, principal: Principal, model: str, ceiling: Ceiling, admit_time: datetime, stop: Callable[[], None]
    ) -> Reservation:
        """See `router.inference.Treasury`."""
        if self.refusal is not None:
            raise self.refusal
        self.stop = stop
        if self.longest is not None:
            ceiling = Ceiling(ceiling.prompt_tokens, self.longest, ceiling.choices, ceiling.price)
        charge = Charge(self.lease, ceiling.amount(pb.BUDGET_UNIT_TOKENS))
        return Reservation([charge], ceiling, Spender(0, principal.api_key_id, model), stop)


async def test_cost_follows_from_tokens_and_the_price_at_admission(world: World) -> None:
    world.first.script.append(chat_document(prompt_tokens=11, completion_tokens=3))
    await world.answer(CHAT)
    event = world.event()
    assert event.cost_micros == 11 + 2 * 3
    assert (event.price.price_id, event.price.completion_micros_per_million) == ("price_1", 2_000_000)


@pytest.mark.parametrize("answer", [failure(400), failure(500)], ids=["refused", "failed"])
async def test_what_brought_nothing_costs_nothing(world: World, answer: Answer) -> None:
    world.treasury = budget = OneBudget()
    world.first.default = answer
    await world.refusal(CHAT)
    event = world.event()
    assert event.outcome in (OUTCOME_REFUSED, OUTCOME_FAILED)
    assert (event.cost_micros, event.usage.prompt_tokens, event.budgets[0].charged) == (0, 0, 0)
    assert (budget.lease.reserved, budget.lease.spent) == (0, 0)


async def test_model_without_a_price_is_named_and_never_free(world: World) -> None:
    world.store.content = RegistryContent(99, (MODEL,), tuple(world.backends.values()), ())
    await world.registry.refresh()
    error = await world.refusal(CHAT)
    assert (error.reason, "'m'" in error.message) == (Reason.MODEL_NOT_PRICED, True)
    assert not world.first.received


async def test_a_price_of_zero_is_free_on_purpose(world: World) -> None:
    free = replace(
        PRICE, prompt_micros_per_million=0, cached_prompt_micros_per_million=0, completion_micros_per_million=0
    )
    world.store.content = RegistryContent(99, (MODEL,), (world.backends["first"],), (free,))
    await world.registry.refresh()
    world.first.script.append(chat_document())
    await world.answer(CHAT)
    assert world.event().cost_micros == 0


async def test_budget_is_charged_what_was_used_and_the_event_says_so(world: World) -> None:
    world.treasury = budget = OneBudget()
    world.first.script.append(chat_document(prompt_tokens=11, completion_tokens=3))
    await world.answer(CHAT)
    (charge,) = world.event().budgets
    assert (charge.budget_id, charge.budget_lease_id, charge.unit) == ("budget_1", "lease_1", CHARGE_UNIT_TOKENS)
    assert charge.charged == 14 < charge.reserved
    assert (budget.lease.reserved, budget.lease.spent) == (0, 14)


async def test_answer_is_shortened_to_what_a_budget_has_left(world: World) -> None:
    world.treasury = OneBudget(longest=20)
    world.first.script.append(chat_document())
    await world.answer(CHAT | {"max_completion_tokens": 500})
    sent: dict[str, Any] = world.first.received[0].body
    assert (sent["max_tokens"], "max_completion_tokens" in sent) == (20, False)


async def test_an_answer_that_no_budget_shortens_keeps_its_own_limit(world: World) -> None:
    world.treasury = OneBudget()
    world.first.script.append(chat_document())
    await world.answer(CHAT)
    assert "max_tokens" not in world.first.received[0].body


async def test_no_more_is_billed_than_a_request_could_use(world: World) -> None:
    world.treasury = budget = OneBudget()
    world.first.script.append(chat_document(prompt_tokens=900_000, completion_tokens=900_000))
    await world.answer(CHAT | {"max_tokens": 50})
    event = world.event()
    assert event.usage_clamped
    assert event.usage.completion_tokens == 50
    assert event.budgets[0].charged <= event.budgets[0].reserved
    assert budget.lease.spent <= budget.lease.amount


async def test_every_prompt_of_a_batch_is_billed(world: World) -> None:
    world.treasury = budget = OneBudget()
    model = replace(MODEL, context_tokens=512)
    world.store.content = RegistryContent(99, (model,), (world.backends["first"],), (PRICE,))
    await world.registry.refresh()
    told = json.dumps({"object": "list", "data": [], "usage": {"prompt_tokens": 1500, "total_tokens": 1500}})
    world.first.script.append(Answer([told.encode()]))
    await world.answer({"model": "m", "input": ["word " * 500] * 3}, endpoint=ENDPOINT_EMBEDDINGS)
    event = world.event()
    assert (event.usage.prompt_tokens, event.usage_clamped, event.budgets[0].charged) == (1500, False, 1500)
    assert budget.lease.spent == 1500


async def test_refused_by_its_budget_reaches_no_engine(world: World) -> None:
    world.treasury = budget = OneBudget()
    budget.refusal = PlatformError(Reason.INSUFFICIENT_QUOTA)
    assert (await world.refusal(CHAT)).reason is Reason.INSUFFICIENT_QUOTA
    assert not world.first.received
    assert (world.event().outcome, world.event().reason) == (OUTCOME_REFUSED, "insufficient_quota")


async def test_stream_whose_lease_ends_is_stopped_and_charged_what_it_had(world: World) -> None:
    world.treasury = budget = OneBudget()
    world.first.default = Answer([*sse(chunk("a"), chunk("b"), done=False), asyncio.Event()], content_type=EVENTS)
    _, parts = world.begin(STREAM)
    produced = b""
    while produced.count(b"data:") < 2:
        part = await anext(parts)
        produced += part if isinstance(part, bytes) else b""
    budget.stop()
    budget.stop()
    with pytest.raises(PlatformError) as stopped:
        await anext(parts)
    assert stopped.value.reason is Reason.UNAVAILABLE
    event = world.event()
    assert (event.outcome, event.reason, event.budgets[0].charged) == (OUTCOME_TRUNCATED, "unavailable", 2)
    await until(world.first.received[0].abandoned.is_set, within_s=1)


async def test_begun_request_is_in_the_journal_with_all_that_bills_it(world: World) -> None:
    world.treasury = OneBudget()
    world.first.default = Answer([*sse(chunk("a"), chunk("b"), done=False), asyncio.Event()], content_type=EVENTS)
    _, parts = world.begin(STREAM)
    assert isinstance(await anext(parts), Head)
    await anext(parts)
    await world.journal.sync()
    (begun,) = await world.journal.read(world.journal.store.read_open)
    event = UsageEvent.FromString(begun.event)
    assert (event.request_id, event.model, event.price.price_id) == ("req_1", "m", "price_1")
    assert event.budgets[0].budget_lease_id == "lease_1"
    await parts.aclose()
    await world.journal.sync()
    assert not await world.journal.read(world.journal.store.read_open)


async def test_succeeded_request_is_closed_before_its_reader_has_the_tail(world: World) -> None:
    world.first.script.append(chat_stream("a"))
    await world.answer(STREAM)
    assert world.event().outcome == OUTCOME_SUCCEEDED


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["document", "stream"])
async def test_inference_that_has_ended_leaves_nothing_to_the_garbage_collector(
    world: World, body: dict[str, Any]
) -> None:
    world.treasury = budget = OneBudget()
    world.first.script.append(chat_stream("a") if body is STREAM else chat_document())
    gc.collect()
    gc.disable()
    try:
        await world.answer(body)
        budget.stop = lambda: None
        assert not [found for found in gc.get_objects() if isinstance(found, Inference)]
    finally:
        gc.enable()
    assert world.event().budgets[0].charged
