"""`python -m deploy.local` as a person runs it and stops it; that it serves is shown by the end-to-end tests."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deploy.local.ports import free_port
from deploy.local.state import State
from deploy.local.supervisor import MARKER


@asynccontextmanager
async def command(
    root: Path, port: int, *options: str, output: int = asyncio.subprocess.PIPE
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.local", "--port", str(port), *options),
        env={**os.environ, "AIAAS_STATE_DIR": str(root)},
        stdout=output,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def processes_of(root: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"{MARKER}={root}".encode() in environment:
                found.append((entry / "cmdline").read_text().replace("\0", " "))
    return found


async def started(process: asyncio.subprocess.Process) -> None:
    """Returns once a first part is ready."""
    assert process.stdout
    async with asyncio.timeout(60):
        while "✓" not in (await process.stdout.readline()).decode():
            assert process.returncode is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_stopping_while_it_starts_leaves_nothing(state: State, number: signal.Signals) -> None:
    root = state.root / "stack"
    async with command(root, free_port()) as process:
        await started(process)
        assert processes_of(root)
        # An impatient person presses Ctrl-C again.
        for _ in range(3):
            process.send_signal(number)
            await asyncio.sleep(0.05)
        async with asyncio.timeout(60):
            output, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert "Stopping." in output.decode()
    assert processes_of(root) == []
    assert list((root / "run").iterdir()) == []


async def test_closing_the_terminal_while_it_starts_leaves_nothing(state: State) -> None:
    root = state.root / "stack"
    reader, writer = os.pipe()
    async with command(root, free_port(), output=writer) as process:
        os.close(writer)
        while b"\n" not in await asyncio.to_thread(os.read, reader, 1000):
            assert process.returncode is None
        os.close(reader)
        process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(60):
            assert await process.wait() == 0
    assert processes_of(root) == []


async def test_next_start_ends_what_a_killed_stack_left(state: State) -> None:
    root = state.root / "stack"
    async with command(root, free_port()) as process:
        await started(process)
        process.kill()
        await process.communicate()
    assert processes_of(root)
    async with command(root, free_port()) as process:
        await started(process)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(60):
            await process.communicate()
    assert processes_of(root) == []


async def test_public_port_in_use_is_a_sentence_and_leaves_nothing(state: State) -> None:
    root = state.root / "stack"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with command(root, port) as process:
            _, errors = await process.communicate()
    assert process.returncode == 1
    assert f"Port {port} is in use: stop what listens there" in errors.decode()
    assert "Traceback" not in errors.decode()
    assert processes_of(root) == []


async def test_unknown_engine_is_a_sentence_and_leaves_nothing(state: State) -> None:
    root = state.root / "stack"
    async with command(root, free_port(), "--engine", "abacus") as process:
        _, errors = await process.communicate()
    assert process.returncode == 1
    assert "choose ENGINE=llamacpp or ENGINE=vllm" in errors.decode()
    assert "Traceback" not in errors.decode()
    assert processes_of(root) == []
