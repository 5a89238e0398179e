"""Reading an engine's token counts."""

import json
from typing import Any

import pytest

from aiaas.type.v1.usage_event_pb2 import TokenUsage
from router.usage import read_response_usage, read_usage


def both(prompt: int, cached: int | None, completion: int, reasoning: int | None) -> tuple[TokenUsage | None, ...]:
    """What is read of the same counts in both spellings."""
    prompt_details, completion_details = {"cached_tokens": cached}, {"reasoning_tokens": reasoning}
    chat: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": prompt_details,
        "completion_tokens_details": completion_details,
    }
    response: dict[str, Any] = {
        "input_tokens": prompt,
        "output_tokens": completion,
        "input_tokens_details": prompt_details,
        "output_tokens_details": completion_details,
    }
    return read_usage(json.dumps(chat).encode()), read_response_usage(json.dumps(response).encode())


@pytest.mark.parametrize(
    ("told", "read"),
    [
        ((9, 4, 5, 2), (9, 4, 5, 2)),
        ((9, None, 5, None), (9, 0, 5, 0)),
        ((9, 10, 5, 6), (9, 9, 5, 5)),
        ((9, -1, 5, -1), (9, 0, 5, 0)),
        ((-1, 4, -(10**30), 2), (0, 0, 0, 0)),
    ],
)
def test_counts_are_held_to_what_a_usage_event_may_say(
    told: tuple[int, int | None, int, int | None], read: tuple[int, int, int, int]
) -> None:
    names = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "reasoning_tokens")
    assert both(*told) == (TokenUsage(**dict(zip(names, read, strict=True))),) * 2


def test_count_beyond_any_request_is_garbage() -> None:
    assert both(10**10, 0, 1, 0) == both(1, 10**10, 1, 0) == (None, None)
