"""How people become members by invitation."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import pytest

from aiaas.identity.v1 import invite_service_pb2 as pb
from aiaas.identity.v1 import organization_service_pb2, role_service_pb2
from identity.invite_service import InviteService
from identity.invites import Invite, Invites, InviteState
from identity.roles import ALL_PERMISSIONS, BUILT_IN
from identity.stores import Store, Transaction, open_database
from mesh import context
from mesh.auth import Principal
from mesh.clock import SystemClock
from mesh.database import Database
from mesh.errors import PlatformError, Reason
from tests.doubles.clock import ManualClock
from tests.integration.identity.harness import Identity
from tests.integration.identity.test_row_level_security import announce_nothing

ADMIN = Principal("api_key", "key_admin", "org_platform", permissions=ALL_PERMISSIONS, platform=True)
EMAIL = "New.Person@example.com"
PASSWORD = "correct horse battery staple"


@dataclass
class Passwords:
    """Takes passwords, within the transaction that they belong to."""

    taken: list[tuple[str, str]] = field(default_factory=list)

    async def set(self, stored: Transaction, user_id: str, password: str, *, has_mfa: bool) -> None:
        """Take one, unless it is too short."""
        if len(password) < 8:
            raise PlatformError(Reason.INVALID_ARGUMENT, field="password", description="'password' is too short.")
        self.taken.append((user_id, password))


@dataclass
class Mail:
    """Keeps the tokens that it sends, by address."""

    sent: dict[str, str] = field(default_factory=dict)
    is_away: bool = False

    async def send_invite(self, email: str, organization_name: str, token: str, expire_time: datetime) -> None:
        """Send one."""
        if self.is_away:
            raise PlatformError(Reason.UNAVAILABLE)
        self.sent[email] = token


@dataclass
class Inviting:
    """Invites of one organization, before the database of a running identity."""

    store: Store
    database: Database
    organization_id: str
    clock: ManualClock
    passwords: Passwords
    mail: Mail
    invites: Invites

    async def invite(
        self, email: str = EMAIL, *role_ids: str, caller: Principal = ADMIN, request_id: str = ""
    ) -> Invite:
        """A new invite."""
        wanted = Invite("", self.organization_id, email, role_ids or ("analyst",))
        return (await self.invites.create(caller, wanted, request_id)).invite

    async def state(self, invite: Invite) -> InviteState:
        return (await self.invites.get(self.organization_id, invite.invite_id)).state_at(self.clock.now())

    async def is_useless(self, token: str) -> bool:
        """Whether a token can neither be shown nor accepted, both with the same words."""
        errors = []
        for call in (self.invites.preview(token), self.invites.accept(token, "", PASSWORD)):
            try:
                await call
            except PlatformError as error:
                errors.append((error.reason, error.field, error.message))
        expected = (
            Reason.INVALID_ARGUMENT,
            "invite_token",
            "'invite_token' is not that of an invite that can be accepted.",
        )
        assert errors in ([], [expected] * 2)
        return bool(errors)


@pytest.fixture
async def inviting(identity: Identity, database_url: str, organization_id: str) -> AsyncIterator[Inviting]:
    database = open_database(database_url)
    store = Store(database, announce_nothing)
    clock, passwords, mail = ManualClock(SystemClock().now()), Passwords(), Mail()
    yield Inviting(store, database, organization_id, clock, passwords, mail, Invites(store, passwords, mail, clock))
    await database.close()


async def test_new_person_becomes_a_member_with_a_password(inviting: Inviting) -> None:
    invite = await inviting.invite()
    assert invite.expire_time - invite.create_time == timedelta(hours=72)
    token = inviting.mail.sent[EMAIL]
    shown = await inviting.invites.preview(token)
    assert (shown.organization.display_name, shown.invite.email, shown.is_new) == ("Tenant", EMAIL, True)
    user = await inviting.invites.accept(token, "New", PASSWORD)
    assert (user.email, user.display_name, user.role_ids) == (EMAIL, "New", ("analyst",))
    assert inviting.passwords.taken == [(user.user_id, PASSWORD)]
    accepted = await inviting.invites.get(inviting.organization_id, invite.invite_id)
    assert (accepted.accept_time, accepted.user_id) == (inviting.clock.now(), user.user_id)


async def test_new_person_needs_a_password_that_will_do(inviting: Inviting) -> None:
    invite = await inviting.invite()
    token = inviting.mail.sent[EMAIL]
    for password in ("", "short"):
        with pytest.raises(PlatformError) as refused:
            await inviting.invites.accept(token, "", password)
        assert (refused.value.reason, refused.value.field) == (Reason.INVALID_ARGUMENT, "password")
    assert await inviting.state(invite) is InviteState.PENDING
    assert await inviting.database.fetchval("SELECT count(*) FROM users WHERE email = $1", EMAIL) == 0


async def test_somebody_who_has_an_account_keeps_its_password(identity: Identity, inviting: Inviting) -> None:
    known = await identity.member(await identity.organization("Other"), "owner", EMAIL.lower())
    await inviting.invite()
    token = inviting.mail.sent[EMAIL]
    assert not (await inviting.invites.preview(token)).is_new
    with pytest.raises(PlatformError) as refused:
        await inviting.invites.accept(token, "", PASSWORD)
    assert (refused.value.reason, refused.value.field) == (Reason.INVALID_ARGUMENT, "password")
    assert (await inviting.invites.accept(token, "", "")).user_id == known.user_id
    assert inviting.passwords.taken == []


async def test_token_is_accepted_once_however_many_try_at_a_time(inviting: Inviting) -> None:
    await inviting.invite()
    token = inviting.mail.sent[EMAIL]
    tries = [inviting.invites.accept(token, "", PASSWORD) for _ in range(5)]
    outcomes = await asyncio.gather(*tries, return_exceptions=True)
    refusals = [outcome.field for outcome in outcomes if isinstance(outcome, PlatformError)]
    assert refusals == ["invite_token"] * 4
    assert await inviting.is_useless(token)
    assert await inviting.database.fetchval("SELECT count(*) FROM memberships") == 1


async def test_token_lasts_for_72_hours(inviting: Inviting) -> None:
    invite = await inviting.invite()
    token = inviting.mail.sent[EMAIL]
    inviting.clock.advance(72 * 3600 - 1)
    assert (await inviting.invites.preview(token)).invite == invite
    inviting.clock.advance(1)
    assert await inviting.is_useless(token)
    assert await inviting.state(invite) is InviteState.EXPIRED


async def test_resent_invite_has_a_new_token_and_a_new_expiry(inviting: Inviting) -> None:
    invite = await inviting.invite()
    first = inviting.mail.sent[EMAIL]
    inviting.clock.advance(80 * 3600)
    again = (await inviting.invites.resend(ADMIN, inviting.organization_id, invite.invite_id)).invite
    assert again.expire_time == inviting.clock.now() + timedelta(hours=72)
    assert await inviting.is_useless(first)
    assert await inviting.invites.accept(inviting.mail.sent[EMAIL], "", PASSWORD)


async def test_revoked_invite_is_good_for_nothing_and_makes_room_for_another(inviting: Inviting) -> None:
    invite = await inviting.invite()
    with pytest.raises(PlatformError) as twice:
        await inviting.invite(EMAIL.lower())
    assert (twice.value.reason, twice.value.field) == (Reason.ALREADY_EXISTS, "invite.email")
    revoked = await inviting.invites.revoke(inviting.organization_id, invite.invite_id)
    assert await inviting.invites.revoke(inviting.organization_id, invite.invite_id) == revoked
    assert await inviting.is_useless(inviting.mail.sent[EMAIL])
    with pytest.raises(PlatformError) as refused:
        await inviting.invites.resend(ADMIN, inviting.organization_id, invite.invite_id)
    assert refused.value.reason is Reason.FAILED_PRECONDITION
    await inviting.invite()


async def test_accepted_invite_is_neither_revoked_nor_sent_again(inviting: Inviting) -> None:
    invite = await inviting.invite()
    await inviting.invites.accept(inviting.mail.sent[EMAIL], "", PASSWORD)
    for call in (
        inviting.invites.revoke(inviting.organization_id, invite.invite_id),
        inviting.invites.resend(ADMIN, inviting.organization_id, invite.invite_id),
    ):
        with pytest.raises(PlatformError) as refused:
            await call
        assert refused.value.reason is Reason.FAILED_PRECONDITION
    with pytest.raises(PlatformError) as member:
        await inviting.invite()
    assert member.value.reason is Reason.ALREADY_EXISTS


@pytest.mark.parametrize("token", ["", "nonsense", "aisv_invite_0_0"])
async def test_token_of_nothing_is_told_from_no_other(inviting: Inviting, token: str) -> None:
    assert await inviting.is_useless(token)


async def test_token_is_stored_as_a_digest_only(inviting: Inviting) -> None:
    invite = await inviting.invite()
    token = inviting.mail.sent[EMAIL]
    row = await inviting.database.fetchval(
        "SELECT to_jsonb(invites)::text FROM invites WHERE invite_id = $1", invite.invite_id
    )
    assert token.rpartition("_")[2] not in row
    assert token.removeprefix("aisv_").rpartition("_")[0] == invite.invite_id


async def test_invite_of_an_organization_that_is_suspended_waits(identity: Identity, inviting: Inviting) -> None:
    await inviting.invite()
    token = inviting.mail.sent[EMAIL]
    ids = {"organization_id": inviting.organization_id}
    suspend = organization_service_pb2.SuspendOrganizationRequest(**ids)
    await identity.call(identity.organizations.SuspendOrganization, suspend)
    assert await inviting.is_useless(token)
    reactivate = organization_service_pb2.ReactivateOrganizationRequest(**ids)
    await identity.call(identity.organizations.ReactivateOrganization, reactivate)
    assert await inviting.invites.preview(token)


async def test_nobody_invites_into_roles_that_they_do_not_hold(inviting: Inviting) -> None:
    manager = Principal(
        "user", "user_1", inviting.organization_id, user_id="user_1", permissions=BUILT_IN["manager"].permissions
    )
    with pytest.raises(PlatformError) as refused:
        await inviting.invite(EMAIL, "owner", caller=manager)
    assert (refused.value.reason, refused.value.field) == (Reason.PERMISSION_DENIED, "invite.role_ids")
    owners = await inviting.invite(EMAIL, "owner")
    with pytest.raises(PlatformError) as resent:
        await inviting.invites.resend(manager, inviting.organization_id, owners.invite_id)
    assert resent.value.reason is Reason.PERMISSION_DENIED


async def test_role_that_is_gone_is_not_given(identity: Identity, inviting: Inviting) -> None:
    role = role_service_pb2.Role(display_name="Reader", permissions=["usage.query"])
    create = role_service_pb2.CreateRoleRequest(organization_id=inviting.organization_id, role=role)
    made = (await identity.call(identity.roles.CreateRole, create)).role
    await inviting.invite(EMAIL, made.role_id, "analyst")
    delete = role_service_pb2.DeleteRoleRequest(organization_id=inviting.organization_id, role_id=made.role_id)
    await identity.call(identity.roles.DeleteRole, delete)
    assert (await inviting.invites.accept(inviting.mail.sent[EMAIL], "", PASSWORD)).role_ids == ("analyst",)


async def test_invite_whose_mail_could_not_be_sent_is_there_to_be_sent_again(inviting: Inviting) -> None:
    inviting.mail.is_away = True
    with pytest.raises(PlatformError) as away:
        await inviting.invite(request_id="once")
    assert away.value.reason is Reason.UNAVAILABLE
    inviting.mail.is_away = False
    repeated = await inviting.invite(request_id="once")
    assert inviting.mail.sent == {}
    await inviting.invites.resend(ADMIN, inviting.organization_id, repeated.invite_id)
    assert await inviting.invites.accept(inviting.mail.sent[EMAIL], "", PASSWORD)


async def test_another_organizations_invite_is_not_found(identity: Identity, inviting: Inviting) -> None:
    invite = await inviting.invite()
    other = await identity.organization("Other")
    for call in (
        inviting.invites.get(other, invite.invite_id),
        inviting.invites.resend(ADMIN, other, invite.invite_id),
        inviting.invites.revoke(other, invite.invite_id),
    ):
        with pytest.raises(PlatformError) as refused:
            await call
        assert refused.value.reason is Reason.NOT_FOUND


async def test_invites_are_listed_by_their_state_and_paged(inviting: Inviting) -> None:
    service = InviteService(inviting.invites, inviting.clock)
    invites = []
    for number in range(4):
        invites.append(await inviting.invite(f"person{number}@example.com"))
        inviting.clock.advance(1)
    await inviting.invites.revoke(inviting.organization_id, invites[0].invite_id)
    await inviting.invites.accept(inviting.mail.sent[invites[1].email], "", PASSWORD)

    async def listed(**fields: int) -> list[str]:
        request = pb.ListInvitesRequest(organization_id=inviting.organization_id, **fields)  # type: ignore[arg-type]
        emails: list[str] = []
        while True:
            page = await service.ListInvites(request, None)
            emails += [invite.email for invite in page.invites]
            request.page_token = page.next_page_token
            if not request.page_token:
                return emails

    assert await listed(page_size=3) == [invite.email for invite in invites]
    assert await listed(state=pb.INVITE_STATE_REVOKED) == [invites[0].email]
    assert await listed(state=pb.INVITE_STATE_ACCEPTED) == [invites[1].email]
    assert await listed(state=pb.INVITE_STATE_PENDING, page_size=1) == [invite.email for invite in invites[2:]]
    inviting.clock.advance(72 * 3600)
    assert await listed(state=pb.INVITE_STATE_EXPIRED) == [invite.email for invite in invites[2:]]
    assert await listed(state=pb.INVITE_STATE_PENDING) == []


async def test_token_is_told_to_the_caller_only_where_there_is_no_mail(inviting: Inviting) -> None:
    with_mail = InviteService(inviting.invites, inviting.clock)
    without = InviteService(Invites(inviting.store, inviting.passwords, None, inviting.clock), inviting.clock)
    token = context.principal.set(ADMIN)
    try:
        request = pb.CreateInviteRequest(organization_id=inviting.organization_id)
        request.invite.email = EMAIL
        request.invite.role_ids.append("analyst")
        made = await with_mail.CreateInvite(request, None)
        assert (made.invite.state, made.invite_token) == (pb.INVITE_STATE_PENDING, "")
        ids = {"organization_id": inviting.organization_id, "invite_id": made.invite.invite_id}
        told = await without.ResendInvite(pb.ResendInviteRequest(**ids), None)
        accept = pb.AcceptInviteRequest(invite_token=told.invite_token, password=PASSWORD)
        assert (await without.AcceptInvite(accept, None)).user.email == EMAIL
    finally:
        context.principal.reset(token)
