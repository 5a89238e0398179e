"""The OpenID Connect issuers that organizations trust: set up, changed, checked; it never signs anybody in.

Whoever can say who somebody is can act as them. So an issuer vouches for nobody who holds what the one who set it up
did not hold: `withheld` says what that was.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from identity import fields, roles
from identity.granted_roles import NO_RULES, RoleRules, check_rules
from identity.organizations import existing
from mesh.addresses import wrong_with
from mesh.auth import Principal
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.pages import TimePlace
from mesh.sealing import Seal
from mesh.updates import check_etag

if TYPE_CHECKING:
    from identity.issuer_client import IssuerClient
    from identity.stores import Store, Transaction

_NEVER = datetime.fromtimestamp(0, UTC)
_ISSUERS_PER_ORGANIZATION = 20
_LIST_LENGTH = 50
_SECRET_LENGTH = 2048
_CLIENT_ID = re.compile(r"[ -~]{1,255}")
# RFC 6749, 3.3.
_SCOPE = re.compile(r"[!#-\[\]-~]{1,128}")
_CLAIM = re.compile(r"[ -~]{0,128}")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})+")


@dataclass(frozen=True, slots=True)
class ClaimNames:
    """Where things stand in an issuer's tokens; an empty name means the standard's."""

    email: str = ""
    display_name: str = ""
    groups: str = ""


@dataclass(frozen=True, slots=True)
class Issuer:
    """An issuer that an organization trusts. `client_secret` is sealed, None for a client without one."""

    issuer_id: str
    organization_id: str
    display_name: str
    issuer_url: str
    client_id: str
    client_secret: bytes | None = field(default=None, repr=False)
    scopes: tuple[str, ...] = ()
    email_domains: tuple[str, ...] = ()
    claim_names: ClaimNames = ClaimNames()
    rules: RoleRules = NO_RULES
    withheld: frozenset[str] = frozenset()
    create_users: bool = False
    trust_mfa: bool = False
    disabled: bool = False
    create_time: datetime = _NEVER
    update_time: datetime = _NEVER
    revision: int = field(default=1, compare=False)


@dataclass(frozen=True, slots=True)
class IssuerUser:
    """Who a subject is, and the roles that the issuer gave."""

    organization_id: str
    issuer_id: str
    subject: str
    user_id: str
    role_ids: tuple[str, ...]
    create_time: datetime


@dataclass(frozen=True, slots=True)
class BegunSignIn:
    """A sign-in at an issuer that has begun."""

    state_digest: bytes = field(repr=False)
    browser_digest: bytes = field(repr=False)
    organization_id: str
    issuer_id: str
    secrets: bytes = field(repr=False)
    return_path: str
    expire_time: datetime


CHANGEABLE = (
    *("display_name", "issuer_url", "client_id", "client_secret", "scopes", "email_domains", "claim_names"),
    *("group_roles", "default_role_ids", "create_users", "trust_mfa", "disabled"),
)
"""What an update may change."""


class Issuers:
    """The operations on issuers."""

    def __init__(self, store: Store, clock: Clock, client: IssuerClient, seal: Seal, *, allow_private: bool) -> None:
        self._store = store
        self._clock = clock
        self._client = client
        self._seal = seal
        self._allow_private = allow_private

    async def create(self, caller: Principal, wanted: Issuer, client_secret: str, request_id: str) -> Issuer:
        """Add an issuer; a repeat with the same `request_id` gives the first one.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, PERMISSION_DENIED, FAILED_PRECONDITION.
        """
        fields.check_request_id(request_id)
        self._check(wanted, client_secret)
        now = self._clock.now()
        issuer_id, organization_id = new_id("iss", clock=self._clock), wanted.organization_id
        new = replace(
            wanted,
            issuer_id=issuer_id,
            client_secret=self._sealed(issuer_id, client_secret),
            withheld=_withheld(caller, organization_id),
            create_time=now,
            update_time=now,
        )
        async with self._store.transaction() as stored:
            await existing(stored, organization_id, lock=True)
            if first := await stored.creations.claim(organization_id, "CreateIssuer", request_id, issuer_id, now):
                return await self._existing(stored, organization_id, first)
            if len(await stored.issuers.page(organization_id, None, _ISSUERS_PER_ORGANIZATION)) >= (
                _ISSUERS_PER_ORGANIZATION
            ):
                raise PlatformError(
                    Reason.FAILED_PRECONDITION,
                    description=f"An organization has at most {_ISSUERS_PER_ORGANIZATION} issuers.",
                )
            await check_rules(stored, caller, organization_id, new.rules, NO_RULES, "issuer")
            await stored.issuers.add(new)
        return new

    async def get(self, organization_id: str, issuer_id: str) -> Issuer:
        """One issuer. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            return await self._existing(stored, organization_id, issuer_id)

    async def problems(self, organization_id: str, issuer_id: str) -> list[str]:
        """What keeps people from signing in through an issuer, a sentence each. Raises PlatformError(NOT_FOUND)."""
        issuer = await self.get(organization_id, issuer_id)
        problems = ["The issuer is disabled."] if issuer.disabled else []
        return problems + await self._client.problems(issuer.issuer_url)

    async def list(self, organization_id: str, after: TimePlace | None, limit: int) -> list[Issuer]:
        """Up to `limit` issuers that come after `after`, oldest first."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            return await stored.issuers.page(organization_id, after, limit)

    async def update(
        self, caller: Principal, wanted: Issuer, client_secret: str, changed: Collection[str], etag: str
    ) -> Issuer:
        """Change the fields `changed` of an issuer to the values of `wanted`, and `client_secret` if it is among them.

        Disabling it, or having it be another issuer, ends the sessions that came from it. Raises PlatformError:
        NOT_FOUND, INVALID_ARGUMENT, PERMISSION_DENIED, FAILED_PRECONDITION for another etag.
        """
        organization_id, issuer_id = wanted.organization_id, wanted.issuer_id
        async with self._store.transaction() as stored:
            await existing(stored, organization_id, lock=True)
            current = await self._existing(stored, organization_id, issuer_id)
            check_etag(etag, current.revision, "issuer.etag")
            new = _changed(current, wanted, changed)
            self._check(new, client_secret)
            if current.client_secret and new.issuer_url != current.issuer_url and "client_secret" not in changed:
                # It would be told to whom nobody gave it.
                raise fields.invalid("issuer.client_secret", "has to be given again with another issuer_url")
            if "client_secret" in changed:
                new = replace(new, client_secret=self._sealed(issuer_id, client_secret))
            if new == current:
                return current
            await check_rules(stored, caller, organization_id, new.rules, current.rules, "issuer")
            if set(changed) - {"display_name"}:
                new = replace(new, withheld=_withheld(caller, organization_id))
            updated = await stored.issuers.change(replace(new, update_time=self._clock.now()))
            if new.issuer_url != current.issuer_url:
                await stored.issuer_users.remove_of_issuer(organization_id, issuer_id)
            if new.issuer_url != current.issuer_url or (new.disabled and not current.disabled):
                await self._end_sessions(stored, organization_id, issuer_id)
        self._client.forget(current.issuer_url)
        return updated

    async def delete(self, organization_id: str, issuer_id: str, etag: str) -> None:
        """Remove an issuer and end the sessions that came from it. Raises PlatformError: NOT_FOUND,
        FAILED_PRECONDITION for another etag."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id, lock=True)
            current = await self._existing(stored, organization_id, issuer_id)
            check_etag(etag, current.revision, "etag")
            await self._end_sessions(stored, organization_id, issuer_id)
            await stored.issuers.remove(organization_id, issuer_id)

    async def _existing(self, stored: Transaction, organization_id: str, issuer_id: str) -> Issuer:
        issuer = await stored.issuers.get(organization_id, issuer_id)
        if issuer is None:
            raise PlatformError(Reason.NOT_FOUND)
        return issuer

    async def _end_sessions(self, stored: Transaction, organization_id: str, issuer_id: str) -> None:
        for user_id in await stored.issuer_users.user_ids(organization_id, issuer_id):
            await stored.sessions.end(user_id, self._clock.now(), organization_id=organization_id, issuer_id=issuer_id)
            await stored.revoke("user_id", user_id)

    def _sealed(self, issuer_id: str, client_secret: str) -> bytes | None:
        return self._seal.close(client_secret.encode(), issuer_id) if client_secret else None

    def _check(self, issuer: Issuer, client_secret: str) -> None:
        fields.check_all(
            lambda: fields.check_display_name(issuer.display_name, "issuer.display_name"),
            lambda: self._check_url(issuer),
            lambda: fields.require(
                _CLIENT_ID.fullmatch(issuer.client_id) is not None,
                "issuer.client_id",
                "must have 1 to 255 printable ASCII characters",
            ),
            lambda: fields.require(
                len(client_secret) <= _SECRET_LENGTH and client_secret.isascii() and client_secret.isprintable(),
                "issuer.client_secret",
                f"must have at most {_SECRET_LENGTH} printable ASCII characters",
            ),
            lambda: _check_texts(issuer.scopes, _SCOPE, "issuer.scopes", "must hold scopes of OAuth 2.0, at most 50"),
            lambda: _check_texts(
                issuer.email_domains, _DOMAIN, "issuer.email_domains", "must hold domains in lower case, at most 50"
            ),
        )
        for name in ClaimNames.__slots__:
            if not _CLAIM.fullmatch(getattr(issuer.claim_names, name)):
                raise fields.invalid(f"issuer.claim_names.{name}", "must have at most 128 printable ASCII characters")

    def _check_url(self, issuer: Issuer) -> None:
        if wrong := wrong_with(issuer.issuer_url, allow_private=self._allow_private):
            raise fields.invalid("issuer.issuer_url", wrong)
        if urlsplit(issuer.issuer_url).query:
            # OpenID Connect Discovery 1.0, 3.
            raise fields.invalid("issuer.issuer_url", "must hold no query")


def _check_texts(values: Sequence[str], form: re.Pattern[str], field_name: str, rule: str) -> None:
    fields.check_once(values, field_name)
    if len(values) > _LIST_LENGTH or not all(form.fullmatch(value) for value in values):
        raise fields.invalid(field_name, rule)


def _changed(current: Issuer, wanted: Issuer, changed: Collection[str]) -> Issuer:
    """The issuer with the changed fields, but for its secret."""
    rules = replace(
        current.rules,
        **{name: getattr(wanted.rules, name) for name in ("group_roles", "default_role_ids") if name in changed},
    )
    apart = {"group_roles", "default_role_ids", "client_secret"}
    return replace(current, rules=rules, **{name: getattr(wanted, name) for name in changed if name not in apart})


def _withheld(caller: Principal, organization_id: str) -> frozenset[str]:
    every = roles.TENANT_PERMISSIONS
    if organization_id == roles.PLATFORM_ORGANIZATION_ID:
        every = roles.ALL_PERMISSIONS
    return every - caller.permissions
