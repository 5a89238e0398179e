"""The edge as its own process: configuration, a request through it, and a stop that lets a stream end."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import closing

import httpx

from aiaas.router.v1 import inference_service_pb2 as pb
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import CHAT, HEADERS, KEY, until


def environment(peers: dict[str, PeerDouble], port: int) -> dict[str, str]:
    targets = {f"AIAAS_EDGE_{name.upper()}_TARGET": peer.address for name, peer in peers.items()}
    return {**os.environ, **targets, "AIAAS_EDGE_ADDRESS": f"127.0.0.1:{port}", "AIAAS_EDGE_DRAIN_S": "10"}


async def started(arguments: list[str], environ: dict[str, str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "edge",
        *arguments,
        env=environ,
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port: int = probe.getsockname()[1]
        return port


async def answers(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                if (await client.get("/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                await asyncio.sleep(0.05)


async def test_wrong_configuration_is_told_and_ends_with_2() -> None:
    process = await started(["check-config"], {"PATH": os.environ["PATH"], "AIAAS_EDGE_DRAIN_S": "soon"})
    _, told = await process.communicate()
    assert process.returncode == 2
    assert b"AIAAS_EDGE_ROUTER_TARGET" in told
    assert b"AIAAS_EDGE_DRAIN_S" in told


async def test_taken_address_is_told_and_ends_with_1(peers: dict[str, PeerDouble]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        process = await started([], environment(peers, taken.getsockname()[1]))
        _, told = await process.communicate()
    assert process.returncode == 1
    assert b"Address already in use" in told


async def test_signal_lets_a_stream_end_and_leaves_no_secret_in_the_log(
    peers: dict[str, PeerDouble], router: PeerDouble
) -> None:
    gate = asyncio.Event()

    async def story(request: pb.InferRequest) -> AsyncIterator[pb.InferResponse]:
        yield pb.InferResponse(head=pb.InferHead(content_type="text/event-stream"))
        yield pb.InferResponse(data=b"data: 1\n\n")
        await gate.wait()
        yield pb.InferResponse(data=b"data: [DONE]\n\n")
        yield pb.InferResponse(tail=pb.InferTail())

    router.streams["Infer"] = story
    port = free_port()
    process = await started(["serve"], environment(peers, port))
    telling = asyncio.create_task(process.communicate())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=HEADERS, trust_env=False) as client:
        await answers(client)
        async with client.stream("POST", CHAT, content=b'{"prompt": "canary"}', params={"q": "canary"}) as response:
            arriving = response.aiter_raw()
            assert await anext(arriving) == b"data: 1\n\n"
            process.send_signal(signal.SIGTERM)
            await until(lambda: not _is_listening(port))
            gate.set()
            assert [chunk async for chunk in arriving] == [b"data: [DONE]\n\n"]
    _, told = await telling
    assert process.returncode == 0, told.decode()
    assert b'"route":"/v1/chat/completions"' in told
    assert b"Traceback" not in told
    assert b"canary" not in told
    assert KEY.encode() not in told


def _is_listening(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
