"""The two C programs, compiled where they are new, and what they print as types; it never decides what is measured."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
# Everything that the benchmark installs, builds and keeps; git ignores it.
WORKSHOP = CHECKOUT / ".bench"
FLAGS = ("-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror")
PROBE_LIMIT_S = 10.0
# The engine serves this model and no other.
MODEL = "m"


class LoadError(Exception):
    """The benchmark cannot do what it was asked; the message says what to do about it."""


def build(name: str, folder: Path = WORKSHOP / "bin") -> Path:
    """The program `name` (fake_engine or load_generator), compiled from its source unless that was done before.

    Raises LoadError without a C compiler, or with what it says.
    """
    source, program = HERE / f"{name}.c", folder / name
    if program.exists() and program.stat().st_mtime_ns > source.stat().st_mtime_ns:
        return program
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise LoadError("There is no C compiler: install gcc and libc6-dev (apt-get install gcc libc6-dev).")
    folder.mkdir(parents=True, exist_ok=True)
    # Under its name only when it is whole, as others may build at the same time.
    with tempfile.TemporaryDirectory(dir=folder) as private:
        new = Path(private) / name
        done = subprocess.run(
            [compiler, *FLAGS, "-o", str(new), str(source)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise LoadError(f"{source.name} does not compile:\n{done.stderr}")
        new.replace(program)
    return program


@dataclass(frozen=True)
class FakeEngine:
    """A fake engine that runs."""

    port: int
    pid: int

    @property
    def base_url(self) -> str:
        """Its address, without a path."""
        return f"http://127.0.0.1:{self.port}"

    def stats(self) -> dict[str, int]:
        """How many streams are open, and how many requests there were."""
        with urllib.request.urlopen(f"{self.base_url}/stats", timeout=5) as answer:
            document: dict[str, int] = json.load(answer)
        return document


@contextlib.contextmanager
def fake_engine(core: int | None = None, program: Path | None = None) -> Iterator[FakeEngine]:
    """Runs a fake engine on a free port, on one core where one is named, until the end of the block."""
    command = [*on_core(core), str(program or build("fake_engine")), "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield FakeEngine(int(process.stdout.readline()), process.pid)
    finally:
        process.kill()
        process.communicate()


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the generator is told; the meaning of each is in load_generator.c."""

    port: int
    body: Mapping[str, Any]
    path: str = "/v1/chat/completions"
    headers: Sequence[str] = ()
    connections: int = 1
    rate: float = 0
    spread_s: float = 0
    warm_s: float = 1
    window_s: float = 5
    timeout_s: float = 30
    slow: int = 0
    slow_bytes_per_s: float = 1000
    count: str = "tokens"
    # Process ids by name.
    processes: Mapping[str, Sequence[int]] = field(default_factory=dict)


class Spread(msgspec.Struct, frozen=True):
    """Milliseconds of many samples; zeros where there were none."""

    count: int
    p50: float
    p95: float
    p99: float
    max: float


class ProcessUse(msgspec.Struct, frozen=True):
    """What a group of processes spent in the window, and held at its end."""

    cpu_s: float
    # Ready to run, while something else ran on their core.
    waited_s: float
    rss_bytes: int


class Measurement(msgspec.Struct, frozen=True):
    """What the generator saw in its window."""

    window_s: float
    requests: int
    chunks: int
    bytes: int
    # Answered with another status than 2xx; broken off, or streams without [DONE]; not ended in time; never sent.
    refused: int
    broken: int
    timed_out: int
    unsent: int
    # Slow readers that were cut off, which is no error.
    slow_cut: int
    # The longest time between two chunks of one stream.
    stall_ms: float
    latency_ms: Spread
    ttfb_ms: Spread
    lag_ms: Spread
    slow_lag_ms: Spread
    late_ms: Spread
    generator_cpu: float
    generator_share: float
    generator_limits: bool
    # The beginning of the first answer that was an error.
    error_sample: str
    processes: dict[str, ProcessUse]

    @property
    def errors(self) -> int:
        """Requests that did not get their whole answer."""
        return self.refused + self.broken + self.timed_out + self.unsent


def run_load(load: Load, core: int | None = None, program: Path | None = None) -> Measurement:
    """Applies the load, from one core where one is named; takes warm-up and window, and what is owed after it.

    Raises LoadError with the generator's own words when it fails.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as body:
        json.dump(load.body, body)
        body.flush()
        command = [*on_core(core), str(program or build("load_generator")), "--body", body.name]
        for name in ("port", "path", "connections", "rate", "spread_s", "warm_s", "window_s", "timeout_s", "slow"):
            command += [f"--{name}", str(getattr(load, name))]
        command += ["--slow_bytes_per_s", str(load.slow_bytes_per_s), "--count", load.count]
        for header in load.headers:
            command += ["--header", header]
        for name, pids in load.processes.items():
            command += ["--processes", f"{name}={':'.join(map(str, pids))}"]
        limit_s = load.warm_s + load.window_s + load.timeout_s + 30
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    if done.returncode:
        raise LoadError(f"The load generator ended with status {done.returncode}: {done.stderr.strip()}")
    return msgspec.json.decode(done.stdout, type=Measurement)


def probe(port: int, headers: Sequence[str]) -> None:
    """Has one request answered. Raises LoadError with what came instead."""
    named = dict(header.split(": ", 1) for header in headers) | {"Content-Type": "application/json"}
    body = json.dumps(chat_body(tokens=1, stream=False)).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body, named)
    try:
        with urllib.request.urlopen(request, timeout=PROBE_LIMIT_S):
            pass
    except urllib.error.HTTPError as error:
        raise LoadError(f"it answers {error.code}: {error.read(300).decode(errors='replace')}") from error
    except OSError as error:
        raise LoadError(f"it does not answer ({error})") from error


def chat_body(
    *, tokens: int, stream: bool = True, pace_ms: int = 20, step: bool = False, model: str = MODEL
) -> dict[str, Any]:
    """A chat completion; the prompt holds the words that the fake engine obeys."""
    system = "You are a helpful assistant."
    question = "Tell me something about foxes and dogs, please, in a few short sentences."
    body = {
        "model": model,
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": f"{question} pace_ms={pace_ms} step={int(step)}"},
        ],
        "max_tokens": tokens,
        "temperature": 0.7,
    }
    return body | {"stream": True, "stream_options": {"include_usage": True}} if stream else body


def on_core(core: int | None) -> tuple[str, ...]:
    """What a command begins with so that it runs on one core, and ends with whoever started it."""
    bound = () if core is None else ("taskset", "-c", str(core))
    return ("setpriv", "--pdeathsig", "TERM", *bound)


def pin(pid: int, core: int) -> None:
    """Binds every thread of a process to one core; threads made later inherit it."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), {core})
