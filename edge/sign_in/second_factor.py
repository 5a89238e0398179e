"""Setting up an authenticator app, for somebody who is signed in; what it takes is identity's to say.

The secret is shown once, as text and as a link that an app on the same device opens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiaas.identity.v1 import mfa_service_pb2, mfa_service_pb2_grpc
from edge.browser import session_token
from edge.exchange import Exchange
from edge.peers import Peer
from edge.sign_in import pages
from edge.sign_in.page import Page, Values
from edge.sign_in.signing_in import sign_in_address
from mesh.errors import PlatformError, Reason

_PATH = "/account/authenticator"
_TIMEOUT_S = 15.0


class SecondFactor:
    """The pages of an authenticator."""

    def __init__(self, identity: Peer) -> None:
        self._identity = identity
        self._mfa = mfa_service_pb2_grpc.MfaServiceStub(identity.channel)

    def pages(self) -> Iterable[tuple[str, Page]]:
        """What is served, by path."""
        for path, to_visit, to_form in ((_PATH, self.ask, self.enroll), (f"{_PATH}/confirm", None, self.confirm)):
            yield path, Page(path, to_visit, to_form)

    async def ask(self, exchange: Exchange, query: Values) -> None:
        """Ask for what proves that it is still the same person."""
        if await _is_somebody(exchange):
            await pages.show(exchange, "authenticator")

    async def enroll(self, exchange: Exchange, form: Values) -> None:
        """Show a new secret."""
        if not await _is_somebody(exchange):
            return
        request = mfa_service_pb2.EnrollTotpRequest(password=form.get("password", ""))
        if code := form.get("totp_code", "").replace(" ", ""):
            request.totp_code = code
        try:
            made = await self._identity.call(self._mfa.EnrollTotp, request, _TIMEOUT_S)
        except PlatformError as error:
            await _show_again(exchange, "authenticator", error)
            return
        await pages.show(exchange, "authenticator_confirm", secret=made.secret, otpauth_uri=made.otpauth_uri)

    async def confirm(self, exchange: Exchange, form: Values) -> None:
        """Take the secret into use, and show the recovery codes."""
        if not await _is_somebody(exchange):
            return
        request = mfa_service_pb2.ConfirmTotpRequest(totp_code=form.get("totp_code", "").replace(" ", ""))
        try:
            done = await self._identity.call(self._mfa.ConfirmTotp, request, _TIMEOUT_S)
        except PlatformError as error:
            # The secret was shown once; the app has it.
            await _show_again(exchange, "authenticator_confirm", error, secret="", otpauth_uri="")
            return
        await pages.show(exchange, "recovery_codes", recovery_codes=list(done.recovery_codes))


async def _is_somebody(exchange: Exchange) -> bool:
    """Have the calls made with the browser's session; without one, the way leads to sign-in."""
    token = session_token(exchange)
    if token:
        exchange.use_credential(token)
    else:
        await pages.redirect(exchange, sign_in_address(_PATH))
    return bool(token)


async def _show_again(exchange: Exchange, template: str, error: PlatformError, **values: Any) -> None:
    if error.reason is Reason.API_KEY_INVALID:
        await pages.redirect(exchange, sign_in_address(_PATH, notice="sign-in-needed"))
    else:
        await pages.show_again(exchange, template, error, **values)
