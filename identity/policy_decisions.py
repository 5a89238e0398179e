"""Decides by an organization's policies, and records what was decided; it never widens what roles allow.

Which policies there are is read for each decision, so a change binds the next one in every process.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from aiaas.identity.v1 import policy_service_pb2 as pb
from aiaas.type.v1.principal_pb2 import Principal as PrincipalMessage
from identity import attempts
from identity.metrics import count_unrecorded_decisions
from identity.policies import Decision, Policy
from identity.policy_inputs import input_json
from identity.policy_judge import PolicyJudge
from mesh import context
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.telemetry import redact

if TYPE_CHECKING:
    from identity.stores import Store

logger = logging.getLogger(__name__)

KEPT = timedelta(days=30)
_INTERVAL_S = 1.0
_WAITING = 10_000
_AT_ONCE = 500
_SWEEP_S = 600.0
_SWEPT = 10_000
_KNOWN = 1_000


@dataclass(frozen=True, slots=True)
class Ruling:
    """What policies say together. `failed`: the one that denied did so by failing."""

    allowed: bool
    policy_ids: tuple[str, ...]
    denying_policy_id: str = ""
    reason: str = ""
    failed: bool = False


class PolicyDecisions:
    """The mesh's Decider, out of the database."""

    def __init__(self, store: Store, clock: Clock, judge: PolicyJudge) -> None:
        self._store = store
        self._clock = clock
        self._judge = judge
        self._waiting: deque[Decision] = deque()
        self._known: OrderedDict[str, Policy] = OrderedDict()

    async def decide(self, organization_id: str, asked: pb.PolicyInput) -> pb.PolicyVerdict:
        """The verdict on an input, which is recorded. Raises PlatformError(AUTH_UNAVAILABLE) while the database is
        away."""
        began = self._clock.monotonic()
        try:
            policies = await self.policies(organization_id)
        except PlatformError as error:
            if error.reason in (Reason.UNAVAILABLE, Reason.DEADLINE_EXCEEDED):
                raise PlatformError(Reason.AUTH_UNAVAILABLE, retry_after_s=error.retry_after_s) from error
            raise
        if not policies:
            return pb.PolicyVerdict(allowed=True)
        ruling = (await ruled(self._judge, organization_id, policies, [input_json(asked)]))[0]
        if ruling.failed:
            logger.warning(
                "a policy failed, which denies",
                extra={"policy_id": ruling.denying_policy_id, "why": ruling.reason, "method": asked.method},
            )
        self._note(organization_id, asked, ruling, int((self._clock.monotonic() - began) * 1_000_000))
        return verdict_of(ruling)

    async def policies(self, organization_id: str) -> list[Policy]:
        """The policies that decide, as they are now."""
        found = []
        for policy_id, version in await self._store.policy_versions(organization_id):
            policy = self._known.get(policy_id)
            if policy is None or policy.version != version:
                policy = await self._read(organization_id, policy_id)
                if policy is None or policy.disabled:
                    # It went in this moment.
                    continue
                self._known[policy_id] = policy
                if len(self._known) > _KNOWN:
                    self._known.popitem(last=False)
            self._known.move_to_end(policy_id)
            found.append(policy)
        return found

    async def run(self, stop: asyncio.Event) -> None:
        """Write decisions each second and remove old ones, until `stop` is set, and a last time then."""
        sweep_at = self._clock.monotonic()
        while not stop.is_set():
            try:
                async with asyncio.timeout(_INTERVAL_S):
                    await stop.wait()
            except TimeoutError:
                pass
            await self.write()
            if self._clock.monotonic() >= sweep_at:
                sweep_at = self._clock.monotonic() + _SWEEP_S
                await self._sweep()

    async def write(self) -> None:
        """Write what was decided; while the database is away the newest wait."""
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(_AT_ONCE, len(self._waiting)))]
            try:
                async with self._store.transaction() as stored:
                    await stored.policy_decisions.add(batch)
            except PlatformError as error:
                self._waiting.extendleft(reversed(batch))
                logger.warning("decisions were not recorded: %s", error.reason.value)
                return
            except Exception as error:
                # What the database refuses now it would refuse again, and nothing after it would ever be written.
                count_unrecorded_decisions(len(batch))
                logger.error("decisions are lost: %r", error)

    async def _read(self, organization_id: str, policy_id: str) -> Policy | None:
        with attempts.apart():
            async with self._store.transaction(across=True) as stored:
                return await stored.policies.get(organization_id, policy_id)

    async def _sweep(self) -> None:
        try:
            removed = _SWEPT
            while removed == _SWEPT:
                async with self._store.transaction() as stored:
                    removed = await stored.policy_decisions.forget_until(self._clock.now() - KEPT, _SWEPT)
        except PlatformError as error:
            logger.warning("old decisions were not removed: %s", error.reason.value)

    def _note(self, organization_id: str, asked: pb.PolicyInput, ruling: Ruling, duration_micros: int) -> None:
        if len(self._waiting) >= _WAITING:
            self._waiting.popleft()
            count_unrecorded_decisions()
        self._waiting.append(
            Decision(
                policy_decision_id=new_id("decision", clock=self._clock),
                organization_id=organization_id,
                request_id=context.request_id.get(),
                principal_id=asked.principal.principal_id,
                input=_recorded(asked),
                allowed=ruling.allowed,
                policy_ids=ruling.policy_ids,
                denying_policy_id=ruling.denying_policy_id,
                reason=ruling.reason,
                decide_time=self._clock.now(),
                duration_micros=duration_micros,
            )
        )


