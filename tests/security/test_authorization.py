"""Every RPC, whoever calls it, in whichever organization: the declared verdict, and no other.

What is let in may still be refused for what it asks; requests here name nothing that exists, so that nothing happens.
"""

import asyncio
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from aiaas.type.v1.usage_event_pb2 import ENDPOINT_CHAT_COMPLETIONS
from identity.roles import PLATFORM_ADMIN
from mesh.auth import policy_of
from mesh.ids import new_id
from tests.security.calls import METHODS, calling
from tests.security.verdicts import VERDICTS
from tests.security.world import CALLERS, STRANGERS, World, strange_id

RPC_VERDICTS = {name: who for name, who in VERDICTS.items() if " " not in name}

# They would end an organization that others here need.
_ENDING = ("SuspendOrganization", "ReactivateOrganization", "DeleteOrganization")
# What may be wrong with a request that names nothing that exists.
_ANSWERS = {
    "ok",
    "invalid_argument",
    "invalid_json",
    "not_found",
    "model_not_found",
    "failed_precondition",
    "sign_in_refused",
}


def test_every_rpc_has_a_verdict() -> None:
    assert set(RPC_VERDICTS) == set(METHODS)
    assert {who for verdict in RPC_VERDICTS.values() for who in verdict} <= {
        *CALLERS,
        "everybody",
        "anybody",
        "services",
    }


def test_every_verdict_lets_somebody_in_and_refuses_somebody() -> None:
    for rpc, verdict in RPC_VERDICTS.items():
        assert verdict, rpc
        assert not set(CALLERS) <= set(verdict), f"{rpc}: that is everybody"


def test_verdict_is_of_the_kind_that_the_contract_declares() -> None:
    for rpc, method in METHODS.items():
        access = policy_of(method).WhichOneof("access")
        kinds = {"public": {"anybody"}, "internal": {"services"}}
        assert access, rpc
        assert set(VERDICTS[rpc]) & {"anybody", "services"} == kinds.get(access, set()), rpc


# A stream of requests may be refused while its first is still being written, and then says less.
@pytest.mark.parametrize("rpc", [rpc for rpc, method in METHODS.items() if not method.client_streaming])
async def test_everybody_gets_the_declared_verdict(world: World, rpc: str) -> None:
    method = METHODS[rpc]
    wrong: list[str] = []
    async with calling(world.stack) as caller:

        async def judge(who: str, where: str) -> None:
            answer = await caller.call(rpc, request_of(method, world, where, who), world.credentials[who])
            told = f"{who}, {where} organization: {answer.told}"
            expected = expected_of(method, who, where)
            if expected is None:
                if answer.reason not in _ANSWERS:
                    wrong.append(told)
            elif answer.reason != expected:
                wrong.append(f"{told} instead of {expected}")
            known = {*world.own.ids.values(), *world.other.ids.values()}
            if expected is not None and any(id_ in answer.told for id_ in known):
                wrong.append(f"{told} tells what there is")

        await asyncio.gather(*(judge(who, where) for who in (*CALLERS, *STRANGERS) for where in places(method)))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("certificate", ["identity", "router", "analytics", "edge"])
async def test_internal_rpc_is_for_the_services_that_its_contract_names(world: World, certificate: str) -> None:
    number = {"identity": 1, "router": 2, "analytics": 3, "edge": 4}[certificate]
    judged = 0
    async with calling(world.stack, certificate) as caller:
        for rpc, method in METHODS.items():
            policy = policy_of(method)
            if policy.internal and number not in policy.callers and not method.client_streaming:
                answer = await caller.call(rpc, GetMessageClass(method.input_type)(), world.credentials[PLATFORM_ADMIN])
                assert answer.reason == "permission_denied", (rpc, answer.told)
                judged += 1
    assert judged


def places(method: MethodDescriptor) -> tuple[str, ...]:
    """The organizations that a call can name, as seen from the caller."""
    if "organization_id" not in method.input_type.fields_by_name:
        return ("no",)
    # Where another organization is what the caller asks for, none is a mistake before it is anything else.
    return ("own", "other") if policy_of(method).across_organizations else ("own", "other", "no")


def expected_of(method: MethodDescriptor, who: str, where: str) -> str | None:
    """Why a call is refused; None if it is let in."""
    verdict = VERDICTS[f"{method.containing_service.name}/{method.name}"]
    if verdict == ["services"]:
        return "permission_denied"
    if verdict == ["anybody"]:
        return None
    if who in STRANGERS:
        return STRANGERS[who]
    if verdict != ["everybody"] and who not in verdict:
        return "permission_denied"
    if where == "other" and who != PLATFORM_ADMIN and not policy_of(method).across_organizations:
        # Another organization is not told from one that does not exist.
        return "not_found"
    return None


def request_of(method: MethodDescriptor, world: World, where: str, who: str) -> Message:
    """A request that names an organization, and otherwise what does not exist."""
    request = GetMessageClass(method.input_type)()
    for name in _ids(method):
        known = world.own.ids.get(name)
        setattr(request, name, strange_id(known) if known else new_id(name.removesuffix("_id")))
    if method.name == "Infer":
        request.endpoint = ENDPOINT_CHAT_COMPLETIONS  # type: ignore[attr-defined]
    if where != "no":
        tenant = world.own if where == "own" else world.other
        if method.name in _ENDING and who == PLATFORM_ADMIN:
            tenant = world.spare
        # A switch to the session's own organization would end the session.
        is_switch = method.name == "SwitchOrganization" and where == "own"
        request.organization_id = new_id("org") if is_switch else tenant.organization_id  # type: ignore[attr-defined]
    return request


def _ids(method: MethodDescriptor) -> Iterator[str]:
    """The names of the fields that name what is to be reached."""
    for field in method.input_type.fields:
        is_id = field.type == FieldDescriptor.TYPE_STRING and field.name.endswith("_id")
        if is_id and field.name not in ("organization_id", "request_id"):
            yield field.name
