"""Reconciliation on real PostgreSQL and RabbitMQ: what is missing is found, comes again, and then agrees."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from aiaas.analytics.v1 import reconciliation_service_pb2 as pb
from aiaas.analytics.v1 import reconciliation_service_pb2_grpc
from aiaas.identity.v1 import budget_service_pb2, budget_service_pb2_grpc
from aiaas.router.v1 import router_service_pb2, router_service_pb2_grpc
from aiaas.type.v1.platform_event_pb2 import EVENT_TYPE_RECONCILIATION_DIFFERENCE, PlatformEvent
from aiaas.type.v1.usage_event_pb2 import (
    CHARGE_UNIT_TOKENS,
    OUTCOME_CANCELLED,
    OUTCOME_FAILED,
    OUTCOME_REFUSED,
    USAGE_SOURCE_ENGINE,
    BudgetCharge,
    UsageEvent,
)
from analytics.consumer import Consumer
from analytics.events import read_event
from analytics.reconciler import Reconciler
from analytics.reconciliation_service import ReconciliationService
from analytics.reconciliation_sources import Sources
from analytics.reconciliation_store import ReconciliationStore
from analytics.reconciliations import HOUR, hour_of
from analytics.store import UsageStore
from mesh.auth import Principal
from mesh.broker import Broker
from mesh.channel import connect
from mesh.conversions import to_timestamp
from mesh.database import Database
from mesh.errors import PlatformError, Reason, from_rpc_error
from mesh.interceptors import chain
from mesh.server import GrpcServer
from mesh.topology import EVENTS, USAGE
from tests.doubles.clock import ManualClock
from tests.doubles.record_keepers import JournalDouble, LedgerDouble, RoutersDouble, engine_tokens, services
from tests.doubles.usage_events import NOW, usage_batch, usage_event
from tests.integration.analytics.harness import wait_until

START = hour_of(NOW) - HOUR
END = START + HOUR
WITHIN = START + timedelta(minutes=20)
PLATFORM = frozenset({f"reconciliations.{verb}" for verb in ("create", "get", "list")})


class Operator:
    """Takes a credential for the id of a platform administrator."""

    async def authenticate(self, credential: str) -> Principal:
        return Principal("user", credential, "org_a", permissions=PLATFORM, platform=True)


@dataclass
class World:
    """Analytics' reconciliation, and everybody that it asks."""

    stub: reconciliation_service_pb2_grpc.ReconciliationServiceStub
    reconciler: Reconciler
    usage: UsageStore
    clock: ManualClock
    routers: RoutersDouble
    journal: JournalDouble
    ledger: LedgerDouble
    address: str

    async def insert(self, *events: UsageEvent) -> None:
        await self.usage.insert_events([read_event(event.SerializeToString(), NOW) for event in events])

    async def create(self, kind: pb.ReconciliationKind.ValueType, **more: Any) -> pb.Reconciliation:
        """A report that waits to be made."""
        asked = pb.Reconciliation(kind=kind, start_time=to_timestamp(START), end_time=to_timestamp(END))
        asked.MergeFrom(more.pop("reconciliation", pb.Reconciliation()))
        request = pb.CreateReconciliationRequest(reconciliation=asked, **more)
        created: pb.Reconciliation = (await self.stub.CreateReconciliation(request, metadata=META)).reconciliation
        return created

    async def compared(self, kind: pb.ReconciliationKind.ValueType) -> pb.Reconciliation:
        """A report that was made."""
        created = await self.create(kind)
        assert created.state == pb.RECONCILIATION_STATE_RUNNING
        await self.reconciler.work()
        return await self.get(created.reconciliation_id)

    async def get(self, reconciliation_id: str) -> pb.Reconciliation:
        request = pb.GetReconciliationRequest(reconciliation_id=reconciliation_id)
        report: pb.Reconciliation = (await self.stub.GetReconciliation(request, metadata=META)).reconciliation
        return report

    async def listed(self, **fields: Any) -> list[pb.Reconciliation]:
        request = pb.ListReconciliationsRequest(**fields)
        return list((await self.stub.ListReconciliations(request, metadata=META)).reconciliations)

    async def differences(self, report: pb.Reconciliation, page_size: int = 0) -> list[pb.ReconciliationDifference]:
        told: list[pb.ReconciliationDifference] = []
        token = ""
        while True:
            request = pb.ListReconciliationDifferencesRequest(
                reconciliation_id=report.reconciliation_id, page_size=page_size, page_token=token
            )
            page = await self.stub.ListReconciliationDifferences(request, metadata=META)
            told += page.reconciliation_differences
            token = page.next_page_token
            if not token:
                return told


