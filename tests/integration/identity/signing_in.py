"""People who sign in, and a server that their mail is delivered to; it never looks into the database."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Any, TypeVar

import grpc
import pyotp
import pytest
from aiosmtpd.smtp import SMTP, Envelope
from aiosmtpd.smtp import Session as SmtpSession

from aiaas.identity.v1 import (
    invite_service_pb2,
    invite_service_pb2_grpc,
    mfa_service_pb2_grpc,
    session_service_pb2_grpc,
)
from aiaas.identity.v1 import mfa_service_pb2 as mfa_pb2
from aiaas.identity.v1 import session_service_pb2 as pb
from mesh.errors import PlatformError, from_rpc_error
from tests.integration.identity.harness import Identity

T = TypeVar("T")

PASSWORD = "river-stone-lantern-41"


class Mailbox:
    """All mail that was delivered, oldest first."""

    def __init__(self) -> None:
        self.messages: list[EmailMessage] = []

    async def handle_DATA(self, server: SMTP, session: SmtpSession, envelope: Envelope) -> str:
        assert isinstance(envelope.content, bytes)
        self.messages.append(message_from_bytes(envelope.content, policy=default))
        return "250 OK"

    def token_to(self, email: str) -> str:
        """The token in the newest mail to an address."""
        for message in reversed(self.messages):
            if message["To"] == email:
                found = re.search(r"token=(\S+)", message.get_content())
                assert found
                return found[1]
        raise AssertionError(f"no mail to {email}")


@asynccontextmanager
async def mail_server(port: int) -> AsyncIterator[Mailbox]:
    """A mail server on 127.0.0.1."""
    mailbox = Mailbox()
    server = await asyncio.get_running_loop().create_server(
        lambda: SMTP(mailbox, hostname="mail.example"), "127.0.0.1", port
    )
    try:
        yield mailbox
    finally:
        server.close()
        await server.wait_closed()


class People:
    """Stubs of a running identity, and people with passwords."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.sessions = session_service_pb2_grpc.SessionServiceStub(identity.channel)
        self.mfa = mfa_service_pb2_grpc.MfaServiceStub(identity.channel)
        self.invites = invite_service_pb2_grpc.InviteServiceStub(identity.channel)
        self.used_code = ""

    async def call(
        self, method: Callable[..., Awaitable[T]], request: object, token: str = "", address: str = "", agent: str = ""
    ) -> T:
        """The answer to a call with a session's token, or with none. Raises the PlatformError that identity raised."""
        metadata = [("authorization", f"Bearer {token}")] if token else []
        metadata += [("x-client-address", address)] if address else []
        metadata += [("x-client-agent", agent)] if agent else []
        try:
            return await method(request, metadata=metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def refused(self, method: Callable[..., Awaitable[Any]], request: object, token: str = "") -> PlatformError:
        """The error of a call that must fail."""
        with pytest.raises(PlatformError) as raised:
            await self.call(method, request, token)
        return raised.value

    async def member(self, organization_id: str, role_id: str, email: str, password: str = PASSWORD) -> str:
        """The id of somebody who has accepted an invite and has a password, unless known before."""
        wanted = invite_service_pb2.Invite(email=email, role_ids=[role_id])
        create = invite_service_pb2.CreateInviteRequest(organization_id=organization_id, invite=wanted)
        made = await self.identity.call(self.invites.CreateInvite, create)
        accept = invite_service_pb2.AcceptInviteRequest(invite_token=made.invite_token, password=password)
        return (await self.call(self.invites.AcceptInvite, accept)).user.user_id

    async def sign_in(self, email: str, password: str = PASSWORD, **fields: Any) -> pb.SignIn:
        """How a sign-in goes on."""
        request = pb.CreateSessionRequest(email=email, password=password, **fields)
        return (await self.call(self.sessions.CreateSession, request)).sign_in

    async def session(self, email: str, password: str = PASSWORD, **fields: Any) -> pb.SignedIn:
        """A session of somebody without MFA."""
        sign_in = await self.sign_in(email, password, **fields)
        assert sign_in.WhichOneof("step") == "signed_in"
        return sign_in.signed_in

    async def is_accepted(self, token: str) -> bool:
        """Whether a session is."""
        return not await self.identity.is_refused(token)

    async def enroll(self, token: str, password: str = PASSWORD) -> tuple[pyotp.TOTP, list[str]]:
        """An authenticator set up, and its recovery codes. `used_code` is the code that is used up by it."""
        made = await self.call(self.mfa.EnrollTotp, mfa_pb2.EnrollTotpRequest(password=password), token)
        totp = pyotp.TOTP(made.secret)
        self.used_code = totp.now()
        confirm = mfa_pb2.ConfirmTotpRequest(totp_code=self.used_code)
        confirmed = await self.call(self.mfa.ConfirmTotp, confirm, token)
        return totp, list(confirmed.recovery_codes)
