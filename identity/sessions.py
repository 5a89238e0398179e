"""Sessions of people: opened, proven by a second factor, judged, ended; it never sees a password.

A session lasts a day, and an hour without use (NIST SP 800-63B-4, 2.2.3). It acts in one organization with what its
user holds there now. Sessions are looked up in PostgreSQL alone: routers remember principals anyway, and a copy
elsewhere would have to be told of everything that ends one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from identity import attempts, roles
from identity.mfa import Mfa, MfaMethod
from identity.mfa_setup import Answer
from identity.organizations import OrganizationState
from identity.principals import Holder
from identity.throttles import FORGOTTEN_AFTER, TOKEN, Throttles
from mesh import context, tokens
from mesh.auth import Principal, RateLimits
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.pages import TimePlace

if TYPE_CHECKING:
    from identity.last_uses import LastUses
    from identity.stores import Store, Transaction

logger = logging.getLogger(__name__)

LIFETIME = timedelta(days=1)
IDLE = timedelta(hours=1)
CHALLENGE = tokens.TokenKind("aisc_", "challenge")
_CHALLENGE_LIFETIME = timedelta(minutes=10)
_ANSWERS = 5
_USER_AGENT = 200
_SWEEP_INTERVAL_S = 600.0
# So long it is known where somebody acted last.
_KEPT = timedelta(days=90)


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who is signed in, in one organization. `issuer_id` is empty for a password."""

    session_id: str
    organization_id: str
    user_id: str
    multi_factor: bool
    issuer_id: str
    client_address: str
    user_agent: str
    create_time: datetime
    last_use_time: datetime
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class Challenge:
    """A sign-in that waits for a second factor."""

    challenge_id: str
    organization_id: str
    user_id: str
    issuer_id: str
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class SignedIn:
    """A new session with its token, which is told this once. `mfa_enrollment_needed`: it can do nothing else."""

    session: Session
    token: str = field(repr=False)
    mfa_enrollment_needed: bool


@dataclass(frozen=True, slots=True)
class Challenged:
    """A second factor is asked for; the token answers for the first one."""

    token: str = field(repr=False)
    methods: tuple[MfaMethod, ...]
    expire_time: datetime


SignIn = SignedIn | Challenged


@dataclass(frozen=True, slots=True)
class StoredSession:
    """A session and all that decides on it. `holder` is None for somebody who is no member any more."""

    session: Session
    digest: bytes = field(repr=False)
    ended: bool
    organization_state: OrganizationState
    organization_limits: RateLimits
    organization_models: tuple[str, ...]
    holder: Holder | None
    issuer_disabled: bool
    mfa_required: bool
    policy_bound: bool

    def what_is_wrong(self, parsed: tokens.ParsedToken, now: datetime) -> str:
        """Why it is not accepted; nothing if it is."""
        if not tokens.matches(parsed, self.digest):
            return "secret"
        if self.ended:
            return "ended"
        if self.session.expire_time <= now or self.session.last_use_time + IDLE <= now:
            return "expired"
        if self.organization_state is not OrganizationState.ACTIVE:
            return "organization"
        if self.issuer_disabled:
            return "issuer"
        return "" if self.holder is not None and self.holder.acting else "owner"

    def principal(self) -> Principal:
        """What an accepted session may do: what its user holds now, and nothing until MFA is set up where it is
        required."""
        session, holder = self.session, self.holder
        if holder is None:
            raise PlatformError(Reason.API_KEY_INVALID)
        held = roles.held_through(holder.role_ids, holder.custom_permissions, session.organization_id)
        is_of_platform = session.organization_id == roles.PLATFORM_ORGANIZATION_ID
        needs_enrollment = self.mfa_required and not session.multi_factor
        return Principal(
            kind="user",
            id=session.user_id,
            organization_id=session.organization_id,
            user_id=session.user_id,
            permissions=frozenset() if needs_enrollment else held,
            allowed_models=self.organization_models,
            platform=is_of_platform and roles.PLATFORM_ADMIN in holder.role_ids and not needs_enrollment,
            expire_time=session.expire_time,
            organization_limits=self.organization_limits,
            policy_bound=self.policy_bound,
        )


@dataclass(frozen=True, slots=True)
class _StoppedClock:
    """Stands at a moment, for an id that says when its holder signed in."""

    moment: datetime

    def now(self) -> datetime:
        return self.moment

    def monotonic(self) -> float:
        return self.moment.timestamp()


