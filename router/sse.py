"""Watches the server-sent events of an engine's answer pass by: finds usage, the end and errors; it never changes a
byte, but for taking out usage that the client did not ask for.

Bytes are handed on at the ends of events, as many events at once as arrived together. Only events that hold something
of note are parsed: usage, a finish reason, an error. Usage mostly stands in an event of its own, which is left out;
llama.cpp's completions tell it beside the last choice, and that one event is written anew without it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

from aiaas.type.v1.usage_event_pb2 import TokenUsage
from router.usage import read_response_usage, read_usage

EVENT_BYTES = 1 << 20
"""An event that has not ended after so many bytes is garbage."""


@dataclass(frozen=True, slots=True)
class EngineFault:
    """An error that an engine reported: an HTTP status, and its words for the client."""

    status: int
    message: str
    param: str | None


class EventTooLongError(Exception):
    """An event did not end within EVENT_BYTES."""


class _Choice(msgspec.Struct):
    index: int = 0
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Incomplete(msgspec.Struct):
    reason: str | None = None


class _Response(msgspec.Struct):
    status: str | None = None
    usage: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    incomplete_details: _Incomplete | None = None


class _ResponseEvent(msgspec.Struct):
    response: _Response


class _Error(msgspec.Struct):
    message: str = ""
    param: str | None = None
    code: int | str | None = None


class _ErrorAnswer(msgspec.Struct):
    """`{"error": {...}}` as vLLM and llama.cpp write it; older ones and the Responses API put it on the top level."""

    error: _Error | str | None = None
    object: str | None = None
    type: str | None = None
    message: str = ""
    param: str | None = None
    code: int | str | None = None


_CHUNK = msgspec.json.Decoder(_Chunk)
_RESPONSE_EVENT = msgspec.json.Decoder(_ResponseEvent)
_RESPONSE = msgspec.json.Decoder(_Response)
_ERROR = msgspec.json.Decoder(_ErrorAnswer)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])

_NULL = msgspec.Raw(b"null")
_EVENT_END = re.compile(rb"\r?\n\r?\n")
_DATA = re.compile(rb"^data: ?(.*?)\r?$", re.MULTILINE)
# JSON escapes quotes and line ends within strings, so none of these is ever found in what a model wrote.
_NOTABLE = re.compile(rb'"usage"|"finish_reason"\s*:\s*"|"error"|^data: ?\[DONE\]', re.MULTILINE)
_CONTENT = re.compile(rb'"(?:content|reasoning|reasoning_content|text|arguments)"\s*:\s*"(?!")')
_TEXT = b'"content":"'
# No chunk is like it.
_NO_SHAPE = (b"\0", b"\0")
_NO_TEXT = b'"content":""'
_RESPONSE_NOTABLE = re.compile(
    rb"^event: ?(?:response\.(?:completed|incomplete|failed)|error)\b|\"error\"", re.MULTILINE
)
_RESPONSE_CONTENT = re.compile(rb'"delta"\s*:\s*"(?!")')
_DONE = re.compile(rb"data: ?\[DONE\]\s*")


class EventWatch:
    """Watches one stream. `responses` is whether it speaks the Responses API's typed events.

    `usage` is the engine's last word on usage, `counted` the events that held generated text (an estimate of tokens),
    `complete` whether the stream reached its end, `fault` an error that came as an event.
    """

    def __init__(self, *, responses: bool, strip_usage: bool) -> None:
        self._strip_usage = strip_usage
        self._notable = _RESPONSE_NOTABLE if responses else _NOTABLE
        self._content = _RESPONSE_CONTENT if responses else _CONTENT
        self._read = self._read_response if responses else self._read_chunk
        self._responses = responses
        self._held = b""
        # What stands before and after the text of the last plain event.
        self._shape = _NO_SHAPE
        self.usage: TokenUsage | None = None
        self.finish_reason = ""
        self.counted = 0
        self.complete = False
        self.fault: EngineFault | None = None

    def feed(self, chunk: bytes) -> bytes:
        """The bytes that go on to the client now: what of `chunk`, and of earlier ones, makes whole events.

        Raises EventTooLongError.
        """
        before, after = self._shape
        if chunk.startswith(before) and chunk.endswith(after) and not self._held:
            text = chunk[len(before) : -len(after)]
            if text and b'"' not in text and b"\n" not in text:
                # The last event with another text, as most are; to know that costs a third of looking into it.
                self.counted += 1
                return chunk
        data = self._held + chunk if self._held else chunk
        if data.endswith(b"\n\n"):
            # The usual case: what an engine writes together are whole events.
            self._held = b""
            return self._pass(data)
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\n\r\n") + 3)
        if end < 3:
            end = 0
        if len(data) - end > EVENT_BYTES:
            raise EventTooLongError
        self._held = data[end:]
        return self._pass(data[:end])

    def end(self) -> bytes | None:
        """The bytes that go on after the engine's last; None if the stream broke off before its end.

        Only a closing marker may lack its empty line; half of any other event is nothing that a client could read.
        """
        if not self.complete and _DONE.fullmatch(self._held):
            self.complete = True
            return self._held
        return b"" if self.complete else None

    def _pass(self, events: bytes) -> bytes:
        if self._is_plain(events):
            texts = events.count(_TEXT) - events.count(_NO_TEXT)
            self.counted += texts
            if texts == events.count(b"data:") == 1:
                text_at = events.find(_TEXT) + len(_TEXT)
                self._shape = events[:text_at], events[events.find(b'"', text_at) :]
            return events
        if not self._notable.search(events):
            self.counted += len(self._content.findall(events))
            return events
        kept = []
        start = 0
        for end in _EVENT_END.finditer(events):
            event = events[start : end.end()]
            start = end.end()
            self.counted += len(self._content.findall(event))
            kept.append(self._read(event) if self._notable.search(event) else event)
            if self.fault is not None:
                # What an engine says after an error, even its closing marker, would make a failure look like an end.
                break
        return b"".join(kept)

    def _is_plain(self, events: bytes) -> bool:
        """Whether these are chat chunks as vLLM and llama.cpp write most: text in each, nothing of note, no spaces
        between. Plain searches tell so at a third of what the patterns cost, which decide in every other case."""
        return (
            events.count(_TEXT) == events.count(b"data:")
            and events.count(b'"finish_reason"') == events.count(b'"finish_reason":null')
            and b'"usage"' not in events
            and b'"error"' not in events
            and b"[DONE]" not in events
            and not self._responses
        )

    def _read_chunk(self, event: bytes) -> bytes:
        """Take what is of note from an event; returns what of it goes on to the client."""
        data = _data_of(event)
        if data == b"[DONE]":
            self.complete = True
            return event
        try:
            chunk = _CHUNK.decode(data)
            fields = _FIELDS.decode(data)
        except ValueError:
            return event
        for choice in chunk.choices or ():
            if choice.finish_reason and (choice.index == 0 or not self.finish_reason):
                self.finish_reason = choice.finish_reason
        if chunk.choices is None and (fault := read_fault(data, 500)):
            self.fault = fault
            return b""
        usage = None if chunk.usage is msgspec.UNSET else read_usage(chunk.usage)
        self.usage = usage or self.usage
        # vLLM may write null in every event but the last.
        if not self._strip_usage or fields.pop("usage", _NULL) == _NULL:
            return event
        return b"data: %b\n\n" % msgspec.json.encode(fields) if chunk.choices else b""

    def _read_response(self, event: bytes) -> bytes:
        """`_read_chunk` for the Responses API."""
        data = _data_of(event)
        try:
            response = _RESPONSE_EVENT.decode(data).response
        except ValueError:
            self.fault = read_fault(data, 500)
            return event if self.fault is None else b""
        if response.status not in ("completed", "incomplete", "failed"):
            return event
        if response.status == "failed":
            self.fault = EngineFault(500, "", None)
        self.complete = True
        self.usage = None if response.usage is msgspec.UNSET else read_response_usage(response.usage)
        self.finish_reason = _finish_of(response)
        return event


def read_answer(body: bytes, *, responses: bool) -> tuple[TokenUsage | None, str]:
    """The usage and the finish reason of a whole JSON answer. Raises ValueError if it is none."""
    if responses:
        response = _RESPONSE.decode(body)
        usage = None if response.usage is msgspec.UNSET else read_response_usage(response.usage)
        return usage, _finish_of(response)
    chunk = _CHUNK.decode(body)
    usage = None if chunk.usage is msgspec.UNSET else read_usage(chunk.usage)
    reasons = [choice.finish_reason for choice in chunk.choices or () if choice.finish_reason]
    return usage, reasons[0] if reasons else ""


def read_fault(body: bytes, status: int) -> EngineFault | None:
    """The error in an engine's JSON; its own code, where it is an HTTP status, wins over `status`. None if it is no
    error."""
    try:
        answer = _ERROR.decode(body)
    except ValueError:
        return None
    if isinstance(answer.error, str):
        return EngineFault(status, answer.error, None)
    if answer.error is not None:
        error = answer.error
    elif "error" in (answer.object, answer.type):
        error = _Error(answer.message, answer.param, answer.code)
    else:
        return None
    code = error.code if isinstance(error.code, int) and 400 <= error.code <= 599 else status
    return EngineFault(code, error.message, error.param)


def _finish_of(response: _Response) -> str:
    if response.status == "completed":
        return "stop"
    details = response.incomplete_details
    return (details and details.reason) or response.status or ""


def _data_of(event: bytes) -> bytes:
    return b"\n".join(_DATA.findall(event))
