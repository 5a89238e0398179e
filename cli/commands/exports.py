"""`aiaas exports download`: waits for an export and fetches its file; it never makes one."""

import base64
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import click
import httpx

from cli.client import is_here
from cli.errors import Failed, Unavailable, UsageProblem
from cli.session import Session

_WAITING = ("EXPORT_STATE_PENDING", "EXPORT_STATE_RUNNING")
_POLL_S = 1.0
_SUCCEEDED = "EXPORT_STATE_SUCCEEDED"
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)


@click.command()
@click.argument("export_id")
@click.option("--to", metavar="FILE", required=True, help="The new file.")
@click.option("--org", metavar="ID", help="The organization; else that of the profile.")
@click.option("--within", "within_s", type=click.FloatRange(min=0), default=600, show_default=True, metavar="SECONDS")
@click.pass_obj
def download(session: Session, export_id: str, to: str, org: str | None, within_s: float) -> None:
    """Wait until an export has succeeded, fetch its file, and hold it against its checksum."""
    path = Path(to)
    if path.exists():
        raise UsageProblem(f"{path} is there already.")
    organization_id = quote(org or session.organization(), safe="")
    export_path = f"/analytics/v1/organizations/{organization_id}/exports/{quote(export_id, safe='')}"
    told = _awaited(session, export_path, within_s)
    export = told["export"]
    if export["state"] != _SUCCEEDED:
        why = f" ({export['failure_reason']})" if export.get("failure_reason") else ""
        raise Failed(f"The export is {export['state'].removeprefix('EXPORT_STATE_').lower()}{why}.")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".export-", delete=False) as part:
            digest = _fetch(told["download_url"], part, int(export.get("size_bytes") or 0))
        if digest != base64.b64decode(export.get("sha256") or ""):
            raise Failed("The file is not what its checksum says; nothing was kept.")
        os.replace(part.name, path)
    except OSError as error:
        raise UsageProblem(f"{path} cannot be written: {error.strerror}.") from error
    except (click.ClickException, KeyboardInterrupt):
        os.unlink(part.name)
        raise
    click.echo(f"{export.get('rows', '?')} rows in {path}.", err=True)


def _awaited(session: Session, path: str, within_s: float) -> dict[str, Any]:
    """The export once it has ended. Raises Unavailable where it does not in time."""
    ends = time.monotonic() + within_s
    with click.progressbar(length=100, label="Waiting", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        while True:
            told: dict[str, Any] = session.client.get(path)
            bar.update(int(told["export"].get("progress_percent") or 0) - bar.pos)
            if told["export"]["state"] not in _WAITING:
                return told
            if time.monotonic() > ends:
                raise Unavailable(f"The export has not ended within {within_s:g} s; it goes on.")
            time.sleep(_POLL_S)


def _fetch(url: str, part: IO[bytes], size_bytes: int) -> bytes:
    """Write what an address holds into a file; gives its SHA-256. The address is the credential, so none is sent."""
    digest = hashlib.sha256()
    try:
        with httpx.stream("GET", url, timeout=_TIMEOUT, trust_env=not is_here(url)) as answer:
            if not answer.is_success:
                raise Failed(f"The file could not be fetched: HTTP {answer.status_code}.")
            hidden = not sys.stderr.isatty()
            with click.progressbar(length=size_bytes, label="Fetching", file=sys.stderr, hidden=hidden) as bar:
                for chunk in answer.iter_bytes():
                    part.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
    except httpx.TransportError as error:
        raise Unavailable(f"The file could not be fetched: {error}") from error
    return digest.digest()
