"""A real browser, and in front of it an edge with a running identity behind."""

import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, async_playwright

from deploy.local.ports import free_port
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import running_edge
from tests.integration.identity.conftest import database_url
from tests.integration.identity.harness import Identity, running_identity
from tests.integration.identity.signing_in import Mailbox, People, mail_server

__all__ = ["database_url"]

# Where `deploy/local/bootstrap.sh test` unpacks it for who is not root.
_UNPACKED = Path(__file__).parents[3] / ".venv/system/usr"
_TIMEOUT_MS = 30_000


@dataclass(frozen=True)
class _At:
    address: str


@dataclass(frozen=True)
class Site:
    """What people see: an identity behind an edge, at an address of this machine by name, and its mail."""

    identity: Identity
    port: int
    mailbox: Mailbox

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """Chromium. Its absence is a failure: what it shows is shown by nothing else."""
    installed, unpacked = shutil.which("chromium"), _UNPACKED / "lib/chromium/chromium"
    if not installed and not unpacked.exists():
        pytest.fail("Chromium is missing, without which sign-in is not tested: run deploy/local/bootstrap.sh test")
    libraries = ":".join(str(folder) for folder in (_UNPACKED / "lib").glob("*-linux-gnu*"))
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(
            executable_path=installed or unpacked,
            env=None if installed else {"LD_LIBRARY_PATH": libraries},
            timeout=_TIMEOUT_MS,
        )
        yield running
        await running.close()


@pytest.fixture
async def site(database_url: str, tmp_path: Path) -> AsyncIterator[Site]:
    port, smtp_port = free_port(), free_port()
    double = PeerDouble(f"unix:{tmp_path}/others.sock")
    await double.start()
    try:
        async with (
            mail_server(smtp_port) as mailbox,
            running_identity(
                database_url,
                tmp_path,
                smtp_url=f"smtp://127.0.0.1:{smtp_port}",
                public_url=f"http://localhost:{port}",
                allow_private_issuers=True,
            ) as identity,
        ):
            peers: Any = {
                "identity": _At(f"unix:{tmp_path}/identity.sock"),
                "router": double,
                "analytics": double,
            }
            async with running_edge(peers, port=port):
                yield Site(identity, port, mailbox)
    finally:
        await double.stop()


@pytest.fixture
def people(site: Site) -> People:
    return People(site.identity)
