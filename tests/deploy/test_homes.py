"""The platform without Kubernetes, by Docker Compose and by systemd: what is set is read, what is secret is in files,
and every role starts as it is written down there, on real servers."""

import asyncio
import json
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import compose_spec
import pytest

from deploy.compose.__main__ import main as make_secrets
from deploy.local.certificates import Authority
from deploy.local.servers import Postgres
from deploy.local.state import State
from deploy.local.supervisor import Supervisor
from deploy.reference.__main__ import CONFIGURATIONS
from mesh.config import describe, load
from tests.deploy.homes import UNITS, composed, composed_pod, credentials, unit, unit_environment, unit_pods
from tests.deploy.node import Node, Pod, spare

STORING = ("identity", "router", "analytics")
SERVICES = (*STORING, "edge")
ROLES = (*SERVICES, "gateway")
MIGRATIONS = tuple(f"migrate-{service}" for service in STORING)
KEY = "A" * 43 + "="
LIMIT_S = 30.0


def seconds(duration: str) -> int:
    assert duration.endswith("s"), duration
    return int(duration[:-1])


def check_environment(role: str, environment: dict[str, str]) -> None:
    """Every variable is one that the role reads, with a value that it takes, and secrets are in files."""
    described = {one.variable: one for one in describe(CONFIGURATIONS[role])}
    ours = {name: value for name, value in environment.items() if name.startswith("AIAAS_")}
    files = {name.removesuffix("_FILE") for name in ours if name.endswith("_FILE")}
    secret = {name for name, one in described.items() if one.secret}
    assert files <= secret, files - secret
    plain = {name: value for name, value in ours.items() if not name.endswith("_FILE")}
    assert plain.keys() <= described.keys() - secret
    load(CONFIGURATIONS[role], plain | dict.fromkeys(files, KEY))


@pytest.mark.parametrize("service", [*SERVICES, *MIGRATIONS])
def test_compose_sets_what_the_service_reads(service: str) -> None:
    environment = composed()["services"][service]["environment"]
    assert composed()["services"][service]["command"][0] == service.removeprefix("migrate-")
    check_environment(service.removeprefix("migrate-"), environment)


@pytest.mark.parametrize("role", ROLES)
def test_unit_sets_what_the_role_reads(role: str) -> None:
    check_environment(role, unit_environment(unit(role)))


def test_compose_file_is_one() -> None:
    document = composed()
    assert compose_spec.PyCompose.from_json(json.dumps(document)).name == "aiaas"
    document["services"]["edge"]["helthcheck"] = {}
    with pytest.raises(ValueError, match="helthcheck"):
        compose_spec.PyCompose.from_json(json.dumps(document))


