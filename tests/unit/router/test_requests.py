"""Reading a client's body: what goes on to an engine, and how what is wrong is named."""

import json
from typing import Any

import pytest

from aiaas.router.v1.backend_service_pb2 import ENGINE_KIND_LLAMACPP, ENGINE_KIND_VLLM
from aiaas.type.v1.usage_event_pb2 import (
    ENDPOINT_CHAT_COMPLETIONS,
    ENDPOINT_COMPLETIONS,
    ENDPOINT_EMBEDDINGS,
    ENDPOINT_MESSAGES,
    ENDPOINT_RESPONSES,
    Endpoint,
)
from mesh.errors import PlatformError, Reason
from router.requests import ParsedRequest, parse

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def parse_json(endpoint: Endpoint.ValueType, body: Any) -> ParsedRequest:
    return parse(endpoint, json.dumps(body).encode())


def sent(endpoint: Endpoint.ValueType, body: Any) -> dict[str, Any]:
    """The body as the engine gets it."""
    upstream: dict[str, Any] = json.loads(parse_json(endpoint, body).upstream_body("up", ENGINE_KIND_VLLM))
    return upstream


def refusal(endpoint: Endpoint.ValueType, body: bytes) -> PlatformError:
    with pytest.raises(PlatformError) as caught:
        parse(endpoint, body)
    return caught.value


def test_engine_gets_the_upstream_name_and_the_clients_fields() -> None:
    body = CHAT | {"temperature": 0.5, "seed": 2**70, "logit_bias": {"5": -1}, "stop": ["a"], "max_tokens": 3}
    assert sent(ENDPOINT_CHAT_COMPLETIONS, body) == body | {"model": "up"}


def test_messages_keep_their_content() -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "ö 😀"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "1", "content": ""},
    ]
    assert sent(ENDPOINT_CHAT_COMPLETIONS, CHAT | {"messages": messages})["messages"] == messages


def test_fields_that_engines_do_not_know_are_dropped() -> None:
    extra = {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "s"}
    for endpoint, body in [
        (ENDPOINT_CHAT_COMPLETIONS, CHAT),
        (ENDPOINT_COMPLETIONS, {"model": "m", "prompt": "x"}),
        (ENDPOINT_EMBEDDINGS, {"model": "m", "input": "x"}),
    ]:
        assert sent(endpoint, body | extra) == body | {"model": "up"}


def test_null_means_absent() -> None:
    assert sent(ENDPOINT_CHAT_COMPLETIONS, CHAT | {"temperature": None, "stop": None}) == CHAT | {"model": "up"}


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (None, (False, False)),
        ({"include_usage": False}, (False, False)),
        ({"include_usage": None, "include_obfuscation": True}, (False, False)),
        ({"include_usage": False, "continuous_usage_stats": True}, (False, False)),
        ({"include_usage": True}, (True, False)),
        ({"include_usage": True, "continuous_usage_stats": None}, (True, False)),
        ({"include_usage": True, "continuous_usage_stats": True}, (True, True)),
    ],
)
@pytest.mark.parametrize(
    ("endpoint", "body"), [(ENDPOINT_CHAT_COMPLETIONS, CHAT), (ENDPOINT_COMPLETIONS, {"model": "m", "prompt": "x"})]
)
def test_engine_tells_usage_all_along_whatever_the_client_wants(
    endpoint: Endpoint.ValueType, body: dict[str, Any], asked: dict[str, Any] | None, wanted: tuple[bool, bool]
) -> None:
    parsed = parse_json(endpoint, body | {"stream": True} | ({} if asked is None else {"stream_options": asked}))
    assert parsed.stream
    assert (parsed.wants_usage, parsed.wants_interim_usage) == wanted
    told = {"include_usage": True, "continuous_usage_stats": True}
    expected = body | {"stream": True}
    # An attempt may go to llama.cpp, which tells timings, and the next one to vLLM.
    bodies = [json.loads(parsed.upstream_body("m", engine)) for engine in (ENGINE_KIND_LLAMACPP, ENGINE_KIND_VLLM)]
    assert bodies == [
        expected | {"stream_options": {"include_usage": True}, "timings_per_token": True},
        expected | {"stream_options": told},
    ]
    assert parsed.strips_interim_usage(ENGINE_KIND_VLLM) == (not wanted[1])
    assert not parsed.strips_interim_usage(ENGINE_KIND_LLAMACPP)


