"""Watching an engine's events pass by."""

import json
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.sse import EVENT_BYTES, EngineFault, EventTooLongError, EventWatch, read_answer, read_fault
from tests.doubles.scripted_backend import chunk, sse, told_chunk, usage, usage_chunk, vllm_usage

STREAM = b"".join(sse(chunk(""), chunk("Hel"), chunk("lo"), chunk(finish_reason="length"), usage_chunk(7, 2)))


def watch_all(
    data: bytes, size: int, *, strip_usage: bool = False, responses: bool = False, **options: Any
) -> tuple[EventWatch, bytes]:
    """Feed `data` in chunks of `size` bytes; returns the watch and all that was passed on."""
    watch = EventWatch(responses=responses, strip_usage=strip_usage, **options)
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


def told(watch: EventWatch) -> tuple[int, int] | None:
    """Tokens of prompt and answer by the engine's last word."""
    return None if watch.usage is None else (watch.usage.prompt_tokens, watch.usage.completion_tokens)


# As vLLM writes it, with several tokens in an event where it was held up.
TOLD = [
    chunk("") | {"usage": vllm_usage(5, 0), "prompt_token_ids": None},
    told_chunk("Hel", 5, 1),
    told_chunk("lo", 5, 2),
    told_chunk("", 5, 3),
    told_chunk(', "\\you', 5, 7),
    told_chunk('"}', 5, 8),
    told_chunk("", 5, 9, finish_reason="stop"),
    usage_chunk(5, 9),
]
BARE = [{name: value for name, value in event.items() if name != "usage"} for event in TOLD]


