"""The checker finds each kind of damage, in books that real stores have written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from aiaas.type.v1.usage_event_pb2 import OUTCOME_CANCELLED, UsageEvent
from analytics.events import read_event
from analytics.store import UsageStore
from mesh.auth import Principal
from mesh.database import Database
from mesh.migrate import migrate
from router.ceilings import Ceiling
from tests.money.checker import Books, check, read_analytics, read_ledger
from tests.money.client import PROMPT_TOKENS, Seen
from tests.money.platform import Sampler
from tests.money.world import PRICE, Economy, RouterLife

LIMIT = 1000
TOKENS = 40
REQUESTS = 3


@dataclass
class Written:
    """Requests that were whole and one whose client hung up, in journal, ledger and analytics."""

    ledger_url: str
    analytics_url: str
    events: list[UsageEvent]
    seen: list[Seen]

    async def books(self) -> Books:
        """All of it, read anew."""
        books = Books(events=[UsageEvent.FromString(event.SerializeToString()) for event in self.events])
        await read_ledger(self.ledger_url, books)
        await read_analytics(self.analytics_url, books)
        return books

    async def damage(self, statement: str) -> None:
        """Do to the tables what nobody should."""
        url = self.analytics_url if "usage_" in statement else self.ledger_url
        connection = await asyncpg.connect(url)
        done = await connection.execute(statement)
        await connection.close()
        assert done.split()[-1] != "0"


@pytest.fixture
async def written(postgres_url: str, tmp_path: Path) -> AsyncIterator[Written]:
    economy = await Economy.open(postgres_url)
    tenant = await economy.new_tenant(LIMIT, daily=False)
    router = RouterLife(tmp_path, economy.line(), economy.clock)
    principal = Principal("api_key", "key_1", tenant.organization_id, api_key_id="key_1")
    for _ in range(REQUESTS):
        running = await router.admit(principal, Ceiling(PROMPT_TOKENS, TOKENS, 1, PRICE))
        router.produce(running, TOKENS)
        router.finish(running)
    running = await router.admit(principal, Ceiling(PROMPT_TOKENS, TOKENS, 1, PRICE))
    router.produce(running, TOKENS // 2)
    router.finish(running, OUTCOME_CANCELLED)
    await router.budgets.close()
    events = await router.ended()
    await router.crash()
    await economy.close()
    name = f"{urlsplit(postgres_url).path[1:]}_analytics"
    analytics_url = urlsplit(postgres_url)._replace(path=f"/{name}").geturl()
    await migrate(analytics_url, "analytics.migrations")
    database = Database(analytics_url)
    await UsageStore(database).insert_events(
        [read_event(event.SerializeToString(), datetime.now(UTC)) for event in events]
    )
    await database.close()
    seen = [
        Seen(
            event.request_id,
            event.organization_id,
            tokens_per_s=10.0,
            status=200,
            tokens=event.usage.completion_tokens,
            ended="left" if event.outcome == OUTCOME_CANCELLED else "done",
        )
        for event in events
    ]
    yield Written(postgres_url, analytics_url, events, seen)
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    await connection.close()


def kinds(books: Books, written: Written) -> set[str]:
    return {finding.kind for finding in check(books, written.seen)}


async def test_books_that_agree_are_left_alone(written: Written) -> None:
    books = await written.books()
    assert len(books.events) == len(books.rows) == REQUESTS + 1
    assert len(books.lines) == len(books.periods) == len(books.budgets) == 2
    assert check(books, written.seen) == []


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("DELETE FROM usage_events WHERE outcome <> 1", "lost"),
        (
            "INSERT INTO usage_events SELECT request_id, admit_time + interval '1 second', organization_id, api_key_id,"
            " user_id, service_account_id, model, backend_id, endpoint, outcome, prompt_tokens, cached_prompt_tokens,"
            " completion_tokens, cost_micros, event FROM usage_events WHERE outcome <> 1",
            "doubled",
        ),
        ("UPDATE usage_events SET request_id = 'req_of_nobody' WHERE outcome <> 1", "unknown"),
        ("UPDATE usage_events SET cost_micros = cost_micros + 1 WHERE outcome <> 1", "wrong"),
        ("UPDATE usage_events SET api_key_id = 'key_2' WHERE outcome <> 1", "wrong"),
        ("UPDATE usage_hourly SET requests = requests + 1 WHERE outcome <> 1", "doubled"),
        ("UPDATE usage_hourly SET requests = requests - 1 WHERE outcome <> 1", "lost"),
        ("UPDATE usage_hourly SET completion_tokens = completion_tokens + 1 WHERE outcome <> 1", "wrong"),
        ("UPDATE budget_ledger SET spent = spent - 1", "lost"),
        ("UPDATE budget_ledger SET spent = spent + 1", "doubled"),
        ("UPDATE budget_ledger SET requests = requests + 1", "wrong"),
        ("UPDATE budget_ledger SET model = 'another'", "lost"),
        ("UPDATE budget_periods SET spent = spent - 1", "lost"),
        ("UPDATE budget_periods SET spent = spent + 1", "doubled"),
        ("UPDATE budget_periods SET leased = 1", "leak"),
        ("UPDATE budget_leases SET state = 'expired'", "leak"),
        (
            "ALTER TABLE budget_periods DROP CONSTRAINT never_overspent;"
            " UPDATE budget_periods SET limit_amount = spent - 1",
            "overspend",
        ),
    ],
)
async def test_damaged_tables_are_found(written: Written, statement: str, kind: str) -> None:
    await written.damage(statement)
    assert kind in kinds(await written.books(), written)


async def test_what_the_journal_has_lost_is_found(written: Written) -> None:
    books = await written.books()
    del books.events[0]
    assert "lost" in kinds(books, written)


async def test_what_the_journal_has_twice_is_found(written: Written) -> None:
    books = await written.books()
    books.events.append(books.events[0])
    assert "doubled" in kinds(books, written)


async def test_a_cost_that_all_books_have_wrong_is_found(written: Written) -> None:
    books = await written.books()
    books.events[0].cost_micros += 1
    found = [finding for finding in check(books, written.seen) if "costs" in finding.what]
    assert [finding.kind for finding in found] == ["wrong"]


async def test_a_request_that_no_budget_was_charged_with_is_found(written: Written) -> None:
    books = await written.books()
    del books.events[0].budgets[:]
    assert any("not charged" in finding.what for finding in check(books, written.seen))


async def test_more_use_than_the_limit_is_found_though_the_ledger_does_not_know_of_it(written: Written) -> None:
    books = await written.books()
    books.events[0].usage.completion_tokens += LIMIT
    assert "overspend" in kinds(books, written)


@pytest.mark.parametrize("leak", ["slots", "open_entries", "unpublished_entries"])
async def test_what_is_held_for_nobody_is_found(written: Written, leak: str) -> None:
    books = await written.books()
    setattr(books, leak, 1)
    assert kinds(books, written) == {"leak"}


async def test_an_answer_without_a_record_is_found(written: Written) -> None:
    written.seen.append(Seen("req_unrecorded", "org_1", status=200, ended="done"))
    assert kinds(await written.books(), written) == {"lost"}


async def test_a_refusal_needs_no_record(written: Written) -> None:
    written.seen.append(Seen("req_refused", "org_1", status=503, ended="answered"))
    assert kinds(await written.books(), written) == set()


async def test_a_refusal_that_is_billed_is_found(written: Written) -> None:
    written.seen[0].status = 429
    assert kinds(await written.books(), written) == {"wrong"}


@pytest.mark.parametrize("off", [-1, 1])
async def test_a_whole_answer_is_billed_to_the_token(written: Written, off: int) -> None:
    written.seen[0].tokens += off
    assert kinds(await written.books(), written) == {"wrong"}


@pytest.mark.parametrize(("off", "found"), [(-12, True), (-10, False), (10, False), (12, True)])
async def test_a_stream_that_broke_off_is_billed_to_within_a_second(written: Written, off: int, found: bool) -> None:
    (cut,) = (seen for seen in written.seen if seen.ended == "left")
    cut.tokens += off
    assert kinds(await written.books(), written) == ({"wrong"} if found else set())


async def test_the_sampler_sees_what_is_overspent(written: Written) -> None:
    await written.damage(
        "ALTER TABLE budget_periods DROP CONSTRAINT never_overspent; UPDATE budget_periods SET limit_amount = spent - 7"
    )
    sampler = Sampler(written.ledger_url)
    sampling = asyncio.create_task(sampler.run())
    async with asyncio.timeout(5):
        while not sampler.looks:
            await asyncio.sleep(0.01)
    sampling.cancel()
    await asyncio.wait([sampling])
    assert sampler.least == -7