@pytest.mark.parametrize("engine", [ENGINE_KIND_LLAMACPP, ENGINE_KIND_VLLM])
def test_engine_is_not_asked_for_usage_where_it_tells_it_anyway(engine: int) -> None:
    response = {"model": "m", "input": "x", "stream": True}
    for endpoint, body in [(ENDPOINT_CHAT_COMPLETIONS, CHAT), (ENDPOINT_RESPONSES, response)]:
        told = json.loads(parse_json(endpoint, body).upstream_body("m", engine))
        assert not {"stream_options", "timings_per_token"} & set(told)


def test_no_client_asks_for_an_engines_timings() -> None:
    error = refusal(ENDPOINT_CHAT_COMPLETIONS, json.dumps(CHAT | {"stream": True, "timings_per_token": True}).encode())
    assert (error.reason, error.field) == (Reason.UNKNOWN_FIELD, "timings_per_token")


def test_answers_of_a_prompt_are_counted() -> None:
    assert parse_json(ENDPOINT_CHAT_COMPLETIONS, CHAT).prompt_choices == 1
    assert parse_json(ENDPOINT_CHAT_COMPLETIONS, CHAT | {"n": 3}).prompt_choices == 3
    batch = {"model": "m", "prompt": ["x", "y"], "n": 2}
    assert parse_json(ENDPOINT_COMPLETIONS, batch).prompt_choices == 2
    assert parse_json(ENDPOINT_RESPONSES, {"model": "m", "input": "x"}).prompt_choices == 1


def test_stream_options_without_a_stream_are_refused() -> None:
    error = refusal(ENDPOINT_CHAT_COMPLETIONS, json.dumps(CHAT | {"stream_options": {"include_usage": True}}).encode())
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "stream_options")


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"no_such_field": 1}, Reason.UNKNOWN_FIELD, "no_such_field"),
        ({"a`b": 1}, Reason.UNKNOWN_FIELD, "a`b"),
        ({"messages": [{"role": "user", "extra": 1}]}, Reason.UNKNOWN_FIELD, "messages.0.extra"),
        ({"stream_options": {"x": 1}}, Reason.UNKNOWN_FIELD, "stream_options.x"),
        ({"temperature": "hot"}, Reason.INVALID_ARGUMENT, "temperature"),
        ({"max_tokens": 1.5}, Reason.INVALID_ARGUMENT, "max_tokens"),
        ({"max_tokens": -1}, Reason.INVALID_ARGUMENT, "max_tokens"),
        ({"stream": "yes"}, Reason.INVALID_ARGUMENT, "stream"),
        ({"model": None}, Reason.INVALID_ARGUMENT, "model"),
        ({"n": 17}, Reason.INVALID_ARGUMENT, "n"),
        ({"n": 0}, Reason.INVALID_ARGUMENT, "n"),
        ({"top_logprobs": 21}, Reason.INVALID_ARGUMENT, "top_logprobs"),
        ({"stop": ["a"] * 17}, Reason.INVALID_ARGUMENT, "stop"),
        ({"logit_bias": {"1": "x"}}, Reason.INVALID_ARGUMENT, "logit_bias"),
        ({"messages": "hello"}, Reason.INVALID_ARGUMENT, "messages"),
        ({"messages": []}, Reason.INVALID_ARGUMENT, "messages"),
        ({"messages": [{"role": "user"}, {"role": 7}]}, Reason.INVALID_ARGUMENT, "messages.1.role"),
        ({"messages": [{"content": "x"}]}, Reason.INVALID_ARGUMENT, "messages.0.role"),
    ],
)
def test_wrong_field_is_named(change: dict[str, Any], reason: Reason, field: str) -> None:
    error = refusal(ENDPOINT_CHAT_COMPLETIONS, json.dumps(CHAT | change).encode())
    assert (error.reason, error.field) == (reason, field)
    assert field in error.message


def test_missing_field_is_named() -> None:
    error = refusal(ENDPOINT_CHAT_COMPLETIONS, b'{"model": "m"}')
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "messages")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"model":"\xff","messages":[]}',
        b'{"model":"m","messages":[{"role":"user"}]} x',
        b"nan",
    ],
)
def test_broken_json_is_invalid_json(body: bytes) -> None:
    assert refusal(ENDPOINT_CHAT_COMPLETIONS, body).reason is Reason.INVALID_JSON


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"1", b"null"])
def test_body_must_be_an_object(body: bytes) -> None:
    error = refusal(ENDPOINT_CHAT_COMPLETIONS, body)
    assert error.reason is Reason.INVALID_ARGUMENT
    assert "object" in error.message


