"""Five hundred requests at once against a budget for thirty-seven of them: those run, and no other."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.auth import Principal
from mesh.errors import PlatformError, Reason
from router.ceilings import Ceiling
from tests.money.world import PRICE, Economy, RouterLife, Tenant

REQUESTS = 500
AFFORDABLE = 37
CEILING = Ceiling(prompt_tokens=40, completion_tokens=60, choices=1, price=PRICE)
TOKENS = 100


@pytest.fixture
async def economy(postgres_url: str) -> AsyncIterator[Economy]:
    opened = await Economy.open(postgres_url)
    yield opened
    await opened.close()


@contextlib.asynccontextmanager
async def routers(economy: Economy, folder: Path, count: int) -> AsyncIterator[list[RouterLife]]:
    """Routers whose budgets run."""
    lives = [RouterLife(folder / f"router-{number}", economy.line(), economy.clock) for number in range(count)]
    running = [asyncio.create_task(life.budgets.run()) for life in lives]
    yield lives
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    for life in lives:
        await life.crash()


async def sample(economy: Economy, tenant: Tenant, samples: list[int]) -> None:
    """Look again and again at what is spent and leased."""
    while True:
        rows = await economy.database.fetch(
            "SELECT limit_amount - spent - leased FROM budget_periods WHERE budget_id = ANY($1)",
            list(tenant.budget_ids),
        )
        samples += [row[0] for row in rows]
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("count", [1, 3])
async def test_exactly_the_affordable_requests_run(economy: Economy, tmp_path: Path, count: int) -> None:
    tenant = await economy.new_tenant(AFFORDABLE * TOKENS, daily=False)
    principal = Principal("api_key", "key_1", tenant.organization_id, api_key_id="key_1")
    outcomes: Counter[str] = Counter()
    left: list[int] = []
    async with routers(economy, tmp_path, count) as lives:
        sampling = asyncio.create_task(sample(economy, tenant, left))

        async def request(number: int) -> None:
            router = lives[number % count]
            try:
                running = await router.admit(principal, CEILING)
            except PlatformError as error:
                outcomes[error.reason] += 1
                return
            await asyncio.sleep(0)
            router.produce(running, TOKENS)
            router.finish(running)
            outcomes["ran"] += 1

        async with asyncio.timeout(60):
            await asyncio.gather(*(request(number) for number in range(REQUESTS)))
        sampling.cancel()
        async with asyncio.timeout(15):
            while await economy.database.fetchval("SELECT count(*) FROM budget_leases WHERE state <> 'settled'"):
                await asyncio.sleep(0.1)
        await economy.check_books(tenant, lives)
    assert outcomes == {"ran": AFFORDABLE, Reason.INSUFFICIENT_QUOTA: REQUESTS - AFFORDABLE}
    assert len(left) > 10
    assert min(left) >= 0


async def test_what_a_router_holds_idle_reaches_another_that_needs_it(economy: Economy, tmp_path: Path) -> None:
    tenant = await economy.new_tenant(16 * TOKENS, daily=False)
    principal = Principal("api_key", "key_1", tenant.organization_id, api_key_id="key_1")
    async with routers(economy, tmp_path, 2) as (first, second):
        first.finish(await first.admit(principal, CEILING))
        # The first holds a slice for more; the second needs all there is.
        all_of_it = Ceiling(15 * TOKENS, TOKENS, 1, PRICE)
        running = await second.admit(principal, all_of_it)
        assert running.ceiling == all_of_it


async def test_a_nearly_spent_budget_shortens_an_answer_rather_than_refuse_it(economy: Economy, tmp_path: Path) -> None:
    tenant = await economy.new_tenant(70, daily=False)
    principal = Principal("api_key", "key_1", tenant.organization_id, api_key_id="key_1")
    async with routers(economy, tmp_path, 1) as (router,):
        running = await router.admit(principal, CEILING)
        assert running.ceiling == Ceiling(40, 30, 1, PRICE)


async def test_a_hard_budget_is_unavailable_without_its_ledger_and_a_soft_one_is_not_missed(
    economy: Economy, tmp_path: Path
) -> None:
    hard, soft = await economy.new_tenant(1000, daily=False), await economy.new_soft_tenant(1000)
    async with routers(economy, tmp_path, 1) as (router,):
        for tenant in (hard, soft):
            # The first request learns of the budgets.
            principal = Principal("api_key", "key_1", tenant.organization_id, api_key_id="key_1")
            router.finish(await router.admit(principal, CEILING))
        router.line.is_cut = True
        large = Ceiling(400, 500, 1, PRICE)
        with pytest.raises(PlatformError) as refused:
            await router.admit(Principal("api_key", "key_1", hard.organization_id, api_key_id="key_1"), large)
        assert (refused.value.reason, refused.value.retry_after_s) == (Reason.UNAVAILABLE, 1.0)
        passed = await router.admit(Principal("api_key", "key_1", soft.organization_id, api_key_id="key_1"), large)
        assert not passed.event.budgets
