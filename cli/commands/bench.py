"""`aiaas bench`: how fast a model answers through the platform, from here; it never says how fast the platform could be
(docs/benchmark.md does)."""

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import click
import httpx

from cli import output
from cli.client import is_here
from cli.commands.chat import chunks
from cli.errors import Failed, refusal
from cli.session import Session

_TIMEOUT = httpx.Timeout(300.0, connect=5.0)


@dataclass(frozen=True)
class _Answered:
    """One answer: seconds to its first token and to its end, and how many tokens."""

    first_token_s: float
    whole_s: float
    tokens: int


@click.command()
@click.argument("model")
@click.option("--requests", "-n", "count", type=click.IntRange(1, 100_000), default=20, show_default=True)
@click.option("--concurrency", "-c", type=click.IntRange(1, 1000), default=4, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--prompt", default="Count slowly from one to one hundred, in words.", show_default=True)
@click.option("--output", "-o", "form", type=click.Choice(output.FORMATS), default="table")
@click.pass_obj
def bench(session: Session, model: str, count: int, concurrency: int, max_tokens: int, prompt: str, form: str) -> None:
    """Stream answers of MODEL, so many at a time, and measure them. They are billed like any others."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    session.client.get("/v1/models")  # A wrong credential is told once, not so many times.
    began = time.monotonic()
    shown = sys.stderr.isatty()
    with click.progressbar(length=count, label="Asking", file=sys.stderr, hidden=not shown) as bar:
        answered, failures = asyncio.run(_ask(session, body, count, concurrency, bar))
    took_s = time.monotonic() - began
    if not answered:
        raise Failed(f"No request was answered; the first failed so: {failures[0]}")
    output.write(_report(answered, failures, took_s), form, columns=())
    if failures:
        raise Failed(f"{len(failures)} of {count} requests failed; the first: {failures[0]}")


async def _ask(
    session: Session, body: dict[str, Any], count: int, concurrency: int, bar: Any
) -> tuple[list[_Answered], list[str]]:
    answered: list[_Answered] = []
    failures: list[str] = []
    left = iter(range(count))

    async def work(client: httpx.AsyncClient) -> None:
        for _ in left:
            try:
                answered.append(await _one(client, body))
            except Failed as error:
                failures.append(error.message)
            except (httpx.TransportError, ValueError) as error:
                failures.append(f"{type(error).__name__}: {error}")
            bar.update(1)

    async with (
        httpx.AsyncClient(
            base_url=session.base_url,
            headers=session.client.authorization(),
            timeout=_TIMEOUT,
            trust_env=not is_here(session.base_url),
            limits=httpx.Limits(max_connections=concurrency),
        ) as client,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(min(concurrency, count)):
            group.create_task(work(client))
    return answered, failures


async def _one(client: httpx.AsyncClient, body: dict[str, Any]) -> _Answered:
    began = time.monotonic()
    first_token_s, tokens, pieces = 0.0, 0, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if not answer.is_success:
            text = await answer.aread()
            raise Failed(_told(answer, text))
        async for line in answer.aiter_lines():
            if line.strip() == "data: [DONE]":
                whole_s = time.monotonic() - began
                return _Answered(first_token_s or whole_s, whole_s, tokens or pieces)
            for chunk in chunks(iter((line, "data: [DONE]"))):
                tokens = (chunk.get("usage") or {}).get("completion_tokens") or tokens
                if any((choice.get("delta") or {}).get("content") for choice in chunk.get("choices") or ()):
                    pieces += 1
                    first_token_s = first_token_s or time.monotonic() - began
    raise Failed("The answer broke off.")


def _told(answer: httpx.Response, text: bytes) -> str:
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    told = refusal(answer.status_code, answer.headers, document)
    return f"{told.message} ({told.reason or told.status})"


def _report(answered: list[_Answered], failures: list[str], took_s: float) -> dict[str, Any]:
    tokens = sum(each.tokens for each in answered)
    return {
        "requests": len(answered),
        "failed": len(failures),
        "requests_per_second": round(len(answered) / took_s, 2),
        "tokens_per_second": round(tokens / took_s, 1),
        "first_token_ms": _spread([each.first_token_s for each in answered]),
        "whole_answer_ms": _spread([each.whole_s for each in answered]),
        "completion_tokens": tokens,
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    """Milliseconds at percentiles, by nearest rank."""
    ordered = sorted(seconds)
    return {f"p{at}": round(ordered[-(-at * len(ordered) // 100) - 1] * 1000, 1) for at in (50, 90, 99)}