def nested(levels: int) -> bytes:
    return b'{"model":"m","messages":[{"role":"user"}],"response_format":{"a":' + b"[" * levels + b"]" * levels + b"}}"


def test_sixty_four_levels_are_read() -> None:
    assert parse(ENDPOINT_CHAT_COMPLETIONS, nested(62)).model == "m"


@pytest.mark.parametrize("levels", [63, 5000, 2_000_000])
def test_deeper_json_is_refused(levels: int) -> None:
    assert refusal(ENDPOINT_CHAT_COMPLETIONS, nested(levels)).reason is Reason.INVALID_JSON


def test_deep_prompt_of_raw_values_is_refused() -> None:
    body = b'{"model":"m","prompt":[' + b"[" * 100_000 + b"]" * 100_000 + b"]}"
    assert refusal(ENDPOINT_COMPLETIONS, body).reason is Reason.INVALID_JSON


def test_brackets_in_text_are_no_levels() -> None:
    body = {"model": "m", "prompt": '[{"\\' * 500}
    assert sent(ENDPOINT_COMPLETIONS, body)["prompt"] == body["prompt"]


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"type": "image_url", "image_url": {"url": "http://10.0.0.1/x.png"}}, "messages.0.content.0.image_url.url"),
        ({"type": "audio_url", "audio_url": {"url": "file:///etc/passwd"}}, "messages.0.content.0.audio_url.url"),
        ({"type": "x", "video_url": "https://example.com"}, "messages.0.content.0.video_url"),
    ],
)
def test_address_that_an_engine_would_fetch_is_refused(part: dict[str, Any], field: str) -> None:
    body = CHAT | {"messages": [{"role": "user", "content": [part]}]}
    error = refusal(ENDPOINT_CHAT_COMPLETIONS, json.dumps(body).encode())
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)


def test_data_url_is_passed_on() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
    messages = [{"role": "user", "content": [part]}]
    assert sent(ENDPOINT_CHAT_COMPLETIONS, CHAT | {"messages": messages})["messages"] == messages


def test_responses_are_never_stored_in_an_engine() -> None:
    body = {"model": "m", "input": "Hi", "store": True, "metadata": {}, "max_output_tokens": 5}
    assert sent(ENDPOINT_RESPONSES, body) == {"model": "up", "input": "Hi", "store": False, "max_output_tokens": 5}


@pytest.mark.parametrize(
    "change", [{"previous_response_id": "resp_1"}, {"background": True}, {"conversation": "c"}, {"prompt": {"id": "p"}}]
)
def test_stateful_responses_are_refused(change: dict[str, Any]) -> None:
    error = refusal(ENDPOINT_RESPONSES, json.dumps({"model": "m", "input": "Hi"} | change).encode())
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, next(iter(change)))


def test_embedding_inputs_pass_as_they_are() -> None:
    for inputs in ("x", ["x", "y"], [1, 2], [[1, 2], [3]]):
        body = {"model": "m", "input": inputs, "encoding_format": "base64", "dimensions": 8}
        assert sent(ENDPOINT_EMBEDDINGS, body) == body | {"model": "up"}


def test_endpoint_that_is_not_served_is_unimplemented() -> None:
    assert refusal(ENDPOINT_MESSAGES, b"{}").reason is Reason.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("endpoint", "fields", "prompts", "choices"),
    [
        (ENDPOINT_COMPLETIONS, {"prompt": "one"}, 1, 1),
        (ENDPOINT_COMPLETIONS, {"prompt": ["one", "two"], "n": 3}, 2, 6),
        (ENDPOINT_COMPLETIONS, {"prompt": [1, 2, 3]}, 1, 1),
        (ENDPOINT_COMPLETIONS, {"prompt": [[1, 2], [3]]}, 2, 2),
        (ENDPOINT_EMBEDDINGS, {"input": ["one", "two", "three"]}, 3, 1),
        (ENDPOINT_EMBEDDINGS, {"input": [1, 2, 3]}, 1, 1),
    ],
)
def test_prompts_of_a_batch_are_counted(
    endpoint: Endpoint.ValueType, fields: dict[str, Any], prompts: int, choices: int
) -> None:
    parsed = parse_json(endpoint, {"model": "m"} | fields)
    assert (parsed.prompts, parsed.choices) == (prompts, choices)