@pytest.mark.parametrize("size", [1, 3, 64, 1000, 100_000])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"strip_usage": True}, BARE[:-1]),
        ({"strip_usage": False, "strip_interim_usage": True}, [*BARE[:-1], TOLD[-1]]),
        ({"strip_usage": False}, TOLD),
    ],
)
def test_client_gets_of_the_usage_told_all_along_what_it_asked_for(
    size: int, options: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    watch, passed = watch_all(b"".join(sse(*TOLD)), size, **options)
    assert passed == b"".join(sse(*expected))
    assert (watch.complete, watch.finish_reason, watch.counted, told(watch)) == (True, "stop", 4, (5, 9))


@pytest.mark.parametrize("kept", range(1, len(TOLD) + 1))
@pytest.mark.parametrize("together", [True, False])
def test_usage_is_known_at_every_moment(kept: int, together: bool) -> None:
    events = sse(*TOLD[:kept], done=False)
    watch, _ = watch_all(b"".join(events), 100_000 if together else len(events[0]), strip_usage=True)
    prompt_tokens, completion_tokens = TOLD[kept - 1]["usage"]["prompt_tokens"], TOLD[kept - 1]["usage"]
    assert told(watch) == watch.progress == (prompt_tokens, completion_tokens["completion_tokens"])


def test_progress_is_what_was_counted_until_the_engine_tells_more() -> None:
    watch = EventWatch(responses=False, strip_usage=True)
    assert (watch.usage, watch.progress) == (None, (0, 0))
    for event in sse(chunk("x"), chunk("y"), told_chunk("z", 5, 1), done=False):
        watch.feed(event)
    assert (told(watch), watch.progress) == ((5, 1), (5, 3))


def test_same_text_under_two_names_is_counted_once() -> None:
    event = chunk("x")
    event["choices"][0]["delta"] = {"reasoning": "x", "reasoning_content": "x"}
    for stream in (sse(event, event, chunk("y")), sse(event | TOLD[1] | {"choices": event["choices"]})):
        watch, _ = watch_all(b"".join(stream), 100_000)
        assert watch.counted == len(stream) - 1


@pytest.mark.parametrize("size", [1, 100_000])
def test_choices_are_added_up_and_prompts_are_counted_once(size: int) -> None:
    # Two prompts of 5 and 7 tokens with two choices each, which vLLM numbers through.
    events = sse(
        *(told_chunk("x", 5 if index < 2 else 7, count, index=index) for count in (1, 2, 3) for index in range(4)),
        told_chunk("x", 7, 4, index=3),
        done=False,
    )
    watch, passed = watch_all(b"".join(events), size, strip_usage=True, choices=2)
    assert (told(watch), watch.counted) == ((12, 13), 13)
    assert b"usage" not in passed
    # vLLM's last word is about all of them, llama.cpp's about one.
    watch.feed(b"".join(sse(usage_chunk(7, 4), done=False)))
    assert told(watch) == (12, 13)
    watch.feed(b"".join(sse(usage_chunk(12, 14))))
    assert told(watch) == (12, 14)


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize("details", [None, {"reasoning_tokens": 2}, {"a": {"b": {}}}, [{}], "}}"])
def test_usage_with_details_is_cut_whole(size: int, details: object) -> None:
    events = [told_chunk("x", 5, count) for count in (1, 2, 3)]
    for event in events[1:]:
        event["usage"]["completion_tokens_details"] = details
    watch, passed = watch_all(b"".join(sse(*events)), size, strip_usage=True)
    assert passed == b"".join(sse(*[chunk("x")] * 3))
    # Garbage in a part of it is garbage: what was said before it counts on.
    assert told(watch) == ((5, 1) if isinstance(details, (list, str)) else (5, 3))


@pytest.mark.parametrize("size", [1, 100, 100_000])
@pytest.mark.parametrize("strip_usage", [True, False])
def test_llamacpps_timings_are_read_and_left_out(size: int, strip_usage: bool) -> None:
    timings = {"cache_n": 4, "prompt_n": 1, "prompt_ms": 16.1}
    events = [chunk(word) | {"timings": timings | {"predicted_n": n}} for n, word in enumerate(["a", '"', "c"], 1)]
    watch, passed = watch_all(b"".join(sse(*events, done=False)), size, strip_usage=strip_usage)
    assert passed == b"".join(sse(chunk("a"), chunk('"'), chunk("c"), done=False))
    assert (told(watch), watch.counted) == ((5, 3), 3)
    last = usage_chunk(5, 4) | {"timings": timings}
    assert watch.feed(sse(last)[0]) == (b"" if strip_usage else sse(last)[0])
    assert told(watch) == (5, 4)


@pytest.mark.parametrize(
    "garbage",
    [
        usage(1, 10**15),
        usage(-1, 2),
        usage(1, -2),
        {"prompt_tokens": "x"},
        {"prompt_tokens": 1.5},
        {"prompt_tokens": 1, "completion_tokens": 1e99},
        [],
        "x",
        {},
        0,
    ],
)
def test_garbage_usage_is_not_believed(garbage: object) -> None:
    last = chunk() | {"choices": [], "usage": garbage}
    for events in ([chunk("x"), last], [chunk("x") | {"usage": garbage}]):
        watch, _ = watch_all(b"".join(sse(*events)), 1000)
        assert watch.usage is None
        assert watch.counted == 1
    # What was said before it counts on.
    odd = chunk("x") | {"usage": garbage}
    watch = EventWatch(responses=False, strip_usage=True)
    passed = b"".join(map(watch.feed, sse(*TOLD[:3], odd, odd, last, done=False)))
    assert passed == b"".join(sse(*BARE[:3], chunk("x"), chunk("x"), done=False))
    assert told(watch) == (5, 2)


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize("own", [5, None, vllm_usage(5, 1)])
def test_usage_of_something_else_is_left_alone(size: int, own: object) -> None:
    bare = {"choices": chunk("x")["choices"], "other": {"name": "x", "usage": {"hours": 1}}}
    event = {"choices": bare["choices"], "usage": own, "other": bare["other"]}
    watch, passed = watch_all(b"".join(sse(event, event)), size, strip_usage=True)
    expected = event if own is None else bare
    assert passed == b"".join(sse(expected, expected))
    assert told(watch) == ((5, 1) if isinstance(own, dict) else None)


def test_line_ends_within_a_text_end_its_event() -> None:
    events = sse(TOLD[1], TOLD[2], done=False)
    events[1] = events[1].replace(b"lo", b"l\n\no")
    for pieces in (events, [bytes([byte]) for byte in b"".join(events)]):
        watch = EventWatch(responses=False, strip_usage=True)
        assert b"".join(map(watch.feed, pieces)) == sse(BARE[1])[0] + events[1]
        assert watch.counted == 2


TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [',"usage":{"prompt_tokens":1}}', '"', "\\", '\\"', "}}\n\n", "data: [DONE]\n\n", '"timings"', '"}}],"usage":{']
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS | st.just("usage"), inner, max_size=2),
    max_leaves=4,
)
COUNTS = st.integers(0, 3)
USAGES = st.one_of(
    st.none(),
    st.builds(vllm_usage, COUNTS, COUNTS),
    st.builds(
        lambda told, details: told | {"completion_tokens_details": details}, st.builds(vllm_usage, COUNTS, COUNTS), JSON
    ),
    JSON,
)


