"""The event that ends a broken stream."""

import json

import pytest

from aiaas.type.v1 import usage_event_pb2
from edge.openai.sse import error_event
from mesh.errors import PlatformError, Reason

CHAT = usage_event_pb2.ENDPOINT_CHAT_COMPLETIONS
ERROR = PlatformError(Reason.BACKEND_ERROR)


@pytest.mark.parametrize("last_chunk", [b"", b"data: 1\n\n", b"data: 1\r\n\r\n"])
def test_error_follows_a_whole_event_at_once(last_chunk: bytes) -> None:
    assert error_event(CHAT, ERROR, last_chunk).startswith(b'data: {"error":{')


@pytest.mark.parametrize("last_chunk", [b"data", b"data: 1\n", b"data: 1\r\n"])
def test_event_that_broke_off_is_ended_first(last_chunk: bytes) -> None:
    assert error_event(CHAT, ERROR, last_chunk).startswith(b'\n\ndata: {"error":{')


def test_responses_api_gets_a_typed_event() -> None:
    name, data, *end = error_event(usage_event_pb2.ENDPOINT_RESPONSES, ERROR, b"").decode().split("\n")
    assert name == "event: error"
    told = json.loads(data.removeprefix("data: "))
    assert told["type"] == "error"
    assert told["error"]["code"] == "backend_error"
    assert end == ["", ""]
