"""Watching an engine's events pass by."""

import json
from random import Random

import pytest

from router.sse import EVENT_BYTES, EngineFault, EventTooLongError, EventWatch, read_answer, read_fault
from tests.doubles.scripted_backend import chunk, sse, usage, usage_chunk

STREAM = b"".join(sse(chunk(""), chunk("Hel"), chunk("lo"), chunk(finish_reason="length"), usage_chunk(7, 2)))


def watch_all(
    data: bytes, size: int, *, strip_usage: bool = False, responses: bool = False
) -> tuple[EventWatch, bytes]:
    """Feed `data` in chunks of `size` bytes; returns the watch and all that was passed on."""
    watch = EventWatch(responses=responses, strip_usage=strip_usage)
    passed = b"".join(watch.feed(data[start : start + size]) for start in range(0, len(data), size))
    return watch, passed + (watch.end() or b"")


@pytest.mark.parametrize("size", [1, 3, 64, 1000, 100_000])
def test_bytes_pass_unchanged_and_are_understood(size: int) -> None:
    watch, passed = watch_all(STREAM, size)
    assert passed == STREAM
    assert watch.complete
    assert watch.finish_reason == "length"
    assert watch.usage is not None
    assert (watch.usage.prompt_tokens, watch.usage.completion_tokens) == (7, 2)
    assert watch.counted == 2


@pytest.mark.parametrize("size", [1, 3, 64, 1000, 100_000])
def test_usage_event_is_left_out_when_not_asked_for(size: int) -> None:
    watch, passed = watch_all(STREAM, size, strip_usage=True)
    events = sse(chunk(""), chunk("Hel"), chunk("lo"), chunk(finish_reason="length"))
    assert passed == b"".join(events)
    assert watch.usage is not None
    assert watch.usage.completion_tokens == 2


def test_any_split_gives_the_same_bytes() -> None:
    random = Random(1)
    for line_end in (b"\n", b"\r\n"):
        stream = STREAM.replace(b"\n", line_end)
        for _ in range(200):
            watch = EventWatch(responses=False, strip_usage=False)
            passed = b""
            start = 0
            while start < len(stream):
                end = start + random.randint(1, 60)
                passed += watch.feed(stream[start:end])
                start = end
            assert passed + (watch.end() or b"") == stream
            assert watch.complete


def test_what_a_model_writes_is_never_taken_for_the_protocol() -> None:
    text = 'data: [DONE]\n\ndata: {"error": {"message": "x"}}\n\n "usage": {"prompt_tokens": 9} "finish_reason":"stop"'
    stream = b"".join(sse(chunk(text), done=False))
    watch, passed = watch_all(stream, 1000, strip_usage=True)
    assert passed == stream
    assert not watch.complete
    assert watch.usage is None
    assert watch.fault is None
    assert watch.finish_reason == ""


# As llama.cpp's completions end, but for a number whose spelling must not change.
LAST_CHOICE = (
    b'data: {"choices":[{"text":"","index":0,"logprobs":{"top":-1.50e-3},"finish_reason":"length"}],"created":1,'
    b'"usage":{"completion_tokens":5,"prompt_tokens":4,"total_tokens":9},"timings":{"prompt_n":4}}\n\n'
)


@pytest.mark.parametrize("size", [1, 64, 1000])
@pytest.mark.parametrize("asked", [True, False])
def test_usage_beside_choices_is_taken_out_when_not_asked_for(size: int, asked: bool) -> None:
    before, after = sse(chunk("x"), chunk("y")), b"data: [DONE]\n\n"
    watch, passed = watch_all(b"".join(before[:2]) + LAST_CHOICE + after, size, strip_usage=not asked)
    bare = LAST_CHOICE.replace(b',"usage":{"completion_tokens":5,"prompt_tokens":4,"total_tokens":9}', b"")
    assert passed == b"".join(before[:2]) + (LAST_CHOICE if asked else bare) + after
    assert (watch.complete, watch.finish_reason, watch.counted) == (True, "length", 2)
    assert watch.usage is not None
    assert (watch.usage.prompt_tokens, watch.usage.completion_tokens) == (4, 5)


@pytest.mark.parametrize("strip_usage", [True, False])
def test_null_for_usage_stays(strip_usage: bool) -> None:
    stream = b"".join(sse(chunk("x") | {"usage": None}, chunk(finish_reason="stop") | {"usage": None}))
    watch, passed = watch_all(stream, 1000, strip_usage=strip_usage)
    assert passed == stream
    assert watch.usage is None


