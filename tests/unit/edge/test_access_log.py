"""The access log against real pipes and files: its lines, its order, readers that do not keep up."""

import asyncio
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge.access_log import AccessLog
from edge.exchange import Exchange, Limits
from mesh.errors import Reason

BACKLOG_BYTES = 1 << 20


class Pipe:
    """A pipe that a test reads when it wants to."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def read(self) -> bytes:
        """All that is in it now."""
        pieces = []
        while select.select([self.reader], [], [], 0)[0] and (piece := os.read(self.reader, 1 << 20)):
            pieces.append(piece)
        return b"".join(pieces)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    for descriptor in (made.reader, made.writer):
        try:
            os.close(descriptor)
        except OSError:
            # A test has closed it.
            continue


def ended(request_id: str = "req_1", reason: Reason | None = None, trace_id: str = "") -> Exchange:
    """A request that was answered."""
    scope = {"type": "http", "method": "POST", "headers": [(b"x-request-id", request_id.encode())]}
    exchange = Exchange(scope, None, None, Limits(1, 1, 1), lambda elapsed_s: [])  # type: ignore[arg-type]
    exchange.route = "/v1/chat/completions"
    exchange.status = 200
    exchange.reason = reason
    exchange.trace_id = trace_id
    return exchange


def lines(written: bytes) -> list[dict[str, Any]]:
    assert written.endswith(b"\n")
    return [msgspec.json.decode(line) for line in written.splitlines()]


async def until_written(pipe: Pipe, within_s: float = 5.0) -> bytes:
    async with asyncio.timeout(within_s):
        while not (written := pipe.read()):
            await asyncio.sleep(0.01)
    return written


async def test_line_has_the_fields_of_every_other_log_line_in_their_order(pipe: Pipe) -> None:
    AccessLog("edge", pipe.writer).write(ended(reason=Reason.CANCELLED, trace_id="4bf9"), 0.01234)
    (line,) = lines(await until_written(pipe))
    timestamp = line["timestamp"]
    assert len(timestamp) == len("2026-11-23T03:25:32.456Z")
    assert list(line.items()) == [
        ("timestamp", timestamp),
        ("level", "info"),
        ("service", "edge"),
        ("logger", "edge.access"),
        ("message", "request"),
        ("request_id", "req_1"),
        ("trace_id", "4bf9"),
        ("duration_ms", 12.3),
        ("method", "POST"),
        ("reason", "cancelled"),
        ("route", "/v1/chat/completions"),
        ("status", 200),
    ]


async def test_lines_leave_together_and_in_order(pipe: Pipe) -> None:
    log = AccessLog("edge", pipe.writer)
    for number in range(10):
        log.write(ended(f"req_{number}"), 0.0)
    assert pipe.read() == b""
    written = lines(await until_written(pipe))
    assert [line["request_id"] for line in written] == [f"req_{number}" for number in range(10)]


async def test_every_write_to_a_pipe_is_whole_lines_that_it_takes_at_once(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[bytes] = []

    def write(descriptor: int, piece: Any) -> int:
        pieces.append(bytes(piece))
        return len(piece)

    monkeypatch.setattr(os, "write", write)
    log = AccessLog("edge", pipe.writer)
    for _ in range(100):
        log.write(ended(), 0.0)
    log.close()
    assert sum(len(lines(piece)) for piece in pieces) == 100
    assert all(len(piece) <= select.PIPE_BUF for piece in pieces)


async def test_blocked_reader_delays_lines_and_nothing_else(pipe: Pipe) -> None:
    log = AccessLog("edge", pipe.writer)
    for number in range(2000):
        log.write(ended(f"req_{number}"), 0.0)
    written = b""
    async with asyncio.timeout(5):
        while written.count(b"\n") < 2000:
            written += pipe.read()
            await asyncio.sleep(0.01)
    assert [line["request_id"] for line in lines(written)] == [f"req_{number}" for number in range(2000)]


async def test_lines_beyond_the_backlog_are_lost_and_counted(pipe: Pipe) -> None:
    log = AccessLog("edge", pipe.writer)
    for number in range(10_000):
        log.write(ended(f"req_{number}"), 0.0)
    written = b""
    async with asyncio.timeout(5):
        while len(written) < BACKLOG_BYTES:
            written += pipe.read()
            await asyncio.sleep(0.01)
    log.write(ended("req_last"), 0.0)
    log.close()
    told = lines(written + pipe.read())
    kept = [line["request_id"] for line in told if line["message"] == "request"]
    (loss,) = [line for line in told if line["message"] == "lines were lost"]
    assert kept == [*(f"req_{number}" for number in range(len(kept) - 1)), "req_last"]
    assert loss["lines"] == 10_000 - (len(kept) - 1)
    assert (loss["level"], told.index(loss)) == ("warning", len(told) - 2)


async def test_reader_that_is_gone_harms_nobody(pipe: Pipe) -> None:
    os.close(pipe.reader)
    log = AccessLog("edge", pipe.writer)
    for _ in range(1000):
        log.write(ended(), 0.0)
    log.close()


async def test_close_waits_for_a_reader_but_not_for_long(pipe: Pipe) -> None:
    log = AccessLog("edge", pipe.writer)
    for _ in range(2000):
        log.write(ended(), 0.0)
    loop = asyncio.get_running_loop()
    began = loop.time()
    log.close()
    assert loop.time() - began < 3
    assert pipe.read().count(b"\n") < 2000


async def test_file_gets_everything(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    try:
        log = AccessLog("edge", descriptor)
        for _ in range(1000):
            log.write(ended(), 0.0)
        log.close()
    finally:
        os.close(descriptor)
    assert len(lines((tmp_path / "log").read_bytes())) == 1000
