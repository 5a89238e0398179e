"""A process that compiles and evaluates Rego for its parent, on its standard input and output; it never touches
anything else.

What organizations write runs here and not beside everybody else's calls: an evaluation holds the interpreter until it
ends, and the parent kills whom it has waited for too long. A message is four bytes of length (big endian) and
MessagePack.
"""

from __future__ import annotations

import re
import resource
import struct
import sys
from collections import OrderedDict
from typing import BinaryIO

import msgspec
import regorus

PACKAGE = "data.aiaas.policy"
LENGTH = struct.Struct(">I")
_KEPT = 500
_MEMORY_BYTES = 1 << 30
_REASON = 1000
_AT = re.compile(r"--> (?P<path>[^\n]+?):(?P<line>\d+):\d+\n")
_WRONG = re.compile(r"error: (?P<message>[^\n]+)")
# They reach out, or answer differently each time, so that a decision could not be judged again.
_FORBIDDEN = re.compile(r"\b(http\.send|net\.lookup_ip_addr|opa\.runtime|rand\.intn|time\.now_ns|uuid\.rfc4122)\s*\(")
_COMMENT = re.compile(r"#[^\n]*")


class Bundle(msgspec.Struct, frozen=True, array_like=True):
    """What decides: sources by their paths, and a JSON object; empty for none."""

    modules: tuple[tuple[str, str], ...]
    data_json: str = ""


class Problem(msgspec.Struct, frozen=True, array_like=True):
    """What is wrong in a source; line 0 is none in particular."""

    path: str
    line: int
    message: str


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """What a policy says of an input. What fails allows nothing."""

    allowed: bool
    reason: str = ""
    failed: bool = False


class Work(msgspec.Struct, frozen=True):
    """What the parent asks: to judge inputs (JSON) by the bundle of a key, or to compile it, where there are none."""

    key: str
    inputs: list[str]
    bundle: Bundle | None = None


class Done(msgspec.Struct, frozen=True):
    """What came of it. `unknown`: the bundle of the key has to be sent."""

    unknown: bool = False
    verdicts: list[Verdict] = []
    problems: list[Problem] = []


def compiled(bundle: Bundle) -> regorus.Engine:
    """An engine that judges by a bundle. Raises ValueError with the problem."""
    engine = regorus.Engine()
    for path, source in bundle.modules:
        if found := _FORBIDDEN.search(_COMMENT.sub("", source)):
            line = source[: source.find(found[1])].count("\n") + 1
            raise ValueError(Problem(path, line, f"{found[1]} cannot be used: a decision depends on its input alone"))
        if (package := _try(engine.add_policy, path, source)) != PACKAGE:
            raise ValueError(Problem(path, 1, f"the package must be {PACKAGE.removeprefix('data.')}, and is {package}"))
    if bundle.data_json:
        _try(engine.add_data_json, bundle.data_json)
    # Names and calls are looked at with the first evaluation only.
    probe = engine.clone()
    probe.set_input_json("{}")
    _try(probe.eval_rule, f"{PACKAGE}.allow")
    return engine


def judged(engine: regorus.Engine, input_json: str) -> Verdict:
    """The verdict on an input."""
    try:
        engine.set_input_json(input_json)
        allowed = engine.eval_rule(f"{PACKAGE}.allow") is True
        reason = ""
        if not allowed:
            try:
                told = engine.eval_rule(f"{PACKAGE}.reason")
            except Exception:
                # A policy need not give one.
                told = None
            reason = told[:_REASON] if isinstance(told, str) else ""
    except Exception as error:
        return Verdict(False, problem_of(error).message[:_REASON], True)
    return Verdict(allowed, reason)


def problem_of(error: Exception) -> Problem:
    """What the library says, without its backtrace."""
    if isinstance(error, ValueError) and error.args and isinstance(error.args[0], Problem):
        return error.args[0]
    text = str(error).partition("Stack backtrace")[0]
    at, wrong = _AT.search(text), _WRONG.search(text)
    message = wrong["message"] if wrong else " ".join(text.split())
    if message == "not a valid rule path":
        message = "allow is not defined"
    return Problem(at["path"] if at else "", int(at["line"]) if at else 0, message[:_REASON])


def _try(call: object, *arguments: str) -> object:
    try:
        return call(*arguments)  # type: ignore[operator]
    except BaseException as error:
        # A panic of the library is no Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(problem_of(Exception(str(error)))) from None


def _work(engines: OrderedDict[str, regorus.Engine], work: Work) -> Done:
    try:
        if work.bundle is not None:
            engines[work.key] = compiled(work.bundle)
            if len(engines) > _KEPT:
                engines.popitem(last=False)
        engine = engines.get(work.key)
        if engine is None:
            return Done(unknown=True)
        engines.move_to_end(work.key)
        return Done(verdicts=[judged(engine, text) for text in work.inputs])
    except ValueError as error:
        return Done(problems=[problem_of(error)])


def _read(source: BinaryIO) -> bytes | None:
    head = source.read(LENGTH.size)
    return source.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


def main() -> None:
    """Work until the parent closes the input."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    engines: OrderedDict[str, regorus.Engine] = OrderedDict()
    while (message := _read(sys.stdin.buffer)) is not None:
        done = msgspec.msgpack.encode(_work(engines, msgspec.msgpack.decode(message, type=Work)))
        sys.stdout.buffer.write(LENGTH.pack(len(done)) + done)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
