"""Second factors of people: TOTP, recovery codes, and who has to have them; it never signs anybody in.

TOTP is that of RFC 6238: six digits, 30 s, SHA-1, what every authenticator knows. A code of the step before or after
the present one is accepted, and none of a step that was used or lies before one that was.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

import pyotp
from cryptography.exceptions import InvalidTag

from identity import attempts, fields
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.sealing import Seal

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

logger = logging.getLogger(__name__)

_ISSUER = "aiaas"
_STEP_S = 30
_STEPS_OFF = 1
_ATTEMPTS = 5
_ATTEMPTS_WITHIN = timedelta(minutes=15)
_RECOVERY_CODES = 10
# 24 characters of base32 are 120 bits: from 112 on a plain hash protects them (NIST SP 800-63B-4, 3.1.2.2).
_CODE_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_CODE_GROUPS, _CODE_GROUP = 6, 4
_TOTP_CODE = re.compile(r"[0-9]{6}")


class MfaMethod(StrEnum):
    """A way to prove a second factor."""

    TOTP = "totp"
    RECOVERY_CODE = "recovery_code"


@dataclass(frozen=True, slots=True)
class Totp:
    """A TOTP secret in use, sealed. `last_step` is the last step (30 s since 1970) of which a code was accepted."""

    user_id: str
    sealed_secret: bytes = field(repr=False)
    last_step: int
    enable_time: datetime


@dataclass(frozen=True, slots=True)
class Enrollment:
    """A TOTP secret that waits for its first code, sealed."""

    user_id: str
    sealed_secret: bytes = field(repr=False)
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class MfaRequirement:
    """Whom an organization requires to use MFA; revision 0 for one that never said."""

    organization_id: str
    everyone: bool = False
    role_ids: tuple[str, ...] = ()
    update_time: datetime | None = None
    revision: int = field(default=0, compare=False)


class Mfa:
    """Second factors as they are asked for and proven."""

    def __init__(self, store: Store, clock: Clock, seal: Seal) -> None:
        self._store = store
        self._clock = clock
        self._seal = seal

    async def methods(self, stored: Transaction, user_id: str) -> tuple[MfaMethod, ...]:
        """The ways in which a user can prove a second factor; none for who has not set one up."""
        if await stored.totps.get(user_id) is None:
            return ()
        codes = await stored.recovery_codes.count(user_id)
        return (MfaMethod.TOTP, MfaMethod.RECOVERY_CODE) if codes else (MfaMethod.TOTP,)

    async def is_required(self, stored: Transaction, organization_id: str, role_ids: Sequence[str]) -> bool:
        """Whether an organization requires MFA of a member with these roles."""
        return await stored.mfa_requirements.binds(organization_id, role_ids)

    async def count_attempt(self, user_id: str) -> None:
        """Count an attempt to `verify` before it is made, in a transaction of its own, which its failure cannot undo.

        Raises PlatformError(RATE_LIMIT_EXCEEDED) after five in 15 minutes without a right one among them.
        """
        now = self._clock.now()
        with attempts.apart():
            async with self._store.transaction(across=True) as stored:
                attempted = await stored.totps.count_attempt(user_id, now, now - _ATTEMPTS_WITHIN)
        if attempted > _ATTEMPTS:
            logger.warning("too many attempts at a second factor", extra={"user_id": user_id})
            raise PlatformError(
                Reason.RATE_LIMIT_EXCEEDED,
                description="Too many attempts. Please try again later.",
                retry_after_s=_ATTEMPTS_WITHIN.total_seconds(),
            )

    async def verify(self, stored: Transaction, user_id: str, *, totp_code: str = "", recovery_code: str = "") -> None:
        """Accept one answer, which is used up once the transaction is committed.

        Raises PlatformError: MFA_CODE_INVALID for a wrong or used one and for a user without MFA, INVALID_ARGUMENT for
        none.
        """
        if totp_code:
            await self._verify_totp(stored, user_id, totp_code)
        elif recovery_code:
            if not await stored.recovery_codes.use(user_id, digest_of(recovery_code)):
                raise PlatformError(Reason.MFA_CODE_INVALID, field="recovery_code")
            await stored.totps.forget_attempts(user_id)
        else:
            raise fields.invalid("totp_code", "is required")

    async def _verify_totp(self, stored: Transaction, user_id: str, code: str) -> None:
        totp = await stored.totps.get(user_id)
        step = None if totp is None else self.step_of(totp, code)
        if totp is None or step is None or not await stored.totps.use_step(totp, step):
            raise PlatformError(Reason.MFA_CODE_INVALID, field="totp_code")

    def step_of(self, totp: Totp | Enrollment, code: str) -> int | None:
        """The step that a code is of, if that is the present one or next to it."""
        if not _TOTP_CODE.fullmatch(code):
            return None
        try:
            secret = self._seal.open(totp.sealed_secret, bound_to(totp.user_id)).decode()
        except InvalidTag:
            logger.error("the TOTP secret of user %s is sealed with another key, or to another user", totp.user_id)
            raise PlatformError(Reason.INTERNAL) from None
        present = int(self._clock.now().timestamp()) // _STEP_S
        generator = pyotp.TOTP(secret, interval=_STEP_S)
        steps = range(present - _STEPS_OFF, present + _STEPS_OFF + 1)
        # All of them are compared, so that the time does not tell which one it was.
        matching = [step for step in steps if secrets.compare_digest(generator.generate_otp(step), code)]
        return max(matching, default=None)


def bound_to(user_id: str) -> str:
    """What a user's TOTP secret is sealed to."""
    return f"totp:{user_id}"


def new_secret() -> str:
    """A new TOTP secret, base32 of 160 random bits (RFC 4226, 4)."""
    return pyotp.random_base32()


def otpauth_uri(secret: str, email: str) -> str:
    """A secret as authenticators read it from a QR code."""
    return pyotp.TOTP(secret, interval=_STEP_S).provisioning_uri(name=email, issuer_name=_ISSUER)


def new_recovery_codes() -> list[str]:
    """Ten new recovery codes, such as ABCD-EFGH-IJKL-MNOP-QRST-UVWX."""
    return ["-".join(_group() for _ in range(_CODE_GROUPS)) for _ in range(_RECOVERY_CODES)]


def digest_of(recovery_code: str) -> bytes:
    """What is stored of a recovery code, however it was typed."""
    return hashlib.sha256(re.sub(r"[\s-]", "", recovery_code).upper().encode(errors="replace")).digest()


def _group() -> str:
    return "".join(secrets.choice(_CODE_ALPHABET) for _ in range(_CODE_GROUP))
