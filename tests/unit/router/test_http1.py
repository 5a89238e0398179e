"""One connection to an engine, byte by byte, without a socket.

Random splits and damage run a few hundred times here; the long run is
`SPLITS=20000 DAMAGES=5000 pytest tests/unit/router/test_http1.py`. What the fuzzer of tests/fuzz/upstream has found
interesting is run again as well.
"""

import asyncio
import os
from collections.abc import Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.http1 import (
    HELD_BYTES,
    AnswerTooLongError,
    BrokenAnswerError,
    ConnectionLostError,
    UnansweredError,
    UpstreamAnswer,
    UpstreamTimeoutError,
)
from tests.doubles.recorded_answers import ALL, BROKEN, CUT, GOOD, OK, SURPLUS, Recorded, Verdict, chunks, head
from tests.doubles.wire import Ear, Wire
from tests.fuzz.upstream.target import check, in_pieces, take

CORPUS = Path(__file__).parents[2] / "fuzz" / "upstream" / "corpus"
SPLITS = int(os.environ.get("SPLITS", "300"))
DAMAGES = int(os.environ.get("DAMAGES", "300"))
DOCUMENT = head(OK, "Content-Type: application/json", "Content-Length: 2") + b"{}"
STREAM = head(OK, "Content-Type: text/event-stream", "Transfer-Encoding: chunked")

TOKENS = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b";", b",", b"0", b"f", b"-", b"\xff", b"Content-Length: 3\r\n"),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 100 \r\n\r\n",
    ),
]

splitting = settings(max_examples=SPLITS, deadline=None, derandomize=True, database=None)
damaging = settings(max_examples=DAMAGES, deadline=None, derandomize=True, database=None)


@st.composite
def split(draw: st.DrawFn, raw: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    bounds = [0, *cuts, len(raw)]
    return [raw[start:end] for start, end in pairwise(bounds) if start < end]


# What answers mean


@pytest.mark.parametrize("size_bytes", [0, 1, 2, 7])
@pytest.mark.parametrize("recorded", ALL, ids=str)
def test_recorded_answer_means_what_it_says(recorded: Recorded, size_bytes: int) -> None:
    pieces = in_pieces(recorded.raw, size_bytes)
    outcome = take(pieces)
    if recorded.verdict is Verdict.LOST and not outcome.status:
        assert (outcome.body, outcome.reason) == (b"", "connection_lost")
    else:
        assert (outcome.status, outcome.content_type, outcome.body, outcome.reason) == (
            recorded.status,
            recorded.content_type,
            recorded.body,
            "" if recorded.verdict is Verdict.COMPLETE else recorded.verdict.value,
        )
    assert take(pieces, ends=False).keeps is (recorded.keeps and recorded.verdict is Verdict.COMPLETE)


@splitting
@given(st.data())
def test_splits_change_nothing(data: st.DataObject) -> None:
    recorded = data.draw(st.sampled_from([*GOOD, *SURPLUS, *CUT]))
    pieces = data.draw(split(recorded.raw))
    assert take(pieces) == take([recorded.raw] if recorded.raw else [])
    assert take(pieces).body == recorded.body


@splitting
@given(st.data())
def test_answers_on_one_connection_are_apart(data: st.DataObject) -> None:
    wire = Wire()
    kept = [recorded for recorded in GOOD if recorded.keeps]
    for recorded in data.draw(st.lists(st.sampled_from(kept), min_size=2, max_size=5)):
        answer, ear = wire.ask(), Ear()
        answer.forward(ear)
        for piece in data.draw(split(recorded.raw)):
            wire.feed(piece)
        assert ear.ends == [None]
        assert (answer.status, answer.content_type, ear.body) == (
            recorded.status,
            recorded.content_type,
            recorded.body,
        )
        answer.close()
        assert wire.kept.pop() is wire.connection


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    raw = draw(st.sampled_from([recorded.raw for recorded in ALL if len(recorded.raw) < 8000]))
    token = st.sampled_from(TOKENS)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(raw)))
        kind = draw(st.sampled_from(["insert", "replace", "delete", "cut", "repeat"]))
        if kind == "insert":
            raw = raw[:place] + draw(token | st.binary(min_size=1, max_size=4)) + raw[place:]
        elif kind == "replace":
            raw = raw[:place] + draw(token | st.binary(min_size=1, max_size=1)) + raw[place + 1 :]
        elif kind == "delete":
            raw = raw[:place] + raw[place + draw(st.integers(1, 20)) :]
        elif kind == "cut":
            raw = raw[:place]
        else:
            raw = raw[:place] + raw[max(0, place - draw(st.integers(1, 40))) :]
    return raw