def _recorded(asked: pb.PolicyInput) -> bytes:
    """An input as it is stored: its caller without what a caller's id tells, which would be most of each row, and what
    a request holds where ids belong without what looks like a secret."""
    told, caller = pb.PolicyInput(), asked.principal
    told.CopyFrom(asked)
    told.principal.CopyFrom(
        PrincipalMessage(
            kind=caller.kind,
            principal_id=caller.principal_id,
            organization_id=caller.organization_id,
            api_key_id=caller.api_key_id,
            user_id=caller.user_id,
            service_account_id=caller.service_account_id,
        )
    )
    told.resource_json = _redacted(asked.resource_json)
    return told.SerializeToString()


def _redacted(resource_json: str) -> str:
    """A JSON document whose texts hold no secrets. As a whole it is no text of which parts could be taken."""
    if redact(resource_json) == resource_json:
        return resource_json
    try:
        return msgspec.json.encode(_told(msgspec.json.decode(resource_json))).decode()
    except (msgspec.DecodeError, RecursionError):
        return ""


def _told(value: Any) -> Any:
    if isinstance(value, dict):
        return {redact(name): _told(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_told(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


async def ruled(
    judge: PolicyJudge, organization_id: str, policies: Sequence[Policy], inputs: Sequence[str]
) -> list[Ruling]:
    """What policies say of inputs (JSON) together: the first that does not allow one decides."""
    policy_ids = tuple(policy.policy_id for policy in policies)
    rulings = [Ruling(True, policy_ids) for _ in inputs]
    for policy in policies:
        asked = [index for index, ruling in enumerate(rulings) if ruling.allowed]
        if not asked:
            break
        verdicts = await judge.judge(organization_id, policy.key, policy.bundle, [inputs[index] for index in asked])
        for index, verdict in zip(asked, verdicts, strict=True):
            if not verdict.allowed:
                rulings[index] = Ruling(False, policy_ids, policy.policy_id, verdict.reason, verdict.failed)
    return rulings


def verdict_of(ruling: Ruling) -> pb.PolicyVerdict:
    """A ruling as it travels."""
    return pb.PolicyVerdict(
        allowed=ruling.allowed,
        policy_ids=ruling.policy_ids,
        denying_policy_id=ruling.denying_policy_id,
        reason=ruling.reason,
    )
