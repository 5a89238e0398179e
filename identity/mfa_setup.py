"""Setting up second factors: people their own, administrators those of who lost theirs, organizations who needs one; it
never proves one by itself.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from identity import fields
from identity.custom_roles import check_assignment
from identity.granted_roles import known_roles
from identity.mfa import (
    Enrollment,
    Mfa,
    MfaRequirement,
    Totp,
    bound_to,
    digest_of,
    new_recovery_codes,
    new_secret,
    otpauth_uri,
)
from identity.organizations import existing
from mesh.auth import Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.sealing import Seal
from mesh.updates import check_etag

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

_ENROLLMENT = timedelta(minutes=10)
_REQUIRED_ROLES = 200


@dataclass(frozen=True, slots=True)
class NewTotp:
    """A new secret as its owner sees it, this once."""

    secret: str = field(repr=False)
    otpauth_uri: str = field(repr=False)
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class MfaState:
    """What a user has set up. No `enable_time` means no TOTP."""

    enable_time: datetime | None
    recovery_codes_left: int
    required: bool


CHANGEABLE = ("everyone", "role_ids")
"""What an update of a requirement may change."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A proof of a second factor; at most one of the two is given."""

    totp_code: str = field(default="", repr=False)
    recovery_code: str = field(default="", repr=False)


class SignIns(Protocol):
    """What second factors need of first ones."""

    async def check_password(self, stored: Transaction, user_id: str, password: str) -> None:
        """Raises PlatformError if it is not the user's; for a user who has none, if it is not empty."""

    async def check_enrolling(self, stored: Transaction, user_id: str, password: str) -> None:
        """The same, and if the session that calls may not set up MFA."""

    async def end_sessions(self, stored: Transaction, user_id: str) -> None:
        """End all sessions of a user, in every organization."""

    async def pass_mfa(self, stored: Transaction) -> None:
        """The session that calls has proven a second factor."""


