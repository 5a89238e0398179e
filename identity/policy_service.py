"""PolicyService: requests to the domain, its answers back; it never decides anything."""

from datetime import datetime

from aiaas.identity.v1 import policy_service_pb2 as pb
from aiaas.identity.v1 import policy_service_pb2_grpc
from identity.fields import check_id
from identity.policies import CHANGEABLE, Decision, Policies, Policy
from identity.policy_decisions import PolicyDecisions, verdict_of
from identity.policy_dry_runs import PolicyDryRuns
from identity.policy_rego import Bundle, Problem
from identity.principals import caller
from mesh.conversions import from_timestamp, to_timestamp
from mesh.pages import TimePlace, cut, read_page_size, read_token
from mesh.updates import etag_of, fields_to_change

_DECISIONS, _MOST_DECISIONS = 10_000, 100_000


class PolicyService(policy_service_pb2_grpc.PolicyServiceServicer):
    """Policies of organizations in Rego."""

    def __init__(self, policies: Policies, decisions: PolicyDecisions, dry_runs: PolicyDryRuns) -> None:
        self._policies = policies
        self._decisions = decisions
        self._dry_runs = dry_runs

    async def CreatePolicy(self, request: pb.CreatePolicyRequest, context: object) -> pb.CreatePolicyResponse:
        """Add a policy."""
        wanted = _from_proto(check_id(request.organization_id, "organization_id"), "", request.policy)
        return pb.CreatePolicyResponse(policy=_to_proto(await self._policies.create(wanted, request.request_id)))

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: object) -> pb.GetPolicyResponse:
        """Return one policy."""
        found = await self._policies.get(
            check_id(request.organization_id, "organization_id"), check_id(request.policy_id, "policy_id")
        )
        return pb.GetPolicyResponse(policy=_to_proto(found))

    async def ListPolicies(self, request: pb.ListPoliciesRequest, context: object) -> pb.ListPoliciesResponse:
        """List policies."""
        organization_id = check_id(request.organization_id, "organization_id")
        size, after = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._policies.list(organization_id, after, size + 1)
        policies, token = cut(request, rows, size, _to_proto, lambda row: TimePlace(row.create_time, row.policy_id))
        return pb.ListPoliciesResponse(policies=policies, next_page_token=token)

    async def UpdatePolicy(self, request: pb.UpdatePolicyRequest, context: object) -> pb.UpdatePolicyResponse:
        """Change a policy."""
        changed = fields_to_change(request.update_mask, request.policy, CHANGEABLE)
        wanted = _from_proto(
            check_id(request.organization_id, "organization_id"),
            check_id(request.policy_id, "policy_id"),
            request.policy,
        )
        return pb.UpdatePolicyResponse(
            policy=_to_proto(await self._policies.update(wanted, changed, request.policy.etag))
        )

    async def DeletePolicy(self, request: pb.DeletePolicyRequest, context: object) -> pb.DeletePolicyResponse:
        """Remove a policy."""
        await self._policies.delete(
            check_id(request.organization_id, "organization_id"), check_id(request.policy_id, "policy_id"), request.etag
        )
        return pb.DeletePolicyResponse()

    async def ValidatePolicy(self, request: pb.ValidatePolicyRequest, context: object) -> pb.ValidatePolicyResponse:
        """Compile a policy."""
        organization_id = check_id(request.organization_id, "organization_id")
        problems = await self._policies.problems(organization_id, _bundle_of(request.policy))
        return pb.ValidatePolicyResponse(valid=not problems, problems=map(_problem_to_proto, problems))

    async def Evaluate(self, request: pb.EvaluateRequest, context: object) -> pb.EvaluateResponse:
        """Tell what would be decided."""
        asked = request.input
        if not asked.HasField("principal"):
            asked.principal.CopyFrom(caller().to_proto())
        if not asked.HasField("request_time"):
            asked.request_time.GetCurrentTime()
        ruling = await self._dry_runs.evaluate(check_id(request.organization_id, "organization_id"), asked)
        return pb.EvaluateResponse(verdict=verdict_of(ruling))

    async def DryRunPolicy(self, request: pb.DryRunPolicyRequest, context: object) -> pb.DryRunPolicyResponse:
        """Judge recorded decisions again."""
        organization_id = check_id(request.organization_id, "organization_id")
        bundle = _bundle_of(request.policy)
        problems = await self._policies.problems(organization_id, bundle)
        if problems:
            return pb.DryRunPolicyResponse(problems=map(_problem_to_proto, problems))
        found = await self._dry_runs.run(
            organization_id,
            _from_proto(
                organization_id,
                request.policy.policy_id and check_id(request.policy.policy_id, "policy.policy_id"),
                request.policy,
            ),
            _moment(request, "start_time"),
            _moment(request, "end_time"),
            min(max(0, request.limit_decisions) or _DECISIONS, _MOST_DECISIONS),
        )
        return pb.DryRunPolicyResponse(
            evaluated=found.evaluated,
            newly_denied=found.newly_denied,
            newly_allowed=found.newly_allowed,
            failed=found.failed,
            examples=[
                pb.PolicyChange(decision=_decision_to_proto(decision), verdict=verdict_of(ruling))
                for decision, ruling in found.examples
            ],
        )

    async def ListPolicyDecisions(
        self, request: pb.ListPolicyDecisionsRequest, context: object
    ) -> pb.ListPolicyDecisionsResponse:
        """List recorded decisions."""
        organization_id = check_id(request.organization_id, "organization_id")
        size, before = read_page_size(request.page_size), read_token(request, TimePlace)
        rows = await self._policies.decisions(
            organization_id,
            before,
            size + 1,
            _moment(request, "start_time"),
            _moment(request, "end_time"),
            denied_only=request.denied_only,
            principal_id=request.principal_id,
        )
        decisions, token = cut(
            request, rows, size, _decision_to_proto, lambda row: TimePlace(row.decide_time, row.policy_decision_id)
        )
        return pb.ListPolicyDecisionsResponse(policy_decisions=decisions, next_page_token=token)

    async def Decide(self, request: pb.DecideRequest, context: object) -> pb.DecideResponse:
        """Decide for another service."""
        organization_id = check_id(request.organization_id, "organization_id")
        return pb.DecideResponse(verdict=await self._decisions.decide(organization_id, request.input))


