"""Signing in and out with a browser: a password, a second factor, an issuer; identity decides on each step.

Between the steps a browser keeps what identity gave it in cookies of its own, so that no address and no page holds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

from aiaas.identity.v1 import (
    auth_service_pb2,
    auth_service_pb2_grpc,
    federation_service_pb2,
    federation_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
)
from edge.browser import SESSION_COOKIE, cookie, cookie_header, forget, session_token
from edge.exchange import Exchange, Headers
from edge.forms import read_query
from edge.peers import Peer
from edge.sign_in import pages
from edge.sign_in.page import Page, Values
from mesh.errors import PlatformError, Reason

SIGN_IN_PATH = "/sign-in"
"""Where people sign in."""

_MFA_PATH = f"{SIGN_IN_PATH}/mfa"
_CHALLENGE_COOKIE = "__Host-aiaas_challenge"
_ISSUER_COOKIE = "__Host-aiaas_issuer"
# Longer than identity lets either last.
_STEP_S = 900
_TIMEOUT_S = 15.0
# An issuer is asked meanwhile.
_ISSUER_TIMEOUT_S = 30.0
_GONE = frozenset({Reason.API_KEY_INVALID, Reason.MISSING_CREDENTIALS})
_NOTICES: Mapping[str, str] = {
    "signed-out": "You are signed out.",
    "password-set": "Your new password is set. Sign in with it.",
    "invite-accepted": "You have joined. Sign in to begin.",
    "sign-in-needed": "Sign in to go on.",
    "sign-in-again": "Sign in once more to go on.",
}


def sign_in_address(return_path: str = "", email: str = "", organization_id: str = "", notice: str = "") -> str:
    """The address of the sign-in page, which goes on to `return_path`; `notice` names what it says above the form."""
    told = {"return_path": return_path, "email": email, "organization_id": organization_id, "notice": notice}
    query = urlencode({name: value for name, value in told.items() if value})
    return f"{SIGN_IN_PATH}?{query}" if query else SIGN_IN_PATH


class SigningIn:
    """The pages from nobody to a session and back."""

    def __init__(self, identity: Peer) -> None:
        self._identity = identity
        self._auth = auth_service_pb2_grpc.AuthServiceStub(identity.channel)
        self._sessions = session_service_pb2_grpc.SessionServiceStub(identity.channel)
        self._federation = federation_service_pb2_grpc.FederationServiceStub(identity.channel)

    def pages(self) -> Iterable[tuple[str, Page]]:
        """What is served, by path."""
        for path, to_visit, to_form in (
            (pages.HOME, self.home, None),
            (SIGN_IN_PATH, self.ask, self.sign_in),
            (_MFA_PATH, self.ask_mfa, self.verify_mfa),
            (f"{SIGN_IN_PATH}/issuer/{{issuer_id}}/begin", self.begin_at_issuer, None),
            (f"{SIGN_IN_PATH}/issuer", self.finish_at_issuer, None),
            ("/sign-out", None, self.sign_out),
        ):
            yield path, Page(path, to_visit, to_form)

    async def home(self, exchange: Exchange, query: Values) -> None:
        """Tell who is signed in, and where."""
        token = session_token(exchange)
        if not token:
            await pages.redirect(exchange, SIGN_IN_PATH)
            return
        exchange.use_credential(token)
        try:
            told = await self._identity.call(
                self._auth.GetCurrentPrincipal, auth_service_pb2.GetCurrentPrincipalRequest(), _TIMEOUT_S
            )
        except PlatformError as error:
            if error.reason not in _GONE:
                raise
            await pages.redirect(exchange, SIGN_IN_PATH, [forget(SESSION_COOKIE)])
            return
        await pages.show(
            exchange,
            "home",
            who=" - ".join(filter(None, (told.display_name, told.email))) or told.principal.principal_id,
            organization=told.organization_display_name or told.principal.organization_id,
            mfa_enrollment_needed=told.mfa_enrollment_needed,
        )

    async def ask(self, exchange: Exchange, query: Values) -> None:
        """Ask for an address and a password."""
        await pages.show(exchange, "sign_in", **_asked(query, notice=_NOTICES.get(query.get("notice", ""), "")))

    async def sign_in(self, exchange: Exchange, form: Values) -> None:
        """Sign in with a password, or offer the issuers of the address."""
        try:
            if form.get("find") == "issuers":
                await self._offer_issuers(exchange, form)
                return
            request = session_service_pb2.CreateSessionRequest(
                email=form.get("email", ""),
                password=form.get("password", ""),
                organization_id=form.get("organization_id", ""),
            )
            answer = await self._identity.call(self._sessions.CreateSession, request, _TIMEOUT_S)
        except PlatformError as error:
            await pages.show_again(exchange, "sign_in", error, **_asked(form))
            return
        await self._go_on(exchange, answer.sign_in, pages.local_path(form.get("return_path", "")))

    async def ask_mfa(self, exchange: Exchange, query: Values) -> None:
        """Ask for the second factor."""
        return_path = pages.local_path(query.get("return_path", ""))
        if not cookie(exchange, _CHALLENGE_COOKIE):
            await pages.redirect(exchange, sign_in_address(return_path))
            return
        await pages.show(exchange, "mfa", return_path=return_path, is_recovery=False)

    async def verify_mfa(self, exchange: Exchange, form: Values) -> None:
        """Sign in with a second factor."""
        return_path = pages.local_path(form.get("return_path", ""))
        request = session_service_pb2.VerifyMfaRequest(challenge_token=cookie(exchange, _CHALLENGE_COOKIE))
        is_recovery = "recovery_code" in form
        if is_recovery:
            request.recovery_code = form["recovery_code"].strip()
        else:
            request.totp_code = form.get("totp_code", "").replace(" ", "")
        try:
            answer = await self._identity.call(self._sessions.VerifyMfa, request, _TIMEOUT_S)
        except PlatformError as error:
            if error.reason is Reason.SIGN_IN_REFUSED:
                # The challenge is over, and no code would be right any more.
                headers = [forget(_CHALLENGE_COOKIE)]
                await pages.show_again(exchange, "sign_in", error, headers, **_asked({"return_path": return_path}))
            else:
                await pages.show_again(exchange, "mfa", error, return_path=return_path, is_recovery=is_recovery)
            return
        signed_in = session_service_pb2.SignedIn(session=answer.session, session_token=answer.session_token)
        await self._open(exchange, signed_in, return_path)

    async def begin_at_issuer(self, exchange: Exchange, query: Values) -> None:
        """Send the browser to an issuer."""
        request = federation_service_pb2.BeginSignInRequest(
            issuer_id=exchange.scope["path_params"]["issuer_id"],
            return_path=pages.local_path(query.get("return_path", "")),
        )
        begun = await self._identity.call(self._federation.BeginSignIn, request, _ISSUER_TIMEOUT_S)
        kept = cookie_header(_ISSUER_COOKIE, begun.browser_token, _STEP_S)
        await pages.redirect(exchange, begun.redirect_uri, [kept])

    async def finish_at_issuer(self, exchange: Exchange, query: Values) -> None:
        """Sign in with what an issuer sent the browser back with."""
        request = federation_service_pb2.FinishSignInRequest(browser_token=cookie(exchange, _ISSUER_COOKIE))
        for name, value in read_query(exchange):
            request.parameters.add(name=name, value=value)
        forgotten = forget(_ISSUER_COOKIE)
        try:
            answer = await self._identity.call(self._federation.FinishSignIn, request, _ISSUER_TIMEOUT_S)
        except PlatformError as error:
            await pages.show_again(exchange, "sign_in", error, [forgotten], **_asked({}))
            return
        await self._go_on(exchange, answer.sign_in, pages.local_path(answer.return_path), [forgotten])

    async def sign_out(self, exchange: Exchange, form: Values) -> None:
        """End the session; one that cannot be ended now is not forgotten either."""
        if token := session_token(exchange):
            exchange.use_credential(token)
            request = session_service_pb2.DeleteSessionRequest(session_id="current")
            try:
                await self._identity.call(self._sessions.DeleteSession, request, _TIMEOUT_S)
            except PlatformError as error:
                if error.reason not in _GONE:
                    raise
        await pages.redirect(exchange, sign_in_address(notice="signed-out"), [forget(SESSION_COOKIE)])

    async def _offer_issuers(self, exchange: Exchange, form: Values) -> None:
        request = federation_service_pb2.FindIssuersRequest(email=form.get("email", ""))
        answer = await self._identity.call(self._federation.FindIssuers, request, _TIMEOUT_S)
        notice = "" if answer.offers else "There is no organization to sign in through for this address."
        await pages.show(exchange, "sign_in", **_asked(form, offers=answer.offers, notice=notice))

    async def _go_on(
        self, exchange: Exchange, sign_in: session_service_pb2.SignIn, return_path: str, headers: Headers = ()
    ) -> None:
        """Open the session, or ask for the second factor before."""
        if sign_in.WhichOneof("step") == "signed_in":
            await self._open(exchange, sign_in.signed_in, return_path, headers)
            return
        kept = cookie_header(_CHALLENGE_COOKIE, sign_in.mfa_challenge.challenge_token, _STEP_S)
        await pages.redirect(exchange, f"{_MFA_PATH}?{urlencode({'return_path': return_path})}", [*headers, kept])

    async def _open(
        self, exchange: Exchange, signed_in: session_service_pb2.SignedIn, return_path: str, headers: Headers = ()
    ) -> None:
        """Give the browser its session, in place of the one that it had (ASVS 5.0, 7.2.4)."""
        if token := session_token(exchange):
            exchange.use_credential(token)
            request = session_service_pb2.DeleteSessionRequest(session_id="current")
            # It was over already, or ends by itself.
            with suppress(PlatformError):
                await self._identity.call(self._sessions.DeleteSession, request, _TIMEOUT_S)
        # Nothing but setting up MFA would be answered.
        target = pages.HOME if signed_in.session.mfa_enrollment_needed else return_path
        given = cookie_header(SESSION_COOKIE, signed_in.session_token)
        await pages.go_on(exchange, target, [*headers, given, forget(_CHALLENGE_COOKIE)])


def _asked(
    values: Values, offers: Iterable[federation_service_pb2.IssuerOffer] = (), notice: str = ""
) -> dict[str, Any]:
    """What the sign-in page shows; never the password."""
    return {
        "email": values.get("email", ""),
        "organization_id": values.get("organization_id", ""),
        "return_path": pages.local_path(values.get("return_path", "")),
        "offers": list(offers),
        "notice": notice,
    }
