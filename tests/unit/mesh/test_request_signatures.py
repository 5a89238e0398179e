"""What a signature is over, how it is read from headers, and that whoever needs one is not let in without."""

import hashlib
import hmac

import pytest

from aiaas.type.v1.request_signature_pb2 import RequestSignature
from mesh.errors import PlatformError, Reason
from mesh.request_signatures import check, from_headers, from_metadata, sign
from tests.doubles.principals import principal

HEADERS = {
    b"x-signature": b"v1=" + b"ab" * 32,
    b"x-signature-timestamp": b"1790000000",
    b"x-signature-nonce": b"nonce-0123456789",
}


class Accepting:
    """Accepts everything, and remembers it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, RequestSignature]] = []

    async def verify(self, api_key_id: str, signature: RequestSignature) -> None:
        self.asked.append((api_key_id, signature))


def test_what_is_signed_is_six_lines() -> None:
    signature = RequestSignature(
        method="POST",
        raw_path="/v1/chat/completions?x=%20",
        body_sha256=hashlib.sha256(b"{}").digest(),
        timestamp_s=1790000000,
        nonce="nonce-0123456789",
    )
    lines = (
        b"v1\n1790000000\nnonce-0123456789\nPOST\n/v1/chat/completions?x=%20\n"
        b"44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    )
    assert sign("aihs_secret", signature) == hmac.digest(b"aihs_secret", lines, hashlib.sha256)


def test_headers_are_read() -> None:
    assert from_headers(HEADERS, "POST", b"/v1/x?y") == RequestSignature(
        method="POST",
        raw_path="/v1/x?y",
        timestamp_s=1790000000,
        nonce="nonce-0123456789",
        signature=b"\xab" * 32,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"x-signature", b""),
        (b"x-signature", b"ab" * 32),
        (b"x-signature", b"v1=" + b"ab" * 31),
        (b"x-signature", b"v1=" + b"AB" * 32),
        (b"x-signature", b"v2=" + b"ab" * 32),
        (b"x-signature-timestamp", b""),
        (b"x-signature-timestamp", b"-1"),
        (b"x-signature-timestamp", b"1790000000.5"),
        (b"x-signature-timestamp", b"9" * 30),
        (b"x-signature-nonce", b""),
        (b"x-signature-nonce", b"short"),
        (b"x-signature-nonce", b"with a space in it"),
        (b"x-signature-nonce", b"n" * 129),
        (b"x-signature-nonce", b"nonce\xff0123456789"),
    ],
)
def test_headers_of_another_form_are_no_signature(name: bytes, value: bytes) -> None:
    assert from_headers(HEADERS | {name: value}, "POST", b"/v1/x") is None


def test_metadata_of_another_form_is_no_signature() -> None:
    signature = from_headers(HEADERS, "POST", b"/v1/x")
    assert signature is not None
    assert from_metadata(signature.SerializeToString()) == signature
    assert from_metadata(b"") is None
    assert from_metadata(b"\xff") is None


async def test_only_who_needs_a_signature_is_asked_for_one() -> None:
    verifier = Accepting()
    signature = from_headers(HEADERS, "POST", b"/v1/x")
    await check(principal(), None, verifier)
    await check(principal(), signature, verifier)
    await check(principal(), signature, None)
    assert verifier.asked == []
    needing = principal(signature_required=True)
    with pytest.raises(PlatformError) as raised:
        await check(needing, None, verifier)
    assert raised.value.reason is Reason.SIGNATURE_INVALID
    with pytest.raises(PlatformError) as raised:
        await check(needing, signature, None)
    assert raised.value.reason is Reason.AUTH_UNAVAILABLE
    await check(needing, signature, verifier)
    assert verifier.asked == [(needing.api_key_id, signature)]
