"""When the transactions of a recorded call are committed, and which of them carries an entry."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from identity import attempts
from identity.attempts import Attempt, AttemptBounds
from identity.audit import Audit
from identity.audit_chain import AuditEntry, AuditKeys, AuditOutcome
from identity.roles import PLATFORM_ORGANIZATION_ID
from identity.stores import Store, Transaction, open_database
from mesh.clock import SystemClock
from mesh.errors import Reason
from tests.integration.identity.harness import AUDIT_KEY, bootstrapped

CLOCK = SystemClock()


class Calls:
    """Calls over a real database: what each left behind, seen from outside of them."""

    def __init__(self, store: Store, sql: "asyncpg.Connection[asyncpg.Record]") -> None:
        self.store = store
        self._audit = Audit(store, CLOCK, AuditKeys(AUDIT_KEY))
        self._sql = sql

    def begin(self, *, mutates: bool = True) -> Attempt[str]:
        attempt: Attempt[str] = Attempt(self._describe, self._audit, AttemptBounds(CLOCK), mutates=mutates)
        attempts.current.set(attempt)
        return attempt

    async def change(self, name: str) -> None:
        async with self.store.transaction() as stored:
            await rename(stored, name)

    async def name(self) -> str:
        return str(await self._sql.fetchval("SELECT display_name FROM organizations"))

    async def entries(self) -> list[tuple[str, str]]:
        rows = await self._sql.fetch("SELECT outcome, reason FROM audit_entries ORDER BY sequence")
        return [(row["outcome"], row["reason"]) for row in rows]

    async def written_with_the_name(self) -> bool:
        """Whether the last entry is of the transaction that gave the name."""
        return bool(
            await self._sql.fetchval(
                "SELECT a.xmin = o.xmin FROM organizations o, audit_entries a ORDER BY sequence DESC LIMIT 1"
            )
        )

    @staticmethod
    def _describe(entry_id: str, outcome: AuditOutcome, reason: str, answer: str | None) -> AuditEntry:
        return AuditEntry(
            audit_entry_id=entry_id,
            organization_id=PLATFORM_ORGANIZATION_ID,
            event_time=CLOCK.now(),
            method="/test",
            outcome=outcome,
            reason=answer or reason,
        )


async def rename(stored: Transaction, name: str) -> None:
    await stored.roles._connection.execute("UPDATE organizations SET display_name = $1", name)


@pytest.fixture
async def calls(database_url: str) -> AsyncIterator[Calls]:
    await bootstrapped(database_url)
    database = open_database(database_url)
    sql = await asyncpg.connect(database_url)

    async def announce_nothing(_: object) -> None:
        pass

    yield Calls(Store(database, announce_nothing, AuditKeys(AUDIT_KEY)), sql)
    attempts.current.set(None)
    await sql.close()
    await database.close()


async def test_change_is_committed_with_the_answer_in_its_entry_when_the_call_ends(calls: Calls) -> None:
    attempt = calls.begin()
    await calls.change("one")
    assert (await calls.name(), await calls.entries()) == ("Platform", [])
    await attempt.succeed("answered")
    assert (await calls.name(), await calls.entries()) == ("one", [("succeeded", "answered")])
    assert await calls.written_with_the_name()


async def test_what_was_left_without_an_error_stays_when_the_call_fails_later_and_its_entry_says_so(
    calls: Calls,
) -> None:
    attempt = calls.begin()
    await calls.change("counted")
    await attempt.fail(Reason.RATE_LIMIT_EXCEEDED, "caller")
    assert await calls.name() == "counted"
    assert [outcome for outcome, _ in await calls.entries()] == ["failed"]
    assert await calls.written_with_the_name()


async def test_what_an_error_ended_is_rolled_back_and_recorded_as_failed(calls: Calls) -> None:
    attempt = calls.begin()
    with pytest.raises(ZeroDivisionError):
        async with calls.store.transaction() as stored:
            await rename(stored, "never")
            raise ZeroDivisionError
    await attempt.fail(Reason.INTERNAL, "caller")
    assert (await calls.name(), await calls.entries()) == ("Platform", [("failed", "internal")])


async def test_each_transaction_that_changed_something_has_an_entry(calls: Calls) -> None:
    attempt = calls.begin()
    await calls.change("one")
    await calls.change("two")
    assert await calls.name() == "one"
    async with calls.store.transaction() as stored:
        await stored.organizations.get(PLATFORM_ORGANIZATION_ID)
    assert (await calls.name(), await calls.entries()) == ("two", [("succeeded", "")] * 2)
    await attempt.succeed("answered")
    assert await calls.entries() == [("succeeded", "")] * 2


async def test_call_that_changed_nothing_has_one_entry_all_the_same(calls: Calls) -> None:
    await calls.begin().succeed("answered")
    attempt = calls.begin()
    async with calls.store.transaction() as stored:
        await stored.organizations.get(PLATFORM_ORGANIZATION_ID)
    await attempt.succeed("answered too")
    assert await calls.entries() == [("succeeded", "answered"), ("succeeded", "answered too")]


async def test_settling_commits_at_once(calls: Calls) -> None:
    attempt = calls.begin()
    await calls.change("one")
    await calls.store.settle()
    assert (await calls.name(), await calls.entries()) == ("one", [("succeeded", "")])
    await attempt.fail(Reason.UNAVAILABLE, "caller")
    assert await calls.entries() == [("succeeded", ""), ("failed", "unavailable")]


async def test_what_outlives_its_call_is_committed_as_it_ends(calls: Calls) -> None:
    await calls.begin().succeed("answered")
    await calls.change("late")
    assert await calls.name() == "late"


async def test_success_whose_commit_was_not_confirmed_is_not_recorded_as_a_failure_too(calls: Calls) -> None:
    attempt = calls.begin()
    await calls.change("one")
    await attempt.succeed("answered")
    # As if the connection had been lost just after the commit.
    await attempt.fail(Reason.UNAVAILABLE, "caller")
    assert await calls.entries() == [("succeeded", "answered")]


async def test_of_a_read_only_a_denial_is_recorded(calls: Calls) -> None:
    await calls.begin(mutates=False).fail(Reason.NOT_FOUND, "caller")
    assert await calls.entries() == []
    await calls.begin(mutates=False).fail(Reason.PERMISSION_DENIED, "caller")
    assert await calls.entries() == [("denied", "permission_denied")]


async def test_no_connection_is_kept_by_calls_that_ended(calls: Calls) -> None:
    for number in range(30):
        attempt = calls.begin()
        await calls.change(str(number))
        if number % 2:
            await attempt.fail(Reason.CANCELLED, "caller")
        else:
            await attempt.succeed("answered")
    assert await calls.name() == "29"
    assert len(await calls.entries()) == 30
