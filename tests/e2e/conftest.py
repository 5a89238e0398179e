"""The platform as a person starts it, one for all end-to-end tests, and tenants on it made through its own admin REST.

Never reaches into a service: everything goes through the public address, but for killing processes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import DefaultHttpxClient, OpenAI

from deploy.local.ports import free_port

ENGINE = os.environ.get("ENGINE", "llamacpp")
REPLICAS = 2 if ENGINE == "vllm" else 1
START_TIMEOUT_S = 240
# With ONE_PROCESS=1 the edge and the router share a process; everything holds for it as well.
FRONT = ("gateway",) if os.environ.get("ONE_PROCESS") == "1" else ("router", "edge")
SERVICES = ("identity", "analytics", *FRONT)
# Go is another toolchain, which only `make test-go` installs.
collect_ignore = [] if os.environ.get("SDK_GO") == "1" else ["test_sdk_go.py"]
# The whole suite has tried before what neither the engine nor the number of processes changes.
IS_REPEATED = ENGINE != "llamacpp" or FRONT == ("gateway",)
# WITHOUT=restart halts what starts killed parts again; the tests that kill must fail then.
WITHOUT = os.environ.get("WITHOUT", "")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked `once` where the end-to-end tests are repeated."""
    left_out = [item for item in items if IS_REPEATED and item.get_closest_marker("once")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@dataclass(frozen=True)
class Tenant:
    """An organization with one API key. The client is untyped: tests send what its types would not let them."""

    organization_id: str
    api_key_id: str
    secret: str
    openai: Any


@dataclass(frozen=True)
class Platform:
    """A running platform."""

    base_url: str
    admin_key: str
    state: Path
    engine: str
    clients: ExitStack
    supervisor_pid: int

    @property
    def admin(self) -> httpx.Client:
        """Admin REST as the platform administrator."""
        return httpx.Client(
            base_url=self.base_url, headers={"Authorization": f"Bearer {self.admin_key}"}, timeout=10, trust_env=False
        )

    def client(self, secret: str) -> Any:
        """The official client, without retries; closed with the platform."""
        client = OpenAI(
            base_url=f"{self.base_url}/v1",
            api_key=secret,
            max_retries=0,
            timeout=60,
            http_client=DefaultHttpxClient(trust_env=False),
        )
        return self.clients.enter_context(client)

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
        if WITHOUT == "restart":
            os.kill(self.supervisor_pid, signal.SIGSTOP)
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
def platform() -> Iterator[Platform]:
    """`make up` on a state folder of its own."""
    # Not pytest's own temporary folder: the stack's service user may not enter that.
    base = Path(tempfile.mkdtemp(prefix="aiaas-e2e-"))
    base.chmod(0o755)
    state = base / "state"
    port = free_port()
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
        with ExitStack() as clients:
            yield Platform(ready["base_url"], ready["api_key"], state, ENGINE, clients, stack.pid)
    finally:
        stack.send_signal(signal.SIGCONT)
        stack.send_signal(signal.SIGINT)
        try:
            stack.wait(30)
        except subprocess.TimeoutExpired:
            stack.kill()
            raise
        finally:
            output.close()
            shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def tenant(platform: Platform) -> Tenant:
    """An organization that most tests share."""
    return platform.new_tenant("Shared tenant")


@pytest.fixture
def openai(tenant: Tenant) -> Any:
    """The official client of the shared tenant."""
    return tenant.openai
