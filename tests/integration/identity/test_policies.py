"""Policies of organizations: stored once they compile, asked at each call, recorded, tried on what was decided."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from aiaas.identity.v1 import (
    api_key_service_pb2,
    configuration_service_pb2,
    configuration_service_pb2_grpc,
    organization_service_pb2,
    policy_service_pb2_grpc,
)
from aiaas.identity.v1 import policy_service_pb2 as pb
from aiaas.type.v1.principal_pb2 import Principal
from identity.policy_judge import PolicyJudge
from identity.policy_rego import Bundle
from mesh.clock import SystemClock
from mesh.errors import PlatformError, Reason
from tests.integration.identity.auditing import entries
from tests.integration.identity.harness import Identity, Member

NO_KEYS = """
package aiaas.policy
import rego.v1

default allow := false
allow if input.permission != "api_keys.create"
allow if input.resource.api_key.display_name in data.names
reason := "only keys with a known name" if not allow
"""


class Organization:
    """An organization with an owner, and short ways to its policies."""

    def __init__(self, identity: Identity, owner: Member, developer: Member) -> None:
        self.identity = identity
        self.owner = owner
        self.developer = developer
        self.id = owner.organization_id
        self.policies = policy_service_pb2_grpc.PolicyServiceStub(identity.channel)

    async def call(self, name: str, secret: str = "", **fields: Any) -> Any:
        request = getattr(pb, f"{name}Request")(organization_id=self.id, **fields)
        return await self.identity.call(getattr(self.policies, name), request, secret or self.owner.secret)

    async def refused(self, name: str, secret: str = "", **fields: Any) -> PlatformError:
        request = getattr(pb, f"{name}Request")(organization_id=self.id, **fields)
        return await self.identity.refused(getattr(self.policies, name), request, secret or self.owner.secret)

    async def add(self, source: str = NO_KEYS, data: str = '{"names": ["Known"]}', **fields: Any) -> pb.Policy:
        made: pb.Policy = (await self.call("CreatePolicy", policy=policy(source, data, **fields))).policy
        return made

    async def makes_key(self, display_name: str, secret: str = "") -> bool:
        """Whether a key may be made; what refuses must be a policy."""
        wanted = api_key_service_pb2.ApiKey(display_name=display_name, user_id=self.developer.user_id)
        request = api_key_service_pb2.CreateApiKeyRequest(organization_id=self.id, api_key=wanted)
        try:
            await self.identity.call(self.identity.api_keys.CreateApiKey, request, secret or self.owner.secret)
        except grpc.aio.AioRpcError as error:
            if "A policy of your organization" not in (error.details() or ""):
                raise
            return False
        return True


def policy(source: str, data: str = "", **fields: Any) -> pb.Policy:
    fields.setdefault("display_name", "Names")
    return pb.Policy(modules=[pb.PolicyModule(path="names.rego", source=source)], data_json=data, **fields)


@pytest.fixture
async def organization(identity: Identity, organization_id: str) -> Organization:
    owner = await identity.member(organization_id, "owner", "owner@example.com")
    developer = await identity.member(organization_id, "developer", "developer@example.com")
    return Organization(identity, owner, developer)


async def test_policy_narrows_what_roles_allow_from_the_next_call_on(organization: Organization) -> None:
    assert await organization.makes_key("Any")
    made = await organization.add()
    assert (made.version, made.disabled) == (1, False)
    assert not await organization.makes_key("Any")
    assert await organization.makes_key("Known")
    changed = pb.Policy(data_json='{"names": ["Any"]}', etag=made.etag)
    updated = (await organization.call("UpdatePolicy", policy_id=made.policy_id, policy=changed)).policy
    assert updated.version == 2
    assert await organization.makes_key("Any")
    assert not await organization.makes_key("Known")
    again = pb.Policy(disabled=True)
    updated = (await organization.call("UpdatePolicy", policy_id=made.policy_id, policy=again)).policy
    assert (updated.version, updated.disabled) == (2, True)
    assert await organization.makes_key("Known")
    stale = await organization.refused("UpdatePolicy", policy_id=made.policy_id, policy=changed)
    assert stale.reason is Reason.FAILED_PRECONDITION
    await organization.call("DeletePolicy", policy_id=made.policy_id)
    assert (await organization.refused("GetPolicy", policy_id=made.policy_id)).reason is Reason.NOT_FOUND


async def test_policy_widens_nothing(organization: Organization) -> None:
    await organization.add("package aiaas.policy\nallow := true", "")
    error = await organization.refused("ListPolicies", secret=organization.developer.secret)
    assert error.reason is Reason.PERMISSION_DENIED
    assert "permission" in error.message


async def test_all_policies_have_to_allow_and_the_first_that_does_not_says_why(organization: Organization) -> None:
    await organization.add("package aiaas.policy\nallow := true", "")
    second = await organization.add()
    asked = pb.PolicyInput(permission="api_keys.create", resource_json='{"api_key": {"display_name": "Any"}}')
    verdict = (await organization.call("Evaluate", input=asked)).verdict
    assert (verdict.allowed, verdict.denying_policy_id) == (False, second.policy_id)
    assert verdict.reason == "only keys with a known name"
    assert len(verdict.policy_ids) == 2
    asked.permission = "users.get"
    assert (await organization.call("Evaluate", input=asked)).verdict.allowed


async def test_policy_that_fails_or_is_undefined_denies(organization: Organization) -> None:
    undefined = await organization.add('package aiaas.policy\nallow if input.nothing.there == "x"', "")
    assert not await organization.makes_key("Any")
    await organization.call("DeletePolicy", policy_id=undefined.policy_id)
    await organization.add('package aiaas.policy\nallow := "yes"', "")
    assert not await organization.makes_key("Any")


async def test_nobody_is_shut_out_by_a_policy(identity: Identity, organization: Organization) -> None:
    made = await organization.add("package aiaas.policy\nallow := false", "")
    get = organization_service_pb2.GetOrganizationRequest(organization_id=organization.id)
    error = await identity.refused(identity.organizations.GetOrganization, get, organization.owner.secret)
    assert error.reason is Reason.PERMISSION_DENIED
    await identity.call(identity.organizations.GetOrganization, get)
    await organization.call("DeletePolicy", policy_id=made.policy_id)
    await identity.call(identity.organizations.GetOrganization, get, organization.owner.secret)


@pytest.mark.parametrize(
    ("source", "data", "field", "told"),
    [
        ("package aiaas.policy\nallow if {", "", "policy.modules", "names.rego, line 2"),
        ("package other\nallow := true", "", "policy.modules", "package"),
        ("package aiaas.policy\nimport rego.v1\nallow if y", "", "policy.modules", "line 3"),
        ("package aiaas.policy\ndeny := true", "", "policy.modules", "allow is not defined"),
        ("package aiaas.policy\nallow if time.now_ns() > 0", "", "policy.modules", "time.now_ns"),
        ('package aiaas.policy\nallow if http.send({"url": "http://x"})', "", "policy.modules", "http.send"),
        ("package aiaas.policy\nallow := true", "[1]", "policy.data_json", "object"),
        ("package aiaas.policy\nallow := true" + "#" * 70_000, "", "policy.modules.source", "characters"),
    ],
)
async def test_policy_that_does_not_compile_is_refused_with_the_line(
    organization: Organization, source: str, data: str, field: str, told: str
) -> None:
    error = await organization.refused("CreatePolicy", policy=policy(source, data))
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)
    assert told in error.message
    checked = await organization.call("ValidatePolicy", policy=policy(source, data))
    assert not checked.valid
    assert checked.problems[0].message
    assert (await organization.call("ValidatePolicy", policy=policy(NO_KEYS))).valid


async def test_policies_of_others_are_not_there(identity: Identity, organization: Organization) -> None:
    made = await organization.add()
    other = await identity.organization("Other")
    owner = await identity.member(other, "owner", "other@example.com")
    for name in ("GetPolicy", "DeletePolicy"):
        request = getattr(pb, f"{name}Request")(organization_id=other, policy_id=made.policy_id)
        error = await identity.refused(getattr(organization.policies, name), request, owner.secret)
        assert error.reason is Reason.NOT_FOUND
    # Nor do they bind anybody there.
    key = api_key_service_pb2.CreateApiKeyRequest(
        organization_id=other, api_key=api_key_service_pb2.ApiKey(display_name="Any")
    )
    await identity.call(identity.api_keys.CreateApiKey, key, owner.secret)


async def recorded(organization: Organization, count: int, **filters: Any) -> list[pb.PolicyDecision]:
    async with asyncio.timeout(10):
        while True:
            found = list((await organization.call("ListPolicyDecisions", page_size=500, **filters)).policy_decisions)
            if len(found) >= count:
                return found
            await asyncio.sleep(0.05)


async def test_decisions_are_recorded_without_secrets(identity: Identity, organization: Organization) -> None:
    await organization.add()
    assert await organization.makes_key("Known")
    assert not await organization.makes_key("Any")
    denied, allowed = await recorded(organization, 2)
    assert [each.verdict.allowed for each in (denied, allowed)] == [False, True]
    assert denied.verdict.reason == "only keys with a known name"
    assert denied.input.method == "/aiaas.identity.v1.ApiKeyService/CreateApiKey"
    assert denied.input.principal.user_id == organization.owner.user_id
    assert '"display_name":"Any"' in denied.input.resource_json
    assert not denied.input.principal.permissions
    assert denied.input.ByteSize() < 1024
    assert denied.duration_micros > 0
    assert organization.owner.secret not in str(denied)
    assert len(await recorded(organization, 1, denied_only=True)) == 1
    assert not (
        await organization.call("ListPolicyDecisions", principal_id=organization.developer.user_id)
    ).policy_decisions
    log = await entries(identity, organization.id)
    assert next(entry.reason for entry in log if entry.method == denied.input.method) == "permission_denied"


async def test_dry_run_tells_what_would_change(organization: Organization) -> None:
    made = await organization.add()
    for name in ("Known", "Known", "Any"):
        await organization.makes_key(name)
    await recorded(organization, 3)
    tried = policy(NO_KEYS, '{"names": ["Any"]}')
    tried.policy_id = made.policy_id
    found = await organization.call("DryRunPolicy", policy=tried)
    assert (found.evaluated, found.newly_denied, found.newly_allowed, found.failed) == (3, 2, 1, 0)
    assert [each.verdict.allowed for each in found.examples] == [True, False, False]
    beside = await organization.call("DryRunPolicy", policy=policy('package aiaas.policy\nallow := {} ["x"]', ""))
    assert beside.problems or beside.newly_denied == 2
    limited = await organization.call("DryRunPolicy", policy=tried, limit_decisions=1)
    assert limited.evaluated == 1
    # Nothing of it is in use or recorded.
    assert not await organization.makes_key("Any")
    assert len(await recorded(organization, 4)) == 4


async def test_dry_run_takes_the_permissions_that_callers_hold_by_then(organization: Organization) -> None:
    await organization.add("package aiaas.policy\nallow := true", "")
    key = await organization.identity.key(
        organization.id, "api_keys.*", "inference.*", user_id=organization.owner.user_id
    )
    await organization.makes_key("One", key.secret)
    await organization.makes_key("Two")
    await recorded(organization, 2)
    holding = policy('package aiaas.policy\nallow if "policies.create" in input.principal.permissions', "")
    found = await organization.call("DryRunPolicy", policy=holding)
    assert (found.evaluated, found.newly_denied) == (2, 1), "the owner's own key has it, the narrow one does not"
    holding.modules[0].source = 'package aiaas.policy\nallow if "api_keys.create" in input.principal.permissions'
    assert (await organization.call("DryRunPolicy", policy=holding)).newly_denied == 0


async def test_other_services_have_decisions_made(identity: Identity, organization: Organization) -> None:
    await organization.add('package aiaas.policy\nallow if input.resource.model == "small"', "")
    principal = await identity.authenticate(organization.developer.secret)
    assert principal.policy_bound
    for model, allowed in (("small", True), ("big", False)):
        asked = pb.PolicyInput(
            principal=principal, permission="inference.create", resource_json=f'{{"model": "{model}"}}'
        )
        request = pb.DecideRequest(organization_id=organization.id, input=asked)
        assert (await organization.policies.Decide(request, timeout=10)).verdict.allowed is allowed
    assert len(await recorded(organization, 2)) == 2


async def test_trials_are_never_judged_by_another_trial(organization: Organization) -> None:
    await organization.add("package aiaas.policy\nallow := true", "")
    assert await organization.makes_key("Any")
    await recorded(organization, 1)
    for source, denied in (("allow := false", 1), ("allow := true", 0), ("allow := false", 1)):
        found = await organization.call("DryRunPolicy", policy=policy(f"package aiaas.policy\n{source}"))
        assert (found.evaluated, found.newly_denied) == (1, denied)
    other = policy("package aiaas.policy\nallow := true")
    other.policy_id = "policy_0000000000000000000000"
    assert (await organization.refused("DryRunPolicy", policy=other)).reason is Reason.NOT_FOUND


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (pb.PolicyInput(resource_json="[1]"), "input.resource_json"),
        (pb.PolicyInput(resource_json='{"a":' * 5_000), "input.resource_json"),
        (pb.PolicyInput(principal=Principal(principal_id="user_1")), "input.principal"),
        (pb.PolicyInput(request_time=Timestamp(seconds=1 << 60)), "input.request_time"),
    ],
)
async def test_input_that_no_call_could_have_is_refused(
    organization: Organization, asked: pb.PolicyInput, field: str
) -> None:
    error = await organization.refused("Evaluate", input=asked)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, field)


async def test_data_that_is_nested_too_deeply_is_refused(organization: Organization) -> None:
    deep = policy("package aiaas.policy\nallow := true", '{"a":' * 5_000)
    error = await organization.refused("CreatePolicy", policy=deep)
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "policy.data_json")


async def test_reason_holds_nothing_that_a_log_or_the_database_cannot(organization: Organization) -> None:
    source = 'package aiaas.policy\nallow := false\nreason := "no\\u0000more\\n2026-01-01 all is well"'
    made = await organization.add(source, "")
    assert not await organization.makes_key("Any")
    (decision,) = await recorded(organization, 1)
    assert decision.verdict.reason == "no more 2026-01-01 all is well"
    assert decision.verdict.denying_policy_id == made.policy_id


async def test_request_that_is_too_long_to_be_judged_is_denied(organization: Organization) -> None:
    await organization.add('package aiaas.policy\nallow if not input.resource.document == "x"', "")
    request = configuration_service_pb2.ApplyConfigurationRequest(
        organization_id=organization.id, document="#" * (70 << 10)
    )
    stub = configuration_service_pb2_grpc.ConfigurationServiceStub(organization.identity.channel)
    error = await organization.identity.refused(stub.ApplyConfiguration, request, organization.owner.secret)
    assert error.reason is Reason.PERMISSION_DENIED
    assert "too long for the policies" in error.message
    # What manages policies is not judged, however long.
    long = policy("package aiaas.policy\nallow := true\n" + "# more\n" * 8_500)
    for number in range(1, 4):
        long.modules.add(path=f"more{number}.rego", source=long.modules[0].source.replace("allow", f"x{number}"))
    await organization.call("CreatePolicy", policy=long)


# One organization's policy must not hold up anybody else's calls.


@pytest.fixture
async def judge() -> AsyncIterator[PolicyJudge]:
    judge = PolicyJudge(SystemClock(), judge_s=0.05)
    yield judge
    await judge.close()


def bundle(source: str) -> Bundle:
    return Bundle((("policy.rego", source),))


async def test_policy_that_takes_too_long_denies_and_is_asked_no_more_for_a_while(judge: PolicyJudge) -> None:
    endless = bundle(
        "package aiaas.policy\nallow if input.n == 0\n"
        "allow if count([1 | some i in numbers.range(1, input.n); some j in numbers.range(1, input.n)]) > 0"
    )
    quick = bundle("package aiaas.policy\nallow := true")
    assert [verdict.allowed for verdict in await judge.judge("org_1", "endless:1", endless, ['{"n": 0}'])] == [True]
    for _ in range(4):
        (verdict,) = await judge.judge("org_1", "endless:1", endless, ['{"n": 9000}'])
        assert (verdict.allowed, verdict.failed, verdict.reason) == (False, True, "The policy takes too long.")
        assert [each.allowed for each in await judge.judge("org_2", "quick:1", quick, ["{}"])] == [True]


async def test_worker_that_dies_is_started_again(judge: PolicyJudge) -> None:
    quick = bundle("package aiaas.policy\nallow := true")
    assert [each.allowed for each in await judge.judge("org_2", "quick:1", quick, ["{}"])] == [True]
    process = judge._process
    assert process is not None
    process.kill()
    await process.wait()
    assert [each.allowed for each in await judge.judge("org_2", "quick:1", quick, ["{}"])] == [True]


async def test_caller_that_is_gone_leaves_its_answer_to_nobody_and_costs_no_worker(judge: PolicyJudge) -> None:
    always, never = bundle("package aiaas.policy\nallow := true"), bundle("package aiaas.policy\nallow := false")
    worker = None
    abandoned = 0
    for steps in range(30):
        gone = asyncio.create_task(judge.judge("org_1", "always:1", always, ["{}"] * 100))
        async with asyncio.timeout(10):
            while judge._process is None:
                # The first is gone while the worker starts, and the others at any moment after that.
                await asyncio.sleep(0)
        worker = worker or judge._process
        for _ in range(steps):
            await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        abandoned += gone.cancelled()
        verdicts = await judge.judge("org_2", "never:1", never, ["{}"])
        assert [(verdict.allowed, verdict.failed) for verdict in verdicts] == [(False, False)]
    assert abandoned > 10
    assert judge._process is worker


async def test_slow_policy_holds_up_another_organization_by_one_evaluation_at_most(judge: PolicyJudge) -> None:
    slow = bundle(
        "package aiaas.policy\n"
        "allow if count([1 | some i in numbers.range(1, 100); some j in numbers.range(1, 100)]) > 0"
    )
    quick = bundle("package aiaas.policy\nallow := true")
    await judge.judge("org_1", "slow:1", slow, ["{}"])
    await judge.judge("org_2", "quick:1", quick, ["{}"])
    order: list[str] = []

    async def asks(organization_id: str, key: str, asked: Bundle) -> None:
        await judge.judge(organization_id, key, asked, ["{}"])
        order.append(organization_id)

    async with asyncio.TaskGroup() as calls:
        for _ in range(10):
            calls.create_task(asks("org_1", "slow:1", slow))
        calls.create_task(asks("org_2", "quick:1", quick))
    assert order.index("org_2") <= 1


async def test_policy_that_breaks_the_interpreter_denies_and_others_go_on(judge: PolicyJudge) -> None:
    recursive = bundle("package aiaas.policy\nf(x) := f(x + 1)\nallow if input.go\nallow if f(1)")
    (verdict,) = await judge.judge("org_1", "recursive:1", recursive, ["{}"])
    assert (verdict.allowed, verdict.failed) == (False, True)
    quick = bundle("package aiaas.policy\nallow := true")
    assert [each.allowed for each in await judge.judge("org_2", "quick:1", quick, ["{}"])] == [True]
    assert [each.message for each in await judge.problems("org_1", recursive)]


async def test_one_input_to_blame_does_not_fail_the_others(judge: PolicyJudge) -> None:
    endless = bundle(
        "package aiaas.policy\nallow if input.n == 0\n"
        "allow if count([1 | some i in numbers.range(1, input.n); some j in numbers.range(1, input.n)]) > 0"
    )
    verdicts = await judge.judge("org_1", "endless:1", endless, ['{"n": 0}', '{"n": 9000}', '{"n": 0}'])
    assert [(each.allowed, each.failed) for each in verdicts] == [(True, False), (False, True), (True, False)]


async def test_worker_knows_no_secret_of_the_environment(judge: PolicyJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIAAS_IDENTITY_DATABASE_URL", "postgresql://secret")
    await judge.judge("org_1", "quick:1", bundle("package aiaas.policy\nallow := true"), ["{}"])
    process = judge._process
    assert process is not None
    environment = await asyncio.to_thread(Path(f"/proc/{process.pid}/environ").read_bytes)
    assert b"PATH=" in environment
    assert b"secret" not in environment


async def test_nothing_that_cannot_be_evaluated_is_allowed(judge: PolicyJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(PlatformError) as raised:
        await judge.judge("org_1", "quick:1", bundle("package aiaas.policy\nallow := true"), ["{}"])
    assert raised.value.reason is Reason.AUTH_UNAVAILABLE
