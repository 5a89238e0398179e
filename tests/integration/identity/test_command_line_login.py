"""`aiaas login --browser` against the real provider: code with PKCE on a loopback address, renewal, sign-out."""

import asyncio
import json
import os
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.local.ports import free_port
from tests.integration.edge.reading import led_to
from tests.integration.identity.authorizing import Provider, Sessions, inhabit, query_of, running_provider

ROOT = Path(__file__).parents[3]


@pytest.fixture
async def provider(database_url: str, tmp_path: Path) -> AsyncIterator[Provider]:
    async with running_provider(database_url, tmp_path, Sessions()) as running:
        await inhabit(running)
        yield running


async def started(provider: Provider, folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AIAAS_")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "cli", *arguments),
        cwd=ROOT,
        env=environment | {"AIAAS_CONFIG_DIR": str(folder), "AIAAS_URL": provider.base_url},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run(provider: Provider, folder: Path, *arguments: str) -> tuple[int | None, str]:
    process = await started(provider, folder, *arguments)
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    return process.returncode, (out + err).decode()


def kept(folder: Path) -> dict[str, Any]:
    path = folder / "profiles.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    profile: dict[str, Any] = json.loads(path.read_text())["profiles"]["default"]
    return profile


async def test_browser_sign_in_is_kept_renewed_and_ended(provider: Provider, tmp_path: Path) -> None:
    folder, port = tmp_path / "config", free_port()
    client = await provider.client("PUBLIC", redirect_uris=[f"http://127.0.0.1:{port}/callback"])
    line = ("login", "--browser", "--no-open", "--client-id", client.id, "--redirect-port", str(port))
    process = await started(provider, folder, *line)
    assert process.stderr is not None
    async with asyncio.timeout(60):
        while not (address := (await process.stderr.readline()).decode().strip()).startswith("http"):
            assert process.returncode is None
        asked = query_of(address)
        assert asked["code_challenge_method"] == "S256"
        location = await provider.consented(asked)
        async with httpx.AsyncClient(trust_env=False) as browser:
            forged = await browser.get(f"http://127.0.0.1:{port}/callback?code=stolen&state=another")
            assert forged.status_code == 404
            arrived = await browser.get(location)
        assert (arrived.status_code, arrived.headers["referrer-policy"]) == (200, "no-referrer")
        _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    first = kept(folder)
    assert first["token"].startswith("aiat_")
    assert first["token"] not in err.decode()
    assert await provider.is_accepted(first["token"])

    # An access token that is about to end is renewed before it is used, once, by whoever comes first.
    path = folder / "profiles.json"
    path.write_text(path.read_text().replace(str(first["expire_time"]), "1.0"))
    at_once = [run(provider, folder, "principal", "get", "--field", "user_id") for _ in range(3)]
    for code, said in await asyncio.gather(*at_once):
        assert (code, said.strip()) == (0, provider.user_id)
    second = kept(folder)
    assert second["token"] != first["token"]
    assert second["refresh_token"] != first["refresh_token"]

    assert (await run(provider, folder, "logout"))[0] == 0
    assert not await provider.is_accepted(second["token"])
    assert kept(folder)["token"] == kept(folder)["refresh_token"] == ""


async def test_refusal_in_the_browser_is_told(provider: Provider, tmp_path: Path) -> None:
    folder, port = tmp_path / "config", free_port()
    client = await provider.client("PUBLIC", redirect_uris=[f"http://127.0.0.1:{port}/callback"])
    line = ("login", "--browser", "--no-open", "--client-id", client.id, "--redirect-port", str(port))
    process = await started(provider, folder, *line)
    assert process.stderr is not None
    async with asyncio.timeout(60):
        while not (address := (await process.stderr.readline()).decode().strip()).startswith("http"):
            assert process.returncode is None
        asked = query_of(address)
        denied = await provider.choose(asked, await provider.visit(asked), consent="deny")
        async with httpx.AsyncClient(trust_env=False) as browser:
            await browser.get(led_to(denied))
        _, err = await process.communicate()
    assert process.returncode == 1
    assert "refused" in err.decode()
    assert not (folder / "profiles.json").exists()
