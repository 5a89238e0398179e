"""Processes killed and stopped under a running platform, and secrets looked for in everything it wrote."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from openai import AuthenticationError, InternalServerError

from .conftest import SERVICES, Platform, wait_until

MODEL = "smollm2"
HELLO = [{"role": "user", "content": "Say hello."}]


@contextmanager
def stopped(platform: Platform, part: str) -> Iterator[None]:
    """Halts a process without ending it, so that nobody restarts it."""
    pid = platform.pid(part)
    os.killpg(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(pid, signal.SIGCONT)


def all_serve(platform: Platform) -> bool:
    """Whether the edge answers and sees every service serve."""
    try:
        checks = httpx.get(f"{platform.base_url}/ready", timeout=5, trust_env=False).json()["checks"]
    except httpx.TransportError:
        return False
    return all(check == "ok" for check in checks.values())


@pytest.mark.parametrize("service", SERVICES)
def test_killed_service_comes_back_and_no_later_request_fails(platform: Platform, service: str) -> None:
    tenant = platform.new_tenant(f"Survivor of {service}")
    tenant.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    killed = platform.kill(service)
    if service in ("identity", "analytics"):
        # What does not need the killed one goes on at once: keys are cached, usage waits in the broker.
        tenant.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    wait_until(lambda: platform.pid(service) != killed and all_serve(platform), 20, f"{service} is back")
    for _ in range(5):
        tenant.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    with platform.admin as admin:
        admin.get(f"/admin/v1/organizations/{tenant.organization_id}").raise_for_status()
        admin.get(
            f"/analytics/v1/organizations/{tenant.organization_id}/usage", params={"start_time": "2026-01-01T00:00:00Z"}
        ).raise_for_status()


def test_usage_of_requests_made_while_analytics_was_down_arrives(platform: Platform) -> None:
    tenant = platform.new_tenant("Patient")
    killed = platform.kill("analytics")
    for _ in range(3):
        tenant.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    wait_until(lambda: platform.pid("analytics") != killed and all_serve(platform), 20, "analytics is back")

    def requests() -> int:
        with platform.admin as admin:
            response = admin.get(
                f"/analytics/v1/organizations/{tenant.organization_id}/usage",
                params={"start_time": "2026-01-01T00:00:00Z"},
            )
        return int(response.json()["totals"].get("requests", 0)) if response.status_code == 200 else 0

    wait_until(lambda: requests() == 3, 15, "all three requests are counted")


def test_stopped_identity_is_503_for_unknown_keys_and_no_hindrance_for_known_ones(platform: Platform) -> None:
    known, unknown = platform.new_tenant("Known"), platform.new_tenant("Not seen yet")
    known.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    with stopped(platform, "identity"):
        known.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
        with pytest.raises(InternalServerError) as error:
            unknown.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
        assert error.value.status_code == 503
        assert error.value.code == "auth_unavailable"
        # A key whose checksum is wrong is known to be wrong without asking anybody.
        broken = unknown.secret[:-1] + ("A" if unknown.secret[-1] != "A" else "B")
        with pytest.raises(AuthenticationError):
            platform.client(broken).chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    wait_until(
        lambda: unknown.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1).choices,
        5,
        "the new key is accepted once identity answers",
    )


@pytest.mark.once
def test_stopped_identity_is_503_or_504_for_administrators(platform: Platform) -> None:
    with stopped(platform, "identity"), platform.admin as admin:
        assert admin.get("/admin/v1/organizations", timeout=40).status_code in (503, 504)
    wait_until(lambda: all_serve(platform), 15, "identity serves again")


def test_killed_engine_comes_back(platform: Platform) -> None:
    tenant = platform.new_tenant("Engine fault")
    engine = next(part.stem for part in (platform.state / "run").iterdir() if "minilm" in part.name)
    killed = platform.kill(engine)
    with pytest.raises(InternalServerError) as error:
        tenant.openai.embeddings.create(model="minilm", input="Hello.")
    assert error.value.status_code in (502, 503)
    # Other models are not touched by it.
    tenant.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    limit_s = 120 if platform.engine == "vllm" else 20
    wait_until(lambda: platform.pid(engine) != killed, limit_s, "a new engine runs")

    def embedded() -> bool:
        try:
            return bool(tenant.openai.embeddings.create(model="minilm", input="Hello.").data)
        except InternalServerError:
            time.sleep(0.2)
            return False

    wait_until(embedded, limit_s, "embeddings are back")


def test_no_secret_and_no_prompt_is_in_any_log(platform: Platform) -> None:
    tenant = platform.new_tenant("Canary")
    canary = "canary-prompt-7431"
    tenant.openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": canary}], max_tokens=4, user=canary
    )
    with pytest.raises(Exception, match="gpt-none"):
        tenant.openai.chat.completions.create(model="gpt-none", messages=[{"role": "user", "content": canary}])
    with pytest.raises(AuthenticationError):
        platform.client(tenant.secret + "x").models.list()
    written = ""
    for service in SERVICES:
        log = (platform.state / "logs" / f"{service}.log").read_text()
        assert log, f"{service} logs nothing"
        written += log
    metrics = httpx.get(f"{platform.base_url}/metrics", trust_env=False).text
    for secret in (tenant.secret, platform.admin_key, tenant.secret.split("_")[-1], canary):
        assert secret not in written
        assert secret not in metrics
