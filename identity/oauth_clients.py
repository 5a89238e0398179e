"""OAuth2 clients: registered, changed, recognised by their secret; it never gives one a token."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from authlib.oauth2.rfc6749 import InvalidClientError, InvalidRequestError
from authlib.oauth2.rfc6749.util import extract_basic_authorization

from identity import fields, roles
from identity.oauth import CLIENT_SECRET, OPENID_SCOPES, Parameters, is_scope, permissions_of
from identity.organizations import OrganizationState, existing
from mesh import tokens
from mesh.auth import Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.pages import TimePlace
from mesh.updates import check_etag

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

_NEVER = datetime.fromtimestamp(0, UTC)
_LONGEST_OVERLAP = timedelta(days=7)
_SCOPES = 100
_REDIRECT_URIS = 20
# Printable ASCII without what a browser, or a comparison by characters, might take for something else.
_REDIRECT_URI = re.compile(r"[a-z][a-z0-9+.-]*:[!$-;=?-\[\]_a-z~]{1,1000}", re.IGNORECASE)
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ClientKind(StrEnum):
    """Whether a client can keep a secret (RFC 6749, 2.1)."""

    CONFIDENTIAL = "confidential"
    PUBLIC = "public"


class GrantType(StrEnum):
    """A way to get tokens, by its name in requests."""

    AUTHORIZATION_CODE = "authorization_code"
    REFRESH_TOKEN = "refresh_token"  # noqa: S105 - a name
    CLIENT_CREDENTIALS = "client_credentials"


@dataclass(frozen=True, slots=True)
class OauthClient:
    """A program that asks for tokens."""

    oauth_client_id: str
    organization_id: str
    display_name: str
    kind: ClientKind
    redirect_uris: tuple[str, ...] = ()
    grant_types: tuple[GrantType, ...] = ()
    scopes: tuple[str, ...] = ()
    service_account_id: str = ""
    disabled: bool = False
    create_time: datetime = _NEVER
    update_time: datetime = _NEVER
    revision: int = field(default=1, compare=False)


@dataclass(frozen=True, slots=True)
class RegisteredClient:
    """A client and all that decides on whether it is accepted."""

    client: OauthClient
    digest: bytes | None = field(repr=False)
    previous_digest: bytes | None = field(repr=False)
    previous_expire_time: datetime | None
    organization_state: OrganizationState

    @property
    def is_accepted(self) -> bool:
        """Whether it may ask for anything."""
        return not self.client.disabled and self.organization_state is OrganizationState.ACTIVE


CHANGEABLE = ("display_name", "redirect_uris", "grant_types", "scopes", "service_account_id", "disabled")
"""What an update may change."""


class OauthClients:
    """The operations on clients."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def create(self, caller: Principal, wanted: OauthClient, request_id: str) -> tuple[OauthClient, str]:
        """Register a client of `wanted.organization_id`; gives it and its secret, empty for a public one.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, PERMISSION_DENIED for a service account that may do more than
        the caller, ALREADY_EXISTS for a `request_id` that has made one.
        """
        fields.check_request_id(request_id)
        _check(wanted)
        now = self._clock.now()
        client_id = new_id("client", clock=self._clock)
        new = replace(wanted, oauth_client_id=client_id, create_time=now, update_time=now)
        secret = CLIENT_SECRET.generate_for(client_id) if new.kind is ClientKind.CONFIDENTIAL else None
        async with self._store.transaction() as stored:
            await existing(stored, new.organization_id)
            if await stored.creations.claim(new.organization_id, "CreateOauthClient", request_id, client_id, now):
                raise PlatformError(
                    Reason.ALREADY_EXISTS,
                    field="request_id",
                    description="'request_id' has made a client already, and its secret cannot be shown twice.",
                )
            await _check_may_act_as(stored, caller, new)
            await stored.oauth_clients.add(new, secret.digest if secret else None)
        return new, secret.text if secret else ""

    async def get(self, organization_id: str, oauth_client_id: str) -> OauthClient:
        """One client. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            return await _existing(stored, organization_id, oauth_client_id)

    async def list(self, organization_id: str, after: TimePlace | None, limit: int) -> list[OauthClient]:
        """Up to `limit` clients that come after `after`."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            return await stored.oauth_clients.page(organization_id, after, limit)

    async def update(self, caller: Principal, wanted: OauthClient, changed: Collection[str], etag: str) -> OauthClient:
        """Change the fields `changed` of a client; one that is disabled loses its tokens.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, PERMISSION_DENIED, FAILED_PRECONDITION for another etag.
        """
        now = self._clock.now()
        async with self._store.transaction() as stored:
            current = await _existing(stored, wanted.organization_id, wanted.oauth_client_id, lock=True)
            check_etag(etag, current.revision, "oauth_client.etag")
            new = replace(current, **{name: getattr(wanted, name) for name in changed})
            if new == current:
                return current
            _check(new)
            await _check_may_act_as(stored, caller, new)
            if new.disabled and not current.disabled:
                await stored.oauth_tokens.revoke_of_client(new.oauth_client_id, now)
            # Its tokens belong to whoever; all of the organization's principals are asked for again.
            await stored.revoke("organization_id", new.organization_id)
            return await stored.oauth_clients.change(replace(new, update_time=now))

    async def delete(self, organization_id: str, oauth_client_id: str, etag: str) -> None:
        """Remove a client, and with it its tokens. Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION."""
        async with self._store.transaction() as stored:
            current = await _existing(stored, organization_id, oauth_client_id, lock=True)
            check_etag(etag, current.revision, "etag")
            await stored.revoke("organization_id", organization_id)
            await stored.oauth_clients.remove(organization_id, oauth_client_id)

    async def rotate(
        self, caller: Principal, organization_id: str, oauth_client_id: str, overlap: timedelta
    ) -> tuple[OauthClient, str]:
        """Give a confidential client a new secret; the one before is accepted for `overlap`, any older one no longer.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, PERMISSION_DENIED, FAILED_PRECONDITION for a public client.
        """
        if not timedelta(0) <= overlap <= _LONGEST_OVERLAP:
            raise fields.invalid("overlap", f"must be 0 to {_LONGEST_OVERLAP.days} days")
        now = self._clock.now()
        async with self._store.transaction() as stored:
            current = await _existing(stored, organization_id, oauth_client_id, lock=True)
            if current.kind is ClientKind.PUBLIC:
                raise PlatformError(Reason.FAILED_PRECONDITION, description="A public client has no secret.")
            await _check_may_act_as(stored, caller, current)
            secret = CLIENT_SECRET.generate_for(oauth_client_id)
            rotated = await stored.oauth_clients.rotate(current, secret.digest, now + overlap, now)
        return rotated, secret.text