META = (("authorization", "Bearer admin_1"),)


@pytest.fixture
async def world(database: Database, store: UsageStore, broker: Broker, tmp_path: Path) -> AsyncIterator[World]:
    clock = ManualClock(NOW)

    async def publish(events: list[UsageEvent]) -> None:
        await broker.publish(USAGE.exchange, USAGE.routing_key, usage_batch(*events), timeout_s=5)

    others = f"unix:{tmp_path}/others"
    # They lack what reconciliation does not ask.
    routers = RoutersDouble({"router_1": others})  # type: ignore[abstract]
    journal, ledger = JournalDouble(publish), LedgerDouble()  # type: ignore[abstract]
    peers = GrpcServer(others, services(routers, journal, ledger), chain(Operator()), drain_s=1)
    await peers.start()

    reconciliations = ReconciliationStore(database)
    channel = connect(
        others,
        router_service_pb2.DESCRIPTOR.services_by_name["RouterService"],
        budget_service_pb2.DESCRIPTOR.services_by_name["BudgetService"],
    )
    sources = Sources(
        router_service_pb2_grpc.RouterServiceStub(channel), budget_service_pb2_grpc.BudgetServiceStub(channel)
    )
    reconciler = Reconciler(reconciliations, store, sources, broker, clock, pauses_s=[0.1] * 3)
    address = f"unix:{tmp_path}/analytics"
    service = (
        pb.DESCRIPTOR.services_by_name["ReconciliationService"],
        reconciliation_service_pb2_grpc.add_ReconciliationServiceServicer_to_server,
        ReconciliationService(reconciliations, reconciler, clock),
    )
    server = GrpcServer(address, [service], chain(Operator()), drain_s=1)
    await server.start()
    async with channel, grpc.aio.insecure_channel(address) as own:
        stub = reconciliation_service_pb2_grpc.ReconciliationServiceStub(own)
        yield World(stub, reconciler, store, clock, routers, journal, ledger, others)
    await server.stop()
    await peers.stop()


async def announced(broker: Broker, count: int) -> list[PlatformEvent]:
    """What people would be told, once there is so much of it."""
    told: list[PlatformEvent] = []

    async def keep(bodies: Any) -> set[int]:
        told.extend(map(PlatformEvent.FromString, bodies))
        return set()

    async def is_enough() -> bool:
        return len(told) >= count

    taking = asyncio.create_task(broker.consume(EVENTS, keep, batch_size=10, wait_s=0.01))
    try:
        await wait_until(is_enough, 10, "the events arrive")
    finally:
        taking.cancel()
        await asyncio.wait([taking])
    return told


def gauge(name: str, kind: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"kind": kind})


async def test_what_analytics_lacks_is_found_published_again_and_then_agrees(world: World, broker: Broker) -> None:
    events = [
        usage_event("req_1", WITHIN),
        usage_event("req_2", WITHIN, organization_id="org_b"),
        usage_event("req_3", WITHIN, api_key_id="key_b"),
        usage_event("req_4", WITHIN, outcome=OUTCOME_REFUSED, usage=None, cost_micros=0, model=""),
    ]
    world.journal.events = [*events, usage_event("req_old", START - timedelta(seconds=1))]
    await world.insert(*events[:2], events[3])

    consumer = Consumer(world.usage, broker, USAGE, world.clock, 100)
    taking = asyncio.create_task(consumer.run())
    world.reconciler._pauses_s = [0.2] * 50  # the consumer connects meanwhile
    try:
        report = await world.compared(pb.RECONCILIATION_KIND_JOURNAL)
    finally:
        taking.cancel()
        await asyncio.wait([taking])
    assert report.state == pb.RECONCILIATION_STATE_AGREED
    # All of the organization's in that hour came again, and what was there already counted once.
    assert (report.compared, report.differences, report.republished) == (4, 0, 3)
    assert [each.organization_id for each in world.journal.replayed] == ["org_a"]
    again = await world.compared(pb.RECONCILIATION_KIND_JOURNAL)
    assert (again.state, again.republished) == (pb.RECONCILIATION_STATE_AGREED, 0)
    assert not await world.differences(again)


