"""Which passwords are taken, how they are changed and recovered, and how often somebody may guess."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import bcrypt
import pytest

from aiaas.identity.v1 import session_service_pb2 as pb
from deploy.local.ports import free_port
from identity.passwords import Passwords, check_strength
from mesh.clock import SystemClock
from mesh.errors import PlatformError, Reason
from tests.integration.identity.auditing import Sql
from tests.integration.identity.harness import running_identity
from tests.integration.identity.signing_in import PASSWORD, Mailbox, People, mail_server

ANN = "ann@example.com"
NEW = "another-river-with-stones"


@pytest.fixture
async def port() -> int:
    return free_port()


@pytest.fixture
async def mailbox(port: int) -> AsyncIterator[Mailbox]:
    async with mail_server(port) as mailbox:
        yield mailbox


@pytest.fixture
async def people(database_url: str, tmp_path: Path, port: int) -> AsyncIterator[People]:
    """People of a platform that sends mail."""
    async with running_identity(database_url, tmp_path, smtp_url=f"smtp://127.0.0.1:{port}") as identity:
        yield People(identity)


@pytest.fixture
async def ann(people: People, mailbox: Mailbox) -> str:
    """The user id of an owner, who came by an invite that was mailed."""
    from aiaas.identity.v1 import invite_service_pb2

    organization_id = await people.identity.organization()
    wanted = invite_service_pb2.Invite(email=ANN, role_ids=["owner"])
    create = invite_service_pb2.CreateInviteRequest(organization_id=organization_id, invite=wanted)
    made = await people.identity.call(people.invites.CreateInvite, create)
    assert not made.invite_token
    accept = invite_service_pb2.AcceptInviteRequest(invite_token=mailbox.token_to(ANN), password=PASSWORD)
    return (await people.call(people.invites.AcceptInvite, accept)).user.user_id


async def is_right(people: People, password: str) -> bool:
    try:
        await people.sign_in(ANN, password)
    except PlatformError as error:
        if error.reason is not Reason.SIGN_IN_REFUSED:
            raise
        return False
    return True


@pytest.mark.parametrize(
    ("password", "has_mfa", "taken"),
    [
        ("short-but-odd", False, False),
        ("short-but-odd", True, True),
        ("7 chars", True, False),
        ("passwordpassword", False, False),
        ("qwertyuiopasdfgh", False, False),
        ("aaaaaaaaaaaaaaaaaaaa", False, False),
        ("correct horse battery staple", False, True),
        ("ünïcödé is fine as well", False, True),
        ("x" * 1001, False, False),
    ],
)
def test_passwords_are_long_and_not_easily_guessed(password: str, has_mfa: bool, taken: bool) -> None:
    if taken:
        check_strength(password, has_mfa=has_mfa, field="password")
        return
    with pytest.raises(PlatformError) as raised:
        check_strength(password, has_mfa=has_mfa, field="new_password")
    assert (raised.value.reason, raised.value.field) == (Reason.INVALID_ARGUMENT, "new_password")
    assert password not in str(raised.value)


class Kept:
    """What is stored of passwords."""

    def __init__(self) -> None:
        self.passwords = self
        self.hash = ""

    async def put(self, user_id: str, password_hash: str, now: object) -> None:
        self.hash = password_hash


@pytest.mark.parametrize("password", ["x" * 500, "with\0a NUL in the middle", "ﬁne as a ligature is"])
async def test_whole_password_counts(password: str) -> None:
    passwords, kept = Passwords(SystemClock(), cost=4), Kept()
    await passwords.keep(kept, "user_1", password)  # type: ignore[arg-type]
    assert await passwords.is_right(kept.hash, password)
    for other in (password + "x", password[:-1], password.split("\0")[0] + "", ""):
        assert other == password or not await passwords.is_right(kept.hash, other)
    assert not await passwords.is_right(None, password)


async def test_characters_that_look_and_mean_the_same_are_the_same() -> None:
    passwords, kept = Passwords(SystemClock(), cost=4), Kept()
    await passwords.keep(kept, "user_1", "cafe\u0301 au lait")  # type: ignore[arg-type]
    assert await passwords.is_right(kept.hash, "caf\u00e9 au lait")


async def test_hash_of_another_cost_is_made_anew_at_the_next_sign_in(people: People, ann: str, sql: Sql) -> None:
    assert (await sql.fetchval("SELECT hash FROM passwords")).startswith("$2b$04$")
    passwords, kept = Passwords(SystemClock(), cost=5), Kept()
    await passwords.keep(kept, ann, PASSWORD)  # type: ignore[arg-type]
    await sql.execute("UPDATE passwords SET hash = $1", kept.hash)
    assert await is_right(people, PASSWORD)
    assert (await sql.fetchval("SELECT hash FROM passwords")).startswith("$2b$04$")
    assert await is_right(people, PASSWORD)


async def test_new_password_ends_all_other_sessions(people: People, ann: str) -> None:
    here, elsewhere = await people.session(ANN), await people.session(ANN)
    change = pb.ChangePasswordRequest(password="wrong", new_password=NEW)
    error = await people.refused(people.sessions.ChangePassword, change, here.session_token)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "password")
    weak = pb.ChangePasswordRequest(password=PASSWORD, new_password="password")
    assert (await people.refused(people.sessions.ChangePassword, weak, here.session_token)).field == "new_password"
    assert await people.is_accepted(elsewhere.session_token)
    change.password = PASSWORD
    await people.call(people.sessions.ChangePassword, change, here.session_token)
    assert await people.is_accepted(here.session_token)
    assert not await people.is_accepted(elsewhere.session_token)
    assert not await is_right(people, PASSWORD)
    assert await is_right(people, NEW)


async def recovery_token(people: People, mailbox: Mailbox, email: str = ANN) -> str:
    mailbox.messages.clear()
    await people.call(people.sessions.StartRecovery, pb.StartRecoveryRequest(email=email))
    async with asyncio.timeout(10):
        while not mailbox.messages:
            await asyncio.sleep(0.02)
    return mailbox.token_to(email)


async def test_recovery_gives_a_new_password_once_and_signs_nobody_in(
    people: People, mailbox: Mailbox, ann: str
) -> None:
    before = await people.session(ANN)
    token = await recovery_token(people, mailbox)
    assert await people.is_accepted(before.session_token)
    weak = pb.CompleteRecoveryRequest(recovery_token=token, new_password="password")
    assert (await people.refused(people.sessions.CompleteRecovery, weak)).field == "new_password"
    complete = pb.CompleteRecoveryRequest(recovery_token=token, new_password=NEW)
    await people.call(people.sessions.CompleteRecovery, complete)
    assert not await people.is_accepted(before.session_token)
    assert await is_right(people, NEW)
    assert (await people.refused(people.sessions.CompleteRecovery, complete)).field == "recovery_token"


async def test_recovery_does_not_skip_the_second_factor(people: People, mailbox: Mailbox, ann: str) -> None:
    await people.enroll((await people.session(ANN)).session_token)
    token = await recovery_token(people, mailbox)
    # With a second factor a shorter one is enough.
    complete = pb.CompleteRecoveryRequest(recovery_token=token, new_password="odd-short-1")
    await people.call(people.sessions.CompleteRecovery, complete)
    assert (await people.sign_in(ANN, "odd-short-1")).WhichOneof("step") == "mfa_challenge"


async def test_only_the_newest_recovery_counts_and_not_for_long(
    people: People, mailbox: Mailbox, ann: str, sql: Sql
) -> None:
    first, second = [await recovery_token(people, mailbox) for _ in range(2)]
    for token in (first, second[:-1] + "x", "aisr_nonsense"):
        complete = pb.CompleteRecoveryRequest(recovery_token=token, new_password=NEW)
        assert (await people.refused(people.sessions.CompleteRecovery, complete)).field == "recovery_token"
    await sql.execute("UPDATE recoveries SET expire_time = now()")
    complete = pb.CompleteRecoveryRequest(recovery_token=second, new_password=NEW)
    assert (await people.refused(people.sessions.CompleteRecovery, complete)).field == "recovery_token"


async def test_unknown_address_is_answered_alike_and_gets_no_mail(people: People, mailbox: Mailbox, ann: str) -> None:
    mailbox.messages.clear()
    await people.call(people.sessions.StartRecovery, pb.StartRecoveryRequest(email="nobody@example.com"))
    await recovery_token(people, mailbox)
    assert [message["To"] for message in mailbox.messages] == [ANN]


async def test_guesses_are_slowed_down_by_account_and_a_right_one_is_not_taken_meanwhile(
    people: People, ann: str, sql: Sql
) -> None:
    for _ in range(5):
        assert not await is_right(people, "wrong")
    error = await people.refused(people.sessions.CreateSession, pb.CreateSessionRequest(email=ANN, password=PASSWORD))
    assert error.reason is Reason.RATE_LIMIT_EXCEEDED
    assert error.retry_after_s is not None
    assert 1 <= error.retry_after_s <= 10
    # An address that nobody has is counted alike.
    for _ in range(5):
        await people.refused(
            people.sessions.CreateSession, pb.CreateSessionRequest(email="no@example.com", password="x")
        )
    unknown = pb.CreateSessionRequest(email="no@example.com", password="x")
    assert (await people.refused(people.sessions.CreateSession, unknown)).reason is Reason.RATE_LIMIT_EXCEEDED
    await sql.execute("UPDATE throttles SET free_time = now()")
    assert not await is_right(people, "wrong")
    error = await people.refused(people.sessions.CreateSession, pb.CreateSessionRequest(email=ANN, password=PASSWORD))
    assert error.retry_after_s is not None
    assert 10 < error.retry_after_s <= 20, "each wait is twice as long as the one before"
    await sql.execute("UPDATE throttles SET free_time = now()")
    assert await is_right(people, PASSWORD)
    for _ in range(5):
        assert not await is_right(people, "wrong")


async def test_of_50_guesses_at_once_five_are_judged(people: People, ann: str) -> None:
    async def guess() -> Reason:
        return (
            await people.refused(people.sessions.CreateSession, pb.CreateSessionRequest(email=ANN, password="x"))
        ).reason

    reasons = await asyncio.gather(*(guess() for _ in range(50)))
    assert reasons.count(Reason.SIGN_IN_REFUSED) == 5
    assert reasons.count(Reason.RATE_LIMIT_EXCEEDED) == 45


async def test_guesses_from_one_address_are_slowed_down_whatever_the_accounts(
    people: People, ann: str, sql: Sql
) -> None:
    async def tried(number: int, address: str) -> Reason:
        request = pb.CreateSessionRequest(email=f"{number}@example.com", password="x")
        with pytest.raises(PlatformError) as raised:
            await people.call(people.sessions.CreateSession, request, address=address)
        return raised.value.reason

    reasons = await asyncio.gather(*(tried(number, f"2001:db8::{number:x}") for number in range(60)))
    assert reasons.count(Reason.RATE_LIMIT_EXCEEDED) == 10, "a /64 is one customer's"
    assert await tried(60, "2001:db8:1::1") is Reason.SIGN_IN_REFUSED


async def test_recoveries_are_not_asked_for_without_end(people: People, mailbox: Mailbox, ann: str) -> None:
    for email in (ANN, "nobody@example.com"):
        request = pb.StartRecoveryRequest(email=email)
        for _ in range(3):
            await people.call(people.sessions.StartRecovery, request)
        assert (await people.refused(people.sessions.StartRecovery, request)).reason is Reason.RATE_LIMIT_EXCEEDED


async def test_platform_without_mail_says_so(database_url: str, tmp_path: Path) -> None:
    async with running_identity(database_url, tmp_path) as identity:
        people = People(identity)
        error = await people.refused(people.sessions.StartRecovery, pb.StartRecoveryRequest(email=ANN))
    assert error.reason is Reason.FAILED_PRECONDITION


async def test_what_is_stored_lets_nobody_in(people: People, ann: str, sql: Sql) -> None:
    made = await people.session(ANN)
    rows = [
        str(dict(row))
        for table in ("passwords", "sessions", "users")
        for row in await sql.fetch(f"SELECT * FROM {table}")
    ]
    assert not any(PASSWORD in row or made.session_token in row for row in rows)
    password_hash = await sql.fetchval("SELECT hash FROM passwords")
    assert not bcrypt.checkpw(PASSWORD.encode(), password_hash.encode())
