"""Several processes of the edge on one address: what they share, what replaces one that dies, how they end."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from aiaas.router.v1 import inference_service_pb2 as pb
from edge import workers
from edge.config import EdgeConfig
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import CHAT, HEADERS, until

STREAM_HEAD = pb.InferResponse(head=pb.InferHead(content_type="text/event-stream"))


@dataclass
class Workers:
    """A parent with two workers, from outside."""

    process: asyncio.subprocess.Process
    port: int
    told: list[bytes] = field(default_factory=list)

    def children(self) -> list[int]:
        """The workers that live."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    async def get(self, path: str) -> httpx.Response:
        """The answer of some worker: each request has a connection of its own."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", trust_env=False) as client:
            return await client.get(path)

    async def count(self, route: str) -> float:
        """How many answers of a route the metrics tell of."""
        text = (await self.get("/metrics")).text
        return sum(float(count) for count in re.findall(rf'edge_requests_total{{route="{route}",.*}} (.*)', text))


def environment(peers: dict[str, PeerDouble], folder: Path, port: int = 0) -> dict[str, str]:
    targets = {f"AIAAS_EDGE_{name.upper()}_TARGET": peer.address for name, peer in peers.items()}
    return {
        **os.environ,
        **targets,
        "AIAAS_EDGE_ADDRESS": f"127.0.0.1:{port}",
        "AIAAS_EDGE_DRAIN_S": "10",
        "AIAAS_EDGE_WORKERS": "2",
        "TMPDIR": str(folder),
    }


async def start(environ: dict[str, str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edge", env=environ, stderr=asyncio.subprocess.PIPE, start_new_session=True
    )


@pytest.fixture
async def running(peers: dict[str, PeerDouble], tmp_path: Path) -> AsyncIterator[Workers]:
    """Two workers that serve on a port that the kernel chose."""
    process = await start(environment(peers, tmp_path))
    assert process.stderr is not None
    told: list[bytes] = []
    try:
        async with asyncio.timeout(30):
            while not (found := re.search(rb"all workers serve on 127\.0\.0\.1:(\d+)", told[-1] if told else b"")):
                told.append(await process.stderr.readline())
                assert told[-1], told
        edge = Workers(process, int(found[1]), told)
        reading = asyncio.create_task(_keep_reading(process.stderr, told))
        yield edge
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    # It ends when the last worker has closed its end.
    await asyncio.wait_for(reading, 20)


async def _keep_reading(reader: asyncio.StreamReader, told: list[bytes]) -> None:
    while line := await reader.readline():
        told.append(line)


async def test_metrics_are_the_sums_over_all_workers_and_outlive_one_that_dies(running: Workers) -> None:
    before = running.children()
    assert len(before) == 2
    for _ in range(30):
        assert (await running.get("/health")).status_code == 200
    assert {await running.count("/health") for _ in range(10)} == {30}
    os.kill(before[0], signal.SIGKILL)
    await until(lambda: len(set(running.children()) - {before[0]}) == 2, within_s=20)
    await until(lambda: _serve_lines(running) == 3, within_s=20)
    for _ in range(10):
        assert (await running.get("/health")).status_code == 200
    assert {await running.count("/health") for _ in range(10)} == {40}
    assert any(b"a worker has died" in line and b'"exit_status": -9' in line for line in running.told)


async def test_signal_lets_streams_end_in_every_worker_and_leaves_nothing_behind(
    running: Workers, router: PeerDouble, tmp_path: Path
) -> None:
    gate = asyncio.Event()

    async def story(request: pb.InferRequest) -> AsyncIterator[pb.InferResponse]:
        yield STREAM_HEAD
        yield pb.InferResponse(data=b"data: 1\n\n")
        await gate.wait()
        yield pb.InferResponse(data=b"data: [DONE]\n\n")
        yield pb.InferResponse(tail=pb.InferTail())

    router.streams["Infer"] = story
    limits = httpx.Limits(max_keepalive_connections=0)
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{running.port}", headers=HEADERS, trust_env=False, limits=limits
            )
        )
        # So many that each worker has one, but for one run in ten thousand.
        streams = [
            (await stack.enter_async_context(client.stream("POST", CHAT, content=b"{}"))).aiter_raw() for _ in range(14)
        ]
        for stream in streams:
            assert await anext(stream) == b"data: 1\n\n"
        # As Ctrl-C in a terminal does: a worker that got it as well would be told twice, and would not wait.
        os.killpg(running.process.pid, signal.SIGINT)
        await until(lambda: not _is_listening(running.port))
        gate.set()
        for stream in streams:
            assert [chunk async for chunk in stream] == [b"data: [DONE]\n\n"]
    async with asyncio.timeout(20):
        assert await running.process.wait() == 0
    assert os.listdir(tmp_path) == []


async def test_signal_changes_the_level_of_logs_in_every_worker(running: Workers) -> None:
    before = running.children()
    running.process.send_signal(signal.SIGUSR1)
    await until(lambda: sum(b"edge logs at DEBUG from now on" in line for line in running.told) == 2)
    assert running.children() == before


async def test_second_signal_does_not_wait_for_streams(running: Workers, router: PeerDouble, tmp_path: Path) -> None:
    async def endless(request: pb.InferRequest) -> AsyncIterator[pb.InferResponse]:
        yield STREAM_HEAD
        await asyncio.Event().wait()

    router.streams["Infer"] = endless
    base_url = f"http://127.0.0.1:{running.port}"
    async with (
        httpx.AsyncClient(base_url=base_url, headers=HEADERS, trust_env=False) as client,
        client.stream("POST", CHAT, content=b"{}"),
    ):
        running.process.send_signal(signal.SIGTERM)
        await until(lambda: not _is_listening(running.port))
        assert running.children()
        running.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(8):
            assert await running.process.wait() == 1
    # The parent and the worker with the stream were told twice.
    await until(lambda: sum(b"stopping on SIGTERM" in line for line in running.told) >= 5)
    assert os.listdir(tmp_path) == []


async def test_workers_do_not_outlive_a_parent_that_was_killed(running: Workers) -> None:
    children = running.children()
    running.process.kill()
    await running.process.wait()
    await until(lambda: not any(_lives(child) for child in children), within_s=20)
    assert not _is_listening(running.port)


@pytest.mark.parametrize("shares", [False, True])
async def test_address_that_is_taken_is_told_even_by_a_listener_that_shares(
    peers: dict[str, PeerDouble], tmp_path: Path, shares: bool
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0), reuse_port=shares)) as taken:
        process = await start(environment(peers, tmp_path, taken.getsockname()[1]))
        _, told = await process.communicate()
    assert process.returncode == 1
    assert b"Address already in use" in told


async def test_worker_that_cannot_start_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    config = EdgeConfig(
        address="127.0.0.1:0", workers=3, identity_target="unix:/i", router_target="unix:/r", analytics_target="unix:/a"
    )
    with pytest.raises(ExceptionGroup) as error:
        await asyncio.wait_for(workers.serve(config, asyncio.Event()), 10)
    assert error.group_contains(RuntimeError, match="a worker ended with status 1 before it served")


def test_address_that_is_reserved_is_free_for_those_who_share_it_and_for_nobody_else() -> None:
    with workers.reserved_port("127.0.0.1", 0) as port:
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", port))
        with pytest.raises(OSError, match="in use"), workers.reserved_port("127.0.0.1", port):
            pass
        with closing(socket.create_server(("127.0.0.1", port), reuse_port=True)) as first:
            socket.create_server(("127.0.0.1", port), reuse_port=True).close()
            with closing(socket.create_connection(("127.0.0.1", port))), closing(first.accept()[0]):
                pass
    with workers.reserved_port("127.0.0.1", port) as again:
        assert again == port


def _serve_lines(running: Workers) -> int:
    return sum(b"the edge serves on" in line for line in running.told)


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def _is_listening(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
