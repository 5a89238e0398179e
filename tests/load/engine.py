"""What the platform adds to a real vLLM: 8 streams through it and straight to the engine, turn by turn; it judges the
difference, never the engine.

    AIAAS_VLLM_PYTHON=.venv-vllm/bin/python python -m tests.load.engine

vLLM has a core for itself, everything else has the other one. Ends with status 1 if the bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys

import aiohttp

from deploy.local.engines import CHAT_MODEL
from deploy.local.errors import LocalError
from deploy.local.processes import family
from deploy.local.stack import Stack, running
from deploy.local.state import State
from tests.load.host import make_tenant
from tests.load.native import Load, LoadError, Measurement, pin, run_load
from tests.load.targets import take_core

ENGINE_CORE, OTHER_CORE = 0, 1
ROUNDS = 10
STREAMS = 8
TOKENS = 64
WINDOW_S = 15.0
MOST_ADDED_TTFB_MS = 3.0
LEAST_RATE = 0.98


def streams(port: int, headers: tuple[str, ...]) -> Measurement:
    """Streams of a fixed length, one after the other on each of 8 connections."""
    body = {
        "model": CHAT_MODEL,
        "messages": [{"role": "user", "content": "Tell me something about foxes and dogs."}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    load = Load(
        port=port,
        headers=headers,
        body=body,
        connections=STREAMS,
        spread_s=2,
        warm_s=5,
        window_s=WINDOW_S,
        timeout_s=120,
        count="events",
    )
    seen = run_load(load, OTHER_CORE)
    if seen.errors or not seen.requests:
        raise LoadError(f"{seen.errors} errors, {seen.requests} answers: {seen.error_sample}")
    return seen


async def measure(stack: Stack, rounds: int) -> bool:
    """Prints the table; whether the bar is met."""
    (engine,) = [engine for engine in stack.engines if any(model.model_id == CHAT_MODEL for model in engine.models)]
    engine_port = int(engine.base_url.rpartition(":")[2])
    for process in family(stack.supervisor.pid(engine.backend_id) or 0):
        pin(process.pid, ENGINE_CORE)
    headers = {"Authorization": f"Bearer {stack.platform_key}"}
    async with aiohttp.ClientSession(stack.base_url, headers=headers) as session:
        tenant = await make_tenant(session)
    through = (int(stack.base_url.rpartition(":")[2]), (f"Authorization: Bearer {tenant.secret}",))
    pairs: list[tuple[Measurement, Measurement]] = []
    for number in range(rounds):
        first, second = ((engine_port, ()), through) if number % 2 else (through, (engine_port, ()))
        one = await asyncio.to_thread(streams, *first)
        other = await asyncio.to_thread(streams, *second)
        pairs.append((one, other) if number % 2 else (other, one))
        direct, ours = pairs[-1]
        print(
            f"round {number + 1} TTFB p50 {direct.ttfb_ms.p50:.2f} ms direct, {ours.ttfb_ms.p50:.2f} through; "
            f"{direct.chunks / direct.window_s:.1f} and {ours.chunks / ours.window_s:.1f} events/s",
            file=sys.stderr,
            flush=True,
        )
    added_ms = statistics.median(ours.ttfb_ms.p50 - direct.ttfb_ms.p50 for direct, ours in pairs)
    rate = statistics.median(
        (ours.chunks / ours.window_s) / (direct.chunks / direct.window_s) for direct, ours in pairs
    )
    good = added_ms <= MOST_ADDED_TTFB_MS, rate >= LEAST_RATE
    words = ["met" if met else "**missed**" for met in good]
    print(f"| {STREAMS} streams on vLLM, {rounds} rounds | found | |\n| --- | --- | --- |")
    print(f"| TTFB added, p50, at most {MOST_ADDED_TTFB_MS} ms | {added_ms:.2f} ms | {words[0]} |")
    print(f"| token rate beside direct, at least {LEAST_RATE} | {rate:.3f} | {words[1]} |")
    return all(good)


async def main(rounds: int) -> bool:
    """Starts the stack with vLLM and measures."""
    with State.temporary() as state:
        async with running(state, engine="vllm") as stack:
            return await measure(stack, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.load.engine", description="What we add to a real vLLM.")
    parser.add_argument("--rounds", type=int, default=os.environ.get("ROUNDS") or ROUNDS, help="of both (ROUNDS)")
    arguments = parser.parse_args()
    try:
        take_core(OTHER_CORE)
        sys.exit(0 if asyncio.run(main(arguments.rounds)) else 1)
    except (LoadError, LocalError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
