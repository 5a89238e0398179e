"""One streamed chat completion through the public API, as any client makes it; never a shortcut into the platform."""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from deploy.local.engines import CHAT_MODEL
from deploy.local.errors import LocalError

# One that the small default model answers well.
QUESTION = "What is a rainbow? One sentence."
ANSWER_LIMIT_S = 60.0
USAGE_LIMIT_S = 10.0


@dataclass(frozen=True)
class Proof:
    """What a client saw."""

    answer: str
    prompt_tokens: int
    completion_tokens: int
    # Seconds from the request to the first word, to the end, and from the end until analytics knew of it.
    first_word_s: float
    whole_s: float
    usage_s: float


async def prove(base_url: str, api_key: str, organization_id: str) -> Proof:
    """Asks one question and checks answer, usage, end of stream and the record in analytics.

    Raises LocalError that says which of them is wrong.
    """
    timeout = aiohttp.ClientTimeout(total=ANSWER_LIMIT_S)
    headers = {"Authorization": f"Bearer {api_key}"}
    async with aiohttp.ClientSession(base_url, headers=headers, timeout=timeout) as session:
        try:
            return await _prove(session, organization_id)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise LocalError(f"The proof failed: {type(error).__name__} {error}".rstrip()) from error


async def _prove(session: aiohttp.ClientSession, organization_id: str) -> Proof:
    body = {
        "model": CHAT_MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.monotonic()
    answer, first_word_s, usage, finished = "", 0.0, None, False
    async with session.post("/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise LocalError(f"The proof failed with status {response.status}: {await response.text()}")
        request_id = response.headers["X-Request-Id"]
        async for line in response.content:
            data = line.strip().removeprefix(b"data: ")
            if data == b"[DONE]":
                finished = True
            elif line.startswith(b"data: "):
                chunk = json.loads(data)
                words = "".join(choice["delta"].get("content") or "" for choice in chunk.get("choices", ()))
                if words and not answer:
                    first_word_s = time.monotonic() - began
                answer += words
                usage = chunk.get("usage") or usage
    ended = time.monotonic()
    if not (answer.strip() and finished and usage):
        raise LocalError(f"The proof's answer broke off: text {answer!r}, [DONE] {finished}, usage {usage}.")
    await _wait_for_usage(session, organization_id, request_id, usage)
    return Proof(
        answer=answer.strip(),
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        first_word_s=first_word_s,
        whole_s=ended - began,
        usage_s=time.monotonic() - ended,
    )


async def _wait_for_usage(
    session: aiohttp.ClientSession, organization_id: str, request_id: str, usage: dict[str, Any]
) -> None:
    """Returns once analytics has the request with the tokens that the client was told."""
    path = f"/analytics/v1/organizations/{organization_id}/usage-records"
    deadline = time.monotonic() + USAGE_LIMIT_S
    while time.monotonic() < deadline:
        async with session.get(path, params={"request_id": request_id}) as response:
            if response.status != 200:
                raise LocalError(f"The proof cannot read usage, status {response.status}: {await response.text()}")
            records = (await response.json())["records"]
        if records:
            # protobuf's JSON writes 64-bit integers as text.
            recorded = {name: int(records[0]["usage"][name]) for name in ("prompt_tokens", "completion_tokens")}
            if recorded != {name: usage[name] for name in recorded}:
                raise LocalError(f"Analytics counts {recorded}, the answer said {usage}.")
            return
        await asyncio.sleep(0.1)
    raise LocalError(f"Analytics does not know of {request_id} {USAGE_LIMIT_S:.0f} s after its answer.")
