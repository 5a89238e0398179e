"""Second factors: a code is good for once, whoever asks and however often at the same time."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pyotp
import pytest

from aiaas.identity.v1 import mfa_service_pb2 as pb
from identity.mfa import Mfa, MfaMethod
from identity.mfa_service import MfaService
from identity.mfa_setup import MfaSetup
from identity.stores import Store, Transaction, open_database
from mesh import context
from mesh.auth import Principal
from mesh.errors import PlatformError, Reason
from mesh.sealing import Seal
from tests.doubles.clock import ManualClock
from tests.integration.identity.harness import SECRET_KEY, Identity

PASSWORD = "the right password"
START = datetime(2026, 3, 1, 12, tzinfo=UTC)


class SignIns:
    """One password for everybody, and the sessions that were ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.passed = 0

    async def check_password(self, stored: Transaction, user_id: str, password: str) -> None:
        if password != PASSWORD:
            raise PlatformError(Reason.PERMISSION_DENIED, field="password")

    check_enrolling = check_password

    async def pass_mfa(self, stored: Transaction) -> None:
        self.passed += 1

    async def end_sessions(self, stored: Transaction, user_id: str) -> None:
        self.ended.append(user_id)


class Person:
    """Somebody who is signed in, with an authenticator."""

    def __init__(self, mfa: "Platform", principal: Principal) -> None:
        self.mfa = mfa
        self.principal = principal
        self.user_id = principal.user_id
        self.secret = ""
        self.recovery_codes: list[str] = []

    async def call(self, method: str, request: Any) -> Any:
        return await self.mfa.call(method, request, self.principal, "aiss_a-session")

    async def refused(self, method: str, request: Any) -> PlatformError:
        with pytest.raises(PlatformError) as raised:
            await self.call(method, request)
        return raised.value

    def code(self, off_s: float = 0) -> str:
        return pyotp.TOTP(self.secret).at(self.mfa.clock.now() + timedelta(seconds=off_s))

    async def enroll(self, **proof: str) -> None:
        """From nothing to a confirmed authenticator; the clock goes on, so that its next code is another."""
        self.secret = (await self.call("EnrollTotp", pb.EnrollTotpRequest(password=PASSWORD, **proof))).secret
        confirmed = await self.call("ConfirmTotp", pb.ConfirmTotpRequest(totp_code=self.code()))
        self.recovery_codes = list(confirmed.recovery_codes)
        self.mfa.clock.advance(60)

    async def accepted(self, **answer: str) -> bool:
        """Whether an answer at a sign-in is accepted; nobody is the caller there."""
        try:
            async with self.mfa.store.transaction() as stored:
                await self.mfa.mfa.verify(stored, self.user_id, **answer)
        except PlatformError as error:
            if error.reason is not Reason.MFA_CODE_INVALID:
                raise
            return False
        return True

    async def methods(self) -> tuple[MfaMethod, ...]:
        async with self.mfa.store.transaction() as stored:
            return await self.mfa.mfa.methods(stored, self.user_id)

    async def state(self) -> pb.Mfa:
        found: pb.Mfa = (await self.call("GetMfa", pb.GetMfaRequest())).mfa
        return found


class Platform:
    """MFA over a real database, and a way to be somebody."""

    def __init__(self, identity: Identity, store: Store) -> None:
        self.identity = identity
        self.store = store
        self.clock = ManualClock(START)
        self.sign_ins = SignIns()
        seal = Seal(SECRET_KEY)
        self.mfa = Mfa(store, self.clock, seal)
        self.service = MfaService(MfaSetup(store, self.clock, seal, self.mfa, self.sign_ins))

    async def call(self, method: str, request: Any, principal: Principal, credential: str) -> Any:
        """What the interceptor sets, around the call."""
        tokens = context.principal.set(principal), context.credential.set(credential)
        try:
            return await getattr(self.service, method)(request, None)
        finally:
            context.principal.reset(tokens[0])
            context.credential.reset(tokens[1])

    async def person(self, organization_id: str, role_id: str, email: str = "") -> Person:
        member = await self.identity.member(organization_id, role_id, email)
        permissions = frozenset((await self.identity.authenticate(member.secret)).permissions)
        return Person(
            self,
            Principal("user", member.user_id, organization_id, user_id=member.user_id, permissions=permissions),
        )

    async def require(self, person: Person, **fields: Any) -> pb.MfaRequirement:
        request = pb.UpdateMfaRequirementRequest(
            organization_id=person.principal.organization_id, mfa_requirement=pb.MfaRequirement(**fields)
        )
        changed: pb.MfaRequirement = (await person.call("UpdateMfaRequirement", request)).mfa_requirement
        return changed


