"""Invites: whom an organization asks to become a member, and how somebody does; it never keeps a token, nor signs
anybody in.

A token is mailed to the address that is invited, so whoever has it speaks for that address. It is accepted once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from random import Random
from secrets import SystemRandom
from typing import TYPE_CHECKING, Protocol

from identity import fields
from identity.custom_roles import check_assignment
from identity.granted_roles import known_roles
from identity.organizations import Organization, OrganizationState, existing
from identity.users import User
from mesh.auth import Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.pages import TimePlace
from mesh.tokens import NewToken, TokenKind, matches

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

_NEVER = datetime.fromtimestamp(0, UTC)
_LIFE = timedelta(hours=72)

INVITE = TokenKind("aisv_", "invite")
"""The token of an invite; it is no credential of a call."""


class InviteState(StrEnum):
    """Where an invite is in its life."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    REVOKED = "revoked"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Invite:
    """An invitation to become a member; `user_id` is the member that it became."""

    invite_id: str
    organization_id: str
    email: str
    role_ids: tuple[str, ...] = ()
    creator_id: str = ""
    user_id: str = ""
    create_time: datetime = _NEVER
    expire_time: datetime = _NEVER
    accept_time: datetime | None = None
    revoke_time: datetime | None = None

    def state_at(self, now: datetime) -> InviteState:
        """Where it is in its life."""
        if self.accept_time is not None:
            return InviteState.ACCEPTED
        if self.revoke_time is not None:
            return InviteState.REVOKED
        return InviteState.PENDING if now < self.expire_time else InviteState.EXPIRED


@dataclass(frozen=True, slots=True)
class SentInvite:
    """An invite and, only where the platform sends no mail, its token's text."""

    invite: Invite
    token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class InvitePreview:
    """What a token invites to, and whether its holder has to choose a password."""

    organization: Organization
    invite: Invite
    is_new: bool


class Passwords(Protocol):
    """Where people's passwords are kept."""

    async def set(self, stored: Transaction, user_id: str, password: str, *, has_mfa: bool) -> None:
        """Store a password. Raises PlatformError(INVALID_ARGUMENT) naming 'password' for one that is too weak."""


class Mail(Protocol):
    """How an invite reaches its address."""

    async def send_invite(self, email: str, organization_name: str, token: str, expire_time: datetime) -> None:
        """Mail a token. Raises PlatformError(UNAVAILABLE)."""


