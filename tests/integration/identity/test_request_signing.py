"""Signed requests: one that is right is accepted once, and nothing that differs from what was signed ever is."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from aiaas.identity.v1 import auth_service_pb2, organization_service_pb2, request_signing_service_pb2_grpc
from aiaas.identity.v1 import request_signing_service_pb2 as pb
from aiaas.type.v1.request_signature_pb2 import RequestSignature
from mesh.errors import PlatformError, Reason
from mesh.request_signatures import METADATA, RemoteVerifier, sign
from tests.doubles.tcp_gate import TcpGate
from tests.integration.identity.harness import Identity, running_identity

BODY = b'{"model": "small"}'


@dataclass(frozen=True)
class Signer:
    """A key with a signing secret, and the identity that judges what it signs."""

    identity: Identity
    organization_id: str
    api_key_id: str
    credential: str
    secret: str

    @property
    def stub(self) -> request_signing_service_pb2_grpc.RequestSigningServiceStub:
        return request_signing_service_pb2_grpc.RequestSigningServiceStub(self.identity.channel)

    def signed(self, *, nonce: str = "nonce-0123456789", off_s: int = 0, secret: str = "") -> RequestSignature:
        signature = RequestSignature(
            method="POST",
            raw_path="/v1/chat/completions?trace=%20x",
            body_sha256=hashlib.sha256(BODY).digest(),
            timestamp_s=int(time.time()) + off_s,
            nonce=nonce,
        )
        signature.signature = sign(secret or self.secret, signature)
        return signature

    async def verdict(self, signature: RequestSignature, api_key_id: str = "") -> Reason | None:
        """Why a signature is refused; None if it is accepted."""
        try:
            await RemoteVerifier(self.stub).verify(api_key_id or self.api_key_id, signature)
        except PlatformError as error:
            return error.reason
        return None


async def signer_of(identity: Identity, organization_id: str) -> Signer:
    key = await identity.key(organization_id)
    stub = request_signing_service_pb2_grpc.RequestSigningServiceStub(identity.channel)
    made = await identity.call(
        stub.CreateSigningSecret,
        pb.CreateSigningSecretRequest(organization_id=organization_id, api_key_id=key.api_key.api_key_id),
    )
    return Signer(identity, organization_id, key.api_key.api_key_id, key.secret, made.signing_secret)


@pytest.fixture
async def signer(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Signer]:
    async with running_identity(database_url, tmp_path, redis_url) as identity:
        yield await signer_of(identity, await identity.organization())


async def test_right_signature_is_accepted_once(signer: Signer) -> None:
    signature = signer.signed()
    assert await signer.verdict(signature) is None
    assert await signer.verdict(signature) is Reason.SIGNATURE_INVALID
    assert await signer.verdict(signer.signed(nonce="another-nonce-01")) is None


async def test_of_one_signature_sent_20_times_at_once_one_is_accepted(signer: Signer) -> None:
    signature = signer.signed()
    verdicts = await asyncio.gather(*(signer.verdict(signature) for _ in range(20)))
    assert sorted(map(str, verdicts)) == ["None"] + ["signature_invalid"] * 19


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "PUT"),
        ("raw_path", "/v1/completions?trace=%20x"),
        ("raw_path", "/v1/chat/completions?trace= x"),
        ("raw_path", "/v1/chat/completions"),
        ("body_sha256", hashlib.sha256(BODY + b" ").digest()),
        ("body_sha256", b""),
        ("nonce", "nonce-0123456780"),
        ("nonce", "short"),
        ("signature", bytes(32)),
        ("signature", b""),
    ],
)
async def test_what_differs_from_what_was_signed_is_refused(signer: Signer, field: str, value: object) -> None:
    signature = signer.signed()
    setattr(signature, field, value)
    assert await signer.verdict(signature) is Reason.SIGNATURE_INVALID
    # Nobody has used up the nonce of the right one by that.
    assert await signer.verdict(signer.signed()) is None


async def test_changed_timestamp_is_refused(signer: Signer) -> None:
    signature = signer.signed()
    signature.timestamp_s += 1
    assert await signer.verdict(signature) is Reason.SIGNATURE_INVALID


@pytest.mark.parametrize(("off_s", "accepted"), [(-310, False), (-290, True), (290, True), (310, False)])
async def test_timestamp_may_be_300_seconds_off(signer: Signer, off_s: int, accepted: bool) -> None:
    expected = None if accepted else Reason.SIGNATURE_INVALID
    assert await signer.verdict(signer.signed(off_s=off_s)) is expected


async def test_line_feed_cannot_move_a_boundary_of_what_is_signed(signer: Signer) -> None:
    signature = signer.signed()
    signature.nonce, signature.method = "nonce-0123456789\nPOST", "/v1"
    signature.signature = sign(signer.secret, signature)
    assert await signer.verdict(signature) is Reason.SIGNATURE_INVALID


async def test_secret_of_another_key_is_refused(signer: Signer) -> None:
    other = await signer_of(signer.identity, signer.organization_id)
    assert await signer.verdict(signer.signed(secret=other.secret)) is Reason.SIGNATURE_INVALID
    assert await signer.verdict(signer.signed(), other.api_key_id) is Reason.SIGNATURE_INVALID


async def test_nonces_of_two_keys_do_not_meet(signer: Signer) -> None:
    other = await signer_of(signer.identity, signer.organization_id)
    assert await signer.verdict(signer.signed()) is None
    assert await other.verdict(other.signed()) is None


async def test_principal_says_whether_requests_have_to_be_signed(signer: Signer) -> None:
    assert (await signer.identity.authenticate(signer.credential)).signature_required
    unsigned = await signer.identity.key(signer.organization_id)
    assert not (await signer.identity.authenticate(unsigned.secret)).signature_required


async def test_new_secret_ends_the_old_one(signer: Signer) -> None:
    request = pb.CreateSigningSecretRequest(organization_id=signer.organization_id, api_key_id=signer.api_key_id)
    made = await signer.identity.call(signer.stub.CreateSigningSecret, request)
    assert await signer.verdict(signer.signed()) is Reason.SIGNATURE_INVALID
    assert await signer.verdict(signer.signed(secret=made.signing_secret)) is None


async def test_without_its_secret_a_key_needs_no_signature(signer: Signer) -> None:
    request = pb.DeleteSigningSecretRequest(organization_id=signer.organization_id, api_key_id=signer.api_key_id)
    for _ in range(2):
        await signer.identity.call(signer.stub.DeleteSigningSecret, request)
    assert not (await signer.identity.authenticate(signer.credential)).signature_required
    assert await signer.verdict(signer.signed()) is Reason.SIGNATURE_INVALID


async def test_key_of_another_organization_is_not_found(signer: Signer) -> None:
    other = await signer.identity.organization("Other")
    owner = await signer.identity.member(other, "owner")
    for method, request in (
        (signer.stub.CreateSigningSecret, pb.CreateSigningSecretRequest),
        (signer.stub.DeleteSigningSecret, pb.DeleteSigningSecretRequest),
    ):
        for organization_id in (other, signer.organization_id):
            named = request(organization_id=organization_id, api_key_id=signer.api_key_id)
            error = await signer.identity.refused(method, named, owner.secret)
            assert error.reason is Reason.NOT_FOUND
    assert await signer.verdict(signer.signed()) is None


async def test_sealed_secret_is_not_readable_and_does_not_open_for_another_key(
    signer: Signer, database_url: str
) -> None:
    other = await signer_of(signer.identity, signer.organization_id)
    connection = await asyncpg.connect(database_url)
    try:
        for sealed in await connection.fetch("SELECT sealed_secret FROM signing_secrets"):
            assert signer.secret.encode() not in sealed["sealed_secret"]
            assert other.secret.encode() not in sealed["sealed_secret"]
        await connection.execute(
            "UPDATE signing_secrets SET sealed_secret ="
            " (SELECT sealed_secret FROM signing_secrets WHERE api_key_id = $1) WHERE api_key_id = $2",
            other.api_key_id,
            signer.api_key_id,
        )
    finally:
        await connection.close()
    assert await signer.verdict(signer.signed(secret=other.secret)) is Reason.AUTH_UNAVAILABLE


async def test_while_redis_is_away_no_signed_request_is_accepted(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    address = urlsplit(redis_url)
    assert address.hostname is not None
    assert address.port is not None
    async with TcpGate(address.hostname, address.port) as gate:
        through_gate = redis_url.replace(f":{address.port}", f":{gate.port}")
        async with running_identity(database_url, tmp_path, through_gate) as identity:
            signer = await signer_of(identity, await identity.organization())
            await gate.shut()
            assert await signer.verdict(signer.signed()) is Reason.AUTH_UNAVAILABLE
            # What is wrong anyway is told as that.
            assert await signer.verdict(signer.signed(secret="another")) is Reason.SIGNATURE_INVALID
            await gate.open()
            async with asyncio.timeout(10):
                while await signer.verdict(signer.signed()) is not None:
                    await asyncio.sleep(0.05)


async def test_without_redis_no_signed_request_is_accepted(identity: Identity, organization_id: str) -> None:
    signer = await signer_of(identity, organization_id)
    assert await signer.verdict(signer.signed()) is Reason.AUTH_UNAVAILABLE


async def test_calls_of_a_key_that_signs_are_refused_unsigned_and_accepted_once_signed(signer: Signer) -> None:
    call = signer.identity.auth.GetCurrentPrincipal
    request = auth_service_pb2.GetCurrentPrincipalRequest()
    error = await signer.identity.refused(call, request, signer.credential)
    assert error.reason is Reason.SIGNATURE_INVALID
    assert error.entry.http == 401
    metadata = (
        ("authorization", f"Bearer {signer.credential}"),
        (METADATA, signer.signed().SerializeToString()),
    )
    answer = await call(request, metadata=metadata, timeout=10)
    assert answer.principal.api_key_id == signer.api_key_id
    with pytest.raises(Exception, match="signature"):
        await call(request, metadata=metadata, timeout=10)


async def test_calls_of_other_keys_need_no_redis_and_no_signature(identity: Identity, organization_id: str) -> None:
    request = organization_service_pb2.GetOrganizationRequest(organization_id=organization_id)
    found = await identity.call(identity.organizations.GetOrganization, request)
    assert found.organization.organization_id == organization_id