@pytest.fixture
async def platform(identity: Identity, database_url: str) -> AsyncIterator[Platform]:
    async def announce_nothing(_: object) -> None:
        pass

    database = open_database(database_url)
    yield Platform(identity, Store(database, announce_nothing))
    await database.close()


@pytest.fixture
async def ann(platform: Platform, organization_id: str) -> Person:
    """A developer without a second factor."""
    return await platform.person(organization_id, "developer", "ann@example.com")


@pytest.fixture
async def owner(platform: Platform, organization_id: str) -> Person:
    return await platform.person(organization_id, "owner", "owner@example.com")


async def test_secret_counts_once_a_code_of_it_confirms_it(ann: Person) -> None:
    assert not (await ann.state()).totp_enabled
    made = await ann.call("EnrollTotp", pb.EnrollTotpRequest(password=PASSWORD))
    ann.secret = made.secret
    assert vars(pyotp.parse_uri(made.otpauth_uri)) == vars(
        pyotp.TOTP(made.secret, name="ann@example.com", issuer="aiaas")
    )
    assert await ann.methods() == ()
    assert not await ann.accepted(totp_code=ann.code())
    wrong = f"{(int(ann.code()) + 1) % 1_000_000:06}"
    error = await ann.refused("ConfirmTotp", pb.ConfirmTotpRequest(totp_code=wrong))
    assert error.reason is Reason.MFA_CODE_INVALID
    confirmed = await ann.call("ConfirmTotp", pb.ConfirmTotpRequest(totp_code=ann.code()))
    assert confirmed.mfa.totp_enabled
    assert confirmed.mfa.recovery_codes_left == len(set(confirmed.recovery_codes)) == 10
    assert confirmed.mfa.enable_time.ToDatetime(UTC) == START
    assert await ann.methods() == (MfaMethod.TOTP, MfaMethod.RECOVERY_CODE)
    # The code that confirmed it is used up.
    assert not await ann.accepted(totp_code=ann.code())


async def test_secret_that_was_not_confirmed_in_ten_minutes_is_gone(ann: Person, platform: Platform) -> None:
    ann.secret = (await ann.call("EnrollTotp", pb.EnrollTotpRequest(password=PASSWORD))).secret
    platform.clock.advance(600)
    error = await ann.refused("ConfirmTotp", pb.ConfirmTotpRequest(totp_code=ann.code()))
    assert error.reason is Reason.FAILED_PRECONDITION


async def test_wrong_password_changes_nothing(ann: Person) -> None:
    error = await ann.refused("EnrollTotp", pb.EnrollTotpRequest(password="wrong"))
    assert error.field == "password"
    await ann.enroll()
    error = await ann.refused("DisableTotp", pb.DisableTotpRequest(password="wrong", totp_code=ann.code()))
    assert error.field == "password"
    # Nor is the code used up by it.
    assert await ann.accepted(totp_code=ann.code())


async def test_another_authenticator_takes_a_proof_of_the_present_one(ann: Person) -> None:
    await ann.enroll()
    first = ann.secret
    error = await ann.refused("EnrollTotp", pb.EnrollTotpRequest(password=PASSWORD))
    assert error.field == "totp_code"
    made = await ann.call("EnrollTotp", pb.EnrollTotpRequest(password=PASSWORD, totp_code=ann.code()))
    ann.mfa.clock.advance(60)
    # Until the new one is confirmed the former counts.
    assert await ann.accepted(totp_code=ann.code())
    ann.secret = made.secret
    await ann.call("ConfirmTotp", pb.ConfirmTotpRequest(totp_code=ann.code()))
    ann.mfa.clock.advance(60)
    assert not await ann.accepted(totp_code=pyotp.TOTP(first).at(ann.mfa.clock.now()))
    assert await ann.accepted(totp_code=ann.code())


