"""Schemathesis on every operation that the edge translates, against a whole edge: no server error, no answer that the
document does not foresee, and whatever the document allows is passed on."""

import asyncio
import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    positive_data_acceptance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.integration.edge.harness import HEADERS, Edge
from tests.unit.edge.test_openapi import DOCUMENT

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 4
TRANSLATED = ("/admin/", "/analytics/")
OPERATIONS = sorted(path for path in DOCUMENT["paths"] if path.startswith(TRANSLATED))


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("part", range(4))
async def test_answers_are_as_the_document_says(edge: Edge, part: int, mode: GenerationMode) -> None:
    paths = set(OPERATIONS[part::4])
    # No pattern tells which of the longest numbers are too large.
    text = json.dumps(DOCUMENT).replace("[0-9]{1,19}", "[0-9]{1,18}").replace("[0-9]{1,20}", "[0-9]{1,19}")
    document = json.loads(text)
    partial = document | {"paths": {path: verbs for path, verbs in document["paths"].items() if path in paths}}
    served = await asyncio.to_thread(exercise, partial, mode, f"http://127.0.0.1:{edge.port}")
    assert served == sum(len(verbs) for verbs in partial["paths"].values())


def exercise(document: dict[str, object], mode: GenerationMode, base_url: str) -> int:
    """Send what the document allows, or what it does not, to each of its operations, judge every answer, and count the
    operations."""
    # Not all that it refuses has to be refused: "1" is a number as well.
    checks = [*CHECKS, positive_data_acceptance] if mode is GenerationMode.POSITIVE else CHECKS
    count = 0
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def judge(case: schemathesis.Case[Any]) -> None:
            if isinstance(case.body, dict) and "etag" in case.body:
                # Two etags would have to be the same.
                case.headers.pop("If-Match", None)
            case.call_and_validate(base_url=base_url, headers=HEADERS, checks=checks)

        judge()
        count += 1
    return count