async def test_what_stays_missing_is_told_line_by_line_the_largest_first(world: World, broker: Broker) -> None:
    world.journal.events = [
        usage_event("req_1", WITHIN),
        usage_event("req_2", WITHIN, organization_id="org_b", cost_micros=900),
    ]
    # Nobody takes what is published again. One line is the same, one is short, one is only in analytics.
    await world.insert(usage_event("req_1", WITHIN), usage_event("req_9", WITHIN, model="ghost", cost_micros=500))
    report = await world.compared(pb.RECONCILIATION_KIND_JOURNAL)
    assert report.state == pb.RECONCILIATION_STATE_DIFFERED
    assert (report.compared, report.differences, report.republished) == (3, 2, 1)
    differences = await world.differences(report, page_size=1)
    assert [(each.organization_id, each.model) for each in differences] == [("org_b", "smollm2"), ("org_a", "ghost")]
    assert differences[0].start_time == to_timestamp(START)
    assert differences[0].end_time == to_timestamp(END)
    told = pb.ReconciledAmounts(
        requests=1, prompt_tokens=10, cached_prompt_tokens=4, completion_tokens=5, cost_micros=900
    )
    assert (differences[0].source, differences[0].analytics) == (told, pb.ReconciledAmounts())

    # Told once, however often there is work.
    await world.reconciler.work()
    other = await world.compared(pb.RECONCILIATION_KIND_JOURNAL)
    events = await announced(broker, 2)
    assert {event.event_id for event in events} == {f"{each.reconciliation_id}:differed" for each in (report, other)}
    assert {event.type for event in events} == {EVENT_TYPE_RECONCILIATION_DIFFERENCE}
    assert {event.reconciliation_differed.differences for event in events} == {2}
    assert events[0].summary == (
        "2 lines differ between journal and analytics from 2026-11-20 11:00 until 2026-11-20 12:00 UTC."
    )


async def test_an_event_that_could_not_be_told_is_told_when_the_broker_is_back(
    world: World, database: Database, broker: Broker
) -> None:
    class Away:
        async def publish(self, exchange: str, routing_key: str, body: bytes, *, timeout_s: float) -> None:
            raise PlatformError(Reason.UNAVAILABLE)

    await world.insert(usage_event("req_9", WITHIN))
    world.reconciler._broker = Away()
    created = await world.create(pb.RECONCILIATION_KIND_JOURNAL)
    with pytest.raises(PlatformError):
        await world.reconciler.work()
    assert (await world.get(created.reconciliation_id)).state == pb.RECONCILIATION_STATE_DIFFERED
    world.reconciler._broker = broker
    await world.reconciler.work()
    assert [event.event_id for event in await announced(broker, 1)] == [f"{created.reconciliation_id}:differed"]


async def test_a_router_that_is_gone_is_named_and_what_only_it_knew_is_no_difference(
    world: World, tmp_path: Path
) -> None:
    world.routers.addresses["router_2"] = f"unix:{tmp_path}/nobody"
    world.journal.events = [usage_event("req_1", WITHIN)]
    await world.insert(usage_event("req_1", WITHIN), usage_event("req_2", WITHIN))
    report = await world.compared(pb.RECONCILIATION_KIND_JOURNAL)
    assert report.state == pb.RECONCILIATION_STATE_INCOMPLETE
    assert list(report.missing_sources) == ["router_2"]
    assert world.routers.asked[0].since_time == to_timestamp(START)
    # What is missing in analytics is missing all the same.
    world.journal.events.append(usage_event("req_3", WITHIN, model="other"))
    report = await world.compared(pb.RECONCILIATION_KIND_JOURNAL)
    assert (report.state, report.differences) == (pb.RECONCILIATION_STATE_DIFFERED, 1)


