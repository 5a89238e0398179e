"""Every operation of the published document, on a whole platform, by an organization that is not alone there: never a
server error, an answer that the document does not foresee, or anything of the other organization."""

import asyncio
import contextlib
import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from deploy.local.stack import Stack
from tests.security.calls import calling
from tests.security.world import Tenant, owned, strange_id
from tests.unit.edge.test_openapi import DOCUMENT

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 2
# They end what others need, and come last.
ENDING = ("Delete", "Disable", "Revoke", "Cancel")
FORM = {"application/x-www-form-urlencoded"}
# What is sent is drawn by chance, and yet most is found; without this, nothing might be.
LEAST_SUCCEEDED = 90
LEAST_READ = 40


@dataclass
class Tenants:
    """The organization that calls, with the key of an owner, and the one that it must not learn of."""

    own: Tenant
    other: Tenant
    key: str = field(repr=False)

    def ids(self, name: str) -> list[str]:
        """What may stand where an id of this name is asked for; nothing where no organization has such ids."""
        if name in ("organization_id", "project_id"):
            return [self.own.organization_id, self.other.organization_id]
        own = self.own.ids.get(name)
        return [] if own is None else [own, self.other.ids[name], strange_id(own)]


@pytest.fixture
def tenants(stack: Stack) -> Tenants:
    async def made() -> Tenants:
        async with calling(stack) as caller:
            (own, key), (other, _) = [await owned(stack, caller) for _ in range(2)]
        return Tenants(own, other, key)

    return asyncio.run(made())


def operations(tenants: Tenants) -> list[Any]:
    """All that there are, with ids of both organizations in their addresses."""
    document = copy.deepcopy(DOCUMENT)
    for verbs in document["paths"].values():
        for operation in verbs.values():
            for parameter in operation.get("parameters", ()):
                if ids := tenants.ids(parameter["name"]):
                    parameter["schema"] = {"type": "string", "enum": ids}
    results = list(schemathesis.openapi.from_dict(document).get_all_operations())
    found = [result.ok() for result in results if isinstance(result, Ok)]
    assert len(found) == len(results) == sum(map(len, document["paths"].values()))
    return sorted(found, key=lambda one: one.definition.raw["operationId"].startswith(ENDING))


def answers(stack: Stack, operation: Any, mode: GenerationMode, key: str) -> list[Any]:
    """What some requests of an operation are answered with, held to the document."""
    # All that is in a form is text: it takes seconds to find that nothing in it can be of a wrong kind.
    if (
        mode is GenerationMode.NEGATIVE
        and operation.definition.raw.get("requestBody", {}).get("content", {}).keys() == FORM
    ):
        return []
    found = []

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
        headers = {"Authorization": f"Bearer {key}"}
        found.append(case.call_and_validate(base_url=stack.base_url, headers=headers, checks=CHECKS))

    # Where nothing is asked for, nothing can be wrong.
    with contextlib.suppress(Unsatisfiable):
        judge()
    return found


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_operation_breaks_or_tells_of_another_organization(
    stack: Stack, tenants: Tenants, mode: GenerationMode
) -> None:
    succeeded = set()
    for operation in operations(tenants):
        for answer in answers(stack, operation, mode, tenants.key):
            assert tenants.other.mark not in answer.text.lower()
            if answer.status_code < 300:
                assert tenants.other.organization_id not in str(answer.request.url)
                succeeded.add(operation.label)
    assert mode is GenerationMode.NEGATIVE or len(succeeded) >= LEAST_SUCCEEDED


@pytest.mark.parametrize("mode", GenerationMode)
def test_nothing_that_the_platform_is_asked_breaks(stack: Stack, tenants: Tenants, mode: GenerationMode) -> None:
    succeeded = set()
    for operation in operations(tenants):
        # What it may change, others need as it is.
        if operation.method == "get":
            found = answers(stack, operation, mode, stack.platform_key)
            succeeded |= {operation.label for answer in found if answer.status_code < 300}
    assert mode is GenerationMode.NEGATIVE or len(succeeded) >= LEAST_READ