@pytest.mark.parametrize("off_s", [-60, -30, 0, 30, 60])
async def test_clock_may_be_one_step_off(ann: Person, off_s: int) -> None:
    await ann.enroll()
    ann.mfa.clock.advance(60)
    assert await ann.accepted(totp_code=ann.code(off_s)) is (abs(off_s) <= 30)


async def test_no_step_is_accepted_twice_nor_one_before_it(ann: Person) -> None:
    await ann.enroll()
    ann.mfa.clock.advance(60)
    before, present, after = ann.code(-30), ann.code(), ann.code(30)
    assert await ann.accepted(totp_code=present)
    assert not await ann.accepted(totp_code=present)
    assert not await ann.accepted(totp_code=before)
    assert await ann.accepted(totp_code=after)
    assert not await ann.accepted(totp_code=after)


@pytest.mark.parametrize("code", ["000000", "12345", "1234567", "٠١٢٣٤٥", "abcdef", " "])
async def test_wrong_codes_are_refused(ann: Person, code: str) -> None:
    await ann.enroll()
    assert code != ann.code()
    assert not await ann.accepted(totp_code=code)
    assert not await ann.accepted(recovery_code=code)


async def test_nobody_without_a_second_factor_proves_one(ann: Person) -> None:
    assert not await ann.accepted(totp_code="123456")
    assert not await ann.accepted(recovery_code="ABCD")


async def test_of_one_code_at_20_sign_ins_at_once_one_is_accepted(ann: Person) -> None:
    await ann.enroll()
    code = ann.code()
    assert sorted(await asyncio.gather(*(ann.accepted(totp_code=code) for _ in range(20)))) == [False] * 19 + [True]


async def test_recovery_code_is_accepted_once(ann: Person) -> None:
    await ann.enroll()
    code = ann.recovery_codes[0]
    verdicts = await asyncio.gather(*(ann.accepted(recovery_code=code) for _ in range(20)))
    assert sorted(verdicts) == [False] * 19 + [True]
    assert (await ann.state()).recovery_codes_left == 9
    # However it is typed.
    assert await ann.accepted(recovery_code=ann.recovery_codes[1].lower().replace("-", " "))
    for left in ann.recovery_codes[2:]:
        assert await ann.accepted(recovery_code=left)
    assert await ann.methods() == (MfaMethod.TOTP,)


async def test_answer_of_a_sign_in_that_failed_is_not_used_up(ann: Person, platform: Platform) -> None:
    await ann.enroll()
    with pytest.raises(ZeroDivisionError):
        async with platform.store.transaction() as stored:
            await platform.mfa.verify(stored, ann.user_id, recovery_code=ann.recovery_codes[0])
            raise ZeroDivisionError
    assert await ann.accepted(recovery_code=ann.recovery_codes[0])


async def test_new_recovery_codes_end_the_old_ones(ann: Person) -> None:
    await ann.enroll()
    request = pb.RegenerateRecoveryCodesRequest(totp_code=ann.code())
    fresh = (await ann.call("RegenerateRecoveryCodes", request)).recovery_codes
    assert len(fresh) == 10
    assert (await ann.refused("RegenerateRecoveryCodes", request)).reason is Reason.MFA_CODE_INVALID
    assert not await ann.accepted(recovery_code=ann.recovery_codes[0])
    assert await ann.accepted(recovery_code=fresh[0])


