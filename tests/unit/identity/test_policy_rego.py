"""What is wrong in the sources of policies, and what is not."""

import pytest

from identity.policy_rego import Bundle, Problem, compiled, judged, problems

HEAD = "package aiaas.policy\nimport rego.v1\n"


def wrong(*sources: str, data_json: str = "") -> list[Problem]:
    return problems(Bundle(tuple((f"{number}.rego", source) for number, source in enumerate(sources)), data_json))


@pytest.mark.parametrize(
    "call",
    [
        "time.now_ns()",
        "time.now_ns  ()",
        'time["now_ns"]()',
        'time["now\\u005fns"]()',
        'http.send({"method": "GET", "url": "http://127.0.0.1"})',
        "opa.runtime()",
        'rand.intn("x", 5)',
        'uuid.rfc4122("x")',
        'net.lookup_ip_addr("localhost")',
    ],
)
@pytest.mark.parametrize(
    "where",
    [
        "allow if CALL",
        'allow if { "#" == "#"; CALL }',
        "allow if not CALL",
        "allow if input.x == [y | y := CALL]",
        "allow if f(1)\nf(x) := CALL",
        "default allow := false\nallow if every x in [1] { x == CALL }",
        "allow := true if { input.never } else := CALL",
    ],
)
def test_what_reaches_out_or_is_not_deterministic_is_refused_wherever_it_stands(call: str, where: str) -> None:
    source = HEAD + "# time.now_ns() is not for us\n" + where.replace("CALL", call)
    (problem,) = wrong(source)
    assert "cannot be used" in problem.message
    assert (problem.path, problem.line) == ("0.rego", 4 + where[: where.index("CALL")].count("\n"))


def test_what_is_not_deterministic_cannot_stand_in_for_another_function() -> None:
    for stand_in in ("time.now_ns", 'time["now_ns"]'):
        (problem,) = wrong(HEAD + f"f(x) := x\nallow if {{ f(1) with f as {stand_in} }}")
        assert "cannot be used" in problem.message


def test_what_is_only_said_is_not_refused() -> None:
    assert not wrong(HEAD + '# http.send(x)\nallow if input.method == "http.send(x)"')


def test_each_source_has_its_problem_in_their_order() -> None:
    assert [
        (each.path, each.line) for each in wrong(HEAD + "allow := true", HEAD + "x := {", "package other\ny := 1")
    ] == [
        ("1.rego", 3),
        ("2.rego", 1),
    ]


def test_function_that_there_is_not_is_told_although_nothing_calls_it_yet() -> None:
    (problem,) = wrong(HEAD + "allow if {\n  input.x == 1\n  nowhere(1)\n}")
    assert (problem.line, problem.message) == (5, "there is no function nowhere")


def test_functions_of_other_sources_imports_and_data_are_found() -> None:
    assert not wrong(
        HEAD
        + "import data.aiaas.policy.g as h\nallow if {\n  f(1)\n  h(1)\n  data.aiaas.policy.g(1)\n  print(input)\n}",
        HEAD + "f(x) if x > 0\ndefault g(_) := false\ng(x) if x > 0\na.b(x) := x\nb if a.b(1)",
    )


@pytest.mark.parametrize(
    "said",
    [
        "input.resource.model in data.models",
        'startswith(input.resource.model, "b")',
        'lower(input.resource["model"]) == "big"',
        'input.resource.model != "big"',
        "input.resource.count + 1 > 3",
        "data.owners[input.resource.model]",
        '["a", input.resource.model] == ["a", "big"]',
        "input.permission in data.nothing",
        "count(data.owners.nobody) > 0",
        "r.model in data.models",
    ],
)
@pytest.mark.parametrize("where", ["allow if not SAID", "allow if count([1 | not SAID]) == 1"])
def test_negation_that_would_be_true_of_what_is_not_there_is_refused(said: str, where: str) -> None:
    source = HEAD + "import input.resource as r\n" + where.replace("SAID", said)
    (problem,) = wrong(source, data_json='{"models": ["big"], "owners": {}}')
    assert problem.line == 4
    assert "may not be there" in problem.message


@pytest.mark.parametrize(
    "body",
    [
        "not input.permission in data.models",
        'not startswith(input.principal.id, "user_")',
        'not input.resource.model == "big"',
        "not input.resource.model",
        "not data.owners[input.principal.id]",
        "model := input.resource.model\n not model in data.models",
        "not count([x | x := input.resource.model]) > 0",
        "not big",
        "not data.aiaas.policy.big",
        "not r.model",
    ],
)
def test_other_negations_are_not_refused(body: str) -> None:
    source = HEAD + f'import input.resource as r\nbig if input.resource.model == "big"\nallow if {{\n {body}\n}}'
    assert not wrong(source, data_json='{"models": ["big"], "owners": {}}')


def test_problem_has_no_backtrace_and_one_line() -> None:
    (problem,) = wrong(HEAD + "allow if {")
    assert "backtrace" not in problem.message
    assert "\n" not in problem.message
    assert 0 < len(problem.message) < 200


@pytest.mark.parametrize("reason", ['"a\\u0000b\\r\\nc\\u2028d"', '["a"]', "1 / 0"])
def test_reason_is_a_line_of_text_or_none(reason: str) -> None:
    engine = compiled(Bundle((("0.rego", HEAD + f"default allow := false\nreason := {reason}"),)))
    verdict = judged(engine, "{}")
    assert (verdict.allowed, verdict.failed) == (False, False)
    assert verdict.reason == ("a b c d" if reason.startswith('"') else "")


def test_reason_has_an_end() -> None:
    engine = compiled(
        Bundle((("0.rego", HEAD + f'default allow := false\nreason := concat("", ["{"x" * 900}",\n"{"y" * 900}"])'),))
    )
    assert judged(engine, "{}").reason == "x" * 900 + "y" * 100