async def test_journals_of_several_routers_are_summed(world: World) -> None:
    world.routers.addresses["router_2"] = world.address
    world.journal.events = [usage_event("req_1", WITHIN)]
    # Both have the same double for a journal, so each request is there twice.
    await world.insert(usage_event("req_1", WITHIN), usage_event("req_1b", WITHIN))
    report = await world.compared(pb.RECONCILIATION_KIND_JOURNAL)
    assert report.state == pb.RECONCILIATION_STATE_AGREED


def charged(budget_id: str, units: int) -> BudgetCharge:
    return BudgetCharge(budget_id=budget_id, reserved=100, charged=units, unit=CHARGE_UNIT_TOKENS)


def ledger_total(budget_id: str, spent: int, requests: int) -> budget_service_pb2.LedgerTotal:
    return budget_service_pb2.LedgerTotal(
        organization_id="org_a",
        budget_id=budget_id,
        hour_start=to_timestamp(START),
        api_key_id="key_a",
        model="smollm2",
        spent=spent,
        requests=requests,
    )


async def test_the_ledger_is_compared_by_budget_hour_key_and_model(world: World) -> None:
    await world.insert(
        usage_event("req_1", WITHIN, budgets=[charged("budget_1", 15), charged("budget_2", 1)]),
        usage_event("req_2", WITHIN, budgets=[charged("budget_1", 20)]),
        # It brought nothing, so it is no request of a budget.
        usage_event(
            "req_3", WITHIN, outcome=OUTCOME_FAILED, usage=None, cost_micros=0, budgets=[charged("budget_1", 0)]
        ),
        usage_event("req_4", END, budgets=[charged("budget_1", 50)]),
    )
    world.ledger.totals = [
        ledger_total("budget_1", 35, 2),
        ledger_total("budget_2", 1, 1),
        ledger_total("budget_3", 0, 0),
    ]
    report = await world.compared(pb.RECONCILIATION_KIND_LEDGER)
    assert (report.state, report.compared) == (pb.RECONCILIATION_STATE_AGREED, 3)

    world.ledger.totals[0].spent = 34
    report = await world.compared(pb.RECONCILIATION_KIND_LEDGER)
    assert report.state == pb.RECONCILIATION_STATE_DIFFERED
    (difference,) = await world.differences(report)
    assert (difference.budget_id, difference.api_key_id, difference.model) == ("budget_1", "key_a", "smollm2")
    assert difference.source == pb.ReconciledAmounts(requests=2, budget_units=34)
    assert difference.analytics == pb.ReconciledAmounts(requests=2, budget_units=35)


def ran(request_id: str, admit_time: datetime, for_s: float, **fields: Any) -> UsageEvent:
    """A request of 10 + 5 tokens that took some time."""
    event = usage_event(request_id, admit_time, usage_source=USAGE_SOURCE_ENGINE, **fields)
    event.end_time.FromDatetime(admit_time + timedelta(seconds=for_s))
    return event


async def test_what_engines_counted_is_compared_with_what_ran_in_that_time(world: World) -> None:
    within, across = ran("req_1", WITHIN, 2.0), ran("req_2", END - timedelta(seconds=1), 4.0)
    await world.insert(within, across, ran("req_3", START - timedelta(hours=1), 5.0))
    half = HOUR.total_seconds() / 2
    # Some of what ran across the end was counted before it.
    world.routers.windows = [
        engine_tokens("backend-1", START, 10, 5, lasts_s=half),
        engine_tokens("backend-1", START + HOUR / 2, 10, 2, lasts_s=half),
        engine_tokens("backend-1", END, 0, 3),
    ]
    report = await world.compared(pb.RECONCILIATION_KIND_ENGINES)
    assert (report.state, report.compared) == (pb.RECONCILIATION_STATE_AGREED, 1)

    # More than all of them used together.
    world.routers.windows[1].completion_tokens = 6
    report = await world.compared(pb.RECONCILIATION_KIND_ENGINES)
    assert report.state == pb.RECONCILIATION_STATE_DIFFERED
    (difference,) = await world.differences(report)
    assert (difference.backend_id, difference.organization_id) == ("backend-1", "")
    assert (difference.source.prompt_tokens, difference.source.completion_tokens) == (20, 11)
    assert (difference.analytics.prompt_tokens, difference.analytics.completion_tokens) == (10, 5)
    assert list(difference.explanations) == [
        "Requests across an edge of this time: 1; up to 10 prompt and 5 completion tokens of theirs are counted."
    ]


