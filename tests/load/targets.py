"""What can be measured, ours and others', started and pinned behind one face; it never measures or judges.

Everything under test runs on one core (TARGET_CORE), everything else on another (LOAD_CORE): generator, fake engine,
PostgreSQL, Valkey, RabbitMQ, identity, analytics.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.local.processes import family
from tests.load.native import CHECKOUT, HERE, FakeEngine, LoadError, pin, probe
from tests.load.peers import PEERS, running_peer

LOAD_CORE, TARGET_CORE = 0, 1
DIRECT, TWO_PROCESSES, ONE_PROCESS = "direct", "aiaas", "aiaas-one-process"
TARGETS = (DIRECT, *PEERS, ONE_PROCESS, TWO_PROCESSES)


def take_core(core: int = LOAD_CORE) -> None:
    """Binds this process, and with it all that it starts, to a core; SIGTERM ends it as Ctrl-C does, in good order.

    Raises LoadError when there is one core only.
    """
    if len(os.sched_getaffinity(0)) < 2:
        raise LoadError("Two cores are needed: one for what is measured, one for the load.")
    os.sched_setaffinity(0, {core})
    # A thousand streams are a thousand files, and for a proxy twice that.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that answers on a port."""

    name: str
    port: int
    headers: tuple[str, ...] = ()
    # Its processes by name, as they are now.
    pids: Callable[[], dict[str, list[int]]]
    # Those whose CPU and memory are its price; the others are told beside it.
    counted: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Platform:
    """A platform of ours that runs, with a tenant that no limit stops."""

    state: Path
    port: int
    gateway_port: int | None
    admin_key: str
    organization_id: str
    secret: str
    # host:port of the router's /metrics.
    router_ops: str
    # What its collector of traces has got; filled when the platform has ended.
    spans: list[int]

    @property
    def headers(self) -> tuple[str, ...]:
        """What a request of the tenant carries."""
        return (f"Authorization: Bearer {self.secret}",)

    def pids(self, part: str) -> list[int]:
        """The processes of a part as they are now, by the local stack's own record; none while it is away."""
        try:
            leader = int(json.loads((self.state / "run" / f"{part}.json").read_text())["pid"])
        except FileNotFoundError:
            return []
        return sorted(process.pid for process in family(leader))

    def target(self, name: str, port: int, parts: tuple[str, ...]) -> Target:
        """Those of its parts that a request goes through, as one target."""

        def pids() -> dict[str, list[int]]:
            found = {part: self.pids(part) for part in (*parts, "valkey")}
            for part in parts:
                for pid in found[part]:
                    pin(pid, TARGET_CORE)
            return found

        return Target(name=name, port=port, headers=self.headers, pids=pids, counted=parts)

    def targets(self) -> dict[str, Target]:
        """Its targets by name."""
        found = {TWO_PROCESSES: self.target(TWO_PROCESSES, self.port, ("edge", "router"))}
        if self.gateway_port is not None:
            found[ONE_PROCESS] = self.target(ONE_PROCESS, self.gateway_port, ("gateway",))
        return found


@contextlib.contextmanager
def running_platform(
    engine_port: int, root: Path = CHECKOUT, settings: Mapping[str, str] | None = None
) -> Iterator[Platform]:
    """Starts the platform of the checkout at `root` on LOAD_CORE, `settings` added to every service's environment.

    Raises LoadError with what it said if it cannot.
    """
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'gen' / 'python'}", "GRPC_ENABLE_FORK_SUPPORT": "0"}
    process = subprocess.Popen(
        [
            *("taskset", "-c", str(LOAD_CORE), sys.executable, str(HERE / "host.py")),
            *(str(engine_port), str(root), json.dumps(dict(settings or {}))),
        ],
        env=environment,
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Ctrl-C is for us; it ends with its input.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    spans: list[int] = []
    try:
        line = process.stdout.readline()
        if not line:
            raise LoadError(f"The platform of {root} did not start; what it said stands above.")
        ready: dict[str, Any] = json.loads(line)
        yield Platform(
            Path(ready["state"]),
            ready["port"],
            ready["gateway_port"],
            ready["admin_key"],
            ready["organization_id"],
            ready["secret"],
            ready["router_ops"],
            spans,
        )
    finally:
        # The end of its input tells it to stop; a stack takes a while.
        process.stdin.close()
        if last := process.stdout.readline():
            spans.append(json.loads(last)["spans"])
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(30)


@contextlib.contextmanager
def running_targets(names: list[str], engine: FakeEngine) -> Iterator[tuple[dict[str, Target], dict[str, str]]]:
    """Starts the named targets; those that run, by name, and why each of the others does not."""
    with contextlib.ExitStack() as stack:
        targets: dict[str, Target] = {}
        missing: dict[str, str] = {}
        ours: dict[str, Target] = {}
        if {TWO_PROCESSES, ONE_PROCESS} & set(names):
            ours = stack.enter_context(running_platform(engine.port)).targets()
        for name in names:
            if name == DIRECT:
                targets[name] = Target(
                    name=name, port=engine.port, pids=lambda: {DIRECT: [engine.pid]}, counted=(DIRECT,)
                )
            elif name in ours:
                try:
                    probe(ours[name].port, ours[name].headers)
                except LoadError as error:
                    missing[name] = str(error)
                else:
                    targets[name] = ours[name]
            elif name == ONE_PROCESS:
                missing[name] = "there is no gateway that starts"
            else:
                try:
                    peer = stack.enter_context(running_peer(PEERS[name], engine.port, TARGET_CORE))
                except LoadError as error:
                    missing[name] = str(error)
                    continue
                targets[name] = Target(
                    name=name,
                    port=peer.port,
                    headers=peer.peer.headers,
                    pids=lambda name=name, peer=peer: {name: peer.pids()},  # type: ignore[misc]
                    counted=(name,),
                    left_out=peer.peer.left_out,
                )
        yield targets, missing
