"""Signing in at an issuer that an organization trusts: begun, and ended with a session; it never sets up an issuer.

A sign-in is kept here from its beginning to the browser's return, under digests of its state and of the browser's own
token, and can be ended once. A subject is somebody by (issuer, subject) from the first time on; the first time, it is
whoever has the address that the issuer has verified, among the organization's members.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar
from urllib.parse import urlencode

import msgspec
from cryptography.exceptions import InvalidTag

from identity import fields, roles
from identity.granted_roles import give
from identity.issuer_client import IssuerError
from identity.issuers import BegunSignIn, ClaimNames, IssuerUser
from identity.organizations import existing
from identity.throttles import ISSUER, Throttles
from identity.users import User, UserState
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.sealing import Seal
from mesh.tokens import digest_of

if TYPE_CHECKING:
    from identity.issuer_client import IssuerClient
    from identity.issuers import Issuer
    from identity.stores import Store, Transaction

S = TypeVar("S", covariant=True)

logger = logging.getLogger(__name__)

BEGUN_S = 600
"""How long a sign-in may take at the issuer."""

_OFFERS = 20
_PATH_LENGTH = 2048
_RANDOM_BYTES = 32
# A path on the edge: a second slash, or what browsers read as one, would begin the name of another host.
_PATH = re.compile(r"/(?:[!-.0-\[\]-~][!-\[\]-~]*)?")
_STANDARD = ClaimNames("email", "name", "groups")
# RFC 8176.
_MFA = "mfa"


class OpensSessions(Protocol[S]):
    """What starts a session, or asks for MFA before."""

    async def open(
        self, stored: Transaction, user_id: str, organization_id: str, *, multi_factor: bool, issuer_id: str
    ) -> S:
        """How the sign-in of a member whom an issuer vouches for goes on."""


class Federation(Generic[S]):
    """Sign-ins at issuers. `redirect_uri` is where issuers send browsers back to."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        client: IssuerClient,
        seal: Seal,
        sessions: OpensSessions[S],
        throttles: Throttles,
        redirect_uri: str,
    ) -> None:
        self._store = store
        self._clock = clock
        self._client = client
        self._seal = seal
        self._sessions = sessions
        self._throttles = throttles
        self._redirect_uri = redirect_uri

    async def offers(self, email: str) -> list[Issuer]:
        """The issuers to offer for an address, by its domain alone."""
        fields.check_email(email, "email")
        async with self._store.transaction() as stored:
            return await stored.issuers.offered(_domain(email), _OFFERS)

    async def begin(self, issuer_id: str, return_path: str) -> tuple[str, str]:
        """The issuer's address to send the browser to, and the token that only this browser gets.

        Raises PlatformError: INVALID_ARGUMENT, NOT_FOUND, RATE_LIMIT_EXCEEDED, UNAVAILABLE, FAILED_PRECONDITION for an
        issuer that answers wrongly.
        """
        await self._throttles.count(ISSUER, "")
        if len(return_path) > _PATH_LENGTH or not _PATH.fullmatch(return_path or "/"):
            raise fields.invalid("return_path", "must be a path")
        async with self._store.transaction() as stored:
            issuer = await stored.issuers.enabled(issuer_id)
        if issuer is None:
            raise PlatformError(Reason.NOT_FOUND)
        try:
            metadata = await self._client.metadata(issuer.issuer_url)
        except IssuerError as error:
            raise _as_platform_error(error, Reason.FAILED_PRECONDITION) from error
        state, browser_token, nonce, verifier = (secrets.token_urlsafe(_RANDOM_BYTES) for _ in range(4))
        state_digest, now = digest_of(state), self._clock.now()
        begun = BegunSignIn(
            state_digest=state_digest,
            browser_digest=digest_of(browser_token),
            organization_id=issuer.organization_id,
            issuer_id=issuer_id,
            secrets=self._seal.close(msgspec.json.encode((nonce, verifier)), state_digest.hex()),
            return_path=return_path or "/",
            expire_time=now + timedelta(seconds=BEGUN_S),
        )
        async with self._store.transaction() as stored:
            await stored.issuer_sign_ins.add(begun, now)
        query = urlencode(
            {
                "response_type": "code",
                "client_id": issuer.client_id,
                "redirect_uri": self._redirect_uri,
                "scope": " ".join(dict.fromkeys(("openid", *issuer.scopes))),
                "state": state,
                "nonce": nonce,
                "code_challenge": _challenge(verifier),
                "code_challenge_method": "S256",
            }
        )
        endpoint = metadata.authorization_endpoint
        return f"{endpoint}{'&' if '?' in endpoint else '?'}{query}", browser_token

    async def finish(self, parameters: Sequence[tuple[str, str]], browser_token: str) -> tuple[S, str]:
        """How the sign-in of whoever the issuer sent back with these parameters goes on, and where the browser does.

        Raises PlatformError: SIGN_IN_REFUSED, UNAVAILABLE while the issuer is away.
        """
        given = dict(parameters)
        if len(given) != len(parameters):
            raise refused("a parameter is repeated")
        state_digest = digest_of(given.get("state", ""))
        # It is used up by a transaction of its own, whatever comes after.
        async with self._store.transaction() as stored:
            begun = await stored.issuer_sign_ins.take(state_digest)
            issuer = None if begun is None else await stored.issuers.enabled(begun.issuer_id)
        if begun is None or begun.expire_time <= self._clock.now():
            raise refused("the state is unknown")
        if not hmac.compare_digest(begun.browser_digest, digest_of(browser_token)):
            raise refused("it is another browser")
        if issuer is None:
            raise refused("the issuer is gone or disabled")
        try:
            claims = await self._claims(issuer, begun, given)
        except IssuerError as error:
            logger.info("a sign-in was refused: %s", error.sentence, extra={"issuer_id": issuer.issuer_id})
            raise _as_platform_error(error, Reason.SIGN_IN_REFUSED) from error
        async with self._store.transaction() as stored:
            await existing(stored, issuer.organization_id, lock=True)
            # While the issuer was asked, nobody has changed what was asked of it.
            if await stored.issuers.enabled(issuer.issuer_id) != issuer:
                raise refused("the issuer has changed")
            user_id = await self._user_id(stored, issuer, claims)
            session = await self._sessions.open(
                stored,
                user_id,
                issuer.organization_id,
                multi_factor=issuer.trust_mfa and _MFA in _texts(claims.get("amr")),
                issuer_id=issuer.issuer_id,
            )
        return session, begun.return_path

    async def _claims(self, issuer: Issuer, begun: BegunSignIn, given: Mapping[str, str]) -> Mapping[str, Any]:
        metadata = await self._client.metadata(issuer.issuer_url)
        # RFC 9207: an answer says which issuer it is from.
        if given.get("iss", issuer.issuer_url) != issuer.issuer_url or (
            metadata.authorization_response_iss_parameter_supported and "iss" not in given
        ):
            raise IssuerError("The answer is another issuer's.")
        if "error" in given or not given.get("code"):
            raise IssuerError("The issuer did not sign you in.")
        try:
            nonce, verifier = msgspec.json.decode(
                self._seal.open(begun.secrets, begun.state_digest.hex()), type=tuple[str, str]
            )
            client_secret = ""
            if issuer.client_secret is not None:
                client_secret = self._seal.open(issuer.client_secret, issuer.issuer_id).decode()
        except InvalidTag:
            logger.error("the secrets of issuer %s are sealed with another key", issuer.issuer_id)
            raise IssuerError("The issuer's client secret cannot be read. Set it again.", away=True) from None
        id_token = await self._client.redeem(
            issuer.issuer_url, issuer.client_id, client_secret, given["code"], verifier, self._redirect_uri
        )
        return await self._client.claims(issuer.issuer_url, issuer.client_id, id_token, nonce, self._clock.now())

    async def _user_id(self, stored: Transaction, issuer: Issuer, claims: Mapping[str, Any]) -> str:
        """The member who a subject is, with the roles that its groups give. Raises PlatformError(SIGN_IN_REFUSED)."""
        names, now = issuer.claim_names, self._clock.now()
        email = _verified_email(claims, names)
        if issuer.email_domains and (email is None or _domain(email) not in issuer.email_domains):
            raise refused("the domain", "Your address is of no domain that this organization accepts.")
        known = await stored.issuer_users.get(issuer.organization_id, issuer.issuer_id, claims["sub"])
        member = await self._member(stored, issuer, claims, known, email)
        groups = _texts(claims.get(names.groups or _STANDARD.groups))
        given = () if known is None else known.role_ids
        member, given = await give(stored, member, given, issuer.rules.role_ids_for(groups), now)
        holder = await stored.holders.find(issuer.organization_id, "", member.user_id)
        if holder is None or not holder.acting:
            raise refused("the user is suspended")
        if issuer.withheld & roles.held_through(holder.role_ids, holder.custom_permissions, issuer.organization_id):
            raise refused(
                "the issuer may not vouch for so much",
                "You hold more than whoever set up this issuer did. Have one of the organization's owners save it.",
            )
        await stored.issuer_users.put(
            IssuerUser(issuer.organization_id, issuer.issuer_id, claims["sub"], member.user_id, given, now)
        )
        return member.user_id

    async def _member(
        self,
        stored: Transaction,
        issuer: Issuer,
        claims: Mapping[str, Any],
        known: IssuerUser | None,
        email: str | None,
    ) -> User:
        organization_id, now = issuer.organization_id, self._clock.now()
        if known is not None:
            member = await stored.users.get(organization_id, known.user_id)
        elif email is None:
            # Anybody could have written it there.
            raise refused("the address is not verified", "The issuer does not say that your address is verified.")
        else:
            member = next(iter(await stored.users.page(organization_id, None, 1, email, "")), None)
        if member is not None:
            return member
        if not issuer.create_users or email is None:
            raise refused("not a member", "You are not a member of this organization.")
        user_id, email, state = await stored.users.known_or_new(email, new_id("user", clock=self._clock), now)
        if (known is not None and known.user_id != user_id) or await stored.scim_users.get(organization_id, user_id):
            raise refused("the directory has deactivated the user", "You are not a member of this organization.")
        new = User(user_id, organization_id, email, _display_name(claims, issuer.claim_names), (), state, now, now)
        if state is not UserState.ACTIVE or not await stored.users.add_membership(new):
            raise refused("the user is suspended")
        return new