@damaging
@given(st.data())
def test_damaged_answer_has_one_end_wherever_it_is_split(data: st.DataObject) -> None:
    raw = data.draw(damaged())
    whole = take([raw] if raw else [])
    assert take(data.draw(split(raw))) == whole
    other = read_with_h11(raw)
    if other is not None and not whole.reason:
        assert (whole.status, whole.body) == other, "two parsers took it for different answers"


def read_with_h11(raw: bytes) -> tuple[int, bytes] | None:
    """Status and body as another parser has them; None if it does not take the answer for a whole one."""
    other = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    other.send(h11.Request(method="POST", target="/", headers=[("Host", "x"), ("Content-Length", "0")]))
    other.send(h11.EndOfMessage())
    other.receive_data(raw)
    other.receive_data(b"")
    status, body = 0, b""
    while True:
        try:
            event = other.next_event()
        except h11.RemoteProtocolError:
            return None
        match event:
            case h11.Response():
                status = event.status_code
            case h11.Data():
                body += event.data
            case h11.EndOfMessage():
                return status, body
            case h11.InformationalResponse():
                pass
            case _:
                return None


@pytest.mark.parametrize("size_bytes", [0, 1, 3, 64])
def test_what_the_fuzzer_found_holds(size_bytes: int) -> None:
    found = [path.read_bytes() for path in sorted(CORPUS.iterdir())]
    assert len(found) > 50
    for data in found:
        check(bytes([size_bytes]) + data[1:])


@pytest.mark.parametrize("size_bytes", [1, 1000, 65_536, 0])
@pytest.mark.parametrize(("excess_bytes", "reason"), [(0, ""), (1, "backend_garbage")])
def test_head_may_have_64_kib_and_not_a_byte_more(size_bytes: int, excess_bytes: int, reason: str) -> None:
    line = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\nX: "
    raw = line + b"x" * (65_536 - len(line) - 4 + excess_bytes) + b"\r\n\r\n" + b"y" * 100_000
    outcome = take(in_pieces(raw, size_bytes))
    assert (outcome.reason, outcome.body) == (reason, b"" if reason else b"y" * 100_000)


# How answers are read


async def run(*steps: Coroutine[Any, Any, Any]) -> list[Any]:
    """Tasks that have had their first turns."""
    tasks = [asyncio.create_task(step) for step in steps]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def arrived(wire: Wire, raw: bytes, *, first_byte_s: float = 60, idle_s: float = 30) -> UpstreamAnswer:
    answer = wire.ask()
    (arrival,) = await run(answer.arrival(first_byte_s, idle_s))
    wire.feed(raw)
    async with asyncio.timeout(1):
        await arrival
    return answer


async def test_answer_arrives_with_the_first_byte_of_its_body() -> None:
    wire = Wire()
    answer = wire.ask()
    (arrival,) = await run(answer.arrival(60, 30))
    wire.feed(STREAM)
    await asyncio.sleep(0)
    assert not arrival.done()
    wire.feed(b"1\r\nx\r\n")
    await asyncio.wait_for(arrival, 1)
    assert (answer.status, answer.content_type) == (200, "text/event-stream")


async def test_answer_without_a_body_arrives_with_its_end() -> None:
    answer = await arrived(Wire(), head("HTTP/1.1 204 No Content"))
    assert await answer.read(0) == b""


async def test_answer_is_read_whole() -> None:
    wire = Wire()
    answer = await arrived(wire, STREAM + b"1\r\nx\r\n")
    (reading,) = await run(answer.read(100))
    for piece in (b"y", b"z"):
        wire.feed(chunks(piece, end=b""))
        await asyncio.sleep(0)
    assert not reading.done()
    wire.feed(chunks())
    assert await asyncio.wait_for(reading, 1) == b"xyz"


@pytest.mark.parametrize("comes_later", [False, True])
async def test_answer_longer_than_its_reader_would_have_it_is_refused(comes_later: bool) -> None:
    wire = Wire()
    answer = await arrived(wire, STREAM + chunks(b"x" if comes_later else b"x" * 6, end=b""))
    (reading,) = await run(answer.read(5))
    if comes_later:
        wire.feed(chunks(b"x" * 5, end=b""))
    with pytest.raises(AnswerTooLongError) as refusal:
        await asyncio.wait_for(reading, 1)
    assert refusal.value.reason == "backend_garbage"
    assert wire.is_reading() is not comes_later
    answer.close()
    assert wire.is_closing()


