"""Statements on real PostgreSQL: what is in them, what corrects them, who issues them, and what verifying one finds."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, TypeVar, cast

import asyncpg
import grpc
import pytest
from cryptography.exceptions import InvalidSignature
from google.protobuf import json_format
from google.protobuf.message import Message

from aiaas.analytics.v1 import statement_service_pb2 as pb
from aiaas.analytics.v1 import statement_service_pb2_grpc
from aiaas.type.v1.usage_event_pb2 import Outcome, PriceSnapshot, TokenUsage, UsageEvent
from analytics.events import AGE, read_event
from analytics.statement_issuer import StatementIssuer
from analytics.statement_keys import StatementKeys
from analytics.statement_service import StatementService
from analytics.statement_store import StatementStore
from analytics.statement_verifier import StatementVerifier
from analytics.statements import Month
from analytics.store import UsageStore
from mesh.auth import Principal
from mesh.database import Database
from mesh.errors import PlatformError, Reason, from_rpc_error
from mesh.interceptors import chain
from mesh.sealing import Seal
from mesh.server import GrpcServer
from tests.doubles.clock import ManualClock
from tests.doubles.usage_events import usage_event
from tests.integration.analytics.harness import SECRET_KEY

T = TypeVar("T")

SEPTEMBER, OCTOBER, NOVEMBER = (datetime(2026, month, 1, tzinfo=UTC) for month in (9, 10, 11))
PERMISSIONS = frozenset(f"statements.{verb}" for verb in ("get", "list", "verify", "issue"))
OTHER_KEY = "eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHg="


class Authenticated:
    """Takes a credential for the id of its organization."""

    async def authenticate(self, credential: str) -> Principal:
        return Principal("user", "user_a", credential, permissions=PERMISSIONS)


@dataclass
class Statements:
    """Calls that carry the credential of an organization, and what is behind them."""

    stub: statement_service_pb2_grpc.StatementServiceStub
    database: Database
    usage: UsageStore
    issuer: StatementIssuer
    clock: ManualClock

    async def call(self, method: Callable[..., Awaitable[T]], request: object, credential: str = "org_a") -> T:
        return await method(request, metadata=(("authorization", f"Bearer {credential}"),), timeout=20)

    async def refused(
        self, method: Callable[..., Awaitable[Any]], request: object, credential: str = "org_a"
    ) -> PlatformError:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.call(method, request, credential)
        return from_rpc_error(raised.value)

    async def count(self, *events: UsageEvent) -> None:
        now = self.clock.now()
        await self.usage.insert_events([read_event(event.SerializeToString(), now) for event in events])

    async def go_to(self, moment: datetime) -> None:
        """The time comes, and all usage until then is counted."""
        self.clock.advance((moment - self.clock.now()).total_seconds())
        await self.usage.set_complete_until(moment)

    async def issue(self, month: datetime, organization_id: str = "org_a") -> pb.Statement:
        request = request_of(month, organization_id)
        return (await self.call(self.stub.IssueStatement, request, organization_id)).statement

    async def listed(self, organization_id: str = "org_a", page_size: int = 0) -> list[pb.Statement]:
        request = pb.ListStatementsRequest(organization_id=organization_id, page_size=page_size)
        found: list[pb.Statement] = []
        while True:
            page = await self.call(self.stub.ListStatements, request, organization_id)
            found += page.statements
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def lines(self, statement: pb.Statement, page_size: int = 0) -> list[pb.StatementLine]:
        request = pb.ListStatementLinesRequest(
            organization_id=statement.organization_id, statement_id=statement.statement_id, page_size=page_size
        )
        found: list[pb.StatementLine] = []
        while True:
            page = await self.call(self.stub.ListStatementLines, request, statement.organization_id)
            found += page.statement_lines
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def verify(self, statement: pb.Statement) -> pb.VerifyStatementResponse:
        request = named(pb.VerifyStatementRequest, statement)
        return await self.call(self.stub.VerifyStatement, request, statement.organization_id)

    async def break_in(self, *statements: str) -> None:
        """What somebody with all rights on the database may do, who has the triggers out of the way."""
        async with self.database.transaction() as connection:
            for table in ("statements", "statement_lines", "statement_keys"):
                await connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER append_only")
            for statement in statements:
                await connection.execute(statement)
            for table in ("statements", "statement_lines", "statement_keys"):
                await connection.execute(f"ALTER TABLE {table} ENABLE TRIGGER append_only")


def request_of(month: datetime, organization_id: str = "org_a") -> pb.IssueStatementRequest:
    return pb.IssueStatementRequest(organization_id=organization_id, year=month.year, month=month.month)


def named(kind: Callable[..., T], statement: pb.Statement) -> T:
    return kind(organization_id=statement.organization_id, statement_id=statement.statement_id)


def used(number: int, admit_time: datetime, **fields: Any) -> UsageEvent:
    """A request at a price, different from its neighbours."""
    price = PriceSnapshot(price_id=fields.pop("price_id", "price_1"))
    return usage_event(f"req_{number}_{admit_time:%m}", admit_time, price=price, **fields)


def month_of_usage(start: datetime, number: int = 60, seed: int = 1) -> list[UsageEvent]:
    """Requests of three keys, two models and two prices, at any time of the month."""
    source = Random(seed)
    return [
        used(
            number + 1000 * seed,
            start + timedelta(seconds=source.randrange(28 * 86400)),
            api_key_id=source.choice(["key_a", "key_b", ""]),
            model=source.choice(["smollm2", "großes-modell"]),
            price_id=source.choice(["price_1", "price_2"]),
            usage=TokenUsage(
                prompt_tokens=source.randrange(50, 90),
                cached_prompt_tokens=source.randrange(50),
                completion_tokens=source.randrange(40),
            ),
            cost_micros=source.randrange(10_000),
        )
        for number in range(number)
    ]


def issuing(database: Database, clock: ManualClock, secret_key: str = SECRET_KEY) -> StatementIssuer:
    """An issuer as another process has it."""
    store = StatementStore(database)
    return StatementIssuer(store, UsageStore(database), StatementKeys(store, Seal(secret_key), clock), clock, AGE)


@asynccontextmanager
async def serving(database: Database, folder: Path, secret_key: str = SECRET_KEY) -> AsyncIterator[Statements]:
    clock, store = ManualClock(NOVEMBER + timedelta(days=2)), StatementStore(database)
    issuer = issuing(database, clock, secret_key)
    verifier = StatementVerifier(store, StatementKeys(store, Seal(secret_key), clock), clock, AGE)
    server = GrpcServer(
        f"unix:{folder}/analytics",
        [
            (
                pb.DESCRIPTOR.services_by_name["StatementService"],
                statement_service_pb2_grpc.add_StatementServiceServicer_to_server,
                StatementService(store, issuer, verifier),
            )
        ],
        chain(Authenticated()),
        drain_s=1,
    )
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{folder}/analytics") as channel:
        stub = statement_service_pb2_grpc.StatementServiceStub(channel)
        yield Statements(stub, database, UsageStore(database), issuer, clock)
    await server.stop()


@pytest.fixture
async def statements(database: Database, tmp_path: Path) -> AsyncIterator[Statements]:
    async with serving(database, tmp_path) as statements:
        await statements.usage.set_complete_until(statements.clock.now())
        yield statements


def sums(events: list[UsageEvent]) -> dict[tuple[str, str, str], tuple[int, ...]]:
    """What lines must hold, summed here in another way."""
    found: dict[tuple[str, str, str], list[tuple[int, ...]]] = defaultdict(list)
    for event in events:
        usage = event.usage
        place = (event.api_key_id, event.model, event.price.price_id)
        found[place].append(
            (1, usage.prompt_tokens, usage.cached_prompt_tokens, usage.completion_tokens, event.cost_micros)
        )
    return {place: tuple(map(sum, zip(*rows, strict=True))) for place, rows in found.items()}


def amounts(line: pb.StatementLine) -> tuple[int, ...]:
    return (
        line.requests,
        line.prompt_tokens,
        line.cached_prompt_tokens,
        line.completion_tokens,
        line.cost_micros,
    )


async def test_statement_equals_raw_usage_to_the_micro_dollar(statements: Statements) -> None:
    events = month_of_usage(OCTOBER)
    await statements.count(
        *events,
        # Neither of the month, nor of the organization, nor billed.
        used(1, OCTOBER - timedelta(microseconds=1), organization_id="org_b"),
        used(2, NOVEMBER),
        used(3, OCTOBER, organization_id="org_b"),
        used(4, OCTOBER, outcome=Outcome.OUTCOME_REFUSED, usage=TokenUsage(), cost_micros=0),
    )
    issued = await statements.issue(OCTOBER)
    lines = await statements.lines(issued, page_size=5)
    assert {(line.api_key_id, line.model, line.price_id): amounts(line) for line in lines} == sums(events)
    assert [line.line_number for line in lines] == list(range(1, issued.lines + 1))
    assert {(line.kind, line.year, line.month) for line in lines} == {(pb.STATEMENT_LINE_KIND_USAGE, 2026, 10)}
    assert (issued.year, issued.month, issued.requests) == (2026, 10, len(events))
    assert issued.cost_micros == sum(event.cost_micros for event in events)
    assert issued.prompt_tokens == sum(event.usage.prompt_tokens for event in events)
    assert issued.completion_tokens == sum(event.usage.completion_tokens for event in events)
    verdict = await statements.verify(issued)
    assert (verdict.intact, verdict.recomputed, verdict.first_broken_line, verdict.problem) == (True, True, 0, "")


async def test_reader_verifies_as_the_documentation_tells(statements: Statements) -> None:
    await statements.count(*month_of_usage(SEPTEMBER, seed=1), *month_of_usage(OCTOBER, seed=2))
    first = await statements.issue(SEPTEMBER)
    await statements.count(used(1, SEPTEMBER, model="späte-nutzung"))
    second = await statements.issue(OCTOBER)
    assert (first.previous_hash, second.previous_hash) == (b"", first.hash)
    verify = documented()
    for statement in (first, second):
        request = named(pb.GetStatementRequest, statement)
        told = as_rest(await statements.call(statements.stub.GetStatement, request))
        lines = [as_rest(line) for line in await statements.lines(statement)]
        verify(told["statement"], lines, told["public_key"])
        with pytest.raises(AssertionError, match="line 2"):
            verify(told["statement"], [lines[0], lines[1] | {"cost_micros": "1"}, *lines[2:]], told["public_key"])
        with pytest.raises(AssertionError):
            verify(told["statement"] | {"cost_micros": "1"}, lines, told["public_key"])
        with pytest.raises(InvalidSignature):
            verify(told["statement"] | {"signature": lines[-1]["signature"]}, lines, told["public_key"])


def documented() -> Callable[..., None]:
    """What docs/statements.md gives to its readers."""
    page = (Path(__file__).parents[3] / "docs" / "statements.md").read_text()
    names: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], names)
    return cast("Callable[..., None]", names["verify"])


def as_rest(message: Message) -> dict[str, Any]:
    told: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return told


async def test_same_usage_makes_the_same_lines_in_whichever_order_it_came(statements: Statements) -> None:
    events = month_of_usage(OCTOBER)
    shuffled = [UsageEvent.FromString(event.SerializeToString()) for event in events]
    Random(2).shuffle(shuffled)
    for event in shuffled:
        event.organization_id = "org_b"
        event.request_id += "_b"
    await statements.count(*events)
    for event in shuffled:
        await statements.count(event)
    lines = [await statements.lines(await statements.issue(OCTOBER, name)) for name in ("org_a", "org_b")]
    for line in (*lines[0], *lines[1]):
        # They belong to their statement.
        line.hash = line.signature = b""
    assert lines[0] == lines[1]


async def test_usage_that_comes_late_is_a_line_of_the_next_statement(statements: Statements) -> None:
    await statements.count(used(1, SEPTEMBER), used(2, SEPTEMBER), used(3, OCTOBER))
    september = await statements.issue(SEPTEMBER)
    late = used(4, SEPTEMBER, cost_micros=7, price_id="price_2"), used(5, SEPTEMBER, cost_micros=11)
    await statements.count(*late)
    assert (await statements.verify(september)).intact, "what is late is not wrong"
    october = await statements.issue(OCTOBER)
    usage, *corrections = await statements.lines(october)
    assert (usage.kind, usage.month) == (pb.STATEMENT_LINE_KIND_USAGE, 10)
    assert [(line.kind, line.year, line.month, line.price_id, *amounts(line)) for line in corrections] == [
        (pb.STATEMENT_LINE_KIND_CORRECTION, 2026, 9, "price_1", 1, 10, 4, 5, 11),
        (pb.STATEMENT_LINE_KIND_CORRECTION, 2026, 9, "price_2", 1, 10, 4, 5, 7),
    ]
    assert october.cost_micros == 25 + 11 + 7
    assert (await statements.lines(september))[0].cost_micros == 50, "a statement is never changed"
    # Once is enough.
    await statements.count(used(6, NOVEMBER))
    await statements.go_to(NOVEMBER + timedelta(days=32))
    assert [line.kind for line in await statements.lines(await statements.issue(NOVEMBER))] == [
        pb.STATEMENT_LINE_KIND_USAGE
    ]


async def test_usage_that_was_too_much_is_taken_back_by_the_next_statement(statements: Statements) -> None:
    await statements.count(used(1, SEPTEMBER, cost_micros=40), used(2, SEPTEMBER, cost_micros=2), used(3, OCTOBER))
    september = await statements.issue(SEPTEMBER)
    await statements.database.execute("DELETE FROM usage_events WHERE request_id = 'req_1_09'")
    found = await statements.verify(september)
    assert (found.intact, found.first_broken_line) == (False, 1)
    assert "Raw usage" in found.problem
    october = await statements.issue(OCTOBER)
    _, correction = await statements.lines(october)
    assert amounts(correction) == (-1, -10, -4, -5, -40)
    assert (october.requests, october.cost_micros) == (0, 25 - 40)
    for statement in (september, october):
        assert (await statements.verify(statement)).intact


async def test_late_usage_of_a_month_that_had_none_is_billed_with_the_next(statements: Statements) -> None:
    await statements.count(used(1, SEPTEMBER - timedelta(days=40)), used(2, OCTOBER))
    assert await statements.issuer.work()
    assert [statement.month for statement in await statements.listed()] == [10, 7]
    await statements.count(used(3, SEPTEMBER, cost_micros=9))
    await statements.go_to(NOVEMBER + timedelta(days=32))
    assert await statements.issuer.work()
    newest = (await statements.listed())[0]
    (line,) = await statements.lines(newest)
    assert (newest.month, line.kind, line.month, line.cost_micros) == (11, pb.STATEMENT_LINE_KIND_CORRECTION, 9, 9)


async def test_months_whose_raw_usage_goes_are_not_taken_back(statements: Statements) -> None:
    await statements.count(used(1, SEPTEMBER))
    september = await statements.issue(SEPTEMBER)
    await statements.database.execute("DELETE FROM usage_events")
    await statements.go_to(SEPTEMBER + timedelta(days=500))
    last = await statements.issue(SEPTEMBER + timedelta(days=460))
    assert (last.lines, last.cost_micros) == (0, 0)
    verdict = await statements.verify(september)
    assert (verdict.intact, verdict.recomputed) == (True, False)
    assert (await statements.verify(last)).intact
    error = await statements.refused(statements.stub.IssueStatement, request_of(OCTOBER, "org_b"), "org_b")
    assert "not kept any more" in error.message


async def test_issuing_at_once_gives_one_statement(statements: Statements, database: Database) -> None:
    await statements.count(*month_of_usage(OCTOBER), *month_of_usage(SEPTEMBER, seed=2))
    others = [issuing(database, statements.clock) for _ in range(4)]
    await asyncio.gather(*(statements.issue(SEPTEMBER) for _ in range(4)), *(other.work() for other in others))
    assert await statements.issuer.work()
    found = await statements.listed(page_size=1)
    assert [statement.month for statement in found] == [10, 9]
    assert found[0].previous_hash == found[1].hash
    assert len({statement.key_id for statement in found}) == 1
    assert (await statements.issue(OCTOBER)).statement_id == found[0].statement_id
    assert await database.fetchval("SELECT count(*) FROM statement_keys") == 1


async def test_month_is_refused_before_it_can_be_stated(statements: Statements) -> None:
    await statements.count(used(1, SEPTEMBER), used(2, OCTOBER))

    async def refusal(month: datetime) -> str:
        error = await statements.refused(statements.stub.IssueStatement, request_of(month))
        assert error.reason is Reason.FAILED_PRECONDITION
        return error.message

    assert "2026-11 is not over yet" in await refusal(NOVEMBER)
    assert "2026-09 comes first" in await refusal(OCTOBER)
    await statements.issue(SEPTEMBER)
    await statements.issue(OCTOBER)
    assert "2026-10 was issued" in await refusal(SEPTEMBER - timedelta(days=1))
    for wrong in ({"year": 2026, "month": 13}, {"year": 0, "month": 1}):
        request = pb.IssueStatementRequest(organization_id="org_a", **wrong)
        error = await statements.refused(statements.stub.IssueStatement, request)
        assert error.reason is Reason.INVALID_ARGUMENT


async def test_month_waits_until_its_usage_is_counted(statements: Statements) -> None:
    await statements.database.execute("UPDATE usage_freshness SET complete_until = $1", NOVEMBER - timedelta(seconds=1))
    await statements.count(used(1, OCTOBER))
    error = await statements.refused(statements.stub.IssueStatement, request_of(OCTOBER))
    assert "not all counted" in error.message
    assert not await statements.issuer.work()
    assert await statements.listed() == []
    await statements.usage.set_complete_until(NOVEMBER)
    assert await statements.issuer.work()
    assert len(await statements.listed()) == 1


async def test_statements_are_issued_on_the_third_and_what_was_missed_is_made_up_for(statements: Statements) -> None:
    await statements.count(
        used(1, SEPTEMBER - timedelta(days=40)), used(2, OCTOBER), used(3, OCTOBER, organization_id="org_b")
    )
    statements.clock.advance(-1)
    assert await statements.issuer.work()
    assert [statement.month for statement in await statements.listed()] == [7], "October is not due yet"
    statements.clock.advance(1)
    assert await statements.issuer.work()
    assert [statement.month for statement in await statements.listed()] == [10, 7], "a month without usage has none"
    assert len(await statements.listed("org_b")) == 1


async def test_statements_of_one_organization_do_not_wait_for_anothers(
    statements: Statements, monkeypatch: pytest.MonkeyPatch
) -> None:
    await statements.count(used(1, OCTOBER), used(2, OCTOBER, organization_id="org_b"))
    whole = StatementIssuer.issue

    async def failing(issuer: StatementIssuer, organization_id: str, *rest: Any) -> Any:
        if organization_id == "org_a":
            raise PlatformError(Reason.UNAVAILABLE)
        return await whole(issuer, organization_id, *rest)

    monkeypatch.setattr(StatementIssuer, "issue", failing)
    assert not await statements.issuer.work()
    assert len(await statements.listed("org_b")) == 1
    monkeypatch.undo()
    assert await statements.issuer.work()
    assert len(await statements.listed()) == 1


async def test_statement_of_another_organization_is_not_found(statements: Statements) -> None:
    await statements.count(used(1, OCTOBER))
    issued = await statements.issue(OCTOBER)
    for method, kind in (
        (statements.stub.GetStatement, pb.GetStatementRequest),
        (statements.stub.ListStatementLines, pb.ListStatementLinesRequest),
        (statements.stub.VerifyStatement, pb.VerifyStatementRequest),
    ):
        for organization_id in ("org_a", "org_b"):
            request = kind(organization_id=organization_id, statement_id=issued.statement_id)
            error = await statements.refused(method, request, "org_b")
            assert error.reason is Reason.NOT_FOUND
    assert await statements.listed("org_b") == []


BREAKS: dict[str, tuple[str, int, str]] = {
    "cost": ("UPDATE statement_lines SET cost_micros = cost_micros - 1 WHERE line_number = 3", 3, "edited"),
    "kind": ("UPDATE statement_lines SET kind = 2 WHERE line_number = 1", 1, "edited"),
    "model": ("UPDATE statement_lines SET model = 'x' WHERE line_number = 5", 5, "edited"),
    "hash": ("UPDATE statement_lines SET hash = sha256('x') WHERE line_number = 4", 4, "edited"),
    "line's signature": ("UPDATE statement_lines SET signature = 'x' WHERE line_number = 4", 4, "not written by"),
    "deleted": ("DELETE FROM statement_lines WHERE line_number = 3", 3, "missing"),
    "first": ("DELETE FROM statement_lines WHERE line_number = 1", 1, "missing"),
    "last": ("DELETE FROM statement_lines WHERE line_number = 6", 6, "missing"),
    "all": ("DELETE FROM statement_lines", 1, "missing"),
    "closed up": (
        "DELETE FROM statement_lines WHERE line_number = 3;"
        "UPDATE statement_lines SET line_number = line_number + 99 WHERE line_number > 3;"
        "UPDATE statement_lines SET line_number = line_number - 100 WHERE line_number > 100;"
        "UPDATE statements SET lines = 5",
        3,
        "not where it was written",
    ),
    "reordered": (
        "UPDATE statement_lines SET line_number = 100 WHERE line_number = 2;"
        "UPDATE statement_lines SET line_number = 2 WHERE line_number = 3;"
        "UPDATE statement_lines SET line_number = 3 WHERE line_number = 100",
        2,
        "not where it was written",
    ),
    "appended": (
        "CREATE TEMP TABLE copy ON COMMIT DROP AS SELECT * FROM statement_lines WHERE line_number = 6;"
        "UPDATE copy SET line_number = 7; INSERT INTO statement_lines SELECT * FROM copy",
        7,
        "not where it was written",
    ),
    "total": ("UPDATE statements SET cost_micros = cost_micros - 1", 0, "statement itself"),
    "time": ("UPDATE statements SET issue_time = issue_time - interval '1 microsecond'", 0, "statement itself"),
    "signature": ("UPDATE statements SET signature = 'x'", 0, "statement itself"),
    "chain": ("UPDATE statements SET previous_hash = sha256('x')", 0, "statement itself"),
}


@pytest.mark.parametrize("broken", BREAKS)
async def test_verify_names_the_first_line_that_is_wrong(statements: Statements, broken: str) -> None:
    await statements.count(*(used(number, OCTOBER, api_key_id=f"key_{number}") for number in range(6)))
    issued = await statements.issue(OCTOBER)
    assert (await statements.verify(issued)).intact
    sql, line_number, problem = BREAKS[broken]
    await statements.break_in(*sql.split(";"))
    found = await statements.verify(issued)
    assert (found.intact, found.first_broken_line) == (False, line_number)
    assert problem in found.problem


async def test_line_that_was_rewritten_with_all_hashes_after_it_is_named(
    statements: Statements, database: Database
) -> None:
    await statements.count(*(used(number, OCTOBER, api_key_id=f"key_{number}") for number in range(6)))
    issued = await statements.issue(OCTOBER)
    store = StatementStore(database)
    stored = await store.get("org_a", issued.statement_id)
    assert stored is not None
    changes, last_hash = ["UPDATE statement_lines SET cost_micros = 1 WHERE line_number = 3"], b""
    for line in await store.lines("org_a", issued.statement_id, 0, 10):
        if line.line_number > 2:
            if line.line_number == 3:
                line = replace(line, amounts=line.amounts._replace(cost_micros=1))
            line = replace(line, hash=line.digest(last_hash))
            changes.append(
                f"UPDATE statement_lines SET hash = '\\x{line.hash.hex()}' WHERE line_number = {line.line_number}"
            )
        last_hash = line.hash
    changes.append(f"UPDATE statements SET hash = '\\x{stored.digest(last_hash).hex()}'")
    await statements.break_in(*changes)
    found = await statements.verify(issued)
    assert (found.intact, found.first_broken_line) == (False, 3)
    assert "not written by the platform" in found.problem


async def test_statement_that_is_gone_is_missed_by_the_next(statements: Statements) -> None:
    await statements.count(used(1, SEPTEMBER), used(2, OCTOBER))
    september, october = await statements.issue(SEPTEMBER), await statements.issue(OCTOBER)
    await statements.break_in(
        f"DELETE FROM statement_lines WHERE statement_id = '{september.statement_id}'",
        f"DELETE FROM statements WHERE statement_id = '{september.statement_id}'",
    )
    found = await statements.verify(october)
    assert (found.intact, found.first_broken_line) == (False, 0)
    assert "statement before" in found.problem


@pytest.mark.parametrize(
    ("table", "column"),
    [("statements", "cost_micros = 0"), ("statement_lines", "cost_micros = 0"), ("statement_keys", "public_key = ''")],
)
async def test_database_refuses_to_change_what_was_issued(statements: Statements, table: str, column: str) -> None:
    await statements.count(used(1, OCTOBER))
    issued = await statements.issue(OCTOBER)
    for change in (f"UPDATE {table} SET {column}", f"DELETE FROM {table}", f"TRUNCATE {table} CASCADE"):
        with pytest.raises(asyncpg.RestrictViolationError, match="never changed"):
            await statements.database.execute(change)
    assert (await statements.verify(issued)).intact


async def test_key_of_another_service_is_not_taken_for_ours(
    statements: Statements, database: Database, tmp_path: Path
) -> None:
    await statements.count(used(1, SEPTEMBER), used(2, OCTOBER))
    september = await statements.issue(SEPTEMBER)
    # Whoever writes into the database without the service's secret key, and the service after its secret key was lost.
    forged = await issuing(database, statements.clock, OTHER_KEY).issue("org_a", Month(2026, 10))
    assert forged.key_id != september.key_id
    (october, _) = await statements.listed()
    found = await statements.verify(october)
    assert (found.intact, found.first_broken_line) == (False, 0)
    assert forged.key_id in found.problem
    assert (await statements.verify(september)).intact