async def test_guessing_ends_after_five_attempts_also_at_the_same_time(ann: Person) -> None:
    await ann.enroll()
    wrong = f"{(int(ann.code()) + 1) % 1_000_000:06}"
    request = pb.RegenerateRecoveryCodesRequest(totp_code=wrong)
    errors = await asyncio.gather(*(ann.refused("RegenerateRecoveryCodes", request) for _ in range(10)))
    assert sorted(error.reason for error in errors) == [Reason.MFA_CODE_INVALID] * 5 + [Reason.RATE_LIMIT_EXCEEDED] * 5
    right = pb.RegenerateRecoveryCodesRequest(totp_code=ann.code())
    assert (await ann.refused("RegenerateRecoveryCodes", right)).reason is Reason.RATE_LIMIT_EXCEEDED
    ann.mfa.clock.advance(15 * 60)
    await ann.call("RegenerateRecoveryCodes", pb.RegenerateRecoveryCodesRequest(totp_code=ann.code()))


async def test_right_answers_are_never_too_many(ann: Person) -> None:
    await ann.enroll()
    for _ in range(7):
        await ann.call("RegenerateRecoveryCodes", pb.RegenerateRecoveryCodesRequest(totp_code=ann.code()))
        ann.mfa.clock.advance(30)


async def test_disabled_it_takes_nothing_more(ann: Person) -> None:
    await ann.enroll()
    request = pb.DisableTotpRequest(password=PASSWORD, recovery_code=ann.recovery_codes[0])
    state = (await ann.call("DisableTotp", request)).mfa
    assert not state.totp_enabled
    assert state.recovery_codes_left == 0
    assert await ann.methods() == ()
    assert not await ann.accepted(totp_code=ann.code())
    assert not await ann.accepted(recovery_code=ann.recovery_codes[1])


async def test_only_who_is_signed_in_deals_with_own_factors(ann: Person, platform: Platform) -> None:
    for credential in ("aias_a-key-of-the-user", "aiat_an-access-token", ""):
        with pytest.raises(PlatformError) as raised:
            await platform.call("EnrollTotp", pb.EnrollTotpRequest(password=PASSWORD), ann.principal, credential)
        assert raised.value.reason is Reason.PERMISSION_DENIED


async def test_organization_requires_it_of_everybody_or_by_role(
    ann: Person, owner: Person, platform: Platform, organization_id: str
) -> None:
    async def concerned(*role_ids: str) -> bool:
        async with platform.store.transaction() as stored:
            return await platform.mfa.is_required(stored, organization_id, role_ids)

    assert not await concerned("owner")
    await platform.require(owner, role_ids=["owner", "admin"])
    assert await concerned("developer", "admin")
    assert not await concerned("developer")
    assert not await concerned()
    assert (await owner.state()).required
    assert not (await ann.state()).required
    await platform.require(owner, everyone=True)
    assert await concerned()
    assert (await ann.state()).required
    other = await platform.identity.organization("Other")
    async with platform.store.transaction() as stored:
        assert not await platform.mfa.is_required(stored, other, ("owner",))


async def test_who_has_to_have_it_cannot_disable_it_from_any_organization(
    ann: Person, platform: Platform, organization_id: str
) -> None:
    await ann.enroll()
    other = await platform.identity.organization("Other")
    boss = await platform.person(other, "owner", "boss@example.com")
    await platform.identity.member(other, "developer", "ann@example.com")
    await platform.require(boss, role_ids=["developer"])
    error = await ann.refused("DisableTotp", pb.DisableTotpRequest(password=PASSWORD, totp_code=ann.code()))
    assert error.reason is Reason.FAILED_PRECONDITION
    await platform.require(boss, role_ids=["owner"])
    await ann.call("DisableTotp", pb.DisableTotpRequest(password=PASSWORD, totp_code=ann.code()))


async def test_requirement_is_changed_as_it_was_seen(owner: Person, platform: Platform, organization_id: str) -> None:
    request = pb.GetMfaRequirementRequest(organization_id=organization_id)
    before = (await owner.call("GetMfaRequirement", request)).mfa_requirement
    assert (before.everyone, list(before.role_ids), before.HasField("update_time")) == (False, [], False)
    changed = await platform.require(owner, everyone=True, etag=before.etag)
    assert changed.everyone
    assert changed.update_time.ToDatetime(UTC) == START
    with pytest.raises(PlatformError) as raised:
        await platform.require(owner, role_ids=["owner"], etag=before.etag)
    assert raised.value.field == "mfa_requirement.etag"
    for role_ids in (["nothing"], ["platform_admin"], ["role_0000000000000000000000"], ["owner", "owner"], ["\0"]):
        with pytest.raises(PlatformError) as raised:
            await platform.require(owner, role_ids=role_ids)
        assert raised.value.field == "mfa_requirement.role_ids"
    assert (await owner.call("GetMfaRequirement", request)).mfa_requirement == changed


