"""What must hold for an answer of any bytes, split anywhere; it never says what a particular answer means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from router.http1 import HEADER_BYTES, UpstreamError
from tests.doubles.wire import Ear, Wire


@dataclass(frozen=True)
class Outcome:
    """What came of an answer: `reason` is empty if it was whole, `keeps` whether its connection could be used again."""

    status: int
    content_type: str
    body: bytes
    reason: str
    keeps: bool


def take(pieces: Iterable[bytes], *, ends: bool = True) -> Outcome:
    """Feed an answer to a connection, each piece as one read, then its end unless `ends` is false.

    Raises AssertionError for what may never happen: no end or two, bytes held back, a timer or a connection left over.
    """
    wire = Wire()
    answer = wire.ask()
    ear = Ear()
    answer.forward(ear)
    for piece in pieces:
        wire.feed(piece)
        assert wire.connection._fruitless_bytes <= HEADER_BYTES
        assert not wire.connection._body
        wire.loop.turn()
    if ends and not ear.ends:
        wire.end()
    assert len(ear.ends) == (1 if ends else len(ear.ends)) <= 1, "an answer has one end"
    error: UpstreamError | None = ear.ends[0] if ear.ends else None
    answer.close()
    wire.loop.turn()
    assert wire.loop.timers == 0
    assert wire.is_closing() is not bool(wire.kept)
    return Outcome(answer.status, answer.content_type, ear.body, error.reason if error else "", bool(wire.kept))


def in_pieces(data: bytes, size_bytes: int) -> list[bytes]:
    """`data` in pieces of a size; 0 for one piece."""
    size_bytes = size_bytes or len(data) or 1
    return [data[start : start + size_bytes] for start in range(0, len(data), size_bytes)]


def check(data: bytes) -> None:
    """The first byte is the size of the pieces, the rest an answer: however it is split, the same comes of it. Raises
    AssertionError."""
    size_bytes, raw = data[:1], data[1:]
    assert take(in_pieces(raw, size_bytes[0] if size_bytes else 0)) == take([raw] if raw else [])
