"""Signed requests: what is signed, and how a signature travels from the edge to whoever knows its principal and has it
judged; it never keeps a secret.

A client signs with HMAC-SHA-256, the bytes of the secret's text being the key, six lines that are joined by line feeds:

    v1
    <seconds since 1970>
    <nonce, 16 to 128 printable ASCII characters without spaces>
    <method>
    <path and query as they are sent>
    <SHA-256 of the body in lower-case hex>

and sends the headers X-Signature-Timestamp, X-Signature-Nonce and X-Signature (v1= and the HMAC in hex).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import grpc
from google.protobuf.message import DecodeError

from aiaas.identity.v1 import request_signing_service_pb2
from aiaas.type.v1.request_signature_pb2 import RequestSignature
from mesh.auth import Principal
from mesh.errors import PlatformError, Reason, from_rpc_error

if TYPE_CHECKING:
    from aiaas.identity.v1.request_signing_service_pb2_grpc import RequestSigningServiceStub

METADATA = "request-signature-bin"
"""Where a call carries a signature on."""

HEADER = b"x-signature"
"""The header that a signed request has."""

_TIMESTAMP, _NONCE = b"x-signature-timestamp", b"x-signature-nonce"
_is_signature = re.compile(rb"v1=([0-9a-f]{64})").fullmatch
_is_timestamp = re.compile(rb"[0-9]{1,12}").fullmatch
_is_nonce = re.compile(rb"[!-~]{16,128}").fullmatch
_VERIFY_TIMEOUT_S = 2.0


class SignatureVerifier(Protocol):
    """Judges signatures."""

    async def verify(self, api_key_id: str, signature: RequestSignature) -> None:
        """Accept a signature, once.

        Raises PlatformError: SIGNATURE_INVALID, AUTH_UNAVAILABLE when nobody could judge it.
        """


class RemoteVerifier:
    """Asks identity."""

    def __init__(self, stub: RequestSigningServiceStub) -> None:
        self._stub = stub

    async def verify(self, api_key_id: str, signature: RequestSignature) -> None:
        """Accept a signature; raises the error that identity raised, AUTH_UNAVAILABLE while it is away."""
        request = request_signing_service_pb2.VerifyRequestSignatureRequest(
            api_key_id=api_key_id,
            method=signature.method,
            raw_path=signature.raw_path,
            body_sha256=signature.body_sha256,
            timestamp_s=signature.timestamp_s,
            nonce=signature.nonce,
            signature=signature.signature,
        )
        try:
            await self._stub.VerifyRequestSignature(request, timeout=_VERIFY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            known = from_rpc_error(error)
            if known.reason is Reason.SIGNATURE_INVALID:
                raise known from None
            raise PlatformError(Reason.AUTH_UNAVAILABLE, retry_after_s=known.retry_after_s) from error


async def check(principal: Principal, signature: RequestSignature | None, verifier: SignatureVerifier | None) -> None:
    """Hold a request to its principal: one that needs a signature has to have a right one.

    Raises PlatformError: SIGNATURE_INVALID, AUTH_UNAVAILABLE, also where there is no verifier.
    """
    if not principal.signature_required:
        return
    if signature is None:
        raise PlatformError(Reason.SIGNATURE_INVALID)
    if verifier is None:
        raise PlatformError(Reason.AUTH_UNAVAILABLE)
    await verifier.verify(principal.api_key_id, signature)


def sign(secret: str, signature: RequestSignature) -> bytes:
    """The HMAC of what `signature` holds besides it, 32 bytes."""
    lines = (
        "v1",
        str(signature.timestamp_s),
        signature.nonce,
        signature.method,
        signature.raw_path,
        signature.body_sha256.hex(),
    )
    return hmac.digest(secret.encode(), "\n".join(lines).encode(), hashlib.sha256)


def from_headers(headers: Mapping[bytes, bytes], method: str, raw_path: bytes) -> RequestSignature | None:
    """The signature in the headers of a request, without the body's hash; None where there is none that could be right.

    `headers` have lower-case names, `raw_path` is path and query as they arrived.
    """
    signature = _is_signature(headers.get(HEADER, b""))
    timestamp = _is_timestamp(headers.get(_TIMESTAMP, b""))
    nonce = _is_nonce(headers.get(_NONCE, b""))
    if not (signature and timestamp and nonce and raw_path.isascii()):
        return None
    return RequestSignature(
        method=method,
        raw_path=raw_path.decode("ascii"),
        timestamp_s=int(timestamp[0]),
        nonce=nonce[0].decode("ascii"),
        signature=bytes.fromhex(signature[1].decode("ascii")),
    )


def from_metadata(value: bytes) -> RequestSignature | None:
    """The signature that a call carries; None where there is none."""
    if not value:
        return None
    try:
        return RequestSignature.FromString(value)
    except DecodeError:
        return None
