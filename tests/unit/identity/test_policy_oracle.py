"""Our decisions beside those of the real Open Policy Agent, on policies as people write them."""

import itertools
import json
from typing import Any

import pytest
from opa_bindings import OpaEngine, OpaError, OpaUndefinedError

from identity.policy_worker import Bundle, compiled, judged

HEAD = "package aiaas.policy\nimport rego.v1\n"

POLICIES = {
    "by role": """
allow if "users.create" in input.principal.permissions
""",
    "by kind, with a default": """
default allow := false
allow if input.principal.kind == "user"
""",
    "several rules are or": """
allow if input.permission == "inference.create"
allow if input.principal.kind == "user"
""",
    "several lines are and": """
allow if {
  input.principal.kind == "user"
  startswith(input.permission, "users.")
}
""",
    "not": """
allow if not input.principal.kind == "api_key"
""",
    "networks": """
allow if net.cidr_contains(data.network, input.client_address)
""",
    "some network": """
allow if {
  some network in data.networks
  net.cidr_contains(network, input.client_address)
}
""",
    "models": """
allow if input.resource.model in data.models
""",
    "clock": """
allow if {
  [hour, _, _] := time.clock(time.parse_rfc3339_ns(input.time))
  hour >= 8
  hour < 18
}
reason := "at night" if not allow
""",
    "weekday": """
allow if time.weekday(time.parse_rfc3339_ns(input.time)) in {"Monday", "Friday"}
""",
    "comprehension": """
allow if count([p | some p in input.principal.permissions; startswith(p, "users.")]) > 1
""",
    "sets": """
wanted := {"users.create", "users.get"}
held := {p | some p in input.principal.permissions}
allow if wanted & held == wanted
""",
    "every": """
allow if every p in input.principal.permissions { not startswith(p, "budgets.") }
""",
    "functions": """
is_read(p) if endswith(p, ".get")
is_read(p) if endswith(p, ".list")
allow if is_read(input.permission)
""",
    "else": """
level := 2 if input.principal.kind == "user"
else := 1 if input.permission == "users.get"
else := 0
allow if level > 0
""",
    "objects": """
limits := {"user": 5, "api_key": 1}
allow if input.resource.count <= limits[input.principal.kind]
""",
    "undefined": """
allow if input.resource.nothing.at.all == "x"
""",
    "regular expressions": """
allow if regex.match("^[a-z]+[.]get$", input.permission)
""",
    "strings": """
allow if lower(concat("-", split(input.permission, "."))) == "users-get"
""",
    "numbers": """
allow if abs(input.resource.count - 3) * 2 < (5 % 3) + 1
""",
    "not a boolean": """
allow := count(input.principal.permissions)
""",
    "conflict": """
allow := true if input.principal.kind == "user"
allow := false if input.permission == "users.get"
""",
    "reason": """
default allow := false
reason := sprintf("%s may not %s", [input.principal.kind, input.permission])
""",
    "walk": """
allow if {
  walk(input.resource, [path, value])
  value == 3
  count(path) == 1
}
""",
    "data": """
allow if data.owners[input.principal.id].allowed
""",
}
# Where ours decides otherwise, and what to write instead is in docs/policies.md: ours denies in both.
DIFFERENCES = {
    "a number with a zero before it": "allow if to_number(substring(input.time, 11, 2)) >= 0",
    "what is not there, negated": """
default allow := true
allow := false if not input.resource.model in ["small", "big"]
""",
}
DATA = {
    "network": "10.0.0.0/8",
    "networks": ["192.0.2.0/24", "2001:db8::/32"],
    "models": ["small", "medium"],
    "owners": {"user_1": {"allowed": True}, "user_2": {"allowed": False}},
}
INPUTS = [
    {
        "principal": {"kind": kind, "id": holder, "permissions": permissions},
        "permission": permission,
        "resource": resource,
        "client_address": address,
        "time": time,
    }
    for (kind, holder), permissions, permission, (resource, address, time) in itertools.product(
        (("user", "user_1"), ("api_key", "user_2")),
        (["users.create", "users.get"], ["budgets.get"], []),
        ("users.get", "inference.create"),
        (
            ({"model": "small", "count": 3}, "10.1.2.3", "2026-03-02T09:30:00Z"),
            ({"model": "big", "count": 9}, "192.0.2.9", "2026-03-07T23:00:00Z"),
            ({}, "2001:db8::5", "2026-03-06T18:00:00Z"),
        ),
    )
]


def of_oracle(oracle: OpaEngine, asked: dict[str, Any]) -> tuple[bool, str]:
    """What the Open Policy Agent says: whether it is allowed, and why not."""
    try:
        allowed = oracle.eval_document("aiaas.policy.allow", asked) is True
    except OpaUndefinedError:
        allowed = False
    except OpaError:
        return False, ""
    if allowed:
        return True, ""
    try:
        reason = oracle.eval_document("aiaas.policy.reason", asked)
    except OpaUndefinedError:
        reason = ""
    return False, reason if isinstance(reason, str) else ""


@pytest.mark.parametrize("name", POLICIES)
def test_decisions_are_those_of_the_open_policy_agent(name: str) -> None:
    source = HEAD + POLICIES[name]
    engine = compiled(Bundle((("policy.rego", source),), json.dumps(DATA)))
    oracle = OpaEngine()
    oracle.add_policy("policy.rego", source)
    oracle.add_data(DATA)
    try:
        ours, theirs = [], []
        for asked in INPUTS:
            verdict = judged(engine, json.dumps(asked))
            # Of what fails each says it in its own words.
            ours.append((verdict.allowed, "" if verdict.failed else verdict.reason))
            theirs.append(of_oracle(oracle, asked))
        assert ours == theirs
    finally:
        oracle.close()


@pytest.mark.parametrize("name", DIFFERENCES)
def test_known_differences_are_what_they_were(name: str) -> None:
    source = HEAD + DIFFERENCES[name]
    engine = compiled(Bundle((("policy.rego", source),)))
    oracle = OpaEngine()
    oracle.add_policy("policy.rego", source)
    try:
        differing = [
            asked for asked in INPUTS if judged(engine, json.dumps(asked)).allowed != of_oracle(oracle, asked)[0]
        ]
    finally:
        oracle.close()
    assert differing
    assert not any(judged(engine, json.dumps(asked)).allowed for asked in differing)


def test_corpus_has_both_outcomes() -> None:
    outcomes = set()
    for source in POLICIES.values():
        engine = compiled(Bundle((("policy.rego", HEAD + source),), json.dumps(DATA)))
        outcomes |= {judged(engine, json.dumps(asked)).allowed for asked in INPUTS}
    assert outcomes == {True, False}
