"""The command line of a service, run as the process that it is."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

SERVICE = """
import asyncio
import logging
import sys
from dataclasses import dataclass
from typing import Annotated

import msgspec

from mesh.config import setting
from mesh.process import main


@dataclass(frozen=True)
class Config:
    database_url: str = setting("T_DATABASE_URL", "PostgreSQL of the toy", secret=True)
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = setting("T_PORT", "gRPC port", default=7002)
    mode: str = setting("T_MODE", "what the toy does", default="wait")


async def serve(config: Config, stop: asyncio.Event) -> None:
    print("serving on", type(asyncio.get_running_loop()).__module__, flush=True)
    asyncio.create_task(whisper())
    if config.mode == "fail":
        raise OSError("port 7002 is in use")
    if config.mode == "fail-in-group":
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())
    await stop.wait()
    print("stopping", flush=True)
    if config.mode == "hang":
        await asyncio.Event().wait()
    print("stopped", flush=True)


async def whisper() -> None:
    while True:
        logging.getLogger("toy").debug("psst")
        await asyncio.sleep(0.01)


async def fail() -> None:
    raise RuntimeError("postgresql://toy:hunter2@db/toy is gone")


main("toy", Config, MIGRATIONS, serve)
"""
URL = "postgresql://toy:hunter2@db/toy"


@pytest.fixture
def toy(tmp_path: Path) -> list[str]:
    script = tmp_path / "toy.py"
    script.write_text(SERVICE.replace("MIGRATIONS", "None"))
    return [sys.executable, str(script)]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False, env=environment(**variables)
    )


@asynccontextmanager
async def started(command: list[str], **variables: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(T_DATABASE_URL=URL, **variables),
    )
    try:
        async with asyncio.timeout(30):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def next_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()


@pytest.mark.parametrize("command", [[], ["serve"], ["check-config"]])
def test_a_wrong_configuration_names_every_wrong_variable_and_exits_2(toy: list[str], command: list[str]) -> None:
    done = run(toy + command, T_PORT="many")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "toy cannot start, its configuration is wrong:",
        "  T_DATABASE_URL wants text: it is not set (PostgreSQL of the toy)",
        "  T_PORT wants an integer, at least 1, at most 65535: it is 'many'",
    ]


def test_check_config_shows_every_variable_and_no_secret(toy: list[str]) -> None:
    done = run([*toy, "check-config"], T_DATABASE_URL=URL, T_PORT="81")
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["T_DATABASE_URL  ********", "T_PORT          81", "T_MODE          wait"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_it_stop_in_good_order(toy: list[str], number: signal.Signals) -> None:
    async with started(toy) as process:
        assert await next_line(process) == "serving on uvloop"
        process.send_signal(number)
        output, _ = await process.communicate()
        assert output == b"stopping\nstopped\n"
        assert process.returncode == 0


async def test_a_second_signal_ends_what_hangs(toy: list[str]) -> None:
    async with started(toy, T_MODE="hang") as process:
        await next_line(process)
        process.send_signal(signal.SIGTERM)
        assert await next_line(process) == "stopping"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 1


async def test_a_signal_has_everything_logged_and_the_next_one_no_more(toy: list[str]) -> None:
    async with started(toy) as process:
        await next_line(process)
        stderr = process.stderr
        assert stderr is not None

        async def message() -> str:
            return str(json.loads(await stderr.readline())["message"])

        assert await message() == "toy is starting"
        process.send_signal(signal.SIGUSR1)
        assert await message() == "toy logs at DEBUG from now on"
        assert [await message() for _ in range(3)] == ["psst"] * 3
        process.send_signal(signal.SIGUSR1)
        while (told := await message()) == "psst":
            pass
        assert told == "toy logs at INFO from now on"
        process.send_signal(signal.SIGTERM)
        assert await message() == "toy is stopping on SIGTERM"


def test_a_failure_is_told_in_the_log_without_secrets_and_exits_1(toy: list[str]) -> None:
    done = run(toy, T_DATABASE_URL=URL, T_MODE="fail")
    assert done.returncode == 1
    assert json.loads(done.stderr.splitlines()[-1])["message"] == "toy stopped: port 7002 is in use"

    done = run(toy, T_DATABASE_URL=URL, T_MODE="fail-in-group")
    assert done.returncode == 1
    line = json.loads(done.stderr.splitlines()[-1])
    assert line["message"] == "toy stopped: postgresql://[redacted]@db/toy is gone"
    assert "hunter2" not in done.stderr + done.stdout


def test_a_service_without_a_database_has_no_migrate(toy: list[str]) -> None:
    done = run([*toy, "migrate"], T_DATABASE_URL=URL)
    assert done.returncode == 2
    assert "invalid choice: 'migrate'" in done.stderr
