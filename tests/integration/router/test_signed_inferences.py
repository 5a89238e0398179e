"""Keys whose requests have to be signed, on every way to the router."""

import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from aiaas.router.v1 import inference_service_pb2
from aiaas.type.v1.request_signature_pb2 import RequestSignature
from mesh.errors import PlatformError, Reason
from mesh.request_signatures import METADATA
from router.config import RouterConfig
from tests.doubles.peer import PeerDouble
from tests.integration.router.conftest import PRINCIPAL, Answer, Router, running

BODY = b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}]}'
SIGNED = RequestSignature(
    method="POST",
    raw_path="/v1/chat/completions",
    timestamp_s=1790000000,
    nonce="nonce-0123456789",
    signature=b"\xab" * 32,
)


@pytest.fixture(params=["Relay", "within the process"])
async def router(
    request: pytest.FixtureRequest, config: RouterConfig, identity: PeerDouble, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Router]:
    """A router without Redis and RabbitMQ, and without a model: what gets that far is let in."""
    monkeypatch.setattr("router.server._FLUSH_S", 0.0)
    async with running(config, identity, way=request.param) as router:
        router.act_as(replace(PRINCIPAL, signature_required=True))
        yield router


async def reason_of(router: Router, signature: RequestSignature | None) -> Reason:
    answer = Answer()
    call = router.relay.infer(
        inference_service_pb2.RelayOpen(
            request=inference_service_pb2.InferRequest(endpoint=1, body=BODY),  # type: ignore[arg-type]
            credential=router.credential,
            request_id="req_test",
            timeout_millis=60_000,
            signature=signature,
        )
    )
    with pytest.raises(PlatformError) as raised:
        async for part in call:
            answer.data += part.data
    return raised.value.reason


def verified(identity: PeerDouble) -> list[Any]:
    return [call.request for call in identity.received if call.rpc == "VerifyRequestSignature"]


async def test_unsigned_inference_is_refused_without_a_call(router: Router, identity: PeerDouble) -> None:
    assert await reason_of(router, None) is Reason.SIGNATURE_INVALID
    assert verified(identity) == []


async def test_signed_inference_is_judged_with_the_hash_of_the_body_that_came(
    router: Router, identity: PeerDouble
) -> None:
    lying = RequestSignature()
    lying.CopyFrom(SIGNED)
    lying.body_sha256 = bytes(32)
    assert await reason_of(router, lying) is Reason.MODEL_NOT_FOUND
    (judged,) = verified(identity)
    assert judged.api_key_id == PRINCIPAL.api_key_id
    assert judged.body_sha256 == hashlib.sha256(BODY).digest()
    assert (judged.method, judged.raw_path) == ("POST", "/v1/chat/completions")
    assert (judged.timestamp_s, judged.nonce, judged.signature) == (1790000000, "nonce-0123456789", b"\xab" * 32)


async def test_verdict_is_told_and_an_outage_is_none(router: Router, identity: PeerDouble) -> None:
    identity.answers["VerifyRequestSignature"] = PlatformError(Reason.SIGNATURE_INVALID)
    assert await reason_of(router, SIGNED) is Reason.SIGNATURE_INVALID
    for away in (Reason.AUTH_UNAVAILABLE, Reason.UNAVAILABLE, Reason.INTERNAL, Reason.DEADLINE_EXCEEDED):
        identity.answers["VerifyRequestSignature"] = PlatformError(away)
        assert await reason_of(router, SIGNED) is Reason.AUTH_UNAVAILABLE


async def test_key_that_does_not_sign_is_not_asked_to(router: Router, identity: PeerDouble) -> None:
    router.act_as(PRINCIPAL)
    assert await reason_of(router, None) is Reason.MODEL_NOT_FOUND
    assert await reason_of(router, SIGNED) is Reason.MODEL_NOT_FOUND
    assert verified(identity) == []


async def test_other_calls_are_judged_by_what_they_carry(router: Router, identity: PeerDouble) -> None:
    request = inference_service_pb2.ListServedModelsRequest()
    with pytest.raises(PlatformError) as raised:
        await router.call(router.inference.ListServedModels, request)
    assert raised.value.reason is Reason.SIGNATURE_INVALID
    metadata: Any = [*router.metadata, (METADATA, SIGNED.SerializeToString())]
    await router.inference.ListServedModels(request, metadata=metadata, timeout=10)
    assert [judged.nonce for judged in verified(identity)] == ["nonce-0123456789"]
