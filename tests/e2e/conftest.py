"""The platform as a person starts it, one for all end-to-end tests, and tenants on it made through its own admin REST.

Never reaches into a service: everything goes through the public address, but for killing processes.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

ENGINE = os.environ.get("ENGINE", "llamacpp")
REPLICAS = 2 if ENGINE == "vllm" else 1
START_TIMEOUT_S = 240


@dataclass(frozen=True)
class Tenant:
    """An organization with one API key."""

    organization_id: str
    api_key_id: str
    secret: str
    openai: OpenAI


@dataclass(frozen=True)
class Platform:
    """A running platform."""

    base_url: str
    admin_key: str
    state: Path
    engine: str

    @property
    def admin(self) -> httpx.Client:
        """Admin REST as the platform administrator."""
        return httpx.Client(
            base_url=self.base_url, headers={"Authorization": f"Bearer {self.admin_key}"}, timeout=10, trust_env=False
        )

    def client(self, secret: str, **options: Any) -> OpenAI:
        """The official client, without retries unless they are asked for."""
        return OpenAI(
            base_url=f"{self.base_url}/v1",
            api_key=secret,
            max_retries=options.pop("max_retries", 0),
            timeout=60,
            http_client=httpx.Client(trust_env=False),
            **options,
        )

    def new_tenant(self, name: str, scopes: tuple[str, ...] = ()) -> Tenant:
        """Makes an organization and a key on it. No scopes means inference only."""
        with self.admin as admin:
            organization = admin.post("/admin/v1/organizations", json={"display_name": name})
            assert organization.status_code == 200, organization.text
            organization_id = organization.json()["organization"]["organization_id"]
            key = admin.post(
                f"/admin/v1/organizations/{organization_id}/api-keys",
                json={"display_name": f"{name} key", "scopes": list(scopes)},
            )
            assert key.status_code == 200, key.text
        secret = key.json()["secret"]
        return Tenant(organization_id, key.json()["api_key"]["api_key_id"], secret, self.client(secret))

    def pid(self, part: str) -> int:
        """The process of a part, by the local stack's own record."""
        return int(json.loads((self.state / "run" / f"{part}.json").read_text())["pid"])

    def kill(self, part: str) -> int:
        """Kills a part as a crash would, and returns the process that it was."""
        pid = self.pid(part)
        os.killpg(pid, signal.SIGKILL)
        return pid


def wait_until(condition: Callable[[], Any], within_s: float, what: str) -> Any:
    """Polls until the condition gives something true, and returns that."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {within_s} s: {what}")


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """`make up` on a state folder of its own."""
    base = Path(tmp_path_factory.mktemp("platform"))
    for folder in (base, *base.parents):
        # The stack's service user must be able to enter the state folder that pytest made for its own user alone.
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    state = base / "state"
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = (base / "output.txt").open("w+")
    command = [
        sys.executable,
        "-m",
        "deploy.local",
        "--port",
        str(port),
        "--engine",
        ENGINE,
        "--replicas",
        str(REPLICAS),
    ]
    stack = subprocess.Popen(
        command,
        env={**os.environ, "AIAAS_STATE_DIR": str(state)},
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )
    try:

        def proven() -> bool:
            assert stack.poll() is None, f"the stack ended:\n{(base / 'output.txt').read_text()}"
            return (state / "ready.json").exists()

        wait_until(proven, START_TIMEOUT_S, "the stack proves itself")
        ready = json.loads((state / "ready.json").read_text())
        yield Platform(ready["base_url"], ready["api_key"], state, ENGINE)
    finally:
        stack.send_signal(signal.SIGINT)
        try:
            stack.wait(30)
        except subprocess.TimeoutExpired:
            stack.kill()
            raise
        finally:
            output.close()


@pytest.fixture(scope="session")
def tenant(platform: Platform) -> Tenant:
    """An organization that most tests share."""
    return platform.new_tenant("Shared tenant")


@pytest.fixture
def openai(tenant: Tenant) -> OpenAI:
    """The official client of the shared tenant."""
    return tenant.openai