ODDITIES = st.sampled_from([*[""] * 6, "index", "text", "finish", "last", "usage", "none", "null", "after"])


@st.composite
def engine_events(draw: st.DrawFn) -> dict[str, Any]:
    """An event of an engine, mostly a text and its usage, whatever it may tell beside them."""
    oddity = draw(ODDITIES)
    event = told_chunk(draw(TEXTS), draw(COUNTS), draw(COUNTS), index=int(oddity == "index"))
    if oddity == "text":
        event["choices"][0] = {"index": 0, "text": draw(TEXTS), "finish_reason": None}
    elif oddity == "finish":
        event["choices"][0]["finish_reason"] = "stop"
    elif oddity == "last":
        event["choices"] = []
    elif oddity == "usage":
        event["usage"] = draw(USAGES)
    elif oddity == "none":
        del event["usage"]
    elif oddity == "null":
        event["usage"] = None
    elif oddity == "after":
        event["prompt_text"] = draw(JSON)
    return event


@given(
    events=st.lists(engine_events(), max_size=12),
    cuts=st.lists(st.integers(0, 1000), max_size=12),
    strip=st.sampled_from([(True, True), (False, True), (False, False)]),
    spelling=st.sampled_from([((",", ":"), b"\n"), ((",", ":"), b"\r\n"), ((", ", ": "), b"\n")]),
    ascii_only=st.booleans(),
)
def test_client_gets_the_same_bytes_however_they_come(
    events: list[dict[str, Any]],
    cuts: list[int],
    strip: tuple[bool, bool],
    spelling: tuple[tuple[str, str], bytes],
    ascii_only: bool,
) -> None:
    separators, line_end = spelling
    documents = [json.dumps(event, separators=separators, ensure_ascii=ascii_only) for event in events]
    parts = [b"data: " + document.encode() + line_end * 2 for document in (*documents, "[DONE]")]
    stream = b"".join(parts)
    sorted_cuts = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    passed, words = [], []
    for pieces in ([stream], parts, [stream[start:end] for start, end in pairwise(sorted_cuts)]):
        watch = EventWatch(responses=False, strip_usage=strip[0], strip_interim_usage=strip[1])
        passed.append(b"".join(map(watch.feed, pieces)))
        words.append((watch.complete, watch.counted, watch.finish_reason, watch.usage))
    assert passed[0] == passed[1] == passed[2]
    assert words[0] == words[1] == words[2]
    got = [line.removeprefix(b"data: ") for line in passed[0].splitlines() if line.startswith(b"data: ")]
    assert got.pop() == b"[DONE]"
    expected = []
    for event in events:
        if event.get("usage") is not None and strip[bool(event["choices"])]:
            del event["usage"]
            if not event["choices"]:
                continue
        expected.append(event)
    assert [json.loads(line) for line in got] == expected


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
    stream += b'data: {"choices": [{"finish_reason": "\xff"}]}\n\ndata: {"\xff": 0, "choices": [{}], "usage": {}}\n\n'
    stream += b"data: [DONE]\n\n"
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