def _moment(request: pb.DryRunPolicyRequest | pb.ListPolicyDecisionsRequest, name: str) -> datetime | None:
    return from_timestamp(getattr(request, name), name) if request.HasField(name) else None  # type: ignore[arg-type]


def _bundle_of(message: pb.Policy) -> Bundle:
    return Bundle(tuple((module.path, module.source) for module in message.modules), message.data_json)


def _from_proto(organization_id: str, policy_id: str, message: pb.Policy) -> Policy:
    return Policy(policy_id, organization_id, message.display_name, _bundle_of(message), message.disabled)


def _to_proto(policy: Policy) -> pb.Policy:
    return pb.Policy(
        policy_id=policy.policy_id,
        organization_id=policy.organization_id,
        display_name=policy.display_name,
        modules=[pb.PolicyModule(path=path, source=source) for path, source in policy.bundle.modules],
        data_json=policy.bundle.data_json,
        disabled=policy.disabled,
        version=policy.version,
        create_time=to_timestamp(policy.create_time),
        update_time=to_timestamp(policy.update_time),
        etag=etag_of(policy.revision),
    )


def _problem_to_proto(problem: Problem) -> pb.PolicyProblem:
    return pb.PolicyProblem(path=problem.path, line=problem.line, message=problem.message)


def _decision_to_proto(decision: Decision) -> pb.PolicyDecision:
    return pb.PolicyDecision(
        policy_decision_id=decision.policy_decision_id,
        organization_id=decision.organization_id,
        request_id=decision.request_id,
        input=pb.PolicyInput.FromString(decision.input),
        verdict=pb.PolicyVerdict(
            allowed=decision.allowed,
            policy_ids=decision.policy_ids,
            denying_policy_id=decision.denying_policy_id,
            reason=decision.reason,
        ),
        decide_time=to_timestamp(decision.decide_time),
        duration_micros=decision.duration_micros,
    )
