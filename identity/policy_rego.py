"""What Rego says: whether a policy can be used, and its verdict on an input; it never waits for anything or stores it.

An evaluation holds the interpreter until it ends, and what an organization wrote may break the process; so this runs
in a process of its own (identity.policy_worker).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec
import regorus

PACKAGE = "data.aiaas.policy"
_REASON = 1000
_AT = re.compile(r"--> (?P<path>[^\n]+?):(?P<line>\d+):\d+\n")
_WRONG = re.compile(r"error: (?P<message>[^\n]+)")
# They reach out, or answer differently each time, so that a decision could not be judged again.
_FORBIDDEN = frozenset({"http.send", "net.lookup_ip_addr", "opa.runtime", "rand.intn", "time.now_ns", "uuid.rfc4122"})
# What is there whatever the call (identity.policy_inputs).
_ALWAYS_THERE = frozenset(
    {"input", "input.method", "input.permission", "input.resource", "input.client_address", "input.time"}
    | {"input.principal"}
    | {f"input.principal.{name}" for name in ("kind", "id", "organization_id", "permissions")}
    | {f"input.principal.{name}" for name in ("user_id", "service_account_id", "api_key_id")}
)
# A text of a policy's must not break a line of a log, or be one that a database cannot hold.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class Bundle(msgspec.Struct, frozen=True, array_like=True):
    """What decides: sources by their paths, and a JSON object; empty for none."""

    modules: tuple[tuple[str, str], ...]
    data_json: str = ""

    @property
    def length(self) -> int:
        """Characters of all of it."""
        return sum(len(source) for _, source in self.modules) + len(self.data_json)


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


def compiled(bundle: Bundle) -> regorus.Engine:
    """An engine that judges by a bundle. Raises what the library does, if it does not compile."""
    engine = regorus.Engine()
    for path, source in bundle.modules:
        engine.add_policy(path, source)
    if bundle.data_json:
        engine.add_data_json(bundle.data_json)
    return engine


def judged(engine: regorus.Engine, input_json: str) -> Verdict:
    """The verdict on an input."""
    try:
        engine.set_input_json(input_json)
        allowed = engine.eval_rule(f"{PACKAGE}.allow") is True
    except BaseException as error:
        return Verdict(False, problem_of(error).message, True)
    return Verdict(allowed, "" if allowed else _reason(engine))


def problems(bundle: Bundle) -> list[Problem]:
    """What is wrong with a bundle, in the order of its sources; nothing if it can be used."""
    names: dict[str, list[_Name]] = {}
    data = msgspec.json.decode(bundle.data_json) if bundle.data_json else {}
    found = []
    for path, source in bundle.modules:
        try:
            names[path] = _names(path, source, data)
        except _UnusableError as error:
            found.append(error.problem)
    if found:
        return found
    # The library looks for functions in what it evaluates only, and would deny some calls some day.
    known = {name.text for each in names.values() for name in each if name.kind == "defined"} | _builtins()
    for path, each in names.items():
        wrong = {problem for name in each if (problem := _misuse(path, name, known)) is not None}
        found += sorted(wrong, key=lambda problem: (problem.line, problem.message))
    if not found:
        try:
            engine = compiled(bundle)
            # Some of what is wrong is only noticed when a rule is evaluated first.
            engine.set_input_json("{}")
            engine.eval_rule(f"{PACKAGE}.allow")
        except BaseException as error:
            return [problem_of(error)]
    return found


def problem_of(error: BaseException) -> Problem:
    """What the library says, without its backtrace. Its panics are no Exceptions, so any is taken, and what is to end
    the process is raised again."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error
    text = str(error).partition("Stack backtrace")[0]
    at, wrong = _AT.search(text), _WRONG.search(text)
    message = wrong["message"] if wrong else text
    if message == "not a valid rule path":
        message = "allow is not defined"
    return Problem(at["path"] if at else "", int(at["line"]) if at else 0, _printable(message))


class _Name(msgspec.Struct, frozen=True):
    """A dotted name in a source. `kind` is "defined", "called", "used" or "unsure", which is one that may not be there
    where that would make a negation true."""

    kind: str
    text: str
    line: int