async def test_an_engine_that_nobody_read_is_named(world: World) -> None:
    await world.insert(ran("req_1", WITHIN, 1.0), ran("req_2", WITHIN, 1.0, backend_id="backend-2"))
    world.routers.windows = [engine_tokens("backend-1", START, 10, 5, lasts_s=3600)]
    report = await world.compared(pb.RECONCILIATION_KIND_ENGINES)
    assert (report.state, list(report.missing_sources)) == (pb.RECONCILIATION_STATE_INCOMPLETE, ["backend-2"])


async def test_each_hour_is_compared_once_when_its_usage_is_complete(world: World) -> None:
    world.journal.events = [usage_event("req_1", WITHIN)]
    await world.insert(usage_event("req_1", WITHIN), ran("req_2", WITHIN, 1.0, outcome=OUTCOME_CANCELLED, model="c"))
    world.journal.events.append(ran("req_2", WITHIN, 1.0, outcome=OUTCOME_CANCELLED, model="c"))
    world.routers.windows = [
        engine_tokens("backend-1", START, 4, 3, lasts_s=600, reset=True),
        engine_tokens("backend-1", START + timedelta(seconds=600), 16, 10, lasts_s=3000),
    ]
    await world.reconciler.work()
    assert not await world.listed()
    await world.usage.set_complete_until(END + timedelta(minutes=9))
    await world.reconciler.work()
    assert {report.end_time.seconds for report in await world.listed()} == {to_timestamp(START).seconds}  # type: ignore[union-attr]

    await world.usage.set_complete_until(END + timedelta(minutes=10))
    await asyncio.gather(world.reconciler.work(), world.reconciler.work())
    await world.reconciler.work()
    reports = [report for report in await world.listed() if report.start_time == to_timestamp(START)]
    assert {report.kind: report.state for report in reports} == {
        pb.RECONCILIATION_KIND_JOURNAL: pb.RECONCILIATION_STATE_AGREED,
        pb.RECONCILIATION_KIND_LEDGER: pb.RECONCILIATION_STATE_AGREED,
        pb.RECONCILIATION_KIND_ENGINES: pb.RECONCILIATION_STATE_DIFFERED,
    }
    assert len(reports) == 3
    (engines,) = [report for report in reports if report.kind == pb.RECONCILIATION_KIND_ENGINES]
    (difference,) = await world.differences(engines)
    assert difference.source.completion_tokens == 13
    assert list(difference.explanations) == [
        "The engine restarted between 11:00:00 and 11:10:00 UTC; what it had counted since it was last read is lost.",
        "Requests broken off: 1; what the engine still made for them is billed to nobody.",
        "Requests of which the engine told no usage, or too much: 1; others counted for them.",
    ]
    assert gauge("aiaas_reconciliation_differences", "engines") == 1
    assert gauge("aiaas_reconciliation_differences", "journal") == 0
    assert gauge("aiaas_reconciliation_hour_timestamp_seconds", "ledger") == START.timestamp()
    # Only what is too much counts, as a restart takes tokens along: 13 of 10 at most, and 20 of 20.
    assert gauge("aiaas_reconciliation_engine_residual_tokens", "completion") == 3
    assert gauge("aiaas_reconciliation_engine_residual_tokens", "prompt") == 0


async def test_an_incomplete_hour_is_compared_again_an_hour_later(world: World) -> None:
    world.journal.failure = PlatformError(Reason.UNAVAILABLE)
    await world.usage.set_complete_until(END + timedelta(minutes=10))
    await world.reconciler.work()
    (journal,) = await world.listed(kind=pb.RECONCILIATION_KIND_JOURNAL)
    assert (journal.state, list(journal.missing_sources)) == (pb.RECONCILIATION_STATE_INCOMPLETE, ["router_1"])
    world.journal.failure = None
    await world.reconciler.work()
    assert (await world.get(journal.reconciliation_id)).state == pb.RECONCILIATION_STATE_INCOMPLETE
    world.clock.advance(3601)
    await world.reconciler.work()
    assert (await world.get(journal.reconciliation_id)).state == pb.RECONCILIATION_STATE_AGREED


