"""Overrides from their asking to their end, over gRPC and a real database."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.identity.v1 import budget_service_pb2 as pb
from identity.budget_overrides import BudgetOverrides
from identity.stores import Store
from mesh.clock import SystemClock
from mesh.errors import PlatformError, Reason
from tests.integration.identity.auditing import entries, verify
from tests.integration.identity.budgeting import HARD, SOFT, Ledger, create, get, to_update, update
from tests.integration.identity.harness import Identity, Member

PENDING = pb.BUDGET_OVERRIDE_STATE_PENDING
ACTIVE = pb.BUDGET_OVERRIDE_STATE_ACTIVE
REJECTED = pb.BUDGET_OVERRIDE_STATE_REJECTED
REVOKED = pb.BUDGET_OVERRIDE_STATE_REVOKED
EXPIRED = pb.BUDGET_OVERRIDE_STATE_EXPIRED
LARGEST = 1 << 62


def at(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


def wanted(**fields: Any) -> pb.BudgetOverride:
    soon = at(datetime.now(UTC) + timedelta(hours=1))
    return pb.BudgetOverride(**{"amount": 500, "expire_time": soon, "reason": "The fair is on.", **fields})


@dataclass
class House:
    """An organization with a budget, whose admin asks and whose owner decides."""

    identity: Identity
    admin: Member
    owner: Member
    budget: pb.Budget

    def ids(self, override: pb.BudgetOverride | None = None) -> dict[str, Any]:
        ids = {"organization_id": self.budget.organization_id, "budget_id": self.budget.budget_id}
        return ids if override is None else ids | {"budget_override_id": override.budget_override_id}

    async def ask(self, **fields: Any) -> pb.BudgetOverride:
        request = pb.CreateBudgetOverrideRequest(**self.ids(), budget_override=wanted(**fields))
        made = await self.identity.call(self.identity.budgets.CreateBudgetOverride, request, self.admin.secret)
        return made.budget_override

    async def approve(
        self, override: pb.BudgetOverride, secret: str | None = None, etag: str = ""
    ) -> pb.BudgetOverride:
        request = pb.ApproveBudgetOverrideRequest(**self.ids(override), etag=etag)
        method = self.identity.budgets.ApproveBudgetOverride
        return (await self.identity.call(method, request, secret or self.owner.secret)).budget_override

    async def refused_approval(
        self, override: pb.BudgetOverride, secret: str | None = None, etag: str = ""
    ) -> PlatformError:
        request = pb.ApproveBudgetOverrideRequest(**self.ids(override), etag=etag)
        method = self.identity.budgets.ApproveBudgetOverride
        return await self.identity.refused(method, request, secret or self.owner.secret)

    async def reject(self, override: pb.BudgetOverride) -> pb.BudgetOverride:
        request = pb.RejectBudgetOverrideRequest(**self.ids(override), reason="Not now.")
        method = self.identity.budgets.RejectBudgetOverride
        return (await self.identity.call(method, request, self.owner.secret)).budget_override

    async def revoke(self, override: pb.BudgetOverride) -> pb.BudgetOverride:
        request = pb.RevokeBudgetOverrideRequest(**self.ids(override))
        method = self.identity.budgets.RevokeBudgetOverride
        return (await self.identity.call(method, request, self.owner.secret)).budget_override

    async def now(self, override: pb.BudgetOverride) -> pb.BudgetOverride:
        request = pb.GetBudgetOverrideRequest(**self.ids(override))
        return (await self.identity.call(self.identity.budgets.GetBudgetOverride, request)).budget_override

    async def revision(self) -> int:
        request = pb.ResolveBudgetsRequest(organization_id=self.budget.organization_id)
        return (await self.identity.budgets.ResolveBudgets(request, timeout=5)).revision

    async def until(self, holds: Callable[[pb.Budget], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds(await get(self.identity, self.budget)):
                await asyncio.sleep(0.05)


@pytest.fixture
async def house(identity: Identity) -> House:
    organization_id = await identity.organization()
    admin, owner = await identity.member(organization_id, "admin"), await identity.member(organization_id, "owner")
    return House(identity, admin, owner, await create(identity, organization_id))


async def test_override_counts_once_somebody_else_approves_it(house: House, ledger: Ledger) -> None:
    asked = await house.ask()
    assert (asked.state, asked.requester_id, asked.approver_id) == (PENDING, house.admin.user_id, "")
    assert await ledger.limit(house.budget) == 1000
    revision = await house.revision()
    approved = await house.approve(asked, etag=asked.etag)
    assert (approved.state, approved.approver_id) == (ACTIVE, house.owner.user_id)
    assert approved.HasField("decide_time")
    assert approved.etag != asked.etag
    assert await house.now(asked) == approved
    assert await ledger.limit(house.budget) == 1500
    assert await house.revision() > revision
    budget = await get(house.identity, house.budget)
    assert (budget.limit, budget.current_period.limit) == (1000, 1500)


async def test_whoever_asked_cannot_decide_with_any_of_their_keys(house: House, ledger: Ledger) -> None:
    asked = await house.ask()
    another = await house.identity.key(house.budget.organization_id, "budget_overrides.*", user_id=house.admin.user_id)
    for secret in (house.admin.secret, another.secret):
        assert (await house.refused_approval(asked, secret)).reason is Reason.PERMISSION_DENIED
        request = pb.RejectBudgetOverrideRequest(**house.ids(asked))
        error = await house.identity.refused(house.identity.budgets.RejectBudgetOverride, request, secret)
        assert error.reason is Reason.PERMISSION_DENIED
    assert (await house.now(asked)).state == PENDING
    assert await ledger.limit(house.budget) == 1000


async def test_keys_that_act_for_nobody_are_no_second_person(house: House, ledger: Ledger) -> None:
    identity, organization_id = house.identity, house.budget.organization_id
    one = (await identity.key(organization_id, "budget_overrides.*", "api_keys.*", secret=house.admin.secret)).secret
    two = (await identity.key(organization_id, "budget_overrides.*", secret=one)).secret
    asked = await house.ask()
    request = pb.CreateBudgetOverrideRequest(**house.ids(), budget_override=wanted())
    of_key = (await identity.call(identity.budgets.CreateBudgetOverride, request, two)).budget_override
    for override, secret in ((asked, one), (asked, two), (of_key, one), (of_key, two), (of_key, house.admin.secret)):
        assert (await house.refused_approval(override, secret)).reason is Reason.PERMISSION_DENIED
        reject = pb.RejectBudgetOverrideRequest(**house.ids(override))
        error = await identity.refused(identity.budgets.RejectBudgetOverride, reject, secret)
        assert error.reason is Reason.PERMISSION_DENIED
    assert await ledger.limit(house.budget) == 1000
    assert (await house.approve(of_key)).state == ACTIVE, "somebody else than the key's maker is a second person"


async def test_audit_log_tells_why_and_that_an_override_expired(house: House) -> None:
    organization_id = house.budget.organization_id
    rejected = await house.reject(await house.ask())
    revoke = pb.RevokeBudgetOverrideRequest(**house.ids(await house.ask()), reason="A slip.")
    await house.identity.call(house.identity.budgets.RevokeBudgetOverride, revoke, house.owner.secret)
    soon = await house.approve(await house.ask(expire_time=at(datetime.now(UTC) + timedelta(seconds=1.5))))
    async with asyncio.timeout(10):
        while (await house.now(soon)).state != EXPIRED:
            await asyncio.sleep(0.05)
    log = [entry for entry in await entries(house.identity, organization_id) if "Override" in entry.method]
    reasons = {entry.resource_id: entry.reason for entry in log if entry.reason}
    assert reasons == {
        rejected.budget_override_id: "Not now.",
        revoke.budget_override_id: "A slip.",
        soon.budget_override_id: "expired",
    }
    assert (await verify(house.identity, organization_id)).intact
    (expired,) = [entry for entry in log if entry.reason == "expired"]
    assert (expired.principal_id, expired.resource_type) == ("", "budget_override")


async def test_postgres_itself_refuses_an_approver_who_asked(house: House, ledger: Ledger) -> None:
    asked = await house.ask()
    with pytest.raises(asyncpg.CheckViolationError):
        await ledger.execute("UPDATE budget_overrides SET approver_id = $1", asked.requester_id)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"amount": 0}, "budget_override.amount"),
        ({"amount": -1}, "budget_override.amount"),
        ({"amount": 1001}, "budget_override.amount"),
        ({"expire_time": None}, "budget_override.expire_time"),
        ({"expire_time": Timestamp(seconds=1)}, "budget_override.expire_time"),
        ({"expire_time": Timestamp(seconds=1 << 50)}, "budget_override.expire_time"),
        ({"reason": ""}, "budget_override.reason"),
        ({"reason": "x" * 1001}, "budget_override.reason"),
        ({"reason": "a\x00b"}, "budget_override.reason"),
    ],
)
async def test_wrong_field_is_named_and_nothing_is_stored(
    house: House, ledger: Ledger, fields: dict[str, Any], field: str
) -> None:
    request = pb.CreateBudgetOverrideRequest(**house.ids(), budget_override=wanted(**fields), request_id="r1")
    method = house.identity.budgets.CreateBudgetOverride
    error = await house.identity.refused(method, request, house.admin.secret)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)
    assert await ledger.fetch("SELECT FROM budget_overrides") == []


async def test_repeated_request_id_gives_the_first_override(house: House) -> None:
    request = pb.CreateBudgetOverrideRequest(**house.ids(), budget_override=wanted(), request_id="once")
    method = house.identity.budgets.CreateBudgetOverride
    made = await asyncio.gather(*(house.identity.call(method, request) for _ in range(3)))
    assert len({answer.budget_override.budget_override_id for answer in made}) == 1


async def test_list_is_paged_newest_first_and_by_state(house: House) -> None:
    asked = [await house.ask(amount=amount) for amount in (1, 2, 3)]
    approved = await house.approve(asked[1])
    method = house.identity.budgets.ListBudgetOverrides
    request = pb.ListBudgetOverridesRequest(**house.ids(), page_size=2)
    first = await house.identity.call(method, request)
    request.page_token = first.next_page_token
    second = await house.identity.call(method, request)
    assert [*first.budget_overrides, *second.budget_overrides] == [asked[2], approved, asked[0]]
    only = pb.ListBudgetOverridesRequest(**house.ids(), state=ACTIVE)
    assert list((await house.identity.call(method, only)).budget_overrides) == [approved]


async def test_override_of_another_organization_is_not_found(house: House) -> None:
    asked = await house.ask()
    other = await house.identity.organization()
    stranger = await house.identity.member(other, "owner", "stranger@example.com")
    other_budget = await create(house.identity, other)
    budgets = house.identity.budgets
    requests: list[tuple[Any, Any]] = [
        (budgets.GetBudgetOverride, pb.GetBudgetOverrideRequest),
        (budgets.ApproveBudgetOverride, pb.ApproveBudgetOverrideRequest),
        (budgets.RejectBudgetOverride, pb.RejectBudgetOverrideRequest),
        (budgets.RevokeBudgetOverride, pb.RevokeBudgetOverrideRequest),
    ]
    theirs = {"organization_id": other, "budget_id": other_budget.budget_id}
    for method, request in requests:
        ids = house.ids(asked)
        for wrong, secret in ((ids, stranger.secret), (ids | theirs, stranger.secret), (ids | theirs, None)):
            assert (await house.identity.refused(method, request(**wrong), secret)).reason is Reason.NOT_FOUND
    create_request = pb.CreateBudgetOverrideRequest(
        organization_id=other, budget_id=house.budget.budget_id, budget_override=wanted()
    )
    error = await house.identity.refused(budgets.CreateBudgetOverride, create_request, stranger.secret)
    assert error.reason is Reason.NOT_FOUND
    assert (await house.now(asked)).state == PENDING


async def test_only_a_pending_one_that_was_seen_is_decided_on(house: House, ledger: Ledger) -> None:
    asked = await house.ask()
    assert (await house.refused_approval(asked, etag="77")).field == "etag"
    rejected = await house.reject(asked)
    assert (rejected.state, rejected.approver_id) == (REJECTED, house.owner.user_id)
    assert (await house.refused_approval(asked)).reason is Reason.FAILED_PRECONDITION
    active = await house.approve(await house.ask())
    assert (await house.refused_approval(active)).reason is Reason.FAILED_PRECONDITION
    assert await ledger.limit(house.budget) == 1500
    error = await house.identity.refused(
        house.identity.budgets.RevokeBudgetOverride, pb.RevokeBudgetOverrideRequest(**house.ids(asked))
    )
    assert error.reason is Reason.FAILED_PRECONDITION


async def test_approvals_at_the_same_time_raise_the_limit_once(house: House, ledger: Ledger) -> None:
    asked = await house.ask()
    answers = await asyncio.gather(*(house.approve(asked) for _ in range(4)), return_exceptions=True)
    assert sum(isinstance(answer, pb.BudgetOverride) for answer in answers) == 1
    assert await ledger.limit(house.budget) == 1500


async def test_override_beyond_the_limit_of_its_approval_is_not_approved(house: House, ledger: Ledger) -> None:
    asked = await house.ask(amount=1000)
    await update(house.identity, house.budget, limit=999)
    assert (await house.refused_approval(asked)).reason is Reason.FAILED_PRECONDITION
    await update(house.identity, house.budget, limit=LARGEST)
    assert (await house.refused_approval(asked)).reason is Reason.FAILED_PRECONDITION
    await update(house.identity, house.budget, limit=LARGEST - 1000)
    await house.approve(asked)
    assert await ledger.limit(house.budget) == LARGEST
    error = await house.identity.refused(
        house.identity.budgets.UpdateBudget, to_update(house.budget, limit=LARGEST - 999)
    )
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "budget.limit")


async def test_limit_below_what_is_used_is_refused_less_its_overrides(house: House, ledger: Ledger) -> None:
    await house.approve(await house.ask())
    await ledger.set(house.budget, spent=1200, leased=100)
    assert (await update(house.identity, house.budget, limit=800)).current_period.limit == 1300
    error = await house.identity.refused(house.identity.budgets.UpdateBudget, to_update(house.budget, limit=799))
    assert error.reason is Reason.FAILED_PRECONDITION
    assert "800" in error.message


async def test_revoked_override_leaves_what_is_used_and_the_limit_falls_as_leases_come_back(
    house: House, ledger: Ledger
) -> None:
    active = await house.approve(await house.ask())
    await ledger.set(house.budget, spent=900, leased=400)
    assert (await house.revoke(active)).state == REVOKED
    assert (await house.revoke(active)).state == REVOKED
    assert await ledger.limit(house.budget) == 1300
    with pytest.raises(asyncpg.CheckViolationError):
        await ledger.set(house.budget, spent=900, leased=401)
    revision = await house.revision()
    await ledger.set(house.budget, spent=950, leased=200)
    await house.until(lambda budget: budget.current_period.limit == 1150)
    assert await house.revision() > revision
    await ledger.set(house.budget, spent=990)
    await house.until(lambda budget: budget.current_period.limit == 1000)
    assert (await ledger.fetch("SELECT falling FROM budget_periods"))[0]["falling"] is False


async def test_other_overrides_go_on_when_one_ends(house: House, ledger: Ledger) -> None:
    first, second = await house.approve(await house.ask()), await house.approve(await house.ask(amount=70))
    assert await ledger.limit(house.budget) == 1570
    await house.revoke(first)
    assert await ledger.limit(house.budget) == 1070
    assert (await house.now(second)).state == ACTIVE


async def test_end_of_an_override_passes_thresholds(house: House, ledger: Ledger) -> None:
    active = await house.approve(await house.ask(amount=1000))
    await ledger.set(house.budget, spent=990)
    assert len(await ledger.fetch("SELECT FROM budget_alerts")) == 0
    await house.revoke(active)
    rows = await ledger.fetch("SELECT percent FROM budget_alerts ORDER BY percent")
    assert [row["percent"] for row in rows] == [50, 80]
    assert len(await ledger.fetch("SELECT FROM unpublished_events")) == 2


async def test_soft_limit_falls_at_once(house: House, ledger: Ledger) -> None:
    await update(house.identity, house.budget, enforcement=SOFT)
    active = await house.approve(await house.ask())
    await ledger.set(house.budget, spent=5000, leased=100)
    await house.revoke(active)
    assert await ledger.limit(house.budget) == 1000
    error = await house.identity.refused(house.identity.budgets.UpdateBudget, to_update(house.budget, enforcement=HARD))
    assert "5100" in error.message


async def test_withdrawn_request_is_never_approved(house: House) -> None:
    asked = await house.ask()
    assert (await house.revoke(asked)).state == REVOKED
    assert (await house.refused_approval(asked)).reason is Reason.FAILED_PRECONDITION


async def test_overrides_expire_by_themselves(house: House, ledger: Ledger) -> None:
    pending, active = await house.ask(), await house.approve(await house.ask())
    lasting = await house.approve(await house.ask(amount=7))
    await ledger.execute(
        "UPDATE budget_overrides SET expire_time = clock_timestamp() WHERE budget_override_id <> $1",
        lasting.budget_override_id,
    )
    assert (await house.refused_approval(pending)).reason is Reason.FAILED_PRECONDITION
    await house.until(lambda budget: budget.current_period.limit == 1007)
    assert [(await house.now(one)).state for one in (pending, active, lasting)] == [EXPIRED, EXPIRED, ACTIVE]


async def test_end_of_the_period_ends_its_overrides(house: House, ledger: Ledger) -> None:
    active = await house.approve(await house.ask())
    # As if the period had been last year's.
    await ledger.execute("ALTER TABLE budget_leases DROP CONSTRAINT budget_leases_budget_id_period_start_fkey")
    for table in ("budget_overrides", "budget_periods"):
        await ledger.execute(f"UPDATE {table} SET period_start = period_start - interval '1 year'")
    await ledger.execute("UPDATE budget_periods SET period_end = period_end - interval '1 year'")
    async with asyncio.timeout(10):
        while (await house.now(active)).state != EXPIRED:
            await asyncio.sleep(0.05)
    assert await ledger.limit(house.budget) == 1000


async def test_sweeps_of_many_processes_change_each_limit_once(house: House, ledger: Ledger) -> None:
    active = [await house.approve(await house.ask(amount=10)) for _ in range(5)]
    sweeps = [BudgetOverrides(Store(ledger.database, no_announcement), SystemClock()) for _ in range(4)]
    await ledger.execute("UPDATE budget_overrides SET expire_time = clock_timestamp()")
    await asyncio.gather(*(one.sweep() for one in sweeps))
    await house.until(lambda budget: budget.current_period.limit == 1000)
    for override in active:
        now = await house.now(override)
        assert (now.state, int(now.etag)) == (EXPIRED, int(override.etag) + 1)


async def no_announcement(_: object) -> None:
    """Nobody listens."""
