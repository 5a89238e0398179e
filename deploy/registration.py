"""Tells routers of the engines that a deployment runs, through the edge as any administrator would; it never removes
one, and never starts one.

python -m deploy.registration http://EDGE FILE    FILE is what the chart writes: engines and the models they serve

AIAAS_KEY is the key of a platform administrator. Models get no price here: until they have one, routers refuse them.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TypedDict
from urllib.parse import quote

import aiohttp

_TIMEOUT_S = 30.0


class Backend(TypedDict):
    """One replica of an engine, and the model it serves."""

    backend_id: str
    base_url: str
    model: str
    endpoints: list[str]
    context_tokens: int
    credential_variable: str


class RegistrationError(Exception):
    """The platform refused; the sentence is its own."""


async def register(base_url: str, key: str, backends: list[Backend]) -> None:
    """Make or update the models and backends. Raises RegistrationError."""
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(base_url, headers=headers, timeout=timeout) as session:
        for backend in {backend["model"]: backend for backend in backends}.values():
            await _patch(
                session,
                f"/admin/v1/models/{quote(backend['model'], safe='')}",
                {
                    "owner": "platform",
                    "context_tokens": backend["context_tokens"],
                    "endpoints": backend["endpoints"],
                },
            )
        for backend in backends:
            await _patch(
                session,
                f"/admin/v1/backends/{backend['backend_id']}",
                {
                    "base_url": backend["base_url"],
                    "engine": "ENGINE_KIND_VLLM",
                    "credential_variable": backend["credential_variable"],
                    "models": [{"model_id": backend["model"], "upstream_model": backend["model"]}],
                },
            )


async def _patch(session: aiohttp.ClientSession, path: str, body: object) -> None:
    try:
        async with session.patch(path, params={"allow_missing": "true"}, json=body) as answer:
            if answer.status != 200:
                raise RegistrationError(f"PATCH {path} answers {answer.status}: {await answer.text()}")
    except (aiohttp.ClientError, TimeoutError) as error:
        raise RegistrationError(f"PATCH {path}: {type(error).__name__}") from error


def main(arguments: list[str], key: str) -> int:
    """Run the command line; returns the exit status."""
    if len(arguments) != 2 or not key:
        print(__doc__, file=sys.stderr)
        return 2
    backends: list[Backend] = json.loads(Path(arguments[1]).read_text(encoding="utf-8"))
    try:
        asyncio.run(register(arguments[0], key, backends))
    except RegistrationError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(backends)} backends registered")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ.get("AIAAS_KEY", "")))