class MfaSetup:
    """The operations on second factors. `caller` is a user who is signed in, or an administrator."""

    def __init__(self, store: Store, clock: Clock, seal: Seal, mfa: Mfa, sign_ins: SignIns) -> None:
        self._store = store
        self._clock = clock
        self._seal = seal
        self._mfa = mfa
        self._sign_ins = sign_ins

    async def get(self, user_id: str) -> MfaState:
        """What a user has set up."""
        async with self._store.transaction(across=True) as stored:
            return await _state(stored, user_id)

    async def enroll(self, caller: Principal, password: str, answer: Answer) -> NewTotp:
        """Make a secret that counts once it is confirmed, within ten minutes; where one is in use, it takes `answer`.

        Raises PlatformError: MFA_CODE_INVALID, RATE_LIMIT_EXCEEDED, and what a wrong password gives.
        """
        user_id = caller.user_id
        secret, expire_time = new_secret(), self._clock.now() + _ENROLLMENT
        await self._mfa.count_attempt(user_id)
        async with self._store.transaction(across=True) as stored:
            await self._sign_ins.check_enrolling(stored, user_id, password)
            if await self._mfa.methods(stored, user_id):
                await self._verify(stored, user_id, answer)
            user = await stored.users.get(caller.organization_id, user_id)
            if user is None:
                raise PlatformError(Reason.NOT_FOUND)
            sealed = self._seal.close(secret.encode(), bound_to(user_id))
            await stored.totp_enrollments.put(Enrollment(user_id, sealed, expire_time))
        return NewTotp(secret, otpauth_uri(secret, user.email), expire_time)

    async def confirm(self, caller: Principal, totp_code: str) -> tuple[MfaState, list[str]]:
        """Take the new secret into use; gives ten recovery codes, which exist nowhere else from then on.

        Raises PlatformError: MFA_CODE_INVALID, FAILED_PRECONDITION where nothing waits to be confirmed.
        """
        user_id, now = caller.user_id, self._clock.now()
        async with self._store.transaction(across=True) as stored:
            enrollment = await stored.totp_enrollments.take(user_id)
            if enrollment is None or enrollment.expire_time <= now:
                raise PlatformError(Reason.FAILED_PRECONDITION, description="Nothing waits to be confirmed.")
            step = self._mfa.step_of(enrollment, totp_code)
            if step is None:
                raise PlatformError(Reason.MFA_CODE_INVALID, field="totp_code")
            # The code is used up: nobody who saw it can sign in with it.
            await stored.totps.put(Totp(user_id, enrollment.sealed_secret, step, now))
            codes = await _renew_codes(stored, user_id)
            await self._sign_ins.pass_mfa(stored)
            await stored.revoke("user_id", user_id)
            return await _state(stored, user_id), codes

    async def disable(self, caller: Principal, password: str, answer: Answer) -> MfaState:
        """Take everything out of use.

        Raises PlatformError: MFA_CODE_INVALID, RATE_LIMIT_EXCEEDED, what a wrong password gives, FAILED_PRECONDITION
        where an organization requires MFA.
        """
        user_id = caller.user_id
        await self._mfa.count_attempt(user_id)
        async with self._store.transaction(across=True) as stored:
            await self._sign_ins.check_password(stored, user_id, password)
            await self._verify(stored, user_id, answer)
            if await stored.mfa_requirements.binds_anywhere(user_id):
                raise PlatformError(
                    Reason.FAILED_PRECONDITION,
                    description="One of your organizations requires MFA.",
                )
            await _remove(stored, user_id)
            return await _state(stored, user_id)

    async def regenerate(self, caller: Principal, totp_code: str) -> list[str]:
        """Ten new recovery codes in the place of those that are left.

        Raises PlatformError: MFA_CODE_INVALID, RATE_LIMIT_EXCEEDED.
        """
        user_id = caller.user_id
        await self._mfa.count_attempt(user_id)
        async with self._store.transaction(across=True) as stored:
            await self._verify(stored, user_id, Answer(totp_code=totp_code))
            return await _renew_codes(stored, user_id)

    async def reset(self, caller: Principal, organization_id: str, user_id: str, reason: str) -> MfaState:
        """Take a member's MFA out of use and end its sessions.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, PERMISSION_DENIED for oneself, for a holder of more than the
        caller holds, and outside the platform for a member of several organizations.
        """
        fields.check_reason(reason, "reason")
        async with self._store.transaction(across=True) as stored:
            await existing(stored, organization_id, lock=True)
            member = await stored.users.get(organization_id, user_id)
            if member is None:
                raise PlatformError(Reason.NOT_FOUND)
            if user_id == caller.user_id:
                raise PlatformError(
                    Reason.PERMISSION_DENIED, field="user_id", description="Your own you can disable, with a code."
                )
            # Who may not take somebody's roles may not take what guards them.
            await check_assignment(stored, caller, organization_id, (), "user_id", current=member.role_ids)
            if not caller.platform and await stored.users.is_in_another(organization_id, user_id):
                raise PlatformError(
                    Reason.PERMISSION_DENIED,
                    field="user_id",
                    description="Of a member of several organizations only the platform can reset MFA.",
                )
            await _remove(stored, user_id)
            await self._sign_ins.end_sessions(stored, user_id)
            return await _state(stored, user_id)

    async def requirement(self, organization_id: str) -> MfaRequirement:
        """Whom an organization requires to use MFA. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            return await _requirement(stored, organization_id)

    async def change_requirement(self, wanted: MfaRequirement, changed: Collection[str], etag: str) -> MfaRequirement:
        """Change the fields `changed` of a requirement to the values of `wanted`.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, FAILED_PRECONDITION for another etag.
        """
        organization_id = wanted.organization_id
        async with self._store.transaction() as stored:
            await existing(stored, organization_id, lock=True)
            current = await _requirement(stored, organization_id)
            check_etag(etag, current.revision, "mfa_requirement.etag")
            new = replace(current, **{name: getattr(wanted, name) for name in changed})
            if new == current:
                return current
            if new.role_ids != current.role_ids:
                await _check_roles(stored, new)
            # What sessions without MFA may do changes at once.
            await stored.revoke("organization_id", organization_id)
            return await stored.mfa_requirements.put(replace(new, update_time=self._clock.now()))

    async def _verify(self, stored: Transaction, user_id: str, answer: Answer) -> None:
        await self._mfa.verify(stored, user_id, totp_code=answer.totp_code, recovery_code=answer.recovery_code)


async def _state(stored: Transaction, user_id: str) -> MfaState:
    totp = await stored.totps.get(user_id)
    return MfaState(
        enable_time=None if totp is None else totp.enable_time,
        recovery_codes_left=await stored.recovery_codes.count(user_id),
        required=await stored.mfa_requirements.binds_anywhere(user_id),
    )


async def _renew_codes(stored: Transaction, user_id: str) -> list[str]:
    codes = new_recovery_codes()
    await stored.recovery_codes.put(user_id, [digest_of(code) for code in codes])
    return codes


async def _remove(stored: Transaction, user_id: str) -> None:
    await stored.totps.remove(user_id)
    await stored.totp_enrollments.take(user_id)
    await stored.recovery_codes.put(user_id, ())
    await stored.revoke("user_id", user_id)


async def _requirement(stored: Transaction, organization_id: str) -> MfaRequirement:
    return await stored.mfa_requirements.get(organization_id) or MfaRequirement(organization_id)


async def _check_roles(stored: Transaction, requirement: MfaRequirement) -> None:
    name = "mfa_requirement.role_ids"
    fields.check_once(requirement.role_ids, name)
    if len(requirement.role_ids) > _REQUIRED_ROLES:
        raise fields.invalid(name, f"may hold {_REQUIRED_ROLES} roles")
    if not all(fields.is_id(role_id) for role_id in requirement.role_ids):
        raise fields.invalid(name, "names an unknown role")
    known = await known_roles(stored, requirement.organization_id, requirement.role_ids)
    if len(known) < len(requirement.role_ids):
        raise fields.invalid(name, "names an unknown role")