async def test_answer_as_long_as_its_reader_would_have_it_is_read() -> None:
    assert await (await arrived(Wire(), DOCUMENT)).read(2) == b"{}"


@pytest.mark.parametrize(
    ("rest", "error"), [(b"not a chunk", BrokenAnswerError), (None, ConnectionLostError)], ids=["broken", "lost"]
)
async def test_answer_that_breaks_while_it_is_read_is_an_error(rest: bytes | None, error: type[Exception]) -> None:
    wire = Wire()
    answer = await arrived(wire, STREAM + chunks(b"x", end=b""))
    (reading,) = await run(answer.read(100))
    if rest is None:
        wire.end()
    else:
        wire.feed(rest)
    with pytest.raises(error):
        await asyncio.wait_for(reading, 1)


async def test_reader_of_a_closed_answer_does_not_wait_for_ever() -> None:
    answer = await arrived(Wire(), STREAM + chunks(b"x", end=b""))
    (reading,) = await run(answer.read(100))
    answer.close()
    with pytest.raises(ConnectionLostError):
        await asyncio.wait_for(reading, 1)


async def test_bytes_before_a_receiver_come_first_and_at_once() -> None:
    wire = Wire()
    answer = await arrived(wire, STREAM + chunks(b"a", b"b", end=b""))
    wire.feed(chunks(b"c", end=b""))
    ear = Ear()
    answer.forward(ear)
    assert ear.pieces == [b"abc"]
    wire.feed(chunks(b"d", b"e", end=b""))
    assert ear.pieces == [b"abc", b"de"]
    assert ear.ends == []
    wire.feed(chunks(b"f"))
    assert (ear.pieces[2:], ear.ends) == ([b"f"], [None])


async def test_answer_that_has_ended_is_forwarded_with_its_end() -> None:
    answer, ear = await arrived(Wire(), DOCUMENT), Ear()
    answer.forward(ear)
    assert (ear.pieces, ear.ends) == ([b"{}"], [None])


@pytest.mark.parametrize("has_ended", [False, True])
async def test_receiver_that_closes_at_its_first_piece_hears_no_more(has_ended: bool) -> None:
    wire = Wire()
    answer = await arrived(wire, DOCUMENT if has_ended else STREAM + chunks(b"a", end=b""))
    ear = Ear(lambda _: answer.close())
    answer.forward(ear)
    assert (len(ear.pieces), ear.ends) == (1, [])
    assert wire.is_closing() is not has_ended


def test_receiver_that_closes_in_the_midst_hears_no_more() -> None:
    wire = Wire()
    answer = wire.ask()
    ear = Ear(lambda _: answer.close())
    answer.forward(ear)
    wire.feed(STREAM + chunks(b"a") + b"garbage")
    assert (ear.body, ear.ends) == (b"a", [])
    assert wire.is_closing()


def test_pieces_that_came_before_an_error_are_passed_on() -> None:
    wire, ear = Wire(), Ear()
    wire.ask().forward(ear)
    wire.feed(STREAM + chunks(b"a", end=b"") + b"garbage")
    assert ear.body == b"a"
    assert [type(error) for error in ear.ends] == [BrokenAnswerError]
    assert wire.is_closing()


# Back-pressure


async def test_engine_waits_when_nobody_has_asked_for_the_body() -> None:
    wire = Wire()
    answer = await arrived(wire, head(OK, f"Content-Length: {HELD_BYTES * 3}") + b"x")
    while wire.is_reading():
        wire.feed(b"x" * 65_536)
    held_bytes = answer._held_bytes
    assert HELD_BYTES <= held_bytes <= HELD_BYTES + 65_536
    ear = Ear()
    answer.forward(ear)
    assert wire.is_reading()
    assert len(ear.body) == held_bytes
    wire.feed(b"x" * (HELD_BYTES * 3 - held_bytes))
    assert ear.ends == [None]


def test_receiver_makes_the_engine_wait() -> None:
    wire = Wire()
    answer, ear = wire.ask(), Ear()
    answer.forward(ear)
    wire.feed(STREAM + chunks(b"a", end=b""))
    answer.pause()
    answer.pause()
    assert not wire.is_reading()
    answer.resume()
    assert wire.is_reading()
    wire.feed(chunks(b"b"))
    assert (ear.body, ear.ends) == (b"ab", [None])


