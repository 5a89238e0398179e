"""The load generator tells what happened, however its answers arrive, and says when it was itself the limit."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from tests.load.native import FakeEngine, Load, Measurement, build, chat_body, run_load
from tests.load.scripted_server import Client, answering

BODY = chat_body(tokens=5)
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def token(made_at_ns: int) -> bytes:
    return b'data: {"choices":[{"delta":{"content":"T%016d "}}]}\n\n' % made_at_ns


def stream_of(*events: bytes) -> bytes:
    return STREAM + b"".join(chunk(event) for event in events) + END


async def load(port: int, **settings: object) -> Measurement:
    given = {"body": BODY, "warm_s": 0.2, "window_s": 0.5, "timeout_s": 5.0} | settings
    return await asyncio.to_thread(run_load, Load(port=port, **given))  # type: ignore[arg-type]


async def started(*command: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(*command)


async def ok(client: Client) -> None:
    await client.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


async def nothing(_: asyncio.subprocess.Process) -> None:
    pass


async def generator(
    *wrapper: str,
    port: int,
    options: tuple[str, ...],
    meanwhile: Callable[[asyncio.subprocess.Process], Awaitable[None]] = nothing,
) -> dict[str, Any]:
    command = (*wrapper, str(build("load_generator")), "--port", str(port), "--body", os.devnull, *options)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    await meanwhile(process)
    output, _ = await process.communicate()
    document: dict[str, Any] = json.loads(output)
    return document


async def ended(*processes: asyncio.subprocess.Process) -> None:
    for process in processes:
        process.kill()
        await process.wait()


async def test_whole_answers_are_counted_by_their_size_or_their_chunks_or_the_end_of_the_connection() -> None:
    answers = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        b"2;name=value\r\nok\r\n0\r\nTrailer: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nok",
    )

    async def answer(client: Client) -> None:
        kind = client.number % len(answers)
        await client.send(answers[kind])
        if kind == 3:
            client.writer.close()

    async with answering(answer) as server:
        seen = await load(server.port, connections=3)
    assert seen.requests > 20
    assert seen.errors == 0
    assert seen.latency_ms.count == seen.requests


async def test_tokens_are_found_when_every_byte_arrives_alone() -> None:
    async def answer(client: Client) -> None:
        now = time.monotonic_ns()
        await client.send_split(stream_of(token(now), token(now), token(now), DONE))

    async with answering(answer) as server:
        seen = await load(server.port, rate=4.0, connections=8)
    # Two were scheduled in the window; the tokens of others fall into it, too.
    assert seen.errors == 0
    assert seen.latency_ms.count == 2
    assert seen.lag_ms.count == seen.chunks > 0


async def test_tokens_are_found_wherever_a_line_is_cut_into_chunks_and_reads() -> None:
    line = token(time.monotonic_ns())

    async def answer(client: Client) -> None:
        at = client.number % len(line)
        await client.send(STREAM + chunk(line[: at or 1]))
        await asyncio.sleep(0.001)
        await client.send(chunk(line[at or 1 :] + line + DONE) + END)

    async with answering(answer) as server:
        seen = await load(server.port)
    assert seen.requests > len(line)
    assert seen.errors == 0
    # The window may begin or end in the middle of an answer.
    assert abs(seen.chunks - 2 * seen.requests) <= 2


async def test_a_chunks_lag_is_the_age_of_the_time_that_it_holds() -> None:
    async def answer(client: Client) -> None:
        await client.send(stream_of(token(time.monotonic_ns() - 300_000_000), DONE))

    async with answering(answer) as server:
        seen = await load(server.port)
    assert seen.lag_ms.count > 10
    assert 300 <= seen.lag_ms.p50 < 600


async def test_the_longest_time_between_two_chunks_of_a_stream_is_its_stall() -> None:
    async def answer(client: Client) -> None:
        now = time.monotonic_ns()
        await client.send(STREAM + chunk(token(now)) + chunk(token(now)))
        await asyncio.sleep(0.15)
        await client.send(chunk(token(now)) + chunk(DONE) + END)

    async with answering(answer) as server:
        seen = await load(server.port)
    assert 140 < seen.stall_ms < 1000


async def test_a_stream_that_has_stalled_to_the_end_of_the_window_counts_as_stalled() -> None:
    async def answer(client: Client) -> None:
        await client.send(STREAM + chunk(token(time.monotonic_ns())))
        await asyncio.Event().wait()

    async with answering(answer) as server:
        seen = await load(server.port)
    assert seen.stall_ms > 400


async def test_events_are_counted_where_there_are_no_tokens_of_the_fake_engine() -> None:
    async def answer(client: Client) -> None:
        await client.send(stream_of(b'data: {"choices":[]}\n\n: a comment\n\n', b"data: {}\r\n\r\n", DONE))

    async with answering(answer) as server:
        seen = await load(server.port, count="events")
    assert seen.requests > 10
    assert abs(seen.chunks - 2 * seen.requests) <= 2


async def test_whatever_is_no_whole_good_answer_is_an_error_with_a_sample() -> None:
    answers = (
        b"HTTP/1.1 429 Too Many\r\nContent-Length: 8\r\n\r\nnot now!",
        stream_of(token(1), b'data: {"error": {"message": "gone"}}\n\n', DONE),
        stream_of(token(1)),
        STREAM + chunk(token(1)),
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok",
    )

    async def answer(client: Client) -> None:
        kind = client.number % len(answers)
        await client.send(answers[kind])
        if kind > 2:
            client.writer.close()

    async with answering(answer) as server:
        seen = await load(server.port, connections=2)
    assert seen.requests == 0
    assert seen.refused > 2
    assert seen.broken > 3 * (seen.refused - 1)
    assert seen.error_sample in ("not now!", "{ error : { message :  gone }}")


async def test_an_answer_that_does_not_end_in_time_is_an_error() -> None:
    async def answer(client: Client) -> None:
        await asyncio.Event().wait()

    async with answering(answer) as server:
        seen = await load(server.port, connections=2, timeout_s=0.1)
    assert seen.requests == 0
    assert seen.timed_out > 2


async def test_at_a_rate_a_request_that_had_to_wait_for_a_connection_waited() -> None:
    async def answer(client: Client) -> None:
        await asyncio.sleep(0.1)
        await client.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with answering(answer) as server:
        # Twice as many as one connection can do: the last of the window waits as long as the window.
        seen = await load(server.port, rate=20.0, window_s=1.0)
    assert seen.latency_ms.count == 20
    assert seen.errors == 0
    assert seen.latency_ms.max > 900
    # The target's fault, not the generator's.
    assert seen.late_ms.p99 < 100


async def test_at_a_rate_what_could_not_be_sent_at_all_is_an_error() -> None:
    async def answer(client: Client) -> None:
        await asyncio.Event().wait()

    async with answering(answer) as server:
        seen = await load(server.port, rate=20.0, window_s=1.0, timeout_s=2.0)
    assert seen.requests == 0
    assert seen.errors == 20
    assert seen.unsent >= 18


async def test_a_slow_reader_takes_no_more_than_it_may_and_is_told_apart(engine: FakeEngine) -> None:
    body = chat_body(tokens=100_000, pace_ms=1)
    seen = await load(engine.port, body=body, connections=2, slow=1, slow_bytes_per_s=4000, window_s=1.5)
    assert seen.lag_ms.count == seen.chunks
    assert seen.chunks > 200
    assert 0 < seen.slow_lag_ms.count < seen.chunks / 5


async def test_it_says_that_it_was_the_limit_when_it_had_to_wait_for_its_core() -> None:
    core = str(min(os.sched_getaffinity(0)))
    crowd = [await started("taskset", "-c", core, sys.executable, "-c", "while True: pass") for _ in range(2)]
    try:
        async with answering(ok) as server:
            # Whoever is so polite hardly ever runs.
            output = await generator(
                "nice", "-n", "19", "taskset", "-c", core, port=server.port, options=("--window_s", "1")
            )
    finally:
        await ended(*crowd)
    assert output["generator_share"] > 0.9
    assert output["generator_cpu"] < 0.5
    assert output["generator_limits"] is True


async def test_it_says_that_it_was_the_limit_when_it_sent_too_late() -> None:
    under_way = asyncio.Event()

    async def answer(client: Client) -> None:
        await ok(client)
        if client.number == 20:
            under_way.set()

    async def halt(process: asyncio.subprocess.Process) -> None:
        await asyncio.wait_for(under_way.wait(), 10)
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGCONT)

    async with answering(answer) as server:
        options = ("--rate", "50", "--connections", "64", "--warm_s", "0.2", "--window_s", "1")
        output = await generator(port=server.port, options=options, meanwhile=halt)
    assert output["late_ms"]["max"] > 200
    assert output["generator_share"] < 0.9
    assert output["generator_limits"] is True


async def test_it_is_no_limit_when_it_has_little_to_do() -> None:
    async def answer(client: Client) -> None:
        await asyncio.sleep(0.05)
        await client.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with answering(answer) as server:
        seen = await load(server.port)
    assert not seen.generator_limits
    assert seen.generator_share < 0.5


async def test_what_processes_spend_is_read_over_the_window(engine: FakeEngine) -> None:
    busy = await started(sys.executable, "-c", "while True: pass")
    idle = await started(sys.executable, "-c", "import signal; signal.pause()")
    try:
        processes = {"busy": [busy.pid], "idle": [idle.pid], "both": [busy.pid, idle.pid]}
        seen = await load(engine.port, processes=processes, window_s=1.0)
    finally:
        await ended(busy, idle)
    spent = seen.processes["busy"]
    # It ran or waited to run, all the time.
    assert 0.8 < spent.cpu_s + spent.waited_s < 1.3
    assert seen.processes["idle"].cpu_s < 0.2
    assert seen.processes["both"].cpu_s >= spent.cpu_s
    assert seen.processes["both"].rss_bytes > spent.rss_bytes > 1 << 20
