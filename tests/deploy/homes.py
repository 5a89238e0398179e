"""compose.yaml and the units of systemd, read as pods, so that the node starts them as it starts those of the chart."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.tools import ROOT, Manifest

COMPOSE = ROOT / "deploy" / "compose" / "compose.yaml"
UNITS = ROOT / "deploy" / "systemd"
COMMON = UNITS / "aiaas-.service.d" / "10-common.conf"
# As systemd's specifiers stand for.
_CREDENTIALS, _STATE = "/run/credentials", "/var/lib"

Unit = dict[str, list[str]]


def composed() -> dict[str, Any]:
    """compose.yaml with what its variables are by default."""
    return dict(yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE.read_text())))


def composed_pod(name: str) -> Manifest:
    """A service of compose.yaml that is run from the platform's image; its secrets are in `/run/secrets`."""
    service = composed()["services"][name]
    volumes: list[dict[str, Any]] = [{"name": "secrets", "secret": {"secretName": "compose"}}]
    mounts = [{"name": "secrets", "mountPath": "/run/secrets"}]
    for volume in service.get("volumes", []):
        source, target = volume.split(":")[:2]
        mounts.append({"name": Path(target).name, "mountPath": target})
        if source.startswith("./secrets/"):
            volumes.append({"name": Path(target).name, "secret": {"secretName": source.removeprefix("./secrets/")}})
    container = {
        "command": ["python", "-m", *service["command"]],
        "env": [{"name": variable, "value": value} for variable, value in service["environment"].items()],
        "volumeMounts": mounts,
    }
    return {"containers": [container], "volumes": volumes}


def unit(name: str) -> Unit:
    """The lines of a unit by key. What holds for all units comes last, and wins, as systemd reads it."""
    found: Unit = {}
    for line in ((UNITS / f"aiaas-{name}.service").read_text() + COMMON.read_text()).splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def unit_environment(lines: Unit) -> dict[str, str]:
    """What `Environment=` says, with what its specifiers stand for."""
    pairs = [word.partition("=") for value in lines["Environment"] for word in shlex.split(value)]
    return {name: value.replace("%d", _CREDENTIALS).replace("%S", _STATE) for name, _, value in pairs}


def unit_pods(name: str) -> list[Manifest]:
    """The commands of a unit in their order, the one that stays last. Its credentials are the secret
    `credentials/<unit>`, its certificate is the one of the folder where it lies."""
    lines = unit(name)
    environment = unit_environment(lines)
    certificates = str(Path(environment["AIAAS_TLS_KEY_PATH"]).parent)
    volumes: list[dict[str, Any]] = [{"name": "tls", "secret": {"secretName": certificates}}]
    mounts = [{"name": "tls", "mountPath": certificates}]
    if "LoadCredential" in lines:
        volumes.append({"name": "credentials", "secret": {"secretName": f"credentials/{name}"}})
        mounts.append({"name": "credentials", "mountPath": _CREDENTIALS})
    mounts += [{"name": "state", "mountPath": f"{_STATE}/{folder}"} for folder in lines.get("StateDirectory", [])]
    pods = []
    for command in (*lines.get("ExecStartPre", []), *lines["ExecStart"]):
        words = command.split()
        assert words[0] == "/opt/aiaas/bin/python"
        container = {
            "command": ["python", *words[1:]],
            "env": [{"name": variable, "value": value} for variable, value in environment.items()],
            "volumeMounts": mounts,
        }
        pods.append({"containers": [container], "volumes": volumes})
    return pods


def credentials(lines: Unit, files: Mapping[str, str]) -> dict[str, str]:
    """What `LoadCredential=` gives a unit, of files by their path."""
    pairs = [value.partition(":") for value in lines.get("LoadCredential", [])]
    return {name: files[path] for name, _, path in pairs}
