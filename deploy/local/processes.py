"""Other processes as /proc shows them: who lives, who descends from whom; never starts one."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One process for good: its id can come back, its id and start time together cannot."""

    pid: int
    # Clock ticks since the machine started.
    started: int


@dataclass(frozen=True)
class _Entry:
    process: Process
    parent: int
    session: int
    gone: bool


def find(pid: int) -> Process | None:
    """The living process with this id, or None."""
    entry = _entry(pid)
    return entry.process if entry and not entry.gone else None


def lives(process: Process) -> bool:
    """Whether it still runs; one that has ended but was not waited for does not."""
    return find(process.pid) == process


def family(pid: int) -> set[Process]:
    """The living processes that descend from this one or belong to the session that it leads, itself included."""
    entries = [entry for entry in map(_entry, _pids()) if entry and not entry.gone]
    members = {pid} | {entry.process.pid for entry in entries if entry.session == pid}
    grown = True
    while grown:
        children = {entry.process.pid for entry in entries if entry.parent in members}
        grown = not children <= members
        members |= children
    return {entry.process for entry in entries if entry.process.pid in members}


def environment(process: Process) -> list[str]:
    """The environment that it was started with, as NAME=value; empty where it cannot be read."""
    try:
        text = Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
    except OSError:
        return []
    return text.split("\0")


async def end(processes: Iterable[Process], *, first: signal.Signals, limit_s: float) -> None:
    """Ends processes that are no longer anybody's: the given signal, then SIGKILL after the limit."""
    remaining = list(processes)
    for number, wait_s in ((first, limit_s), (signal.SIGKILL, 5.0)):
        for process in remaining:
            if lives(process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            remaining = [process for process in remaining if lives(process)]
            if not remaining:
                return
            await asyncio.sleep(0.02)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _entry(pid: int) -> _Entry | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold anything, so the fields are counted from its end (proc(5)).
    fields = text.rpartition(")")[2].split()
    return _Entry(
        Process(pid, started=int(fields[19])), parent=int(fields[1]), session=int(fields[3]), gone=fields[0] in "ZX"
    )
