"""Signing secrets of API keys, and the judgement of requests that are signed with them; it never sees a request's body.

A signature is accepted once: its nonce is remembered in Redis for as long as its timestamp would be accepted. While
Redis is away nobody can tell whether a request is a repetition, so none that has to be signed is accepted.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag

from aiaas.type.v1.request_signature_pb2 import RequestSignature
from identity.api_keys import ApiKeys
from mesh.auth import Principal
from mesh.cache import Cache
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.request_signatures import sign
from mesh.sealing import Seal

if TYPE_CHECKING:
    from identity.stores import Store

logger = logging.getLogger(__name__)

_PREFIX = "aihs_"
_SECRET_BYTES = 32
_OFF_S = 300
# A timestamp may lie that far ahead and is accepted until it lies that far behind; clocks differ a little on top.
_REMEMBERED_S = 2 * _OFF_S + 60
_METHOD = re.compile(r"[A-Z]{1,16}")
_RAW_PATH = re.compile(r"/[!-~]{0,8191}")
_NONCE = re.compile(r"[!-~]{16,128}")
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class SigningSecret:
    """A key's signing secret, sealed."""

    api_key_id: str
    organization_id: str
    sealed_secret: bytes = field(repr=False)
    create_time: datetime


class RequestSigning:
    """The operations on signing secrets, and the judgement of signatures. Without a `cache` none is accepted."""

    def __init__(self, store: Store, clock: Clock, seal: Seal, api_keys: ApiKeys, cache: Cache | None) -> None:
        self._store = store
        self._clock = clock
        self._seal = seal
        self._api_keys = api_keys
        self._cache = cache

    async def create(self, caller: Principal, organization_id: str, api_key_id: str) -> tuple[str, datetime]:
        """Make a key's signing secret in the place of any that it has; gives its text, which exists nowhere else in
        clear, and when it was made.

        Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION for a key that is revoked.
        """
        text = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        now = self._clock.now()
        # It is seen as its owner sees it; after that only its being revoked can change what follows.
        await self._api_keys.get(caller, organization_id, api_key_id)
        async with self._store.transaction() as stored:
            key = await stored.api_keys.get(organization_id, api_key_id, lock=True)
            if key is None:
                raise PlatformError(Reason.NOT_FOUND)
            if key.revoke_time is not None:
                raise PlatformError(Reason.FAILED_PRECONDITION, description="The key is revoked.")
            sealed = self._seal.close(text.encode(), _bound_to(api_key_id))
            await stored.signing_secrets.put(SigningSecret(api_key_id, organization_id, sealed, now))
            await stored.revoke("api_key_id", api_key_id)
        return text, now

    async def delete(self, caller: Principal, organization_id: str, api_key_id: str) -> None:
        """Remove a key's signing secret; where there is none, nothing changes. Raises PlatformError(NOT_FOUND)."""
        await self._api_keys.get(caller, organization_id, api_key_id)
        async with self._store.transaction() as stored:
            await stored.signing_secrets.remove(organization_id, api_key_id)
            await stored.revoke("api_key_id", api_key_id)

    async def verify(self, api_key_id: str, signature: RequestSignature) -> None:
        """Accept a signature, once.

        Raises PlatformError: SIGNATURE_INVALID, whatever is wrong with it; AUTH_UNAVAILABLE while PostgreSQL or Redis
        is away.
        """
        if wrong := await self._what_is_wrong(api_key_id, signature):
            logger.info("a signature was refused", extra={"api_key_id": api_key_id, "why": wrong})
            raise PlatformError(Reason.SIGNATURE_INVALID)

    async def _what_is_wrong(self, api_key_id: str, signature: RequestSignature) -> str:
        if not _is_well_formed(signature):
            return "form"
        if abs(self._clock.now().timestamp() - signature.timestamp_s) > _OFF_S:
            return "timestamp"
        secret = await self._secret(api_key_id)
        if secret is None:
            return "no secret"
        if not hmac.compare_digest(sign(secret, signature), signature.signature):
            return "signature"
        # Only now, so that nobody else can use up a nonce.
        return "" if await self._is_new(api_key_id, signature.nonce) else "nonce"

    async def _secret(self, api_key_id: str) -> str | None:
        try:
            async with self._store.transaction(across=True) as stored:
                found = await stored.signing_secrets.get(api_key_id)
        except PlatformError as error:
            if error.reason in (Reason.UNAVAILABLE, Reason.DEADLINE_EXCEEDED):
                raise PlatformError(Reason.AUTH_UNAVAILABLE, retry_after_s=error.retry_after_s) from error
            raise
        if found is None:
            return None
        try:
            return self._seal.open(found.sealed_secret, _bound_to(api_key_id)).decode()
        except InvalidTag:
            logger.error("the signing secret of %s is sealed with another key, or to another API key", api_key_id)
            raise PlatformError(Reason.INTERNAL) from None

    async def _is_new(self, api_key_id: str, nonce: str) -> bool:
        if self._cache is None:
            raise PlatformError(Reason.AUTH_UNAVAILABLE)
        name = f"identity:nonce:{api_key_id}:{hashlib.sha256(nonce.encode()).hexdigest()}"
        try:
            return bool(await self._cache.call(lambda redis: redis.set(name, b"", nx=True, ex=_REMEMBERED_S)))
        except PlatformError as error:
            raise PlatformError(Reason.AUTH_UNAVAILABLE) from error


def _bound_to(api_key_id: str) -> str:
    return f"signing:{api_key_id}"


def _is_well_formed(signature: RequestSignature) -> bool:
    """Whether no field could stand for two things, as one that holds a line feed could."""
    return bool(
        _METHOD.fullmatch(signature.method)
        and _RAW_PATH.fullmatch(signature.raw_path)
        and _NONCE.fullmatch(signature.nonce)
        and len(signature.body_sha256) == _DIGEST_BYTES
        and len(signature.signature) == _DIGEST_BYTES
    )
