"""Signing in with a password, changing it, and finding the way back in without it; it never proves a second factor.

A known and an unknown address are answered alike and take the same time: a password is compared either way, and a
recovery is looked up only when its request has been answered.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from identity import fields
from identity.mfa import Mfa
from identity.passwords import Passwords
from identity.sessions import Sessions, SignIn, check_acting, check_own, current_id
from identity.throttles import PASSWORD, RECOVERY, TOKEN, Throttles
from identity.users import UserState
from mesh import tokens
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

logger = logging.getLogger(__name__)

RECOVERY_TOKEN = tokens.TokenKind("aisr_", "recovery")
RECOVERY_LIFETIME = timedelta(minutes=30)
_WAITING = 1000


class RecoveryMail(Protocol):
    """How a recovery token reaches its address."""

    async def send_recovery(self, email: str, token: str, expire_time: datetime) -> None:
        """Mail a token. Raises PlatformError(UNAVAILABLE)."""


class SignIns:
    """The operations that take a password or give a new one. Without `mail` nobody recovers by himself."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        passwords: Passwords,
        sessions: Sessions,
        mfa: Mfa,
        throttles: Throttles,
        mail: RecoveryMail | None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._passwords = passwords
        self._sessions = sessions
        self._mfa = mfa
        self._throttles = throttles
        self._mail = mail
        self._recoveries: asyncio.Queue[str] = asyncio.Queue(_WAITING)

    async def sign_in(self, email: str, password: str, organization_id: str) -> SignIn:
        """How the sign-in of whoever has this password goes on, in an organization or where it was last.

        Raises PlatformError: SIGN_IN_REFUSED, RATE_LIMIT_EXCEEDED, INVALID_ARGUMENT.
        """
        fields.check_email(email, "email")
        await self._throttles.count(PASSWORD, email)
        async with self._store.transaction(across=True) as stored:
            account = await stored.passwords.account(email)
        await self._store.settle()
        password_hash = None if account is None else account.password_hash
        right = await self._passwords.is_right(password_hash, password)
        if account is None or password_hash is None or not right or account.state is not UserState.ACTIVE:
            logger.info("a sign-in was refused", extra={"user_id": "" if account is None else account.user_id})
            raise PlatformError(Reason.SIGN_IN_REFUSED, description="The address or the password is wrong.")
        await self._throttles.succeeded(PASSWORD, email)
        async with self._store.transaction(across=True) as stored:
            chosen = organization_id or await stored.sessions.last_organization_id(account.user_id)
            if chosen is None:
                raise PlatformError(Reason.SIGN_IN_REFUSED, description="You are a member of no organization.")
            await check_acting(stored, chosen, account.user_id)
            if self._passwords.is_outdated(password_hash):
                await self._passwords.keep(stored, account.user_id, password)
            return await self._sessions.open(stored, account.user_id, chosen, multi_factor=False)

    async def change_password(self, user_id: str, password: str, new_password: str) -> None:
        """Give the caller a new password and end its other sessions.

        Raises PlatformError: INVALID_ARGUMENT naming the field, PERMISSION_DENIED for a session from an issuer,
        RATE_LIMIT_EXCEEDED.
        """
        await self._throttles.count(PASSWORD, user_id)
        async with self._store.transaction(across=True) as stored:
            await self.check_password(stored, user_id, password)
            has_mfa = bool(await self._mfa.methods(stored, user_id))
            await self._passwords.set(stored, user_id, new_password, has_mfa=has_mfa, field="new_password")
            await stored.recoveries.remove_of_user(user_id)
            await self._sessions.end_all(stored, user_id, but_session_id=current_id())
        await self._throttles.succeeded(PASSWORD, user_id)

    async def start_recovery(self, email: str) -> None:
        """Have a recovery token mailed, if there is whom to; it is found out later.

        Raises PlatformError: INVALID_ARGUMENT, RATE_LIMIT_EXCEEDED, FAILED_PRECONDITION where no mail can be sent.
        """
        fields.check_email(email, "email")
        if self._mail is None:
            raise PlatformError(
                Reason.FAILED_PRECONDITION,
                description="This platform sends no mail. Ask an administrator for an invite.",
            )
        await self._throttles.count(RECOVERY, email)
        try:
            self._recoveries.put_nowait(email)
        except asyncio.QueueFull:
            raise PlatformError(Reason.UNAVAILABLE, retry_after_s=30) from None

    async def complete_recovery(self, recovery_token: str, new_password: str) -> None:
        """Give the user of a recovery token a new password, and end all that was signed in with the former.

        Raises PlatformError: INVALID_ARGUMENT naming the field, RATE_LIMIT_EXCEEDED.
        """
        await self._throttles.count(TOKEN, "")
        refused = fields.invalid("recovery_token", "is unknown, was used, or is over")
        try:
            parsed = RECOVERY_TOKEN.parse(recovery_token)
        except PlatformError:
            raise refused from None
        async with self._store.transaction(across=True) as stored:
            found = await stored.recoveries.find(parsed.id, self._clock.now())
            if found is None or not tokens.matches(parsed, found[1]):
                raise refused
            user_id = found[0]
            has_mfa = bool(await self._mfa.methods(stored, user_id))
            await self._passwords.set(stored, user_id, new_password, has_mfa=has_mfa, field="new_password")
            await stored.recoveries.remove_of_user(user_id)
            await self._sessions.end_all(stored, user_id)

    async def check_password(self, stored: Transaction, user_id: str, password: str) -> None:
        """Raises PlatformError(INVALID_ARGUMENT) unless it is the caller's; of a user who has none, unless it is empty;
        PERMISSION_DENIED if an issuer vouched for the caller."""
        check_own(await self._sessions.current(stored))
        await self._check_password(stored, user_id, password)

    async def check_enrolling(self, stored: Transaction, user_id: str, password: str) -> None:
        """Raises PlatformError as `check_password` does, but accepts some callers for whom an issuer vouched
        (`Sessions.check_enrolling`)."""
        await self._sessions.check_enrolling(stored, await self._sessions.current(stored))
        await self._check_password(stored, user_id, password)

    async def _check_password(self, stored: Transaction, user_id: str, password: str) -> None:
        account = await stored.passwords.account_of(user_id)
        if account is None or account.password_hash is None:
            if password:
                raise fields.invalid("password", "must be empty: you have none")
        elif not await self._passwords.is_right(account.password_hash, password):
            raise fields.invalid("password", "is not your password")

    async def end_sessions(self, stored: Transaction, user_id: str) -> None:
        """End all sessions of a user, in every organization."""
        await self._sessions.end_all(stored, user_id)

    async def pass_mfa(self, stored: Transaction) -> None:
        """The session that calls has proven a second factor."""
        await stored.sessions.pass_mfa(current_id())

    async def run(self, stop: asyncio.Event) -> None:
        """Mail recoveries that were asked for, until `stop` is set."""
        ended = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                asked = asyncio.ensure_future(self._recoveries.get())
                await asyncio.wait((asked, ended), return_when=asyncio.FIRST_COMPLETED)
                if not asked.done():
                    asked.cancel()
                    return
                try:
                    await self._mail_recovery(asked.result())
                except PlatformError as error:
                    logger.warning("a recovery was not mailed: %s", error.reason.value)
                except Exception:
                    logger.exception("a recovery was not mailed")
        finally:
            ended.cancel()

    async def _mail_recovery(self, email: str) -> None:
        token = RECOVERY_TOKEN.generate(clock=self._clock)
        expire_time = self._clock.now() + RECOVERY_LIFETIME
        async with self._store.transaction(across=True) as stored:
            account = await stored.passwords.account(email)
            if account is None or account.state is not UserState.ACTIVE:
                return
            await stored.recoveries.add(token.id, account.user_id, token.digest, expire_time)
        if self._mail is not None:
            await self._mail.send_recovery(account.email, token.text, expire_time)
