"""Mail to people, over SMTP: what it says and how it leaves; it never decides who gets any.

smtps:// is TLS from the first byte, smtp:// with STARTTLS, without which nothing is sent but to this machine.
"""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from urllib.parse import quote, unquote, urlsplit

import aiosmtplib

from mesh.errors import PlatformError, Reason

logger = logging.getLogger(__name__)

URL_PATTERN = r"^(smtps?://[^\s/]+)?$"
"""The form of a server's address in a configuration; empty for none."""

_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class _Server:
    hostname: str
    port: int
    username: str | None
    password: str | None
    use_tls: bool
    start_tls: bool | None


class Mailer:
    """Sends mail through the server at `url`, from `sender`; links lead to `public_url`."""

    def __init__(self, url: str, sender: str, public_url: str) -> None:
        self._server = _server_of(url)
        self._sender = sender
        self._public_url = public_url.rstrip("/")

    async def send_invite(self, email: str, organization_name: str, token: str, expire_time: datetime) -> None:
        """Mail an invite's token. Raises PlatformError(UNAVAILABLE)."""
        name = " ".join(organization_name.split())
        await self._send(
            email,
            f"You are invited to {name}",
            f"You are invited to become a member of {name}. To accept, open\n\n"
            f"    {self._public_url}/invites/accept?token={quote(token)}\n\n"
            f"until {_written(expire_time)}. If you expect no invite, do nothing.\n",
        )

    async def send_recovery(self, email: str, token: str, expire_time: datetime) -> None:
        """Mail a recovery token. Raises PlatformError(UNAVAILABLE)."""
        await self._send(
            email,
            "Choose a new password",
            "Somebody, hopefully you, asked for a new password for this address. To choose one, open\n\n"
            f"    {self._public_url}/recover/complete?token={quote(token)}\n\n"
            f"until {_written(expire_time)}. If it was not you, do nothing: your password stays as it is.\n",
        )

    async def _send(self, email: str, subject: str, text: str) -> None:
        message = EmailMessage()
        message["From"] = self._sender
        message["To"] = email
        message["Subject"] = subject
        message["Date"] = formatdate(usegmt=True)
        message["Message-ID"] = make_msgid(domain=self._sender.rpartition("@")[2].rstrip(">"))
        # RFC 3834: nobody's holiday answers this.
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(text)
        server = self._server
        try:
            await aiosmtplib.send(
                message,
                hostname=server.hostname,
                port=server.port,
                username=server.username,
                password=server.password,
                use_tls=server.use_tls,
                start_tls=server.start_tls,
                timeout=_TIMEOUT_S,
            )
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            # What a server says may repeat the address.
            logger.warning("a mail could not be sent: %s", type(error).__name__)
            raise PlatformError(Reason.UNAVAILABLE) from None


def _server_of(url: str) -> _Server:
    parts = urlsplit(url)
    use_tls = parts.scheme == "smtps"
    hostname = parts.hostname or ""
    return _Server(
        hostname=hostname,
        port=parts.port or (465 if use_tls else 587),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        use_tls=use_tls,
        start_tls=False if use_tls else (None if _is_here(hostname) else True),
    )


def _is_here(hostname: str) -> bool:
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return hostname == "localhost"


def _written(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