async def authenticated_client(
    stored: Transaction, parameters: Parameters, authorization: str, now: datetime
) -> OauthClient:
    """The client that makes a request, locked against being disabled until the transaction ends.

    Confidential clients send their secret in the Authorization header or in the form, and not in both (RFC 6749, 2.3);
    public ones their id alone. Raises InvalidClientError (401), InvalidRequestError.
    """
    client_id, secret = parameters.get("client_id"), parameters.get("client_secret")
    if authorization:
        try:
            named, header_secret = extract_basic_authorization({"Authorization": authorization})
        except ValueError:
            named, header_secret = None, None
        if not named or not header_secret:
            raise _unknown_client()
        if secret or (client_id and client_id != named):
            raise InvalidRequestError("The client says in more than one way who it is.")
        client_id, secret = named, header_secret
    if not client_id:
        raise _unknown_client()
    found = await stored.oauth_clients.find(client_id, lock=True) if fields.is_id(client_id) else None
    if found is None or not found.is_accepted or not _is_secret_of(found, secret, now):
        raise _unknown_client()
    return found.client


def _is_secret_of(registered: RegisteredClient, secret: str, now: datetime) -> bool:
    if registered.digest is None:
        return not secret
    try:
        parsed = CLIENT_SECRET.parse(secret)
    except PlatformError:
        return False
    if parsed.id != registered.client.oauth_client_id:
        return False
    if tokens.matches(parsed, registered.digest):
        return True
    ends = registered.previous_expire_time
    return (
        registered.previous_digest is not None
        and ends is not None
        and tokens.matches(parsed, registered.previous_digest)
        and now < ends
    )