async def test_receiver_may_pause_at_its_first_piece() -> None:
    wire = Wire()
    answer = await arrived(wire, head(OK, "Content-Length: 500000") + b"x" * HELD_BYTES)
    assert not wire.is_reading()
    answer.forward(Ear(lambda _: answer.pause()))
    assert not wire.is_reading()


@pytest.mark.parametrize("how", ["close", "end", "error"])
def test_paused_answer_ends(how: str) -> None:
    wire = Wire()
    answer, ear = wire.ask(), Ear()
    answer.forward(ear)
    wire.feed(STREAM + chunks(b"a", end=b""))
    answer.pause()
    if how == "close":
        answer.close()
    else:
        wire.end(ConnectionResetError() if how == "error" else None)
    answer.resume()
    answer.pause()
    assert len(ear.ends) == (how != "close")


def test_connection_that_was_paused_is_read_again_when_it_is_given_back() -> None:
    wire = Wire()
    answer = wire.ask()
    answer.forward(Ear(lambda _: answer.pause()))
    wire.feed(DOCUMENT)
    answer.close()
    assert wire.kept
    assert wire.is_reading()


# Silence


async def test_silence_before_the_first_byte_has_a_limit() -> None:
    wire = Wire()
    (arrival,) = await run(wire.ask().arrival(60, 30))
    wire.feed(head("HTTP/1.1 103 Early Hints"))
    wire.loop.advance(59)
    wire.feed(STREAM)
    assert not wire.is_closing()
    wire.loop.advance(1)
    with pytest.raises(UpstreamTimeoutError):
        await asyncio.wait_for(arrival, 1)
    assert wire.is_closing()


@pytest.mark.parametrize("first_byte_s", [1, 30, 600])
async def test_silence_between_two_pieces_has_a_limit(first_byte_s: float) -> None:
    wire = Wire()
    answer = await arrived(wire, STREAM + chunks(b"a", end=b""), first_byte_s=first_byte_s)
    ear = Ear()
    answer.forward(ear)
    for _ in range(5):
        wire.loop.advance(29)
        wire.feed(chunks(b"a", end=b""))
        assert wire.loop.timers == 1
    wire.loop.advance(29.9)
    assert ear.ends == []
    wire.loop.advance(0.1)
    assert [type(error) for error in ear.ends] == [UpstreamTimeoutError]
    assert wire.is_closing()
    assert wire.loop.timers == 0


async def test_silence_of_an_engine_that_has_to_wait_does_not_count() -> None:
    wire = Wire()
    answer, ear = await arrived(wire, STREAM + chunks(b"a", end=b"")), Ear()
    answer.forward(ear)
    answer.pause()
    wire.loop.advance(1000)
    answer.resume()
    wire.loop.advance(29.9)
    assert ear.ends == []
    wire.loop.advance(0.1)
    assert [type(error) for error in ear.ends] == [UpstreamTimeoutError]


async def test_answer_leaves_no_timer() -> None:
    wire = Wire()
    for raw in (DOCUMENT, STREAM + chunks(b"a")):
        answer = await arrived(wire, raw)
        assert wire.loop.timers == 0
        answer.close()
    answer = await arrived(wire, STREAM + chunks(b"a", end=b""))
    assert wire.loop.timers == 1
    answer.close()
    assert wire.loop.timers == 0


# Requests, and what becomes of connections


