"""Certificates of services for tests, in files as a process gets them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from deploy.local.certificates import Authority
from mesh.clock import SystemClock
from mesh.tls import Tls, TlsConfig


class Files:
    """The three files of one process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.certificate, self.key, self.ca = (folder / name for name in ("own.pem", "key.pem", "ca.pem"))

    @property
    def config(self) -> TlsConfig:
        """What the process is told."""
        return TlsConfig(certificate_path=str(self.certificate), key_path=str(self.key), ca_path=str(self.ca))

    def put(self, pair: tuple[str, str], *trusted: Authority) -> None:
        """Replace all of them: a certificate with its key, and the authorities that are trusted."""
        self.certificate.write_text(pair[0])
        self.key.write_text(pair[1])
        self.ca.write_text("".join(authority.certificate for authority in trusted))


def tls_of(folder: Path, pair: tuple[str, str], *trusted: Authority) -> Tls:
    """A process with these files."""
    files = Files(folder)
    files.put(pair, *trusted)
    return Tls(files.config, SystemClock())


@asynccontextmanager
async def started(server: Any) -> AsyncIterator[Any]:
    """A server that listens within the block."""
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