def _unknown_client() -> InvalidClientError:
    return InvalidClientError("The client is unknown, or it did not prove to be itself.", status_code=401)


async def _existing(
    stored: Transaction, organization_id: str, oauth_client_id: str, *, lock: bool = False
) -> OauthClient:
    found = await stored.oauth_clients.get(organization_id, oauth_client_id, lock=lock)
    if found is None:
        raise PlatformError(Reason.NOT_FOUND)
    return found


async def _check_may_act_as(stored: Transaction, caller: Principal, client: OauthClient) -> None:
    """Whoever has the secret can do what the service account can, within the scopes; so the caller has to hold that."""
    if not client.service_account_id:
        return
    name = "oauth_client.service_account_id"
    holder = await stored.holders.find(client.organization_id, client.service_account_id, "")
    if holder is None:
        raise fields.invalid(name, "names nobody in this organization")
    held = roles.held_through(holder.role_ids, holder.custom_permissions, client.organization_id)
    is_platforms = roles.PLATFORM_ADMIN in holder.role_ids and not caller.platform
    if is_platforms or (held & permissions_of(client.scopes)) - caller.permissions:
        raise PlatformError(
            Reason.PERMISSION_DENIED, field=name, description=f"'{name}' may do within the scopes what you may not."
        )


def _check(client: OauthClient) -> None:
    fields.check_display_name(client.display_name, "oauth_client.display_name")
    for name, most in (("redirect_uris", _REDIRECT_URIS), ("scopes", _SCOPES), ("grant_types", len(GrantType))):
        values = getattr(client, name)
        if len(values) > most:
            raise fields.invalid(f"oauth_client.{name}", f"may hold {most} values")
        fields.check_once(values, f"oauth_client.{name}")
    if not all(map(is_scope, client.scopes)):
        raise fields.invalid("oauth_client.scopes", "names a scope that does not exist")
    if not all(map(_is_redirect_uri, client.redirect_uris)):
        raise fields.invalid(
            "oauth_client.redirect_uris",
            "must hold whole https addresses, http ones of this machine, or ones of a scheme of the client's own with"
            " a dot, without a fragment",
        )
    if not client.grant_types:
        raise fields.invalid("oauth_client.grant_types", "must hold a way to get tokens")
    by_code = GrantType.AUTHORIZATION_CODE in client.grant_types
    if by_code != bool(client.redirect_uris):
        raise fields.invalid("oauth_client.redirect_uris", "belongs to the authorization code, and it to them")
    if GrantType.REFRESH_TOKEN in client.grant_types and not by_code:
        raise fields.invalid("oauth_client.grant_types", "must hold the authorization code for refresh tokens")
    as_itself = GrantType.CLIENT_CREDENTIALS in client.grant_types
    if as_itself and client.kind is ClientKind.PUBLIC:
        raise fields.invalid("oauth_client.grant_types", "must not hold client credentials for a public client")
    if as_itself != bool(client.service_account_id):
        raise fields.invalid("oauth_client.service_account_id", "belongs to client credentials, and they to it")
    if not by_code and any(scope in OPENID_SCOPES for scope in client.scopes):
        raise fields.invalid("oauth_client.scopes", "must not hold OpenID Connect's without the authorization code")


def _is_redirect_uri(text: str) -> bool:
    """RFC 9700, 2.1 and RFC 8252, 7: https, http to the same machine, or a private scheme named after a domain."""
    if not _REDIRECT_URI.fullmatch(text):
        return False
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    if parts.scheme in ("http", "https"):
        if not host or "@" in parts.netloc or not text.startswith(f"{parts.scheme}://"):
            return False
        return parts.scheme == "https" or host in _LOOPBACK
    return "." in parts.scheme
