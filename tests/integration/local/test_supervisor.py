"""The supervisor with real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from textwrap import dedent

import pytest

from deploy.local import processes
from deploy.local.errors import LocalError
from deploy.local.state import State
from deploy.local.supervisor import Event, Program, Supervisor

# Says that it is ready with a file, then sleeps.
SLEEPER = "touch ready; exec sleep 600"
# Starts a child in a session of its own, which no signal to the group reaches.
WITH_ESCAPED_CHILD = "setsid sleep 601 & touch ready; wait"
STUBBORN = "trap '' TERM INT; touch ready; while :; do sleep 0.1; done"


def program(state: State, script: str, name: str = "sleeper", **changes: object) -> Program:
    folder = state.folder(name)

    async def probe() -> None:
        if not (folder / "ready").exists():
            raise ConnectionRefusedError

    fields = {
        "name": name,
        "command": ("/bin/sh", "-c", script),
        "folder": folder,
        "account": state.account,
        "probe": probe,
        "stop_limit_s": 0.5,
    }
    return Program(**(fields | changes))  # type: ignore[arg-type]


async def until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.01)


async def test_program_is_ready_only_once_its_probe_succeeds(state: State, supervisor: Supervisor) -> None:
    await supervisor.start(program(state, "sleep 0.3; " + SLEEPER))
    assert (state.root / "sleeper" / "ready").exists()
    assert supervisor.pid("sleeper")


async def test_killed_child_comes_back(state: State, supervisor: Supervisor, events: list[Event]) -> None:
    await supervisor.start(program(state, SLEEPER))
    first = supervisor.pid("sleeper")
    assert first
    os.kill(first, signal.SIGKILL)
    await until(lambda: supervisor.pid("sleeper") not in (first, None))
    await supervisor.ready("sleeper")
    assert [event.what for event in events] == ["starting", "ready", "died", "starting", "ready"]
    assert events[2].status == -signal.SIGKILL


async def test_pauses_grow_between_restarts(state: State, supervisor: Supervisor, events: list[Event]) -> None:
    await supervisor.start(program(state, "echo life >>lives; touch ready; sleep 0.1; exit 3"))
    lives = state.root / "sleeper" / "lives"
    began = time.monotonic()
    await until(lambda: lives.read_text().count("life") == 4)
    # 0.2 s, 0.4 s and 0.8 s, and the lives between them.
    assert time.monotonic() - began > 1.4
    assert any(event.what == "died" and event.status == 3 for event in events)


async def test_program_that_ends_at_once_is_an_error_with_the_end_of_its_log(
    state: State, supervisor: Supervisor
) -> None:
    with pytest.raises(LocalError, match=r"ended at once with status 7.*\n.*no such setting"):
        await supervisor.start(program(state, "echo no such setting; exit 7"))


async def test_program_that_does_not_exist_is_an_error(state: State, supervisor: Supervisor) -> None:
    with pytest.raises(LocalError, match="could not be started"):
        await supervisor.start(program(state, "", command=("/nonexistent/program",)))


async def test_program_that_never_gets_ready_is_ended_and_an_error(state: State, supervisor: Supervisor) -> None:
    with pytest.raises(LocalError, match=r"was not ready within 0 s"):
        await supervisor.start(program(state, "echo $$ >pid; exec sleep 600", start_limit_s=0.4))
    assert processes.find(int((state.root / "sleeper" / "pid").read_text())) is None


async def test_stop_leaves_nothing_not_even_a_child_with_a_session_of_its_own(state: State) -> None:
    async with Supervisor(state) as supervisor:
        await supervisor.start(program(state, WITH_ESCAPED_CHILD))
        pid = supervisor.pid("sleeper")
        assert pid
        await until(lambda: len(processes.family(pid)) == 2)
        family = processes.family(pid)
    assert not any(processes.lives(process) for process in family)
    assert list((state.root / "run").iterdir()) == []


async def test_child_that_ignores_signals_is_killed(state: State) -> None:
    async with Supervisor(state) as supervisor:
        await supervisor.start(program(state, STUBBORN))
        pid = supervisor.pid("sleeper")
        assert pid
        began = time.monotonic()
    assert processes.find(pid) is None
    assert 0.5 <= time.monotonic() - began < 5


async def test_suspended_child_is_ended(state: State) -> None:
    async with Supervisor(state) as supervisor:
        await supervisor.start(program(state, SLEEPER, stop_limit_s=30.0))
        pid = supervisor.pid("sleeper")
        assert pid
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
    assert processes.find(pid) is None
    assert time.monotonic() - began < 5


async def test_programs_end_before_those_they_need(state: State, events: list[Event]) -> None:
    async with Supervisor(state, events.append) as supervisor:
        await supervisor.start(program(state, SLEEPER, "database"))
        await supervisor.start(program(state, SLEEPER, "service", needs=("database",)))
        await supervisor.start(program(state, SLEEPER, "edge", needs=("service",)))
    assert [event.name for event in events if event.what == "stopped"] == ["edge", "service", "database"]


async def test_one_program_can_be_stopped_and_started_again(state: State, supervisor: Supervisor) -> None:
    sleeper = program(state, SLEEPER)
    await supervisor.start(sleeper)
    await supervisor.start(program(state, SLEEPER, "service", needs=("sleeper",)))
    await supervisor.stop("sleeper")
    assert supervisor.pid("service")
    await supervisor.start(sleeper)
    assert supervisor.pid("sleeper")


async def test_cancelling_twice_while_it_stops_leaves_nothing(state: State) -> None:
    pids: list[int] = []

    async def run() -> None:
        async with Supervisor(state) as supervisor:
            await supervisor.start(program(state, STUBBORN))
            pids.append(supervisor.pid("sleeper") or 0)
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await until(lambda: pids)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.05)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert processes.find(pids[0]) is None


async def test_child_gets_nothing_of_the_callers_environment(
    state: State, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "x")
    await supervisor.start(program(state, "env >variables; " + SLEEPER, environment={"OWN": "1"}))
    variables = (state.root / "sleeper" / "variables").read_text()
    assert "OWN=1" in variables
    assert "SECRET_OF_THE_CALLER" not in variables


async def test_next_start_ends_what_a_killed_supervisor_left(state: State) -> None:
    folder = state.folder("sleeper")
    script = dedent(f"""
        import asyncio
        from pathlib import Path
        from deploy.local.state import State
        from deploy.local.supervisor import Program, Supervisor

        async def ready():
            assert (Path({str(folder)!r}) / "ready").exists()

        async def main():
            state = State(Path({str(state.root)!r}), None)
            async with Supervisor(state) as supervisor:
                await supervisor.start(Program(
                    name="sleeper", command=("/bin/sh", "-c", {WITH_ESCAPED_CHILD!r}),
                    folder=Path({str(folder)!r}), probe=ready,
                ))
                print(supervisor.pid("sleeper"), flush=True)
                await asyncio.Event().wait()

        asyncio.run(main())
    """)
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    assert killed.stdout
    pid = int(await killed.stdout.readline())
    await until(lambda: len(processes.family(pid)) == 2)
    left = processes.family(pid)
    killed.kill()
    await killed.wait()
    assert all(processes.lives(process) for process in left)
    async with Supervisor(state):
        assert not any(processes.lives(process) for process in left)


async def test_a_stranger_with_the_id_of_a_dead_child_is_left_alone(state: State) -> None:
    stranger = await asyncio.create_subprocess_exec("/bin/sleep", "60", start_new_session=True)
    state.save("run/old.json", {"pid": stranger.pid, "started": 1, "stop_signal": 15, "stop_limit_s": 1.0})
    async with Supervisor(state):
        assert processes.find(stranger.pid)
    stranger.kill()
    await stranger.wait()
