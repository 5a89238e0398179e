"""Signatures pass the edge unjudged: what was signed is told as it arrived."""

import hashlib

from aiaas.type.v1.request_signature_pb2 import RequestSignature
from mesh.request_signatures import METADATA
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import CHAT, Edge

KEYS = "/admin/v1/organizations/org_1/api-keys"
BODY = b'{"display_name":  "x"}'
SIGNED = {
    "x-signature": "v1=" + "ab" * 32,
    "x-signature-timestamp": "1790000000",
    "x-signature-nonce": "nonce-0123456789",
}


def signature_of(method: str, raw_path: str, body_sha256: bytes) -> RequestSignature:
    return RequestSignature(
        method=method,
        raw_path=raw_path,
        body_sha256=body_sha256,
        timestamp_s=1790000000,
        nonce="nonce-0123456789",
        signature=b"\xab" * 32,
    )


async def carried(peer: PeerDouble) -> RequestSignature:
    (call,) = peer.received
    value = call.metadata[METADATA]
    assert isinstance(value, bytes)
    return RequestSignature.FromString(value)


async def test_admin_call_carries_the_hash_of_its_body(edge: Edge, identity: PeerDouble) -> None:
    headers = {**SIGNED, "content-type": "application/json"}
    response = await edge.client.post(KEYS, content=BODY, headers=headers)
    assert response.status_code == 200, response.text
    assert await carried(identity) == signature_of("POST", KEYS, hashlib.sha256(BODY).digest())


async def test_path_and_query_are_told_as_they_arrived(edge: Edge, router: PeerDouble) -> None:
    path = "/v1/models?a=%20b&c=%2F"
    await edge.client.get(path, headers=SIGNED)
    assert await carried(router) == signature_of("GET", path, hashlib.sha256(b"").digest())


async def test_inference_carries_it_with_its_body(edge: Edge, router: PeerDouble) -> None:
    await edge.client.post(f"{CHAT}?trace=%20", content=b"{}", headers={**SIGNED, "content-type": "application/json"})
    (opened,) = [frame.open for batch in router.relayed for frame in batch.frames if frame.HasField("open")]
    assert opened.signature == signature_of("POST", f"{CHAT}?trace=%20", hashlib.sha256(b"{}").digest())
    assert opened.request.body == b"{}"


async def test_request_without_a_signature_carries_none(edge: Edge, identity: PeerDouble, router: PeerDouble) -> None:
    await edge.client.get(KEYS)
    (call,) = identity.received
    assert METADATA not in call.metadata
    await edge.client.post(CHAT, content=b"{}", headers={"content-type": "application/json"})
    (opened,) = [frame.open for batch in router.relayed for frame in batch.frames if frame.HasField("open")]
    assert not opened.HasField("signature")


async def test_signature_of_a_pipelined_request_is_not_the_next_ones(edge: Edge, identity: PeerDouble) -> None:
    head = b"GET %s HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\n" % KEYS.encode()
    signed = b"".join(f"{name}: {value}\r\n".encode() for name, value in SIGNED.items())
    await edge.exchange(head + signed + b"\r\n" + head + b"connection: close\r\n\r\n")
    with_signature, without = identity.received
    assert METADATA in with_signature.metadata
    assert METADATA not in without.metadata