def refused(why: str, description: str | None = None) -> PlatformError:
    """The error for a sign-in that is not accepted; `why` is logged and not told."""
    logger.info("a sign-in was refused: %s", why)
    return PlatformError(Reason.SIGN_IN_REFUSED, description=description)


def _as_platform_error(error: IssuerError, otherwise: Reason) -> PlatformError:
    return PlatformError(Reason.UNAVAILABLE if error.away else otherwise, description=error.sentence)


def _challenge(verifier: str) -> str:
    """The S256 challenge of a PKCE verifier (RFC 7636, 4.2)."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")


def _domain(email: str) -> str:
    return email.rpartition("@")[2].lower()


def _verified_email(claims: Mapping[str, Any], names: ClaimNames) -> str | None:
    """The address, if the issuer says that it has verified this very claim; whatever is not plainly so, is not."""
    name = names.email or _STANDARD.email
    email = claims.get(name)
    if not isinstance(email, str) or claims.get(f"{name}_verified") is not True:
        return None
    try:
        fields.check_email(email, "email")
    except PlatformError:
        return None
    return email


def _display_name(claims: Mapping[str, Any], names: ClaimNames) -> str:
    name = claims.get(names.display_name or _STANDARD.display_name)
    try:
        fields.check_display_name(name if isinstance(name, str) else "", "display_name", required=False)
    except PlatformError:
        return ""
    return name if isinstance(name, str) else ""


def _texts(claim: Any) -> frozenset[str]:
    """The texts of a claim that is a list of them, or one."""
    values = claim if isinstance(claim, list) else [claim]
    return frozenset(value for value in values if isinstance(value, str))
