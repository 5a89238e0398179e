"""Routers that crash, are cut off and come back, against the real ledger: whatever happens in whatever order, a hard
budget is never overspent, and in the end the journals and the ledger agree to the last token.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mesh.auth import Principal
from mesh.errors import PlatformError
from router import budgets
from router.ceilings import Ceiling
from router.journal import Journal
from router.leases import Lease
from tests.money.world import PRICE, Economy, RouterLife, Running

T = TypeVar("T")

STEPS = int(os.environ.get("MONEY_STEPS", "2000"))
STEPS_AN_EXAMPLE = 50
TICK_S = 0.25


class Money(RuleBasedStateMachine):
    """Two routers, one organization with budgets of tokens and of cost, and all that may happen to them."""

    economy: Economy
    runner: asyncio.Runner

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.routers: list[RouterLife | None] = []
        self.crashed: list[Path] = []

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def end(self, router: RouterLife, running: Running) -> None:
        async def finish() -> None:
            router.finish(running)

        self.do(finish())

    @initialize(limit=st.integers(1_000, 20_000), daily=st.booleans())
    def begin(self, limit: int, daily: bool) -> None:
        self.tenant = self.do(self.economy.new_tenant(limit, daily=daily))
        for number in range(2):
            self.routers.append(self.do(self.start(Path(self.folder.name) / f"router-{number}")))

    async def start(self, folder: Path) -> RouterLife:
        return RouterLife(folder, self.economy.line(), self.economy.clock)

    def live(self, number: int) -> RouterLife | None:
        return self.routers[number % len(self.routers)]

    def running(self, number: int) -> tuple[RouterLife, Running] | None:
        found = [(router, running) for router in self.routers if router for running in router.running]
        return found[number % len(found)] if found else None

    @rule(
        number=st.integers(0, 1),
        prompt=st.integers(1, 300),
        completion=st.integers(1, 3_000),
        key=st.sampled_from(["key_a", "key_b"]),
    )
    def admit(self, number: int, prompt: int, completion: int, key: str) -> None:
        router = self.live(number)
        if router is None:
            return
        principal = Principal("api_key", key, self.tenant.organization_id, api_key_id=key)
        # Refused by its budgets, or while the ledger is away.
        with contextlib.suppress(PlatformError):
            self.do(router.admit(principal, Ceiling(prompt, completion, 1, PRICE)))

    @rule(number=st.integers(0, 50), tokens=st.integers(0, 3_000))
    def produce(self, number: int, tokens: int) -> None:
        if found := self.running(number):
            found[0].produce(found[1], tokens)

    @rule(number=st.integers(0, 50))
    def finish(self, number: int) -> None:
        if found := self.running(number):
            self.end(*found)

    @rule(number=st.integers(0, 1))
    def checkpoint(self, number: int) -> None:
        if router := self.live(number):
            self.do(router.checkpoint())

    @rule(number=st.integers(0, 1))
    def renew(self, number: int) -> None:
        if router := self.live(number):
            self.do(router.budgets._renew())

    @rule(number=st.integers(0, 1))
    def settle_former(self, number: int) -> None:
        if router := self.live(number):
            self.do(router.settle_former())

    @rule(number=st.integers(0, 1), cut=st.booleans(), loses=st.booleans())
    def disturb(self, number: int, cut: bool, loses: bool) -> None:
        if router := self.live(number):
            router.line.is_cut, router.line.loses_answers = cut, loses

    @rule(number=st.integers(0, 1))
    def crash(self, number: int) -> None:
        if router := self.live(number):
            self.routers[number] = None
            self.do(router.crash())

    @rule(number=st.integers(0, 1))
    def restart(self, number: int) -> None:
        if self.live(number) is None:
            self.routers[number] = self.do(self.start(Path(self.folder.name) / f"router-{number}"))

    @rule(seconds=st.floats(0.1, 15.0))
    def time_passes(self, seconds: float) -> None:
        self.do(self.advance(seconds))

    @precondition(lambda self: self.tenant.is_daily)
    @rule()
    def next_day(self) -> None:
        self.do(self.advance(self.economy.seconds_to_midnight()))

    async def advance(self, seconds: float) -> None:
        """Time passes, and in all of it routers look whether leases end."""
        left = seconds
        while left > 0:
            await self.economy.advance(min(left, TICK_S if seconds < 60 else left))
            left -= TICK_S if seconds < 60 else left
            for router in self.routers:
                if router is not None:
                    router.fence()

    @rule(limit=st.integers(0, 30_000))
    def change_limit(self, limit: int) -> None:
        self.do(self.economy.change_limit(self.tenant, limit))
        self.learn()

    @rule(amount=st.integers(1, 5_000), seconds=st.integers(1, 60))
    def override(self, amount: int, seconds: int) -> None:
        self.do(self.economy.override(self.tenant, amount, seconds))
        self.learn()

    @rule()
    def sweep(self) -> None:
        self.do(self.economy.sweep())
        self.learn()

    @rule()
    def operator_settles_what_expired(self) -> None:
        """An operator settles expired leases by hand, by what was charged to them so far, as he sees it."""
        self.do(self.economy.settle_by_hand(self.tenant, [router for router in self.routers if router is not None]))

    def learn(self) -> None:
        """Routers hear of changes."""
        for router in self.routers:
            if router is not None:
                router.forget_budgets()

    @invariant()
    def never_overspent(self) -> None:
        if self.routers:
            self.do(self.economy.check_not_overspent(self.tenant, [router for router in self.routers if router]))

    def teardown(self) -> None:
        """All comes back, all ends, and then the books must agree."""
        try:
            if self.routers:
                self.come_to_an_end()
        finally:
            for router in self.routers:
                if router is not None:
                    self.do(router.crash())
            self.folder.cleanup()

    def come_to_an_end(self) -> None:
        """Routers run again and reach the ledger, requests end, and what was left behind is settled."""
        for number in range(len(self.routers)):
            self.restart(number)
        live = [router for router in self.routers if router is not None]
        for router in live:
            router.line.is_cut = router.line.loses_answers = False
            for running in list(router.running):
                self.end(router, running)
        for _ in range(4):
            for router in live:
                self.do(router.budgets._renew())
                self.do(router.settle_former())
            self.do(self.advance(5.0))
        self.do(self.economy.check_books(self.tenant, live))


@pytest.fixture
def machine(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The machine, over a ledger of its own. Nobody waits for what might come back: time stands still here."""
    monkeypatch.setattr(budgets, "WAIT_S", 0.0)
    with asyncio.Runner() as runner:
        economy = runner.run(Economy.open(postgres_url))

        class OnThisLedger(Money):
            pass

        OnThisLedger.economy, OnThisLedger.runner = economy, runner
        yield OnThisLedger
        runner.run(economy.close())


def run(machine: Any, steps: int = STEPS) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(1, steps // STEPS_AN_EXAMPLE),
            stateful_step_count=STEPS_AN_EXAMPLE,
            deadline=None,
            derandomize=steps == STEPS,
            suppress_health_check=list(HealthCheck),
            # Shrinking takes minutes, and what failed is printed as it is.
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
            print_blob=False,
            verbosity=Verbosity.quiet,
        ),
    )


def test_budgets_are_never_overspent_and_books_agree_in_the_end(machine: Any) -> None:
    run(machine)


def test_without_fencing_an_overspend_is_found(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lease, "is_ending", lambda *_: False)
    with pytest.raises(AssertionError):
        run(machine)


def test_with_leases_freed_as_they_expire_an_overspend_is_found(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Economy.advance

    async def advance_and_free(self: Economy, seconds: float) -> None:
        await advance(self, seconds)
        await self.free_what_expired()

    monkeypatch.setattr(Economy, "advance", advance_and_free)
    with pytest.raises(AssertionError):
        run(machine)


def test_with_a_journal_that_forgets_books_do_not_agree(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "commit", lambda _: None)
    with pytest.raises(AssertionError):
        run(machine)
