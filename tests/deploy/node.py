"""A node of a cluster, as far as pods of the chart need one: it runs their containers as processes, with an address of
this machine for each pod, files where volumes are mounted, probes that are asked and a grace period that is held.

Secrets, names of services and paths of mounts are put into the environment as a cluster puts them into a pod; nothing
else of a manifest is changed.
"""

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tests.deploy.tools import Manifest

_POLL_S = 0.05
_LISTENS = "0A"


@dataclass
class Pod:
    """A pod that runs."""

    name: str
    address: str
    container: Manifest
    grace_s: float
    process: asyncio.subprocess.Process
    log: Path

    async def probe(self, which: str) -> int:
        """The status that a probe is answered with, 0 if it is not."""
        get = self.container[which]["httpGet"]
        (port,) = [port["containerPort"] for port in self.container["ports"] if port["name"] == get["port"]]
        timeout = aiohttp.ClientTimeout(total=self.container[which].get("timeoutSeconds", 1))
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(f"http://{self.address}:{port}{get['path']}") as answer,
            ):
                return answer.status
        except (OSError, aiohttp.ClientError, TimeoutError):
            return 0

    async def started(self) -> None:
        """Waits as a startup probe does, then until it is ready."""
        startup = self.container["startupProbe"]
        limit_s = startup["periodSeconds"] * startup["failureThreshold"]
        for which in ("startupProbe", "readinessProbe"):
            deadline = time.monotonic() + limit_s
            while await self.probe(which) != 200:
                assert self.process.returncode is None, f"{self.name} ended:\n{self.log.read_text()}"
                assert time.monotonic() < deadline, f"{self.name} is not ready:\n{self.log.read_text()}"
                await asyncio.sleep(_POLL_S)

    def listening(self) -> set[int]:
        """The TCP ports that are listened on at its address."""
        octets = bytes(int(part) for part in reversed(self.address.split("."))).hex().upper()
        # gRPC listens by IPv6, on the address as that writes it.
        mapped = f"0000000000000000FFFF0000{octets}"
        tables = "".join(Path(path).read_text() for path in ("/proc/net/tcp", "/proc/net/tcp6"))
        lines = [line.split() for line in tables.splitlines()]
        own = [line[1].split(":") for line in lines if line[3] == _LISTENS]
        return {int(port, 16) for address, port in own if address in (octets, mapped)}

    def terminate(self) -> None:
        """The order to stop, after the pause of its lifecycle."""
        self.process.send_signal(signal.SIGTERM)

    async def ended(self) -> int:
        """The exit status, which must be there before the grace period is over."""
        async with asyncio.timeout(self.grace_s):
            return await self.process.wait()


class Node:
    """Use as an async context manager; whatever still runs is killed at its end. `secrets` are by name, then key;
    `names` are the addresses behind services."""

    def __init__(self, folder: Path, secrets: Mapping[str, Mapping[str, str]]) -> None:
        self._folder = folder
        self._secrets = dict(secrets)
        self._names: dict[str, str] = {}
        self._pods: list[Pod] = []

    async def __aenter__(self) -> "Node":
        return self

    async def __aexit__(self, *_: object) -> None:
        for pod in self._pods:
            if pod.process.returncode is None:
                pod.process.kill()
                await pod.process.wait()

    def name(self, host: str, address: str) -> None:
        """Has a name lead to an address, as the cluster's DNS does."""
        self._names[host] = address

    def secret(self, name: str, content: Mapping[str, str]) -> None:
        """Adds a secret, or a map of configuration."""
        self._secrets[name] = content

    async def start(self, name: str, spec: Manifest, address: str = "127.0.0.1", prefix: tuple[str, ...] = ()) -> Pod:
        """Starts the only container of a pod; `prefix` comes before its command."""
        (container,) = spec["containers"]
        folder = self._folder / name
        folder.mkdir()
        mounts = self._mounted(spec, container, folder)
        environment: dict[str, str] = {}
        for variable in container["env"]:
            value = self._value(variable, name)
            value = re.sub(r"\$\(([A-Z_]+)\)", lambda found: environment[found[1]], value)
            environment[variable["name"]] = self._placed(value, mounts, address)
        log = folder / "log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *prefix,
                *(self._placed(word, mounts, address) for word in container["command"]),
                *container.get("args", []),
                # As in an image, where there is nothing but this.
                env={"PATH": str(Path(sys.executable).parent), "HOME": str(folder), **environment},
                cwd=folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        pod = Pod(name, address, container, spec.get("terminationGracePeriodSeconds", 30), process, log)
        self._pods.append(pod)
        return pod

    def _value(self, variable: dict[str, Any], pod: str) -> str:
        source = variable.get("valueFrom")
        if source is None:
            return str(variable["value"])
        if "secretKeyRef" in source:
            return self._secrets[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]
        assert source["fieldRef"]["fieldPath"] == "metadata.name"
        return pod

    def _mounted(self, spec: Manifest, container: Manifest, folder: Path) -> dict[str, str]:
        """Folders here, by the paths at which they are mounted."""
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        made = {}
        for mount in container.get("volumeMounts", []):
            place = folder / mount["name"]
            place.mkdir()
            volume = volumes.get(mount["name"], {})
            name = volume.get("secret", {}).get("secretName") or volume.get("configMap", {}).get("name")
            for key, value in self._secrets[name].items() if name else ():
                (place / key).write_text(self._named(value))
            made[mount["mountPath"]] = str(place)
        return made

    def _placed(self, value: str, mounts: Mapping[str, str], address: str) -> str:
        for path, place in mounts.items():
            if value == path or value.startswith(path + "/"):
                value = place + value.removeprefix(path)
        return self._named(value).replace("0.0.0.0:", f"{address}:")

    def _named(self, value: str) -> str:
        for name, there in self._names.items():
            value = value.replace(name, there)
        return value


def spare(environ: Mapping[str, str] = os.environ) -> int:
    """A number for the third part of addresses, so that tests that run side by side do not meet."""
    worker = environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return 10 + int(worker)
