"""Chat completions through the official client, against a real engine. Texts differ by engine and are not compared."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from openai.types.chat import ChatCompletionChunk

from .conftest import Platform, Tenant

MODEL = "smollm2"
HELLO = [{"role": "user", "content": "Say hello."}]


def texts(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_chat_completion_answers_with_text_and_usage(openai: Any) -> None:
    answer = openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens > 0
    assert 0 < answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_answer_names_the_model_by_its_public_id(openai: Any) -> None:
    answer = openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
    assert answer.model == MODEL


def test_streamed_chat_completion_comes_in_many_chunks_with_one_finish_reason(openai: Any) -> None:
    chunks = list(
        openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=16, temperature=0, stream=True)
    )
    assert len(chunks) > 3
    assert texts(chunks)
    finishes = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert finishes in (["stop"], ["length"])
    assert len({chunk.id for chunk in chunks}) == 1


def test_streamed_and_whole_answers_are_the_same_text(openai: Any) -> None:
    request = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "temperature": 0, "seed": 7}
    whole = openai.chat.completions.create(**request).choices[0].message.content
    assert texts(list(openai.chat.completions.create(**request, stream=True))) == whole


def test_stream_without_include_usage_shows_none(openai: Any) -> None:
    chunks = list(openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)


def test_stream_with_include_usage_ends_with_a_chunk_of_usage_alone(openai: Any) -> None:
    stream = openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    *others, last = list(stream)
    assert last.choices == []
    assert last.usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in others)


def test_stream_on_the_wire_is_events_ended_by_done(platform: Platform, tenant: Tenant) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 4, "stream": True}
    with (
        httpx.Client(trust_env=False, timeout=30) as client,
        client.stream(
            "POST",
            f"{platform.base_url}/v1/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {tenant.secret}"},
        ) as response,
    ):
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"]
        assert response.headers["openai-version"] == "2020-10-01"
        events = [line for line in response.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-1])


def test_n_gives_that_many_choices(openai: Any) -> None:
    answer = openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_usage_counts_every_choice_of_n(openai: Any, platform: Platform) -> None:
    answer = openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=4, n=3, extra_body={"ignore_eos": True}
    )
    assert len(answer.choices) == 3
    # llama.cpp's gap: its usage tells the tokens of one choice only.
    assert answer.usage.completion_tokens == (4 if platform.engine == "llamacpp" else 12)


def test_stop_sequence_ends_the_answer_and_is_not_in_it(openai: Any) -> None:
    messages = [{"role": "user", "content": "Count: one two three four five six seven eight"}]
    free = openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=16, temperature=0)
    text = free.choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    answer = openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=16, temperature=0, stop=stop)
    assert answer.choices[0].finish_reason == "stop"
    assert stop not in answer.choices[0].message.content


def test_max_completion_tokens_is_a_limit_too(openai: Any) -> None:
    answer = openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me a long story."}],
        max_completion_tokens=3,
    )
    assert answer.usage.completion_tokens <= 3
    assert answer.choices[0].finish_reason == "length"


def test_logprobs_come_with_alternatives(openai: Any) -> None:
    answer = openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    tokens = answer.choices[0].logprobs.content
    assert 1 <= len(tokens) <= answer.usage.completion_tokens
    assert all(token.logprob <= 0 and len(token.top_logprobs) >= 1 for token in tokens)


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_named_tool_is_called_with_valid_arguments(openai: Any, platform: Platform) -> None:
    answer = openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=64,
        temperature=0,
    )
    calls = answer.choices[0].message.tool_calls
    if platform.engine == "llamacpp":
        # llama.cpp's gap: a named tool_choice is ignored, so the small model answers in prose.
        assert not calls
        return
    assert calls[0].function.name == "get_weather"
    assert json.loads(calls[0].function.arguments)["city"] in ("Paris", "Rome")


def test_json_schema_is_kept_to(openai: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Is water wet? Answer in JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
        max_tokens=40,
        temperature=0,
    )
    assert isinstance(json.loads(answer.choices[0].message.content)["ok"], bool)


def test_long_unicode_passes_unharmed(openai: Any) -> None:
    text = "Grüße, 世界! 🌍🚀 \u0000 \u2028 שלום " * 40
    answer = openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text}], max_tokens=8, temperature=0
    )
    assert answer.usage.prompt_tokens > 400
    assert answer.choices[0].message.content is not None


def test_conversation_with_system_and_content_parts(openai: Any) -> None:
    answer = openai.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "Bye."},
        ],
        max_tokens=4,
    )
    assert answer.choices[0].message.role == "assistant"


def test_fields_of_the_hosted_service_are_accepted(openai: Any) -> None:
    answer = openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=2, user="u-1", store=False, metadata={"a": "b"}, service_tier="auto"
    )
    assert answer.choices


def test_raw_response_shows_the_platforms_headers(openai: Any) -> None:
    raw = openai.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=2)
    assert raw.headers["x-request-id"] == raw.request_id
    assert int(raw.headers["openai-processing-ms"]) >= 0


def test_ten_tenants_in_parallel_each_get_their_own_answer(platform: Platform) -> None:
    tenants = [platform.new_tenant(f"Tenant {number}") for number in range(10)]

    def ask(number: int) -> tuple[str, list[ChatCompletionChunk]]:
        stream = tenants[number].openai.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"Repeat the word canary{number}."}],
            max_tokens=16,
            temperature=0,
            stream=True,
        )
        return stream.response.headers["x-request-id"], list(stream)

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, range(10)))
    assert len({request_id for request_id, _ in answers}) == 10
    for number, (_, chunks) in enumerate(answers):
        text = texts(chunks)
        assert text
        assert not any(f"canary{other}" in text for other in range(10) if other != number)