@pytest.mark.parametrize("name", composed()["services"])
def test_container_may_do_no_more_than_it_needs(name: str) -> None:
    document = composed()
    service = document["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].partition(":")[0]) > 0
    assert service["mem_limit"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"} & service.keys()
    assert "healthcheck" in service or service["restart"] == "no"
    # What is named is there, and what it is given is what it asks for.
    given = {item if isinstance(item, str) else item["source"] for item in service.get("secrets", [])}
    assert given <= document["secrets"].keys()
    wanted = set(
        re.findall(r"/run/secrets/([\w.-]+)", json.dumps([service.get("environment"), service.get("command")]))
    )
    targeted = {item["source"] for item in service.get("secrets", []) if isinstance(item, dict)}
    assert given - targeted == wanted
    assert set(service["networks"]) <= document["networks"].keys()


def test_networks_of_compose_keep_apart_what_has_nothing_to_say_to_each_other() -> None:
    document = composed()
    members = {
        network: {name for name, service in document["services"].items() if network in service["networks"]}
        for network in document["networks"]
    }
    assert members["engines"] == {"router", "engine"}
    assert members["mesh"] == set(SERVICES)
    assert members["outside"] == {"edge", "identity", "analytics"}
    assert "edge" not in members["data"]
    assert [name for name, network in document["networks"].items() if not network.get("internal")] == ["outside"]
    assert [name for name, service in document["services"].items() if "ports" in service] == ["edge"]


@pytest.mark.parametrize("role", ["edge", "router", "gateway"])
def test_nothing_is_stopped_before_the_longest_stream_has_ended(role: str) -> None:
    lines = unit(role)
    environment = unit_environment(lines)
    limits_s = [int(lines["TimeoutStopSec"][-1])]
    if role != "gateway":
        service = composed()["services"][role]
        environment |= service["environment"]
        limits_s.append(seconds(service["stop_grace_period"]))
    drains_s = [float(value) for name, value in environment.items() if name.endswith("_DRAIN_S")]
    longest_s = float(composed()["services"]["edge"]["environment"]["AIAAS_EDGE_REQUEST_TIMEOUT_S"])
    assert min(limits_s) >= max(drains_s) + 10
    assert min(drains_s) > longest_s


@pytest.mark.parametrize("role", ROLES)
def test_unit_has_no_rights_and_a_user_of_its_own(role: str) -> None:
    lines = unit(role)
    users = {line.split()[1] for line in (UNITS / "aiaas.sysusers.conf").read_text().splitlines() if line[0] == "u"}
    (user,) = lines["User"]
    assert user in users
    assert user == ("aiaas-router" if role == "gateway" else f"aiaas-{role}")
    for key in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "RestrictNamespaces"):
        assert lines[key] == ["yes"], key
    assert lines["ProtectSystem"] == ["strict"]
    assert lines["CapabilityBoundingSet"] == lines["AmbientCapabilities"] == [""]


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("this machine has no systemd-analyze")
    root = tmp_path / "root"
    shutil.copytree(UNITS, root / "etc" / "systemd" / "system")
    shutil.copytree("/usr/lib/systemd/system", root / "usr" / "lib" / "systemd" / "system", symlinks=True)
    python = root / "opt" / "aiaas" / "bin" / "python"
    python.parent.mkdir(parents=True)
    shutil.copy("/bin/true", python)
    units = [f"aiaas-{role}.service" for role in ROLES]
    verify = [analyze, "verify", "--man=no", f"--root={root}", "aiaas.target", *units]
    done = subprocess.run(verify, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # 0 is a service that may do nothing, 100 one that may do all.
    exposed = [analyze, "security", "--offline=true", f"--root={root}", "--threshold=15", "--no-pager", *units]
    done = subprocess.run(exposed, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


def test_secrets_are_kept_and_certificates_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    assert make_secrets([str(folder)]) == 0
    before = {path.relative_to(folder): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for secret in composed()["secrets"].values():
        assert Path(secret["file"]).relative_to("secrets") in before
    assert make_secrets([str(folder)]) == 0
    after = {path.relative_to(folder): path.read_text() for path in folder.rglob("*") if path.is_file()}
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {Path("tls", service, file) for service in SERVICES for file in ("tls.crt", "tls.key")}


@dataclass
class Home:
    node: Node
    # What deploy.compose made, by name.
    files: dict[str, str]
    authority: Authority


@pytest.fixture
async def home(redis_url: str, amqp_url: str, tmp_path: Path) -> AsyncIterator[Home]:
    """A node whose secrets are those that compose.yaml is given, and a PostgreSQL that has run its script."""
    folder = tmp_path / "secrets"
    assert make_secrets([str(folder)]) == 0
    files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    files |= {"redis-url": redis_url, "amqp-url": amqp_url}
    with State.temporary() as state:
        async with Supervisor(state) as supervisor:
            postgres = Postgres(state)
            await postgres.start(supervisor)
            connection = await asyncpg.connect(postgres.admin_url)
            for statement in filter(None, files["postgres-init.sql"].split(";\n")):
                await connection.execute(statement)
            await connection.close()
            for service in STORING:
                name = f"{service}-database-url"
                files[name] = files[name].replace("postgres:5432", f"127.0.0.1:{postgres.port}")
            secrets: dict[str, dict[str, str]] = {"compose": {n: text for n, text in files.items() if "/" not in n}}
            for service in SERVICES:
                there = f"tls/{service}"
                secrets[there] = {n: files[f"{there}/{n}"] for n in ("tls.crt", "tls.key", "ca.crt")}
            async with Node(tmp_path, secrets) as node:
                yield Home(node, files, Authority.load(files["ca.key"], files["ca.crt"]))


async def until(ready: Any, pod: Pod) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not await ready():
        assert pod.process.returncode is None, f"{pod.name} ended:\n{pod.log.read_text()}"
        assert time.monotonic() < deadline, f"{pod.name} is not ready:\n{pod.log.read_text()}"
        await asyncio.sleep(0.05)


async def healthy(name: str, address: str) -> bool:
    """What the health check of compose.yaml says."""
    _, _, *arguments = composed()["services"][name]["healthcheck"]["test"]
    arguments[-1] = arguments[-1].replace("127.0.0.1", address)
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stderr=asyncio.subprocess.DEVNULL)
    return await process.wait() == 0


async def stopped(*pods: Pod) -> None:
    for pod in pods:
        pod.terminate()
    for pod in pods:
        assert await pod.ended() == 0, pod.log.read_text()


async def test_compose_starts_every_service(home: Home) -> None:
    addresses = {service: f"127.79.{spare()}.{number}" for number, service in enumerate(SERVICES, start=1)}
    for service, port in (("identity", 7001), ("router", 7003), ("analytics", 7005)):
        home.node.name(f"{service}:{port}", f"{addresses[service]}:{port}")
    migrations = [await home.node.start(name, composed_pod(name)) for name in MIGRATIONS]
    for pod in migrations:
        assert await pod.ended() == 0, pod.log.read_text()
    pods = {service: await home.node.start(service, composed_pod(service), addresses[service]) for service in SERVICES}
    for service, pod in pods.items():
        await until(lambda service=service: healthy(service, addresses[service]), pod)
    await stopped(*reversed(pods.values()))


async def test_units_start_every_role(home: Home) -> None:
    address = f"127.80.{spare()}.1"
    home.node.name("127.0.0.1:70", f"{address}:70")
    home.node.name("127.0.0.1:8080", f"{address}:8080")
    identity, router, analytics, edge = await asyncio.gather(*(started_unit(home, role, address) for role in SERVICES))
    await stopped(edge, router)
    gateway = await started_unit(home, "gateway", address)
    await stopped(gateway, analytics, identity)


async def started_unit(home: Home, role: str, address: str) -> Pod:
    """As systemd does it: what comes before, then the service, which is ready when it says so."""
    lines = unit(role)
    certificate, key = home.authority.issue(*(("edge", "router") if role == "gateway" else (role,)))
    made = {"tls.crt": certificate, "tls.key": key, "ca.crt": home.authority.certificate}
    home.node.secret(f"/etc/aiaas/tls/{role}", made)
    of = "router" if role == "gateway" else role
    names = {"audit-key": f"{of}-audit-key", "secret-key": f"{of}-secret-key", "database-url": f"{of}-database-url"}
    there = {
        f"/etc/aiaas/credentials/{of}/{name}": home.files[names.get(name, name)]
        for name in ("amqp-url", "redis-url", *names)
        if names.get(name, name) in home.files
    }
    home.node.secret(f"credentials/{role}", credentials(lines, there))
    *before, service = unit_pods(role)
    for number, spec in enumerate(before):
        pod = await home.node.start(f"{role}-before-{number}", spec, address)
        assert await pod.ended() == 0, pod.log.read_text()
    pod = await home.node.start(role, service, address)
    environment = unit_environment(lines)
    listens = environment.get(f"AIAAS_{role.upper()}_OPS_ADDRESS", environment.get("AIAAS_EDGE_ADDRESS", ""))
    port = listens.rpartition(":")[2]

    async def ready() -> bool:
        try:
            async with aiohttp.request("GET", f"http://{address}:{port}/ready") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    await until(ready, pod)
    return pod
