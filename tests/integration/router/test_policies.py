"""Inferences of organizations that have policies: identity decides, whichever way they come."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from aiaas.identity.v1.policy_service_pb2 import DecideRequest, DecideResponse, PolicyVerdict
from aiaas.router.v1.inference_service_pb2 import ListServedModelsRequest
from mesh.errors import PlatformError, Reason
from router.config import RouterConfig
from tests.doubles.peer import PeerDouble
from tests.doubles.scripted_backend import ScriptedBackend, chat_document
from tests.integration.router.conftest import PRINCIPAL, Router, running

CHAT = {"model": "alias", "messages": [{"role": "user", "content": "a prompt that nobody else may see"}]}
BOUND = replace(PRINCIPAL, policy_bound=True, platform=False)
REFUSED = DecideResponse(
    verdict=PolicyVerdict(allowed=False, denying_policy_id="policy_1", reason="Not at night.", policy_ids=["policy_1"])
)


@pytest.fixture(autouse=True)
def nobody_takes_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.server._FLUSH_S", 0.0)


@pytest.fixture(params=["Infer", "Relay", "within the process"])
async def router(config: RouterConfig, identity: PeerDouble, request: pytest.FixtureRequest) -> AsyncIterator[Router]:
    async with ScriptedBackend() as engine, running(config, identity, way=request.param) as router:
        engine.default = chat_document("ok")
        await router.add_model("m", aliases=["alias"])
        await router.add_backend("only", engine.base_url, "m")
        yield router


def decisions(identity: PeerDouble) -> list[DecideRequest]:
    return [call.request for call in identity.received if call.rpc.endswith("Decide")]


async def test_policy_judges_the_model_and_sees_no_prompt(router: Router, identity: PeerDouble) -> None:
    assert (await router.answer(CHAT)).error is None
    assert decisions(identity) == [], "whose organization has no policy costs no call"
    router.act_as(BOUND)
    identity.answers["Decide"] = DecideResponse(verdict=PolicyVerdict(allowed=True))
    assert (await router.answer(CHAT)).error is None
    (asked,) = decisions(identity)
    assert asked.organization_id == BOUND.organization_id
    assert json.loads(asked.input.resource_json) == {"model": "m", "endpoint": "ENDPOINT_CHAT_COMPLETIONS"}
    assert (asked.input.method, asked.input.permission) == (
        "/aiaas.router.v1.InferenceService/Infer",
        "inference.create",
    )
    assert asked.input.principal.principal_id == BOUND.id
    assert "prompt" not in str(asked)


async def test_refusal_says_the_policys_reason(router: Router, identity: PeerDouble) -> None:
    router.act_as(BOUND)
    identity.answers["Decide"] = REFUSED
    error = (await router.answer(CHAT)).error
    assert error is not None
    assert error.reason is Reason.PERMISSION_DENIED
    assert "Not at night." in error.message


async def test_nobody_is_let_in_whom_no_policy_could_judge(router: Router, identity: PeerDouble) -> None:
    router.act_as(BOUND)
    identity.answers["Decide"] = PlatformError(Reason.UNAVAILABLE)
    error = (await router.answer(CHAT)).error
    assert error is not None
    assert error.reason is Reason.AUTH_UNAVAILABLE


async def test_other_calls_are_judged_as_well_but_not_the_platforms(router: Router, identity: PeerDouble) -> None:
    identity.answers["Decide"] = REFUSED
    router.act_as(BOUND)
    with pytest.raises(PlatformError) as raised:
        await router.call(router.inference.ListServedModels, ListServedModelsRequest())
    assert raised.value.reason is Reason.PERMISSION_DENIED
    assert decisions(identity)[-1].input.method == "/aiaas.router.v1.InferenceService/ListServedModels"
    router.act_as(replace(BOUND, platform=True))
    await router.call(router.inference.ListServedModels, ListServedModelsRequest())
