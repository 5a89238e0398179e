"""Watches the server-sent events of an engine's answer pass by: finds usage, the end and errors; it never changes a
byte, but for taking out usage that the client did not ask for.

Bytes are handed on at the ends of events, as many events at once as arrived together. Only events that hold something
of note are parsed: usage, a finish reason, an error. Engines tell usage beside every text, vLLM as such, llama.cpp as
timings, and no two of these are alike; so an event that differs from the last in its text and its usage alone is cut by
plain searches, and what it told is read when somebody wants to know.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from aiaas.type.v1.usage_event_pb2 import TokenUsage
from router.usage import read_response_usage, read_timings, read_usage

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
    timings: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


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
# What ends an event whose last field is usage: an object of numbers, which may end with details in another one.
_USAGE_ENDS = frozenset((b"}}\n\n", b"}}}\n\n"))
_DIGITS = b"0123456789"
_END_OF_STRING = re.compile(rb'(?:[^"\\]|\\.)*+')
_NOTABLE = re.compile(rb'"usage"|"timings"|"finish_reason"\s*:\s*"|"error"|^data: ?\[DONE\]', re.MULTILINE)
_CONTENT = re.compile(rb'"(?:content|reasoning|reasoning_content|text|arguments)"\s*:\s*"(?!")')
_TEXT = b'"content":"'
_NO_TEXT = b'"content":""'
# Of so many choices at once the events are told by their shapes.
_SHAPES = 16
_RESPONSE_NOTABLE = re.compile(
    rb"^event: ?(?:response\.(?:completed|incomplete|failed)|error)\b|\"error\"", re.MULTILINE
)
_RESPONSE_CONTENT = re.compile(rb'"delta"\s*:\s*"(?!")')
_DONE = re.compile(rb"data: ?\[DONE\]\s*")


class EventWatch:
    """Watches one stream. `responses` is whether it speaks the Responses API's typed events; `choices` how many answers
    a prompt has. `strip_usage` takes out all usage, `strip_interim_usage` that which stands beside choices, for the
    client that wants to have it at the end alone.

    `counted` are the events that held generated text (an estimate of tokens), `complete` is whether the stream reached
    its end, `fault` an error that came as an event.
    """

    __slots__ = (
        "_choices",
        "_content",
        "_held",
        "_interim",
        "_last_usage",
        "_notable",
        "_read",
        "_responses",
        "_shapes",
        "_strip_interim",
        "_strip_last",
        "_unread",
        "complete",
        "counted",
        "fault",
        "finish_reason",
    )

    def __init__(
        self, *, responses: bool, strip_usage: bool, strip_interim_usage: bool = False, choices: int = 1
    ) -> None:
        self._strip_last = strip_usage
        self._strip_interim = strip_usage or strip_interim_usage
        self._choices = choices
        self._notable = _RESPONSE_NOTABLE if responses else _NOTABLE
        self._content = _RESPONSE_CONTENT if responses else _CONTENT
        self._read = self._read_response if responses else self._read_chunk
        self._responses = responses
        self._held = b""
        # Of the last event of each choice: what stands before its text, and after it, to the end or into its usage; how
        # much of the latter goes on, if not all; the rest without its digits; and the choice's index.
        self._shapes: list[tuple[bytes, bytes, int, bytes, int]] = []
        # Usage beside choices, by their index: the last of each that was read, and ends of events that came since.
        self._interim: dict[int, TokenUsage] = {}
        self._unread: dict[int, bytes] = {}
        self._last_usage: TokenUsage | None = None
        self.finish_reason = ""
        self.counted = 0
        self.complete = False
        self.fault: EngineFault | None = None

    @property
    def usage(self) -> TokenUsage | None:
        """The engine's last word on the usage of all choices together; None if it has said none that makes sense."""
        last, interim = self._last_usage, self._interim_usage()
        if last is None:
            return interim
        if interim is not None and len(self._interim) > 1 and interim.completion_tokens > last.completion_tokens:
            # llama.cpp ends with the usage of each choice, and never tells their sum.
            return interim
        return last

    def _interim_usage(self) -> TokenUsage | None:
        for index, rest in self._unread.items():
            if (usage := _read_interim(b"{" + rest.removesuffix(b"}\n\n"))) is not None:
                self._interim[index] = usage
        self._unread.clear()
        if len(self._interim) < 2:
            return next(iter(self._interim.values()), None)
        # Each choice tells its own tokens and its prompt's; choices are numbered through all prompts.
        prompts = {index // self._choices: usage for index, usage in self._interim.items()}
        return TokenUsage(
            prompt_tokens=sum(usage.prompt_tokens for usage in prompts.values()),
            cached_prompt_tokens=sum(usage.cached_prompt_tokens for usage in prompts.values()),
            completion_tokens=sum(usage.completion_tokens for usage in self._interim.values()),
            reasoning_tokens=sum(usage.reasoning_tokens for usage in self._interim.values()),
        )

    @property
    def progress(self) -> tuple[int, int]:
        """Tokens of the prompt, 0 before the engine has told them, and of what has been generated by now."""
        usage = self.usage
        if usage is None:
            return 0, self.counted
        return usage.prompt_tokens, max(usage.completion_tokens, self.counted)

    def feed(self, chunk: bytes) -> bytes:
        """The bytes that go on to the client now: what of `chunk`, and of earlier ones, makes whole events.

        Raises EventTooLongError.
        """
        if not self._held and (event := self._pass_alike(chunk)) is not None:
            return event
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

    def _pass_alike(self, event: bytes) -> bytes | None:
        """What goes on of an event that is like the last, but for its text and its usage, as most are: to know that
        costs a small part of looking into it. None if it is another one, or not one event."""
        for before, after, kept, digitless, index in self._shapes:
            if event.startswith(before):
                passed = self._pass_shaped(event, len(before), after, kept, digitless, index)
                if passed is not None:
                    return passed
        return None

    def _pass_shaped(
        self, event: bytes, text_at: int, after: bytes, kept: int, digitless: bytes, index: int
    ) -> bytes | None:
        text_end = event.find(b'"', text_at)
        if not event.startswith(after, text_end):
            # The text may hold quotes of its own.
            text_end = _end_of_string(event, text_at)
            if not event.startswith(after, text_end):
                return None
        if event.find(b"\n") != len(event) - 2:
            return None
        rest = event[text_end + len(after) :]
        if rest:
            if rest.translate(None, _DIGITS) != digitless:
                return None
            self._unread[index] = rest
            if kept:
                event = event[: text_end + kept] + b"}\n\n"
        if text_end > text_at:
            self.counted += 1
        return event

    def _learn(self, event: bytes, index: int, after_end: int, kept_end: int = 0) -> None:
        """Take an event of one line for the shape of those to come. `after_end` is where its usage begins, or its end;
        `kept_end` is where it is cut, if it is."""
        if (text := self._content.search(event)) and event.find(b"\n") == len(event) - 2:
            text_end = _end_of_string(event, text.end())
            if text_end < after_end:
                kept = max(0, kept_end - text_end)
                others = [shape for shape in self._shapes if shape[-1] != index]
                digitless = event[after_end:].translate(None, _DIGITS)
                shape = (event[: text.end()], event[text_end:after_end], kept, digitless, index)
                self._shapes = [shape, *others[: _SHAPES - 1]]

    def _pass(self, events: bytes) -> bytes:
        if self._is_plain(events):
            texts = events.count(_TEXT) - events.count(_NO_TEXT)
            self.counted += texts
            if texts == events.count(b"data:") == 1:
                self._learn(events, 0, len(events))
            return events
        kept = []
        *whole, rest = _split(events)
        for event in whole:
            if (alike := self._pass_alike(event)) is not None:
                kept.append(alike)
                continue
            # Some engines write the same words twice in one event, under an old name and a new one.
            self.counted += self._content.search(event) is not None
            if not self._notable.search(event):
                kept.append(event)
                if not self._responses:
                    self._learn(event, 0, len(event))
                continue
            kept.append(self._read(event))
            if self.fault is not None:
                # What an engine says after an error, even its closing marker, would make a failure look like an end.
                return b"".join(kept)
        return b"".join([*kept, rest])

    def _is_plain(self, events: bytes) -> bool:
        """Whether these are chat chunks as vLLM and llama.cpp write most: text in each, nothing of note, no spaces
        between. Plain searches tell so at a third of what the patterns cost, which decide in every other case."""
        return (
            b'"usage"' not in events
            and b'"timings"' not in events
            and events.count(_TEXT) == events.count(b"data:")
            and events.count(b'"finish_reason"') == events.count(b'"finish_reason":null')
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
        except ValueError:
            return event
        choices = chunk.choices or ()
        for choice in choices:
            if choice.finish_reason and (choice.index == 0 or not self.finish_reason):
                self.finish_reason = choice.finish_reason
        if chunk.choices is None and (fault := read_fault(data, 500)):
            self.fault = fault
            return b""
        # vLLM may write null in every event but the last.
        usage = None if chunk.usage is msgspec.UNSET or chunk.usage == _NULL else chunk.usage
        if not choices:
            if usage is None:
                return event
            self._last_usage = read_usage(usage) or self._last_usage
            return b"" if self._strip_last else event
        told = chunk.timings if usage is None else usage
        if told is msgspec.UNSET:
            return event
        index = choices[0].index
        interim = _read_interim(told)
        if interim is not None:
            self._interim[index] = interim
            self._unread.pop(index, None)
        name = "timings" if usage is None else "usage"
        # No client asks for timings beside every text; it was the router who did.
        is_stripped = self._strip_interim or usage is None
        key = b',"%b":{' % name.encode()
        start = event.find(key)
        if start < 0 or event[event.find(b"}", start) :] not in _USAGE_ENDS or event.count(key[1:-2]) != 1:
            return _without(name, event, data) if is_stripped else event
        if interim is not None and len(choices) == 1:
            self._learn(event, index, start + len(key), start if is_stripped else 0)
        return event[:start] + b"}\n\n" if is_stripped else event

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
        self._last_usage = None if response.usage is msgspec.UNSET else read_response_usage(response.usage)
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


def _split(events: bytes) -> list[bytes]:
    """The events, and what stands after the last of them."""
    if b"\r" not in events:
        *whole, rest = events.split(b"\n\n")
        return [*(event + b"\n\n" for event in whole), rest]
    ends = [0, *(end.end() for end in _EVENT_END.finditer(events)), len(events)]
    return [events[start:end] for start, end in pairwise(ends)]


def _read_interim(raw: bytes | msgspec.Raw) -> TokenUsage | None:
    return read_usage(raw) or read_timings(raw)


def _end_of_string(event: bytes, start: int) -> int:
    """Where the JSON string ends that is open at `start`."""
    end = _END_OF_STRING.match(event, start)
    return len(event) if end is None else end.end()


def _without(name: str, event: bytes, data: bytes) -> bytes:
    """An event written anew, but for one field."""
    try:
        fields = _FIELDS.decode(data)
    except ValueError:
        return event
    fields.pop(name, None)
    return b"data: %b\n\n" % msgspec.json.encode(fields)


def _data_of(event: bytes) -> bytes:
    return b"\n".join(_DATA.findall(event))
