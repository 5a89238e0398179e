"""Ways to an account of one's own: an invitation, a lost password; both end at the sign-in page, signed in to nothing.

The tokens of mails travel in forms, and in the addresses of the mails' own links, which are told to no other site.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiaas.identity.v1 import (
    invite_service_pb2,
    invite_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
)
from edge.exchange import Exchange
from edge.peers import Peer
from edge.sign_in import pages
from edge.sign_in.page import Page, Values
from edge.sign_in.signing_in import sign_in_address
from mesh.errors import PlatformError

_TIMEOUT_S = 15.0


class Accounts:
    """The pages of recoveries and invites."""

    def __init__(self, identity: Peer) -> None:
        self._identity = identity
        self._sessions = session_service_pb2_grpc.SessionServiceStub(identity.channel)
        self._invites = invite_service_pb2_grpc.InviteServiceStub(identity.channel)

    def pages(self) -> Iterable[tuple[str, Page]]:
        """What is served, by path."""
        for path, to_visit, to_form in (
            ("/recover", self.ask_address, self.start_recovery),
            ("/recover/complete", self.ask_password, self.complete_recovery),
            ("/invites/accept", self.show_invite, self.accept_invite),
        ):
            yield path, Page(path, to_visit, to_form)

    async def ask_address(self, exchange: Exchange, query: Values) -> None:
        """Ask whose password is lost."""
        await pages.show(exchange, "recover", email="", sent=False)

    async def start_recovery(self, exchange: Exchange, form: Values) -> None:
        """Have a mail sent, if the address is known; the page is the same if not."""
        email = form.get("email", "")
        request = session_service_pb2.StartRecoveryRequest(email=email)
        try:
            await self._identity.call(self._sessions.StartRecovery, request, _TIMEOUT_S)
        except PlatformError as error:
            await pages.show_again(exchange, "recover", error, email=email, sent=False)
            return
        await pages.show(exchange, "recover", email=email, sent=True)

    async def ask_password(self, exchange: Exchange, query: Values) -> None:
        """Ask for a new password."""
        await pages.show(exchange, "recover_complete", token=query.get("token", ""))

    async def complete_recovery(self, exchange: Exchange, form: Values) -> None:
        """Set a new password."""
        token = form.get("token", "")
        request = session_service_pb2.CompleteRecoveryRequest(
            recovery_token=token, new_password=form.get("password", "")
        )
        try:
            await self._identity.call(self._sessions.CompleteRecovery, request, _TIMEOUT_S)
        except PlatformError as error:
            await pages.show_again(exchange, "recover_complete", error, token=token)
            return
        await pages.redirect(exchange, sign_in_address(notice="password-set"))

    async def show_invite(self, exchange: Exchange, query: Values) -> None:
        """Tell what an invite is to, and ask for what a new person needs."""
        await pages.show(exchange, "invite", **await self._invited(query))

    async def accept_invite(self, exchange: Exchange, form: Values) -> None:
        """Make a member of whoever was invited."""
        request = invite_service_pb2.AcceptInviteRequest(
            invite_token=form.get("token", ""),
            display_name=form.get("display_name", ""),
            password=form.get("password", ""),
        )
        try:
            await self._identity.call(self._invites.AcceptInvite, request, _TIMEOUT_S)
        except PlatformError as error:
            await pages.show_again(exchange, "invite", error, **await self._invited(form))
            return
        await pages.redirect(exchange, sign_in_address(notice="invite-accepted"))

    async def _invited(self, values: Values) -> dict[str, Any]:
        """What the page of an invite shows. Raises PlatformError, for a token that is of no use INVALID_ARGUMENT."""
        token = values.get("token", "")
        request = invite_service_pb2.PreviewInviteRequest(invite_token=token)
        invited = await self._identity.call(self._invites.PreviewInvite, request, _TIMEOUT_S)
        return {
            "token": token,
            "organization": invited.organization_display_name,
            "email": invited.email,
            "password_needed": invited.password_needed,
            "display_name": values.get("display_name", ""),
        }