@pytest.mark.parametrize("size_bytes", [0, 10, 256 << 10, (256 << 10) + 1, 3_000_000])
def test_request_is_a_head_a_length_and_a_body(size_bytes: int) -> None:
    wire = Wire()
    body = bytes(range(250)) * (size_bytes // 250 + 1)
    wire.ask(b"POST /x HTTP/1.1\r\nHost: y\r\n", body[:size_bytes])
    while wire.loop.turn():
        pass
    expected = b"POST /x HTTP/1.1\r\nHost: y\r\nContent-Length: %d\r\n\r\n" % size_bytes
    assert wire.sent == expected + body[:size_bytes]


def test_large_request_waits_for_an_engine_that_does_not_read() -> None:
    wire = Wire()
    wire.connection.pause_writing()
    wire.ask(body=b"x" * 1_000_000)
    wire.loop.turn()
    assert len(wire.sent) < 100
    wire.connection.resume_writing()
    assert 200_000 < len(wire.sent) < 300_000
    while wire.loop.turn():
        pass
    assert len(wire.sent) > 1_000_000


@pytest.mark.parametrize(("status", "goes_on"), [(200, True), (413, False)])
def test_request_that_is_refused_before_it_is_out_is_not_sent_on(status: int, goes_on: bool) -> None:
    wire, ear = Wire(), Ear()
    answer = wire.ask(body=b"x" * 2_000_000)
    answer.forward(ear)
    sent_bytes = len(wire.sent)
    wire.feed(head(f"HTTP/1.1 {status} Early", "Content-Length: 2") + b"{}")
    wire.loop.turn()
    assert (len(wire.sent) > sent_bytes) is goes_on
    assert (answer.status, ear.body, ear.ends) == (status, b"{}", [None])
    answer.close()
    assert not wire.kept
    assert wire.is_closing()


def test_connection_with_a_request_that_is_not_out_is_not_used_again() -> None:
    wire = Wire()
    answer = wire.ask(body=b"x")
    answer.forward(Ear())
    wire.unsent_bytes = 1
    wire.feed(DOCUMENT)
    answer.close()
    assert not wire.kept
    assert wire.is_closing()


def test_connection_is_used_again_only_after_the_end_of_its_answer() -> None:
    wire = Wire()
    for raw, keeps in ((DOCUMENT, True), (STREAM + chunks(b"a"), True), (DOCUMENT[:-1], False)):
        answer = wire.ask()
        answer.forward(Ear())
        wire.feed(raw)
        answer.close()
        answer.close()
        assert wire.kept == ([wire.connection] if keeps else [])
        wire.kept.clear()
    assert wire.is_closing()


@pytest.mark.parametrize("data", [b"\r\n", b"H", DOCUMENT])
def test_idle_connection_that_says_anything_is_closed(data: bytes) -> None:
    wire = Wire()
    wire.feed(data)
    assert wire.is_closing()
    assert not wire.connection.is_usable


def test_bytes_after_an_answer_that_is_not_closed_yet_spoil_the_connection() -> None:
    wire, ear = Wire(), Ear()
    answer = wire.ask()
    answer.forward(ear)
    wire.feed(DOCUMENT)
    wire.feed(DOCUMENT)
    answer.close()
    assert (ear.body, ear.ends) == (b"{}", [None])
    assert not wire.kept
    assert wire.is_closing()


async def test_connection_that_was_lost_before_the_question_is_told_apart() -> None:
    wire = Wire()
    wire.end()
    answer = wire.ask()
    with pytest.raises(UnansweredError):
        await answer.arrival(60, 30)
    answer.close()
    assert wire.sent == b""
    assert wire.loop.timers == 0


def test_connection_whose_transport_is_closing_is_not_usable() -> None:
    wire = Wire()
    assert wire.connection.is_usable
    wire.abort()
    assert not wire.connection.is_closed
    assert not wire.connection.is_usable


@pytest.mark.parametrize("error", [None, ConnectionResetError()])
@pytest.mark.parametrize(("raw", "unanswered"), [(b"", True), (b"H", False)])
def test_lost_answer_is_told_from_none_at_all(error: OSError | None, raw: bytes, unanswered: bool) -> None:
    wire, ear = Wire(), Ear()
    wire.ask().forward(ear)
    if raw:
        wire.feed(raw)
    wire.end(error)
    assert [isinstance(end, UnansweredError) for end in ear.ends] == [unanswered]
    assert isinstance(ear.ends[0], ConnectionLostError)


def test_body_that_the_end_ends_is_not_whole_when_the_connection_breaks() -> None:
    wire, ear = Wire(), Ear()
    wire.ask().forward(ear)
    wire.feed(head(OK) + b"half of i")
    wire.end(ConnectionResetError())
    assert [type(error) for error in ear.ends] == [ConnectionLostError]


def test_errors_hold_nothing_of_question_and_answer() -> None:
    for recorded in [*CUT, *BROKEN]:
        wire, ear = Wire(), Ear()
        wire.ask(b"POST / HTTP/1.1\r\nAuthorization: Bearer canary\r\n", b"canary").forward(ear)
        wire.feed(recorded.raw[:20].replace(b"200 OK", b"200 canary") + b"canary" + recorded.raw[20:] or b"canary")
        wire.end()
        (error,) = ear.ends
        while error is not None:
            assert "canary" not in str(error)
            error = error.__cause__ or error.__context__  # type: ignore[assignment]
