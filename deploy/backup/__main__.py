"""RabbitMQ's definitions (users, permissions, queues, exchanges, bindings) to a file and back; never its messages,
which routers publish again from their journals.

python -m deploy.backup export FOLDER    writes FOLDER/<time>.json and keeps the newest 30
python -m deploy.backup import FILE      makes what a broker lacks of it

AMQP_MANAGEMENT_URL, http://user:password@host:15672, says of which broker.
"""

import asyncio
import base64
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import aiohttp

_KEPT = 30
_TIMEOUT_S = 60.0


class DefinitionsError(Exception):
    """The broker did not give or take its definitions; the sentence never holds its password."""


def export(url: str, folder: Path) -> Path:
    """Write the definitions of the broker at `url`, whole or not at all; returns the file. Raises DefinitionsError."""
    definitions = asyncio.run(_call(url, "GET", None))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    new = path.with_suffix(".unfinished")
    # It holds digests of passwords.
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(definitions, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    for old in sorted(folder.glob("*.json"))[:-_KEPT]:
        old.unlink()
    return path


def restore(url: str, path: Path) -> None:
    """Make what the broker at `url` lacks of an export. Raises DefinitionsError."""
    asyncio.run(_call(url, "POST", json.loads(path.read_text(encoding="utf-8"))))


async def _call(url: str, verb: str, body: Any) -> Any:
    parts = urlsplit(url)
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2], path="/api/definitions").geturl()
    credentials = base64.b64encode(f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode()).decode()
    headers = {"Authorization": f"Basic {credentials}"}
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.request(verb, address, json=body) as answer,
        ):
            if answer.status >= 300:
                raise DefinitionsError(f"{verb} {address} answers {answer.status}")
            return await answer.json() if verb == "GET" else None
    except (aiohttp.ClientError, TimeoutError) as error:
        raise DefinitionsError(f"{verb} {address}: {type(error).__name__}") from error


def main(arguments: list[str], url: str) -> int:
    """Run what the command line asks for; returns the exit status."""
    if len(arguments) != 2 or arguments[0] not in ("export", "import") or not url:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        if arguments[0] == "export":
            print(export(url, Path(arguments[1])))
        else:
            restore(url, Path(arguments[1]))
    except DefinitionsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ.get("AMQP_MANAGEMENT_URL", "")))
