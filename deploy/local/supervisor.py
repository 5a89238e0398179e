"""Child processes: started, probed, started again when they die, and ended; never leaves one behind.

Each child leads a session of its own, so that Ctrl-C reaches the supervisor alone, and has a log file and a pid file in
the state folder. The pid files let the next start end what a killed supervisor left.
"""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from deploy.local import processes
from deploy.local.errors import LocalError
from deploy.local.processes import Process
from deploy.local.state import Account, State

FIRST_PAUSE_S = 0.2
LAST_PAUSE_S = 5.0
# A child that ran for so long is not failing again and again: its next pause is the first one.
SETTLED_S = 10.0
PROBE_EVERY_S = 0.05
PROBE_LIMIT_S = 5.0
LOG_BYTES = 16 << 20
# As much of a log as an error shows.
TAIL_LINES = 12
# What never served has nothing to finish, and may not listen to signals yet.
UNREADY_STOP_LIMIT_S = 3.0
# Set in the environment of every child, so that it can be recognised.
MARKER = "AIAAS_LOCAL_STATE"

Probe = Callable[[], Awaitable[object]]


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to run, how to tell that it is ready and how to end it."""

    name: str
    command: tuple[str, ...]
    # Working folder, home and place for temporary files.
    folder: Path
    # Succeeds once the program answers in its own protocol; raises until then.
    probe: Probe
    environment: Mapping[str, str] = field(default_factory=dict)
    # Whom it runs as; None means the caller.
    account: Account | None = None
    # Programs that must outlive it.
    needs: tuple[str, ...] = ()
    stop_signal: signal.Signals = signal.SIGTERM
    # Seconds after which what still runs gets SIGKILL.
    stop_limit_s: float = 10.0
    start_limit_s: float = 60.0


@dataclass(frozen=True)
class Event:
    """What happened to a part: starting, ready or done (after `seconds`), died (with its `status`), stopped."""

    name: str
    what: str
    seconds: float = 0.0
    status: int | None = None


class _Child:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.process: Process | None = None
        self.ready = asyncio.Event()
        self.stop = asyncio.Event()
        self.ended = asyncio.Event()
        # Why it ended before it was ever ready.
        self.trouble = ""


class Supervisor:
    """Runs programs in one state folder: `async with Supervisor(state) as supervisor: await supervisor.start(program)`.

    Leaving the block ends every child, however it is left; being cancelled meanwhile changes nothing.
    """

    def __init__(self, state: State, report: Callable[[Event], None] = lambda event: None) -> None:
        self._state = state
        self._report = report
        self._children: dict[str, _Child] = {}
        self._closing = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._root: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Supervisor":
        await self._end_leftovers()
        opened = asyncio.Event()
        self._root = asyncio.create_task(self._run(opened), name="supervisor")
        await opened.wait()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._root  # noqa: S101 - the block was entered
        self._closing.set()
        cancelled = False
        while not self._root.done():
            try:
                await asyncio.shield(self._root)
            except asyncio.CancelledError:
                cancelled = True
        if cancelled and error is None:
            raise asyncio.CancelledError
        self._root.result()

    async def start(self, program: Program) -> None:
        """Starts the program and returns once it is ready.

        Raises LocalError with the end of its log when it ends before that, or is not ready within its limit.
        """
        assert self._group  # noqa: S101 - the block was entered
        if program.name in self._children:
            raise ValueError(f"{program.name} runs already")
        child = self._children[program.name] = _Child(program)
        keeper = self._group.create_task(self._keep(child), name=f"keep {program.name}")
        ready = asyncio.create_task(child.ready.wait())
        try:
            await asyncio.wait((ready, keeper), timeout=program.start_limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if child.ready.is_set():
            return
        trouble = child.trouble or f"was not ready within {program.start_limit_s:.0f} s"
        await self.stop(program.name)
        log = self.log_path(program.name)
        raise LocalError(f"{program.name} {trouble}. The end of {log}:\n{_tail(log)}")

    async def stop(self, name: str) -> None:
        """Ends one program for good, and it alone."""
        child = self._children[name]
        child.stop.set()
        await child.ended.wait()
        self._children.pop(name, None)

    async def ready(self, name: str) -> None:
        """Returns once the program answers its probe, be it now or after it was started again."""
        await self._children[name].ready.wait()

    async def wait(self) -> None:
        """Returns when the supervisor ends; raises what made it end otherwise than by leaving its block."""
        assert self._root  # noqa: S101 - the block was entered
        await asyncio.shield(self._root)

    def pid(self, name: str) -> int | None:
        """The process id of a program that runs, else None."""
        process = self._children[name].process
        return process.pid if process else None

    def program(self, name: str) -> Program:
        """What was started under a name."""
        return self._children[name].program

    def log_path(self, name: str) -> Path:
        """Where the program's output goes."""
        return self._state.root / "logs" / f"{name}.log"

    async def _run(self, opened: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            opened.set()
            await self._closing.wait()
            for child in self._children.values():
                child.stop.set()

    async def _keep(self, child: _Child) -> None:
        """Runs one program until it is told to stop: again and again, once it was ready the first time."""
        settled = False
        pause_s = FIRST_PAUSE_S
        try:
            while not child.stop.is_set():
                began = time.monotonic()
                try:
                    was_ready, status = await self._run_once(child)
                    trouble = f"ended at once with status {status}"
                except OSError as error:
                    was_ready, status, trouble = False, None, f"could not be started ({error.strerror})"
                if child.stop.is_set():
                    return
                ran_s = time.monotonic() - began
                self._report(Event(child.program.name, "died", ran_s, status))
                settled = settled or was_ready
                if not settled:
                    child.trouble = trouble
                    return
                if ran_s > SETTLED_S:
                    pause_s = FIRST_PAUSE_S
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(child.stop.wait(), pause_s)
                pause_s = min(pause_s * 2, LAST_PAUSE_S)
        finally:
            self._pid_file(child.program.name).unlink(missing_ok=True)
            child.ended.set()

    async def _run_once(self, child: _Child) -> tuple[bool, int]:
        """One life of a program: whether it was ever ready, and its exit status."""
        program = child.program
        began = time.monotonic()
        self._report(Event(program.name, "starting"))
        process = await self._spawn(program)
        child.process = processes.find(process.pid)
        self._write_pid_file(child)
        ended = asyncio.create_task(process.wait())
        told = asyncio.create_task(child.stop.wait())
        probe = asyncio.create_task(self._probe(child, began))
        try:
            await asyncio.wait((ended, told), return_when=asyncio.FIRST_COMPLETED)
            if self._closing.is_set():
                await self._dependants_ended(program)
        finally:
            was_ready = child.ready.is_set()
            child.ready.clear()
            told.cancel()
            probe.cancel()
            await asyncio.gather(told, probe, return_exceptions=True)
            limit_s = program.stop_limit_s if was_ready else min(program.stop_limit_s, UNREADY_STOP_LIMIT_S)
            await _end(process.pid, ended, program.stop_signal, limit_s)
            child.process = None
            if child.stop.is_set():
                self._report(Event(program.name, "stopped", time.monotonic() - began, ended.result()))
        return was_ready, ended.result()

    async def _spawn(self, program: Program) -> asyncio.subprocess.Process:
        with _open_log(self.log_path(program.name)) as output:
            return await _execute(
                program.command,
                folder=program.folder,
                environment={MARKER: str(self._state.root), **program.environment},
                account=program.account,
                output=output,
            )

    async def _probe(self, child: _Child, began: float) -> None:
        while True:
            try:
                await asyncio.wait_for(child.program.probe(), PROBE_LIMIT_S)
                break
            except Exception:
                # Whatever a client library raises, it says that the program does not answer yet.
                await asyncio.sleep(PROBE_EVERY_S)
        child.ready.set()
        self._report(Event(child.program.name, "ready", time.monotonic() - began))

    async def _dependants_ended(self, program: Program) -> None:
        for other in list(self._children.values()):
            if program.name in other.program.needs:
                await other.ended.wait()

    def _write_pid_file(self, child: _Child) -> None:
        if child.process is None:
            # It has ended already.
            return
        record = {
            "pid": child.process.pid,
            "started": child.process.started,
            "stop_signal": child.program.stop_signal.value,
            "stop_limit_s": child.program.stop_limit_s,
        }
        path = self._pid_file(child.program.name)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(record))
        new.replace(path)

    def _pid_file(self, name: str) -> Path:
        folder = self._state.root / "run"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / f"{name}.json"

    async def _end_leftovers(self) -> None:
        """Ends what a supervisor that was killed left in this state folder."""
        pid_files = list(self._pid_file("any").parent.glob("*.json"))
        await asyncio.gather(*(self._end_leftover(json.loads(pid_file.read_text())) for pid_file in pid_files))
        # Only now: should ending them be broken off, the next start tries again.
        for pid_file in pid_files:
            pid_file.unlink()

    async def _end_leftover(self, record: dict[str, Any]) -> None:
        leader = Process(record["pid"], record["started"])
        family = processes.family(leader.pid)
        if not processes.lives(leader):
            # Its id may be another's by now: only what bears this folder's mark is ours.
            mark = f"{MARKER}={self._state.root}"
            family = {process for process in family if mark in processes.environment(process)}
        first, limit_s = signal.Signals(record["stop_signal"]), record["stop_limit_s"]
        await processes.end({leader} & family, first=first, limit_s=limit_s)
        await processes.end(family, first=signal.SIGTERM, limit_s=1.0)