class Invites:
    """The operations on invites. Without `mail` whoever makes an invite is told its token."""

    def __init__(
        self, store: Store, passwords: Passwords, mail: Mail | None, clock: Clock, random: Random | None = None
    ) -> None:
        self._store = store
        self._passwords = passwords
        self._mail = mail
        self._clock = clock
        self._random = random or SystemRandom()

    async def create(self, caller: Principal, wanted: Invite, request_id: str) -> SentInvite:
        """Invite `wanted.email` into `wanted.organization_id`; a repeat with the same `request_id` gives the invite
        that is there, mails nothing and tells no token.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, PERMISSION_DENIED, ALREADY_EXISTS for the address of a member
        or of an open invite, UNAVAILABLE where the mail could not be sent: then the invite is there to be sent again.
        """
        fields.check_request_id(request_id)
        fields.check_email(wanted.email, "invite.email")
        now = self._clock.now()
        organization_id = wanted.organization_id
        token = INVITE.generate(self._random, clock=self._clock)
        new = replace(wanted, invite_id=token.id, creator_id=caller.id, create_time=now, expire_time=now + _LIFE)
        async with self._store.transaction() as stored:
            organization = await existing(stored, organization_id)
            if first := await stored.creations.claim(organization_id, "CreateInvite", request_id, new.invite_id, now):
                return SentInvite(await self._invite(stored, organization_id, first))
            await check_assignment(stored, caller, organization_id, new.role_ids, "invite.role_ids")
            if await stored.users.is_member(organization_id, new.email):
                raise _already("that of a member")
            if not await stored.invites.add(new, token.digest):
                raise _already("invited already; send that invite again, or revoke it")
        return await self._send(new, organization, token)

    async def get(self, organization_id: str, invite_id: str) -> Invite:
        """One invite. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            return await self._invite(stored, organization_id, invite_id)

    async def list(
        self, organization_id: str, after: TimePlace | None, limit: int, state: InviteState | None
    ) -> list[Invite]:
        """Up to `limit` invites that come after `after`, only those in this state where given."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            return await stored.invites.page(organization_id, after, limit, state, self._clock.now())

    async def resend(self, caller: Principal, organization_id: str, invite_id: str) -> SentInvite:
        """Send it with a new token, which lasts as long as a new invite's; the one before is refused.

        Raises PlatformError: NOT_FOUND, PERMISSION_DENIED, FAILED_PRECONDITION for one that is accepted or revoked,
        UNAVAILABLE.
        """
        token = INVITE.generate_for(invite_id, self._random)
        async with self._store.transaction() as stored:
            organization = await existing(stored, organization_id)
            current = await self._invite(stored, organization_id, invite_id, lock=True)
            self._check_open(current)
            # It gives the roles once more, so whoever sends it has to hold them as its creator had.
            role_ids = await known_roles(stored, organization_id, current.role_ids)
            await check_assignment(stored, caller, organization_id, role_ids, "invite_id")
            new = replace(current, role_ids=tuple(role_ids), expire_time=self._clock.now() + _LIFE)
            await stored.invites.renew(new, token.digest)
        return await self._send(new, organization, token)

    async def revoke(self, organization_id: str, invite_id: str) -> Invite:
        """Take an invite back. Revoking it again changes nothing.

        Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION for one that is accepted.
        """
        async with self._store.transaction() as stored:
            current = await self._invite(stored, organization_id, invite_id, lock=True)
            if current.revoke_time is not None:
                return current
            self._check_open(current)
            new = replace(current, revoke_time=self._clock.now())
            await stored.invites.end(new)
        return new

    async def preview(self, token: str) -> InvitePreview:
        """What a token invites to. Raises PlatformError(INVALID_ARGUMENT) for one that is good for nothing."""
        async with self._store.transaction(across=True) as stored:
            invite, organization = await self._invited(stored, token)
            return InvitePreview(organization, invite, not await stored.users.is_known(invite.email))

    async def accept(self, token: str, display_name: str, password: str) -> User:
        """Make the holder of a token a member, and a user with a password where nobody has the address.

        Raises PlatformError: INVALID_ARGUMENT naming the field, ALREADY_EXISTS for somebody who is a member.
        """
        fields.check_display_name(display_name, "display_name", required=False)
        now = self._clock.now()
        async with self._store.transaction(across=True) as stored:
            invite, _ = await self._invited(stored, token, lock=True)
            new_user_id = new_id("user", clock=self._clock)
            user_id, email, state = await stored.users.known_or_new(invite.email, new_user_id, now)
            await self._take_password(stored, user_id, password, is_new=user_id == new_user_id)
            role_ids = await known_roles(stored, invite.organization_id, invite.role_ids)
            user = User(
                user_id=user_id,
                organization_id=invite.organization_id,
                email=email,
                display_name=display_name,
                role_ids=tuple(role_ids),
                state=state,
                create_time=now,
                update_time=now,
            )
            if not await stored.users.add_membership(user):
                raise PlatformError(Reason.ALREADY_EXISTS, description="You are a member already.")
            await stored.invites.end(replace(invite, user_id=user_id, accept_time=now))
            await stored.revoke("user_id", user_id)
        return user

    async def _take_password(self, stored: Transaction, user_id: str, password: str, *, is_new: bool) -> None:
        if not is_new:
            if password:
                raise fields.invalid("password", "must be empty: you have an account already")
            return
        if not password:
            raise fields.invalid("password", "is required: you are new here")
        await self._passwords.set(stored, user_id, password, has_mfa=False)

    async def _invited(self, stored: Transaction, token: str, *, lock: bool = False) -> tuple[Invite, Organization]:
        """The invite of a token that can be accepted now. Why another one cannot is told to nobody."""
        refused = fields.invalid("invite_token", "is not that of an invite that can be accepted")
        try:
            parsed = INVITE.parse(token)
        except PlatformError:
            raise refused from None
        found = await stored.invites.find(parsed.id, lock=lock)
        if found is None or not matches(parsed, found[1]):
            raise refused
        invite = found[0]
        organization = await stored.organizations.get(invite.organization_id)
        if (
            invite.state_at(self._clock.now()) is not InviteState.PENDING
            or organization is None
            or organization.state is not OrganizationState.ACTIVE
        ):
            raise refused
        return invite, organization

    async def _invite(self, stored: Transaction, organization_id: str, invite_id: str, *, lock: bool = False) -> Invite:
        invite = await stored.invites.get(organization_id, invite_id, lock=lock)
        if invite is None:
            raise PlatformError(Reason.NOT_FOUND)
        return invite

    def _check_open(self, invite: Invite) -> None:
        state = invite.state_at(self._clock.now())
        if state in (InviteState.ACCEPTED, InviteState.REVOKED):
            raise PlatformError(Reason.FAILED_PRECONDITION, description=f"The invite is {state.value}.")

    async def _send(self, invite: Invite, organization: Organization, token: NewToken) -> SentInvite:
        if self._mail is None:
            return SentInvite(invite, token.text)
        try:
            await self._mail.send_invite(invite.email, organization.display_name, token.text, invite.expire_time)
        except PlatformError as error:
            raise PlatformError(
                error.reason, description="The invite is made, but its mail could not be sent: send it again."
            ) from error
        return SentInvite(invite)


def _already(what: str) -> PlatformError:
    return PlatformError(Reason.ALREADY_EXISTS, field="invite.email", description=f"'invite.email' is {what}.")
