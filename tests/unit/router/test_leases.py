"""A lease never lends more than it holds, and tells the ledger all that was spent."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.identity.v1 import budget_service_pb2 as pb
from router.ceilings import Ceiling
from router.leases import AHEAD, FENCE_S, IDLE_S, Account, Charge, Lease, Reservation, Spender
from tests.unit.router.test_ceilings import PRICE

SPENDER = Spender(3600, "key_1", "m")


def budget(unit: pb.BudgetUnit.ValueType = pb.BUDGET_UNIT_TOKENS) -> pb.Budget:
    return pb.Budget(budget_id="budget_1", unit=unit, enforcement=pb.BUDGET_ENFORCEMENT_HARD)


def lease(account: Account, amount: int, *, asked_at: float = 0.0, admit_for_s: int | None = 10) -> Lease:
    message = pb.BudgetLease(
        budget_lease_id=f"lease_{len(account.leases)}",
        amount=amount,
        state=pb.BUDGET_LEASE_STATE_ACTIVE,
        period_start=Timestamp(seconds=0),
        valid_for=Duration(seconds=10),
        admit_for=None if admit_for_s is None else Duration(seconds=admit_for_s),
    )
    made = Lease(account, message, asked_at)
    account.leases.append(made)
    return made


def reserve(held: Lease, amount: int) -> Reservation:
    return Reservation([Charge(held, amount)], Ceiling(amount, 0, 1, PRICE), SPENDER, lambda: None)


def test_reserved_is_not_free() -> None:
    held = lease(Account(budget()), 100)
    reserve(held, 70)
    assert held.free == 30


def test_settling_frees_what_was_not_used() -> None:
    held = lease(Account(budget()), 100)
    assert reserve(held, 70).settle(0, 20, 1) == [20]
    assert (held.spent, held.reserved, held.free) == (20, 0, 80)


def test_no_charge_is_above_what_was_reserved() -> None:
    held = lease(Account(budget()), 100)
    assert reserve(held, 70).settle(0, 5000, 1) == [70]


def test_each_budget_is_charged_in_its_own_unit() -> None:
    held = [
        lease(Account(budget(unit)), 100)
        for unit in (pb.BUDGET_UNIT_COST, pb.BUDGET_UNIT_TOKENS, pb.BUDGET_UNIT_REQUESTS)
    ]
    reservation = Reservation([Charge(one, 50) for one in held], Ceiling(1, 0, 1, PRICE), SPENDER, lambda: None)
    assert reservation.settle(7, 20, 1) == [7, 20, 1]


def test_nothing_is_admitted_shortly_before_the_end() -> None:
    account = Account(budget())
    lease(account, 100, asked_at=5.0)
    assert account.find(100, 15.0 - FENCE_S - 0.01) is not None
    assert account.find(100, 15.0 - FENCE_S) is None


def test_nothing_is_admitted_after_the_period_though_what_runs_goes_on() -> None:
    account = Account(budget())
    held = lease(account, 100, admit_for_s=2)
    assert account.find(1, 1.9) is held
    assert account.find(1, 2.0) is None
    assert not held.is_ending(2.0)


def test_a_lease_without_admission_admits_nothing() -> None:
    account = Account(budget())
    lease(account, 100, admit_for_s=None)
    assert account.find(1, 0.0) is None


def test_report_gives_back_before_it_is_sent() -> None:
    held = lease(Account(budget()), 100)
    reserve(held, 30)
    report = held.report(10)
    assert (report.spent, report.reserved, report.wanted) == (0, 30, 10)
    assert held.free == 10, "what is given back must not be reserved any more, whether or not the report arrives"


def test_reports_tell_only_lines_that_have_grown() -> None:
    held = lease(Account(budget()), 100)
    reserve(held, 30).settle(0, 12, 1)
    assert [(line.spent, line.requests) for line in held.report(50).lines] == [(12, 1)]
    assert not held.report(50).lines


def test_a_report_that_may_be_lost_is_told_again() -> None:
    held = lease(Account(budget()), 100)
    reserve(held, 30).settle(0, 12, 1)
    held.unreport(held.report(50))
    reserve(held, 30).settle(0, 5, 1)
    assert [(line.spent, line.requests) for line in held.report(50).lines] == [(17, 2)]


def test_a_settlement_tells_everything() -> None:
    held = lease(Account(budget()), 100)
    reserve(held, 30).settle(0, 12, 1)
    held.report(0)
    settlement = held.settlement()
    assert settlement.spent == 12
    assert [(line.hour_start.seconds, line.api_key_id, line.model, line.spent) for line in settlement.lines] == [
        (3600, "key_1", "m", 12)
    ]


def test_a_lease_in_use_is_not_idle() -> None:
    held = lease(Account(budget()), 100)
    running = reserve(held, 30)
    assert not held.is_idle(IDLE_S + 1)
    running.settle(0, 1, 1)
    assert held.is_idle(IDLE_S + 1)


def test_what_the_last_second_took_is_kept_twice() -> None:
    account = Account(budget())
    first, second = lease(account, 100), lease(account, 100)
    account.took(60)
    assert account.share_out(1.0) == {first.lease_id: 100, second.lease_id: 20}
    assert account.share_out(2.0) == {first.lease_id: 0, second.lease_id: 0}


def test_a_scarce_budget_is_not_held_ahead_of_need() -> None:
    account = Account(budget())
    held = lease(account, 100)
    account.took(60)
    account.is_scarce = True
    assert account.share_out(1.0) == {held.lease_id: 0}
    assert not account.is_low(1, 1.0)


def test_asks_for_what_waits_and_for_some_requests_more() -> None:
    account = Account(budget())
    assert account.wanted(10) == AHEAD * 10
    account.waiting = 1000
    assert account.wanted(10) == 1000


def test_a_refusal_is_known_for_as_much_or_more_and_for_a_moment() -> None:
    account = Account(budget())
    denial = pb.LeaseDenial(budget_id="budget_1")
    account.deny(denial, 50, until=1.0)
    assert account.known_denial(50, 0.5) is denial
    assert account.known_denial(49, 0.5) is None
    assert account.known_denial(50, 1.0) is None
    account.deny(denial, 50, until=1.0)
    account.change(budget())
    assert account.known_denial(50, 0.5) is None, "a changed budget may give what it refused before"


def test_budgets_bind_by_subject_and_model() -> None:
    assert Account(pb.Budget()).binds("u", "", "k", "m")
    assert Account(pb.Budget(user_id="u", model="m")).binds("u", "", "k", "m")
    assert not Account(pb.Budget(user_id="u")).binds("v", "", "k", "m")
    assert not Account(pb.Budget(api_key_id="k")).binds("u", "", "other", "m")
    assert not Account(pb.Budget(service_account_id="s")).binds("u", "", "k", "m")
    assert not Account(pb.Budget(model="other")).binds("u", "", "k", "m")