async def run_to_end(
    *command: str, folder: Path, account: Account | None, environment: Mapping[str, str] | None = None
) -> str:
    """Runs a command to its end and returns what it printed to its standard output.

    Raises LocalError with the end of what it printed otherwise when it fails.
    """
    process = await _execute(
        command, folder=folder, environment=environment or {}, account=account, output=asyncio.subprocess.PIPE
    )
    ended = asyncio.create_task(process.wait())
    try:
        output, errors = await process.communicate()
    finally:
        await _end(process.pid, ended, signal.SIGTERM, 5.0)
    if process.returncode:
        trouble = (errors + output).decode(errors="replace").splitlines()[-TAIL_LINES:]
        what = " ".join((Path(command[0]).name, *command[1:4]))
        raise LocalError(f"{what} ended with status {process.returncode}:\n" + "\n".join(trouble))
    return output.decode()


async def _execute(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    account: Account | None,
    output: int | IO[bytes],
) -> asyncio.subprocess.Process:
    # Nothing of the caller's own environment: it may hold secrets and proxies.
    own = {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
        "LANG": "C.UTF-8",
        "HOME": str(folder),
        "TMPDIR": str(folder),
    }
    return await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={**own, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
        umask=0o077,
    )


async def _end(pid: int, ended: asyncio.Task[int], first: signal.Signals, limit_s: float) -> None:
    """Ends a child and all that it started."""
    family = processes.family(pid)
    if not ended.done():
        _signal_group(pid, first)
        # One that was suspended would not see the signal.
        _signal_group(pid, signal.SIGCONT)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(ended), limit_s)
    if not ended.done():
        _signal_group(pid, signal.SIGKILL)
        await ended
    await processes.end(family | processes.family(pid), first=signal.SIGTERM, limit_s=1.0)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _open_log(log: Path) -> IO[bytes]:
    log.parent.mkdir(mode=0o700, exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    return open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab")


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join(f"  {line}" for line in text.splitlines()[-TAIL_LINES:])