def reset_of(person: Person, **fields: str) -> pb.ResetUserMfaRequest:
    named = {"organization_id": person.principal.organization_id, "user_id": person.user_id, "reason": "Lost phone"}
    return pb.ResetUserMfaRequest(**{**named, **fields})


async def test_administrator_resets_it_and_ends_the_sessions(ann: Person, owner: Person, platform: Platform) -> None:
    await ann.enroll()
    assert (await owner.refused("ResetUserMfa", reset_of(ann, reason=" "))).field == "reason"
    assert platform.sign_ins.ended == []
    state = (await owner.call("ResetUserMfa", reset_of(ann))).mfa
    assert (state.totp_enabled, state.recovery_codes_left) == (False, 0)
    assert platform.sign_ins.ended == [ann.user_id]
    assert await ann.methods() == ()
    assert not await ann.accepted(recovery_code=ann.recovery_codes[0])


async def test_nobody_resets_those_above_nor_oneself(owner: Person, platform: Platform, organization_id: str) -> None:
    admin = await platform.person(organization_id, "admin")
    await owner.enroll()
    await admin.enroll()
    for caller, target in ((admin, owner), (admin, admin)):
        error = await caller.refused("ResetUserMfa", reset_of(target))
        assert (error.reason, error.field) == (Reason.PERMISSION_DENIED, "user_id")
    assert await owner.accepted(totp_code=owner.code())
    assert await admin.accepted(totp_code=admin.code())


async def test_member_of_another_organization_too_is_reset_by_the_platform_only(
    ann: Person, owner: Person, platform: Platform
) -> None:
    await ann.enroll()
    other = await platform.identity.organization("Other")
    await platform.identity.member(other, "developer", "ann@example.com")
    error = await owner.refused("ResetUserMfa", reset_of(ann))
    assert (error.reason, error.field) == (Reason.PERMISSION_DENIED, "user_id")
    assert await ann.accepted(totp_code=ann.code())
    administrator = Principal(
        "api_key", "key_1", "org_platform", permissions=owner.principal.permissions, platform=True
    )
    await platform.call("ResetUserMfa", reset_of(ann), administrator, "aias_a-key")
    assert await ann.methods() == ()


async def test_stranger_is_not_found(ann: Person, platform: Platform, organization_id: str) -> None:
    other = await platform.identity.organization("Other")
    boss = await platform.person(other, "owner", "boss@example.com")
    error = await boss.refused("ResetUserMfa", reset_of(ann, organization_id=other))
    assert error.reason is Reason.NOT_FOUND


async def test_what_is_stored_shows_no_secret_and_opens_for_its_user_alone(
    ann: Person, owner: Person, database_url: str
) -> None:
    await ann.enroll()
    await owner.enroll()
    connection = await asyncpg.connect(database_url)
    try:
        rows = await connection.fetch("SELECT sealed_secret FROM totps")
        for person in (ann, owner):
            raw = pyotp.TOTP(person.secret).byte_secret()
            assert all(person.secret.encode() not in row[0] and raw not in row[0] for row in rows)
        digests = await connection.fetchval("SELECT string_agg(digest::text, ' ') FROM recovery_codes")
        assert all(code.replace("-", "").encode().hex() not in digests for code in ann.recovery_codes)
        await connection.execute(
            "UPDATE totps SET sealed_secret = (SELECT sealed_secret FROM totps WHERE user_id = $1) WHERE user_id = $2",
            owner.user_id,
            ann.user_id,
        )
    finally:
        await connection.close()
    with pytest.raises(PlatformError) as raised:
        await ann.accepted(totp_code=owner.code())
    assert raised.value.reason is Reason.INTERNAL