class _UnusableError(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def _reason(engine: regorus.Engine) -> str:
    try:
        reason = engine.eval_rule(f"{PACKAGE}.reason")
    except BaseException as error:
        # A policy need not give one, and without it the denial stands.
        problem_of(error)
        return ""
    return _printable(reason) if isinstance(reason, str) else ""


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub(" ", text[:_REASON]).strip()


def _misuse(path: str, name: _Name, known: set[str]) -> Problem | None:
    if name.text in _FORBIDDEN:
        return Problem(path, name.line, f"{name.text} cannot be used: a decision depends on its input alone")
    if name.kind == "unsure":
        advice = f"{name.text} may not be there, which would make this true; name it first: x := {name.text}"
        return Problem(path, name.line, advice)
    if name.kind == "called" and name.text not in known:
        return Problem(path, name.line, f"there is no function {name.text}")
    return None


def _names(path: str, source: str, data: dict[str, Any]) -> list[_Name]:
    """What a source names. Raises _UnusableError for one that does not parse, or is of another package."""
    engine = regorus.Engine()
    try:
        package = engine.add_policy(path, source)
        tree = msgspec.json.decode(engine.get_ast_as_json())[0]["ast"]
    except BaseException as error:
        problem = problem_of(error)
        raise _UnusableError(Problem(path, problem.line, problem.message)) from None
    if package != PACKAGE:
        raise _UnusableError(Problem(path, 1, f"the package must be {PACKAGE.removeprefix('data.')}"))
    imported = {_imported(each, source.encode()): _dotted(each["refr"]) or "" for each in tree["imports"]}
    # What is imported is data of the policy itself, and the library finds it.
    found = [
        name
        for name in _walked(tree["rules"])
        if name.kind != "called" or name.text.partition(".")[0] not in {*imported, "data"}
    ]
    return [*found, *_unsure(tree["rules"], imported, data)]


def _imported(node: dict[str, Any], source: bytes) -> str:
    """The name that an import gives to what it imports."""
    if (alias := node.get("as")) is not None:
        return source[alias["start"] : alias["end"]].decode()
    return (_dotted(node["refr"]) or "").rpartition(".")[2]


def _walked(tree: Any) -> Iterator[_Name]:
    """The functions that are defined and called, and every other dotted name, in no order."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting.extend(node)
        elif isinstance(node, dict):
            waiting.extend(node.values())
            for kind, inner in node.items():
                if kind in ("Func", "Call", "RefDot", "RefBrack", "Default"):
                    named = {kind: inner} if kind in ("RefDot", "RefBrack") else inner.get("refr") or inner["fcn"]
                    if (text := _dotted(named)) is not None:
                        yield _Name(_KINDS.get(kind, "used"), text, inner["span"]["line"])


def _unsure(rules: Any, imported: dict[str, str], data: dict[str, Any]) -> Iterator[_Name]:
    """What may not be there, as a part of something that is negated.

    The Open Policy Agent takes such a negation for undefined and the library for true, so that `not x in blocked` would
    allow whatever has no x. Of what is compared by == both say the same.
    """
    for negated in _nodes(rules, "NotExpr"):
        expression = negated["expr"]
        comparison = expression.get("BoolExpr")
        direct = [comparison["lhs"], comparison["rhs"]] if comparison and comparison["op"] == "Eq" else [expression]
        waiting: list[Any] = []
        for each in direct:
            waiting.extend(_indexes(each) if next(iter(each)) in ("RefDot", "RefBrack", "Var") else [each])
        while waiting:
            node = waiting.pop()
            if isinstance(node, list):
                waiting.extend(node)
            elif isinstance(node, dict):
                kind = next(iter(node), "")
                if kind in ("RefDot", "RefBrack"):
                    waiting.extend(_indexes(node))
                    text = _dotted(node) or f"{_prefix(node)}[_]"
                    root, dot, rest = text.partition(".")
                    name = imported.get(root, root) + dot + rest
                    if not _is_there(name, data):
                        yield _Name("unsure", name, node[kind]["span"]["line"])
                elif kind == "Call":
                    waiting.extend(node[kind]["params"])
                elif kind not in ("ArrayCompr", "SetCompr", "ObjectCompr"):
                    waiting.extend(node.values())


def _is_there(name: str, data: dict[str, Any]) -> bool:
    root, *rest = name.split(".")
    if root == "data" and rest[:2] != PACKAGE.split(".")[1:]:
        inner: Any = data
        for part in rest:
            if not isinstance(inner, dict) or part not in inner:
                return False
            inner = inner[part]
        return True
    return root != "input" or name in _ALWAYS_THERE


def _nodes(tree: Any, kind: str) -> Iterator[Any]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting.extend(node)
        elif isinstance(node, dict):
            waiting.extend(node.values())
            if kind in node:
                yield node[kind]


def _prefix(node: dict[str, Any]) -> str:
    """As much of a reference as has a name."""
    while _dotted(node) is None:
        inner = node.get("RefDot") or node.get("RefBrack")
        if inner is None:
            return ""
        node = inner["refr"]
    return _dotted(node) or ""


def _indexes(node: dict[str, Any]) -> Iterator[Any]:
    """What stands in the brackets of a reference."""
    while (inner := node.get("RefDot") or node.get("RefBrack")) is not None:
        if "index" in inner:
            yield inner["index"]
        node = inner["refr"]


_KINDS = {"Func": "defined", "Default": "defined", "Call": "called"}


def _dotted(node: dict[str, Any]) -> str | None:
    """A reference by its name, such as time.now_ns, also where it is written time["now_ns"]; None if it has none."""
    parts: list[str] = []
    while (kind := next(iter(node))) != "Var":
        inner = node[kind]
        if kind == "RefDot":
            parts.append(inner["field"][1])
        elif kind == "RefBrack" and (index := inner["index"].get("String") or inner["index"].get("RawString")):
            parts.append(index["value"])
        else:
            return None
        node = inner["refr"]
    return ".".join([node["Var"]["value"], *reversed(parts)])


@cache
def _builtins() -> set[str]:
    engine = regorus.Engine()
    engine.add_policy("", "package builtins\nnames := opa.runtime().builtins")
    return {*engine.eval_rule("data.builtins.names"), "print"}