class Sessions:
    """The operations on sessions. Whoever is the caller of one is signed in."""

    def __init__(self, store: Store, clock: Clock, mfa: Mfa, throttles: Throttles, last_uses: LastUses) -> None:
        self._store = store
        self._clock = clock
        self._mfa = mfa
        self._throttles = throttles
        self._last_uses = last_uses

    async def authenticate(self, credential: str) -> Principal:
        """The principal behind a session's token.

        Raises PlatformError: API_KEY_INVALID, AUTH_UNAVAILABLE when the database is away.
        """
        parsed = tokens.SESSION.parse(credential)
        try:
            found = await self._store.session(parsed.id)
        except PlatformError as error:
            if error.reason in (Reason.UNAVAILABLE, Reason.DEADLINE_EXCEEDED):
                raise PlatformError(Reason.AUTH_UNAVAILABLE, retry_after_s=error.retry_after_s) from error
            raise
        now = self._clock.now()
        wrong = "unknown" if found is None else found.what_is_wrong(parsed, now)
        if found is None or wrong:
            logger.info("a session was refused", extra={"session_id": parsed.id, "why": wrong})
            raise PlatformError(Reason.API_KEY_INVALID, description="The session is over. Please sign in again.")
        self._last_uses.note_session(parsed.id, now)
        return found.principal()

    async def open(
        self, stored: Transaction, user_id: str, organization_id: str, *, multi_factor: bool, issuer_id: str = ""
    ) -> SignIn:
        """How a sign-in goes on whose first factor is proven: with a challenge for whoever has a second one."""
        now = self._clock.now()
        if not multi_factor and (methods := await self._mfa.methods(stored, user_id)):
            token = CHALLENGE.generate(clock=self._clock)
            expire_time = now + _CHALLENGE_LIFETIME
            await stored.challenges.add(
                Challenge(token.id, organization_id, user_id, issuer_id, expire_time), token.digest
            )
            return Challenged(token.text, methods, expire_time)
        return await self._begin(stored, user_id, organization_id, multi_factor, issuer_id, now, now + LIFETIME)

    async def answer(self, challenge_token: str, answer: Answer) -> SignedIn:
        """The session of whoever answers a challenge.

        Raises PlatformError: SIGN_IN_REFUSED for one that is unknown, over or answered five times, MFA_CODE_INVALID,
        INVALID_ARGUMENT, RATE_LIMIT_EXCEEDED.
        """
        await self._throttles.count(TOKEN, "")
        try:
            parsed = CHALLENGE.parse(challenge_token)
        except PlatformError:
            raise PlatformError(Reason.SIGN_IN_REFUSED) from None
        now = self._clock.now()
        with attempts.apart():
            async with self._store.transaction(across=True) as stored:
                found = await stored.challenges.attempt(parsed.id, now, _ANSWERS)
        if found is None or not tokens.matches(parsed, found[1]):
            raise PlatformError(Reason.SIGN_IN_REFUSED)
        challenge = found[0]
        user_id, organization_id = challenge.user_id, challenge.organization_id
        await self._mfa.count_attempt(user_id)
        async with self._store.transaction(across=True) as stored:
            await self._mfa.verify(stored, user_id, totp_code=answer.totp_code, recovery_code=answer.recovery_code)
            if not await stored.challenges.remove(challenge.challenge_id):
                raise PlatformError(Reason.SIGN_IN_REFUSED)
            await check_acting(stored, organization_id, user_id)
            return await self._begin(stored, user_id, organization_id, True, challenge.issuer_id, now, now + LIFETIME)

    async def current(self, stored: Transaction) -> Session:
        """The session that makes the call which is served. Raises PlatformError(API_KEY_INVALID)."""
        session = await stored.sessions.get(current_id())
        if session is None:
            raise PlatformError(Reason.API_KEY_INVALID)
        return session

    async def current_needs_enrollment(self) -> bool:
        """Whether the session that makes the call may do nothing but set up MFA."""
        async with self._store.transaction(across=True) as stored:
            session = await self.current(stored)
        return await self.needs_enrollment(session)

    async def needs_enrollment(self, session: Session) -> bool:
        """Whether a session may do nothing but set up MFA."""
        if session.multi_factor:
            return False
        async with self._store.transaction(across=True) as stored:
            return await self._is_required(stored, session.organization_id, session.user_id)

    async def check_enrolling(self, stored: Transaction, session: Session) -> None:
        """Raises PlatformError(PERMISSION_DENIED) unless a session may set up MFA. One from an issuer may where nothing
        else is open to it and nobody else is concerned: MFA is required of it, its user has none yet, and is a member
        of its organization alone, since an organization's issuer must not put a lock before another organization."""
        if not session.issuer_id:
            return
        user_id, organization_id = session.user_id, session.organization_id
        if (
            session.multi_factor
            or await self._mfa.methods(stored, user_id)
            or await stored.users.is_in_another(organization_id, user_id)
            or not await self._is_required(stored, organization_id, user_id)
        ):
            check_own(session)

    async def list(self, user_id: str, before: TimePlace | None, limit: int) -> Sequence[Session]:
        """Up to `limit` sessions of a user that are still accepted, in all its organizations, newest first."""
        now = self._clock.now()
        async with self._store.transaction(across=True) as stored:
            return await stored.sessions.page(user_id, before, limit, now, now - IDLE)

    async def switch(self, user_id: str, organization_id: str) -> SignIn:
        """The caller's session exchanged for one in another of its organizations, which lasts no longer; until a
        challenge is answered there is the present one.

        Raises PlatformError: NOT_FOUND where the user is no member, PERMISSION_DENIED for a session from an issuer.
        """
        now = self._clock.now()
        async with self._store.transaction(across=True) as stored:
            current = await self.current(stored)
            check_own(current)
            holder = await stored.holders.find(organization_id, "", user_id)
            organization = await stored.organizations.get(organization_id)
            if holder is None or organization is None or organization.state is not OrganizationState.ACTIVE:
                raise PlatformError(Reason.NOT_FOUND)
            if not current.multi_factor and await self._mfa.is_required(stored, organization_id, holder.role_ids):
                return await self.open(stored, user_id, organization_id, multi_factor=False)
            await stored.sessions.end(user_id, now, session_id=current.session_id)
            await stored.revoke("user_id", user_id)
            return await self._begin(
                stored,
                user_id,
                organization_id,
                current.multi_factor,
                "",
                current.create_time,
                current.expire_time,
            )

    async def end(self, user_id: str, session_id: str) -> None:
        """End one of a user's sessions; "current" is the one that calls. Raises PlatformError(NOT_FOUND) for another
        user's."""
        wanted = current_id() if session_id == "current" else session_id
        async with self._store.transaction(across=True) as stored:
            session = await stored.sessions.get(wanted)
            if session is None:
                return
            if session.user_id != user_id:
                raise PlatformError(Reason.NOT_FOUND)
            await stored.sessions.end(user_id, self._clock.now(), session_id=wanted)
            await stored.revoke("user_id", user_id)

    async def end_of_member(self, organization_id: str, user_id: str) -> int:
        """End what a member has open in an organization, refresh tokens included; gives how many sessions there were.

        Raises PlatformError(NOT_FOUND).
        """
        now = self._clock.now()
        async with self._store.transaction() as stored:
            if await stored.users.get(organization_id, user_id) is None:
                raise PlatformError(Reason.NOT_FOUND)
            ended = await stored.sessions.end(user_id, now, organization_id=organization_id)
            await stored.oauth_authorizations.revoke_of_user(organization_id, user_id, now)
            await stored.revoke("user_id", user_id)
        return ended

    async def end_all(self, stored: Transaction, user_id: str, *, but_session_id: str = "") -> None:
        """End a user's sessions and unanswered challenges in every organization, but for one session."""
        await stored.sessions.end(user_id, self._clock.now(), but_session_id=but_session_id)
        await stored.challenges.remove_of_user(user_id)
        await stored.revoke("user_id", user_id)

    async def run(self, stop: asyncio.Event) -> None:
        """Forget what is long over, until `stop` is set."""
        while not stop.is_set():
            now = self._clock.now()
            try:
                async with self._store.transaction() as stored:
                    await stored.sessions.forget_until(now - _KEPT)
                    await stored.challenges.forget_until(now)
                    await stored.recoveries.forget_until(now)
                    await stored.throttles.forget_until(now - FORGOTTEN_AFTER)
            except PlatformError as error:
                logger.warning("sessions that are over were not removed: %s", error.reason.value)
            try:
                async with asyncio.timeout(_SWEEP_INTERVAL_S):
                    await stop.wait()
            except TimeoutError:
                pass

    async def _begin(
        self,
        stored: Transaction,
        user_id: str,
        organization_id: str,
        multi_factor: bool,
        issuer_id: str,
        signed_in_at: datetime,
        expire_time: datetime,
    ) -> SignedIn:
        token = tokens.SESSION.generate(clock=_StoppedClock(signed_in_at))
        session = Session(
            session_id=token.id,
            organization_id=organization_id,
            user_id=user_id,
            multi_factor=multi_factor,
            issuer_id=issuer_id,
            client_address=context.client_address.get(),
            user_agent=context.user_agent.get()[:_USER_AGENT].replace("\0", ""),
            create_time=signed_in_at,
            last_use_time=self._clock.now(),
            expire_time=expire_time,
        )
        await stored.sessions.add(session, token.digest)
        required = not multi_factor and await self._is_required(stored, organization_id, user_id)
        return SignedIn(session, token.text, required)

    async def _is_required(self, stored: Transaction, organization_id: str, user_id: str) -> bool:
        holder = await stored.holders.find(organization_id, "", user_id)
        return holder is not None and await self._mfa.is_required(stored, organization_id, holder.role_ids)


def current_id() -> str:
    """The id of the session that makes the call which is served. Raises PlatformError(API_KEY_INVALID) for anything
    else."""
    return tokens.SESSION.parse(context.credential.get()).id


def check_own(session: Session) -> None:
    """Raises PlatformError(PERMISSION_DENIED) for a session that an issuer vouched for: it must not reach what the user
    is beyond the issuer's organization."""
    if session.issuer_id:
        raise PlatformError(
            Reason.PERMISSION_DENIED, description="Sign in with your password for this, and not through your issuer."
        )


async def check_acting(stored: Transaction, organization_id: str, user_id: str) -> None:
    """Raises PlatformError(SIGN_IN_REFUSED) unless somebody is a member who may act in an organization that does."""
    holder = await stored.holders.find(organization_id, "", user_id)
    organization = await stored.organizations.get(organization_id)
    if (
        holder is None
        or not holder.acting
        or organization is None
        or organization.state is not OrganizationState.ACTIVE
    ):
        raise PlatformError(Reason.SIGN_IN_REFUSED, description="You cannot act in this organization.")
