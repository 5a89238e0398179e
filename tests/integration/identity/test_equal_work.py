"""Who is known and who is not takes the same work to answer, so that no time tells them apart: work is counted, since
what a time shows depends on the machine.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from asyncpg.connection import Connection

from aiaas.identity.v1 import session_service_pb2 as pb
from deploy.local.ports import free_port
from mesh import tokens
from mesh.errors import Reason
from tests.integration.identity.auditing import Sql
from tests.integration.identity.harness import Identity, running_identity
from tests.integration.identity.signing_in import Mailbox, People, mail_server

ANN, BOB, CARL, NOBODY = (f"{name}@example.com" for name in ("ann", "bob", "carl", "nobody"))


class Work:
    """The hashes that are compared, by the costs that they name, and the statements that PostgreSQL is asked."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.costs: list[str] = []
        self.statements: list[str] = []
        self._is_counted = False
        check, execute = bcrypt.checkpw, Connection._execute  # type: ignore[attr-defined]

        def checkpw(password: bytes, hashed: bytes) -> bool:
            if self._is_counted:
                self.costs.append(hashed[:7].decode())
            return check(password, hashed)

        async def counted(connection: Any, query: str, *arguments: Any, **named: Any) -> Any:
            # What runs by itself in the background is no work for a caller.
            is_callers = any(table in query for table in ("throttles", "passwords", "api_keys"))
            if self._is_counted and is_callers and "SET last_use_time" not in query:
                self.statements.append(query)
            return await execute(connection, query, *arguments, **named)

        patch.setattr(bcrypt, "checkpw", checkpw)
        patch.setattr(Connection, "_execute", counted)

    @contextmanager
    def counted(self) -> Iterator[tuple[list[str], list[str]]]:
        """What is done in the block."""
        self.costs, self.statements, self._is_counted = [], [], True
        try:
            yield self.costs, self.statements
        finally:
            self._is_counted = False


@pytest.fixture
def work(real_cost: None, monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


async def test_sign_in_compares_one_hash_of_the_same_cost_whoever_it_is(
    work: Work, identity: Identity, organization_id: str, sql: Sql
) -> None:
    people = People(identity)
    for email in (ANN, BOB, CARL):
        await people.member(organization_id, "developer", email)
    await sql.execute("UPDATE users SET state = 'suspended' WHERE email = $1", BOB)
    await sql.execute("DELETE FROM passwords WHERE user_id = (SELECT user_id FROM users WHERE email = $1)", CARL)
    done = []
    for email in (ANN, BOB, CARL, NOBODY):
        request = pb.CreateSessionRequest(email=email, password="wrong")
        with work.counted() as (costs, statements):
            assert (await people.refused(people.sessions.CreateSession, request)).reason is Reason.SIGN_IN_REFUSED
        done.append((costs, statements))
    assert done[0][0] == ["$2b$12$"]
    assert done[0][1], "statements are counted"
    assert all(each == done[0] for each in done)


async def test_an_api_key_takes_one_look_whether_its_id_is_known_or_not(
    work: Work, identity: Identity, organization_id: str
) -> None:
    known = await identity.key(organization_id)
    done = []
    for api_key_id in (known.api_key.api_key_id, "key_" + "0" * 22):
        wrong = tokens.API_KEY.generate_for(api_key_id).text
        with work.counted() as (_, statements):
            assert await identity.is_refused(wrong)
        done.append(statements)
    assert len(done[0]) == 1
    assert done[0] == done[1]


@pytest.fixture
async def slow_mail(database_url: str, tmp_path: Path) -> AsyncIterator[tuple[People, asyncio.Event, Mailbox]]:
    """An identity whose mail server does not take a mail before it is told to."""
    port, may_go_on = free_port(), asyncio.Event()
    async with mail_server(port) as mailbox:
        deliver = mailbox.handle_DATA

        async def slowly(*arguments: Any) -> str:
            await may_go_on.wait()
            return await deliver(*arguments)

        mailbox.handle_DATA = slowly  # type: ignore[assignment,method-assign]
        smtp_url = f"smtp://127.0.0.1:{port}"
        async with running_identity(database_url, tmp_path, smtp_url=smtp_url) as identity:
            yield People(identity), may_go_on, mailbox
        may_go_on.set()


async def test_recovery_is_answered_alike_and_before_anybody_is_looked_for_or_mailed(
    work: Work, slow_mail: tuple[People, asyncio.Event, Mailbox]
) -> None:
    people, may_go_on, mailbox = slow_mail
    await people.identity.member(await people.identity.organization(), "developer", ANN)
    done = []
    for email in (ANN, NOBODY, ANN, NOBODY):
        with work.counted() as (_, statements):
            async with asyncio.timeout(5):
                answer = await people.call(people.sessions.StartRecovery, pb.StartRecoveryRequest(email=email))
        # What follows in the background is about the address that is known, and nobody waits for it.
        done.append((answer, [each for each in statements if "throttles" in each]))
    assert all(each == done[0] for each in done)
    assert done[0][1]
    assert not mailbox.messages
    may_go_on.set()
    async with asyncio.timeout(5):
        while not mailbox.messages:
            await asyncio.sleep(0.02)
    assert {message["To"] for message in mailbox.messages} == {ANN}
