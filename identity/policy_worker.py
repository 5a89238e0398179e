"""A process that has Rego evaluated for its parent, on its standard input and output; it never touches anything else.

What organizations write runs here and not beside everybody else's calls: an evaluation holds the interpreter until it
ends, and the parent kills whom it has waited for too long. A message is four bytes of length (big endian) and
MessagePack.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import msgspec
import regorus

from identity.policy_rego import Bundle, Problem, Verdict, compiled, judged, problem_of, problems

LENGTH = struct.Struct(">I")
_KEPT_LENGTH = 16 << 20
# On top of what is there at the start: of that the library has reserved a gibibyte, which it uses up first.
_MEMORY_BYTES = 256 << 20
# The parent stops waiting before; this ends a worker whose parent is gone.
_GRACE_S = 5.0


class Work(msgspec.Struct, frozen=True):
    """What the parent asks, and waits `limit_s` for: to judge inputs (JSON) by the bundle of a key, which is kept when
    it is sent, or without a key to find what is wrong with one."""

    key: str
    inputs: list[str]
    limit_s: float
    bundle: Bundle | None = None


class Done(msgspec.Struct, frozen=True):
    """What came of it. `unknown`: the bundle of the key has to be sent."""

    unknown: bool = False
    verdicts: list[Verdict] = []
    problems: list[Problem] = []


class Engines:
    """Compiled bundles by their keys: those used last, as many as fit into 16 Mi characters of source."""

    def __init__(self) -> None:
        self._engines: OrderedDict[str, tuple[regorus.Engine, int]] = OrderedDict()
        self._length = 0

    def work(self, work: Work) -> Done:
        """Do what is asked."""
        if not work.key:
            return Done(problems=problems(work.bundle) if work.bundle is not None else [])
        if work.bundle is not None:
            try:
                self._keep(work.key, compiled(work.bundle), work.bundle.length)
            except BaseException as error:
                return Done(problems=[problem_of(error)])
        if work.key not in self._engines:
            return Done(unknown=True)
        self._engines.move_to_end(work.key)
        engine, _ = self._engines[work.key]
        return Done(verdicts=[judged(engine, text) for text in work.inputs])

    def _keep(self, key: str, engine: regorus.Engine, length: int) -> None:
        self._length += length - self._engines.pop(key, (None, 0))[1]
        self._engines[key] = engine, length
        while self._length > _KEPT_LENGTH and len(self._engines) > 1:
            self._length -= self._engines.popitem(last=False)[1][1]


def _read(source: BinaryIO) -> bytes | None:
    head = source.read(LENGTH.size)
    return source.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


def main() -> None:
    """Work until the parent closes the input."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    memory_bytes = pages * resource.getpagesize() + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # What the library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    engines = Engines()
    while (message := _read(sys.stdin.buffer)) is not None:
        work = msgspec.msgpack.decode(message, type=Work)
        signal.setitimer(signal.ITIMER_REAL, work.limit_s + _GRACE_S)
        done = msgspec.msgpack.encode(engines.work(work))
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(LENGTH.pack(len(done)) + done)
        answers.flush()


if __name__ == "__main__":
    main()
