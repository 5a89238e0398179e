"""What is billed against the engines' own counters: the same to the token, and for a request that was broken off as
much as its client could have had.
"""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import httpx
import pytest

from router.engine_tokens import METRICS_PATH, read_counters

from .conftest import ENGINE, Platform, Tenant, wait_until
from .test_admin_and_usage import usage

MODEL = "smollm2"
REQUESTS = int(os.environ.get("ENGINE_REQUESTS", "100"))
BROKEN_OFF = max(5, REQUESTS // 20)
# One small engine on a processor is soon too busy for its probes.
AT_ONCE = {"vllm": 16, "llamacpp": 4}[ENGINE]
# What an engine makes between the last chunk that a client took and its noticing that nobody listens.
UNHEARD_TOKENS = 64
WORDS = (
    "Tell",
    "me",
    "about",
    "rain,",
    "rivers,",
    "the",
    "sea,",
    "a",
    "lamp,",
    "bridges,",
    "bread",
    "and",
    "a",
    "clock.",
)


class Tokens(NamedTuple):
    """Prompt and completion tokens."""

    prompt: int
    completion: int


def told_by_engines(platform: Platform) -> dict[str, Tokens]:
    """The counters of every backend that has some."""
    with platform.admin as admin:
        backends = admin.get("/admin/v1/backends").json()["backends"]
    counters = {}
    for backend in backends:
        body = httpx.get(backend["base_url"] + METRICS_PATH, trust_env=False).content
        if (read := read_counters(body)) is not None:
            counters[backend["backend_id"]] = Tokens(read.prompt_tokens, read.completion_tokens)
    return counters


def moved(platform: Platform, before: dict[str, Tokens]) -> dict[str, Tokens]:
    """How far the counters of the engines moved, of those that did."""
    after = told_by_engines(platform)
    moves = {
        name: Tokens(now.prompt - before[name].prompt, now.completion - before[name].completion)
        for name, now in after.items()
    }
    return {name: move for name, move in moves.items() if any(move)}


def billed(platform: Platform, tenant: Tenant) -> dict[str, Tokens]:
    """What analytics has of a tenant, by backend."""
    answer = usage(platform, tenant.organization_id, group_by="USAGE_DIMENSION_BACKEND")
    sums = {
        bucket["group"][0]["value"]: Tokens(
            int(bucket["totals"]["prompt_tokens"]), int(bucket["totals"]["completion_tokens"])
        )
        for bucket in answer["buckets"]
    }
    return {name: tokens for name, tokens in sums.items() if name and any(tokens)}


def counted(platform: Platform, tenant: Tenant) -> int:
    totals = usage(platform, tenant.organization_id)["totals"]
    return int(totals["requests"]) + int(totals["refused_requests"])


def is_counted(platform: Platform, tenant: Tenant, requests: int) -> bool:
    return counted(platform, tenant) == requests


def ask(platform: Platform, tenant: Tenant, chance: random.Random) -> int:
    """One request of a mix, to its end; returns how many tokens of prompts the engine counts more often than they are
    billed, since it counts a prompt for each of its answers."""
    prompt = " ".join(chance.choices(WORDS, k=chance.randint(1, 40)))
    tokens = chance.randint(1, 12)
    match chance.randint(0, 5):
        case 0:
            tenant.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=tokens)
        case 1:
            list(tenant.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=tokens, stream=True))
        case 2 if platform.engine == "vllm":
            messages = [{"role": "user", "content": prompt}]
            answer = tenant.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=tokens, n=2)
            return int(answer.usage.prompt_tokens)
        case 3:
            tenant.openai.embeddings.create(model="minilm", input=prompt)
        case kind:
            messages = [{"role": "user", "content": prompt}]
            more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if kind % 2 else {}
            answer = tenant.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=tokens, **more)
            if more:
                list(answer)
    return 0


@pytest.mark.timeout(1200)
def test_billed_tokens_are_the_engines_own(platform: Platform) -> None:
    tenant = platform.new_tenant("Reconciled")
    before = told_by_engines(platform)
    chance = random.Random(7)
    with ThreadPoolExecutor(AT_ONCE) as clients:
        seeds = [random.Random(chance.random()) for _ in range(REQUESTS)]
        repeated_tokens = sum(clients.map(lambda one: ask(platform, tenant, one), seeds))
    wait_until(lambda: counted(platform, tenant) == REQUESTS, 30, "every request is counted")
    ours, theirs = billed(platform, tenant), moved(platform, before)
    assert {name: tokens.completion for name, tokens in ours.items()} == {
        name: tokens.completion for name, tokens in theirs.items()
    }
    assert sum(tokens.prompt for tokens in ours.values()) + repeated_tokens == sum(
        tokens.prompt for tokens in theirs.values()
    )


@pytest.mark.timeout(300)
def test_broken_off_stream_is_billed_what_came_and_its_prompt(platform: Platform) -> None:
    tenant = platform.new_tenant("Breaks off")
    for number in range(BROKEN_OFF):
        before, bill = told_by_engines(platform), billed(platform, tenant)
        messages = [{"role": "user", "content": f"Write a long story about number {number}."}]
        stream = tenant.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=400, stream=True)
        chunks = 0
        for chunk in stream:
            chunks += bool(chunk.choices and chunk.choices[0].delta.content)
            if chunks > number % 5:
                break
        stream.close()
        wait_until(partial(is_counted, platform, tenant, number + 1), 10, "the request is counted")
        engine, ours = settled_move(platform, before), difference(billed(platform, tenant), bill)
        assert engine.keys() == ours.keys()
        for name, made in engine.items():
            assert ours[name].prompt == made.prompt
            assert chunks <= ours[name].completion <= made.completion <= ours[name].completion + UNHEARD_TOKENS


def settled_move(platform: Platform, before: dict[str, Tokens]) -> dict[str, Tokens]:
    """How far the counters moved, once they stand still."""
    last = moved(platform, before)
    while True:
        time.sleep(0.3)
        now = moved(platform, before)
        if now and now == last:
            return now
        last = now


def difference(after: dict[str, Tokens], before: dict[str, Tokens]) -> dict[str, Tokens]:
    """What was added, by backend."""
    none = Tokens(0, 0)
    added = {
        name: Tokens(now.prompt - before.get(name, none).prompt, now.completion - before.get(name, none).completion)
        for name, now in after.items()
    }
    return {name: tokens for name, tokens in added.items() if any(tokens)}
