"""Tries policies on an input, or one on what was decided before; it never stores anything."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime

from aiaas.identity.v1 import policy_service_pb2 as pb
from identity.policies import Decision, Policies, Policy
from identity.policy_decisions import PolicyDecisions, Ruling, ruled
from identity.policy_inputs import checked_input_json, input_json
from identity.policy_judge import PolicyJudge
from identity.principals import Principals
from mesh.auth import Principal
from mesh.ids import new_id

_EXAMPLES = 100


@dataclass(slots=True)
class DryRun:
    """What would change. `examples` are decisions with what would be decided now, newest first."""

    evaluated: int = 0
    newly_denied: int = 0
    newly_allowed: int = 0
    failed: int = 0
    examples: list[tuple[Decision, Ruling]] = field(default_factory=list)


class PolicyDryRuns:
    """Policies as if they were in use. The judge is not the one that decides, so that no call waits for a trial."""

    def __init__(
        self, policies: Policies, decisions: PolicyDecisions, judge: PolicyJudge, principals: Principals
    ) -> None:
        self._principals = principals
        self._policies = policies
        self._decisions = decisions
        self._judge = judge

    async def evaluate(self, organization_id: str, asked: pb.PolicyInput) -> Ruling:
        """What would be decided. Raises PlatformError(INVALID_ARGUMENT) for an input that no call could have."""
        asked_json = checked_input_json(asked)
        policies = await self._decisions.policies(organization_id)
        return (await ruled(self._judge, organization_id, policies, [asked_json]))[0]

    async def run(
        self, organization_id: str, tried: Policy, start_time: datetime | None, end_time: datetime | None, most: int
    ) -> DryRun:
        """Judge the newest recorded decisions as if `tried` were in use, in the place of the policy with its id where
        there is one; callers have the permissions that they hold by now. Raises PlatformError(NOT_FOUND) for an id that
        no policy has."""
        if tried.policy_id:
            await self._policies.get(organization_id, tried.policy_id)
        in_use = await self._decisions.policies(organization_id)
        tried = replace(tried, trial_id=new_id("trial"))
        if any(policy.policy_id == tried.policy_id for policy in in_use):
            policies = [tried if policy.policy_id == tried.policy_id else policy for policy in in_use]
        else:
            policies = [*in_use, tried]
        found, held = DryRun(), dict[bytes, list[str]]()
        async for batch in self._policies.recorded(organization_id, start_time, end_time, most):
            inputs = [input_json(await self._asked(decision, held)) for decision in batch]
            for decision, ruling in zip(
                batch, await ruled(self._judge, organization_id, policies, inputs), strict=True
            ):
                found.evaluated += 1
                found.failed += ruling.failed
                found.newly_denied += decision.allowed and not ruling.allowed
                found.newly_allowed += ruling.allowed and not decision.allowed
                if decision.allowed != ruling.allowed and len(found.examples) < _EXAMPLES:
                    found.examples.append((decision, ruling))
        return found

    async def _asked(self, decision: Decision, held: dict[bytes, list[str]]) -> pb.PolicyInput:
        """A recorded input, whose caller has the permissions that it holds now."""
        asked = pb.PolicyInput.FromString(decision.input)
        caller = asked.principal.SerializeToString(deterministic=True)
        if caller not in held:
            held[caller] = sorted(await self._principals.held_now(Principal.from_proto(asked.principal)))
        asked.principal.permissions.extend(held[caller])
        return asked
