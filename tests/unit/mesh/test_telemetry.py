"""Logs: one JSON object a line, with the ids of the request, and without secrets."""

import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from random import Random
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from mesh import context, tokens
from mesh.telemetry import configure_logging, redact
from tests.doubles.clock import ManualClock

# The same in every worker, as it is part of tests' names.
KEY = tokens.API_KEY.generate(Random(7), clock=ManualClock()).text
SECRET = KEY.rpartition("_")[2]
# Of the same secret, as only that is looked for.
SESSION = f"{tokens.SESSION.prefix}session_{KEY.split('_')[2]}_{SECRET}"
logger = logging.getLogger("tests.telemetry")


class Lines:
    def __init__(self) -> None:
        self.stream = io.StringIO()

    @property
    def raw(self) -> str:
        return self.stream.getvalue()

    @property
    def last(self) -> dict[str, Any]:
        line: dict[str, Any] = json.loads(self.raw.splitlines()[-1])
        return line


@pytest.fixture
def lines() -> Iterator[Lines]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    written = Lines()
    configure_logging("router", "debug", stream=written.stream)
    yield written
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_says_when_how_grave_where_and_what(lines: Lines) -> None:
    logger.info("answered %d", 200, extra={"status": 200, "model": "smollm2"})
    line = lines.last
    moment = datetime.fromisoformat(line.pop("timestamp"))
    assert moment.utcoffset() == timedelta(0)
    assert line == {
        "level": "info",
        "service": "router",
        "logger": "tests.telemetry",
        "message": "answered 200",
        "status": 200,
        "model": "smollm2",
    }


def test_a_line_carries_the_request_and_the_span(lines: Lines) -> None:
    token = context.request_id.set("req_1")
    try:
        with TracerProvider().get_tracer("t").start_as_current_span("s") as span:
            logger.info("x")
    finally:
        context.request_id.reset(token)
    assert lines.last["request_id"] == "req_1"
    assert lines.last["trace_id"] == f"{span.get_span_context().trace_id:032x}"
    assert lines.last["span_id"] == f"{span.get_span_context().span_id:016x}"


def test_a_line_break_in_a_value_does_not_make_another_line(lines: Lines) -> None:
    logger.info("a\nb %s", 'c\r\n{"level": "critical"}')
    assert len(lines.raw.splitlines()) == 1


def test_an_exception_is_written_without_the_values_of_local_variables(lines: Lines) -> None:
    def fail() -> None:
        prompt = "tell me " + "a story"
        raise ValueError(f"bad key {KEY}") from KeyError(f"password={len(prompt)}")

    try:
        fail()
    except ValueError:
        logger.exception("failed")
    assert "ValueError: bad key aias_[redacted]" in lines.last["exception"]
    assert "tell me a story" not in lines.raw
    assert SECRET not in lines.raw


@pytest.mark.parametrize(
    "text",
    [
        f"{KEY}",
        f"x={KEY}&y=1",
        f"%3D{KEY}",
        KEY[:-4],
        SESSION,
        f"%3D{SESSION}",
        f"Authorization: Bearer {SECRET}",
        f"{{'authorization': 'Bearer {SECRET}'}}",
        f"('authorization', 'Bearer {SECRET}')",
        f"authorization={SECRET}",
        f"Authorization: Basic {SECRET}==",
        f"bearer {SECRET}",
        f"postgresql://router:{SECRET}@127.0.0.1:5432/router",
        f"amqp://user:p@ss/{SECRET}@rabbit//",
        f"redis://:{SECRET}@cache",
        f"password={SECRET}",
        f'{{"password": "{SECRET} with spaces {SECRET}"}}',
        f"DB_PASSWORD: {SECRET}",
        f"client_secret='{SECRET}'",
        f"api-key: {SECRET}",
        f"credentials={SECRET}",
        f"refresh_token={SECRET}&x",
        "sk-proj-" + SECRET,
        "whsec_" + SECRET + "/+=",
        f"eyJhbGciOiJIUzI1NiJ9.eyJ{SECRET}.{SECRET}",
    ],
)
def test_secrets_are_withheld_wherever_they_stand(lines: Lines, text: str) -> None:
    logger.info(text)
    logger.info("an argument: %s", text)
    logger.info("a mapping: %r", {"x": [text]})
    logger.info("an extra", extra={"detail": text, "nested": {text: [text, {"x": text}]}})
    logger.info("does not fit: %d %d", text)
    try:
        raise RuntimeError(text)
    except RuntimeError:
        logger.exception("an exception")
    assert len(lines.raw.splitlines()) == 6
    assert SECRET[:-4] not in lines.raw


def test_fields_that_hold_secrets_or_prompts_are_withheld_by_name(lines: Lines) -> None:
    logger.info("x", extra={"authorization": "zzz", "nested": {"Set-Cookie": "zzz"}, "prompt": ["zzz"], "password": 1})
    assert "zzz" not in lines.raw
    assert lines.last["password"] == "[redacted]"


def test_what_is_not_secret_stays() -> None:
    text = "org_1 used 12 prompt_tokens and 3 completion_tokens of key_0352 at http://127.0.0.1:8080/v1/models?limit=3"
    assert redact(text) == text


def test_whatever_is_logged_a_line_comes_out(lines: Lines) -> None:
    class Rude:
        def __str__(self) -> str:
            raise RuntimeError("no")

    cyclic: dict[str, Any] = {}
    cyclic["self"] = cyclic
    logger.info("%s", Rude())
    logger.info(Rude())
    logger.info("x", extra={"a": Rude(), "b": float("nan"), "c": b"\xff", "d": "\ud800", "e": {1: {2}}})
    logger.info("x", extra={"cyclic": cyclic})
    logger.info("%s", "x" * 10_000_000)
    assert len(lines.raw.splitlines()) == 5
    assert all(json.loads(line)["level"] == "info" for line in lines.raw.splitlines())
    assert len(lines.raw) < 100_000


def test_an_unknown_level_is_refused() -> None:
    root = logging.getLogger()
    handlers = root.handlers[:]
    root.handlers.clear()
    try:
        with pytest.raises(ValueError, match="LOUD"):
            configure_logging("router", "loud", stream=io.StringIO())
    finally:
        root.handlers[:] = handlers