async def test_a_report_whose_maker_died_is_made_by_another(world: World, database: Database) -> None:
    created = await world.create(pb.RECONCILIATION_KIND_LEDGER)
    dead = await ReconciliationStore(database).claim(NOW)
    assert dead is not None
    await world.reconciler.work()
    assert (await world.get(created.reconciliation_id)).state == pb.RECONCILIATION_STATE_RUNNING
    world.clock.advance(601)
    await world.reconciler.work()
    assert (await world.get(created.reconciliation_id)).state == pb.RECONCILIATION_STATE_AGREED


async def refused(world: World, **fields: Any) -> PlatformError:
    kind = fields.pop("kind", pb.RECONCILIATION_KIND_JOURNAL)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.create(kind, **fields)
    return from_rpc_error(caught.value)


async def test_a_repeated_request_makes_one_report_and_another_one_is_refused(world: World) -> None:
    first = await world.create(pb.RECONCILIATION_KIND_JOURNAL, request_id="once")
    assert await world.create(pb.RECONCILIATION_KIND_JOURNAL, request_id="once") == first
    error = await refused(world, kind=pb.RECONCILIATION_KIND_LEDGER, request_id="once")
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "request_id")
    assert len(await world.listed()) == 1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kind": 0}, "reconciliation.kind"),
        ({"kind": 9}, "reconciliation.kind"),
        ({"start_time": to_timestamp(START + timedelta(minutes=1))}, "reconciliation.start_time"),
        ({"end_time": to_timestamp(END + timedelta(seconds=1))}, "reconciliation.end_time"),
        ({"start_time": to_timestamp(END)}, "reconciliation.start_time"),
        ({"start_time": to_timestamp(END - timedelta(hours=73))}, "reconciliation.start_time"),
        ({"end_time": to_timestamp(hour_of(NOW) + 2 * HOUR)}, "reconciliation.end_time"),
    ],
)
async def test_wrong_ranges_and_kinds_are_named(world: World, fields: dict[str, Any], field: str) -> None:
    kind = fields.pop("kind", pb.RECONCILIATION_KIND_JOURNAL)
    error = await refused(world, kind=kind, reconciliation=pb.Reconciliation(**fields))
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)


async def test_reports_come_newest_first_page_by_page_and_by_kind_and_state(world: World) -> None:
    made = []
    for number in range(5):
        kind = (pb.RECONCILIATION_KIND_LEDGER, pb.RECONCILIATION_KIND_ENGINES)[number % 2]
        made.append((await world.create(kind)).reconciliation_id)
        world.clock.advance(1)
    told: list[str] = []
    token = ""
    while True:
        request = pb.ListReconciliationsRequest(page_size=2, page_token=token)
        page = await world.stub.ListReconciliations(request, metadata=META)
        told += [report.reconciliation_id for report in page.reconciliations]
        token = page.next_page_token
        if not token:
            break
    assert told == made[::-1]
    engines = await world.listed(kind=pb.RECONCILIATION_KIND_ENGINES)
    assert [report.reconciliation_id for report in engines] == [made[3], made[1]]
    assert len(await world.listed(state=pb.RECONCILIATION_STATE_RUNNING)) == 5
    assert not await world.listed(state=pb.RECONCILIATION_STATE_AGREED)
    for request, field in (
        (pb.ListReconciliationsRequest(page_token="x"), "page_token"),
        (pb.ListReconciliationsRequest(kind=9), "kind"),  # type: ignore[arg-type]
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await world.stub.ListReconciliations(request, metadata=META)
        assert from_rpc_error(caught.value).field == field


async def test_a_report_that_is_not_there_is_not_found(world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.get("rec_1")
    assert from_rpc_error(caught.value).reason is Reason.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.differences(pb.Reconciliation(reconciliation_id="rec_1"))
    assert from_rpc_error(caught.value).reason is Reason.NOT_FOUND