@pytest.mark.parametrize("garbage", [usage(1, 10**15), {"prompt_tokens": "x"}, {"prompt_tokens": 1.5}, [], "x", {}])
def test_garbage_usage_is_not_believed(garbage: object) -> None:
    watch, _ = watch_all(b"".join(sse(chunk("x"), chunk() | {"choices": [], "usage": garbage})), 1000)
    assert watch.usage is None
    assert watch.counted == 1


def test_stream_without_its_end_is_noticed() -> None:
    watch, passed = watch_all(b"".join(sse(chunk("x"), done=False)) + b'data: {"half', 1000)
    assert not watch.complete
    assert watch.end() is None
    assert passed == b"".join(sse(chunk("x"), done=False))


def test_closing_marker_may_lack_its_empty_line() -> None:
    stream = STREAM.removesuffix(b"\n\n")
    watch, passed = watch_all(stream, 1000)
    assert watch.complete
    assert passed == stream


def test_endless_event_is_cut() -> None:
    watch = EventWatch(responses=False, strip_usage=False)
    for _ in range(EVENT_BYTES // 65536):
        assert watch.feed(b"x" * 65536) == b""
    with pytest.raises(EventTooLongError):
        watch.feed(b"x")


def test_bad_utf8_and_broken_json_pass() -> None:
    stream = b'data: {"choices": [{"delta": {"content": "\xff\xfe"}}]}\n\ndata: {"usage": \n\n'
    stream += b'data: {"choices": [{"finish_reason": "\xff"}]}\n\ndata: {"\xff": 0, "usage": {}}\n\ndata: [DONE]\n\n'
    watch, passed = watch_all(stream, 1000, strip_usage=True)
    assert passed == stream
    assert watch.complete
    assert watch.usage is None


@pytest.mark.parametrize(
    "event",
    [
        {"error": {"message": "too long", "param": "prompt", "code": 400}},
        {"object": "error", "message": "too long", "param": "prompt", "code": 400},
    ],
)
def test_error_event_is_found_and_kept_back(event: dict[str, object]) -> None:
    watch, passed = watch_all(b"".join(sse(chunk("x"), event)), 1000)
    assert watch.fault == EngineFault(400, "too long", "prompt")
    assert b"too long" not in passed


def response_event(kind: str, **response: object) -> bytes:
    data = json.dumps({"type": f"response.{kind}", "response": {"error": None, "usage": None} | response})
    return f"event: response.{kind}\ndata: {data}\n\n".encode()


DELTA = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"Hi"}\n\n'
RESPONSE_USAGE = {"input_tokens": 4, "output_tokens": 2, "output_tokens_details": {"reasoning_tokens": 1}}


@pytest.mark.parametrize("size", [1, 50, 10_000])
def test_typed_events_tell_usage_and_the_end(size: int) -> None:
    stream = response_event("created", status="in_progress") + DELTA * 2
    stream += response_event("completed", status="completed", usage=RESPONSE_USAGE)
    watch, passed = watch_all(stream, size, responses=True)
    assert passed == stream
    assert watch.complete
    assert watch.finish_reason == "stop"
    assert watch.counted == 2
    assert watch.usage is not None
    assert (watch.usage.prompt_tokens, watch.usage.completion_tokens, watch.usage.reasoning_tokens) == (4, 2, 1)


def test_incomplete_response_is_whole_and_names_its_reason() -> None:
    details = {"reason": "max_output_tokens"}
    stream = response_event("incomplete", status="incomplete", usage=RESPONSE_USAGE, incomplete_details=details)
    watch, _ = watch_all(stream, 1000, responses=True)
    assert watch.complete
    assert watch.finish_reason == "max_output_tokens"


def test_typed_events_without_the_last_are_not_whole() -> None:
    watch, _ = watch_all(response_event("created", status="in_progress") + DELTA, 1000, responses=True)
    assert not watch.complete
    assert watch.counted == 1


def test_failed_response_is_a_fault() -> None:
    watch, _ = watch_all(response_event("failed", status="failed"), 1000, responses=True)
    assert watch.fault is not None


def test_document_tells_usage_and_finish() -> None:
    document = {"choices": [{"index": 0, "finish_reason": "stop"}], "usage": usage(3, 4)}
    tokens, finish_reason = read_answer(json.dumps(document).encode(), responses=False)
    assert tokens is not None
    assert (tokens.prompt_tokens, tokens.completion_tokens, finish_reason) == (3, 4, "stop")


def test_what_is_no_error_is_no_fault() -> None:
    assert read_fault(b"<html>", 502) is None
    assert read_fault(b'{"detail": "x"}', 400) is None
    assert read_fault(b'{"error": {"message": "\xff"}}', 400) is None
