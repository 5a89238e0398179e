"""Policies of organizations in Rego: kept, compiled, tried on what was decided before; it never enforces one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import msgspec

from identity import fields
from identity.organizations import existing
from identity.policy_judge import PolicyJudge
from identity.policy_rego import Bundle, Problem
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.ids import new_id
from mesh.pages import TimePlace
from mesh.updates import check_etag

if TYPE_CHECKING:
    from identity.stores import Store, Transaction

_NEVER = datetime.fromtimestamp(0, UTC)
_POLICIES = 20
_MODULES = 20
_SOURCE_LENGTH = 64 << 10
_DATA_LENGTH = 256 << 10
_BUNDLE_LENGTH = 256 << 10
_PATH_LENGTH = 200
_DAY = timedelta(days=1)
_BATCH = 100

CHANGEABLE = ("display_name", "modules", "data_json", "disabled")
"""What an update may change."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Rego modules that decide together. `version` grows with each change of what they say; `trial_id` names what is
    not stored."""

    policy_id: str
    organization_id: str
    display_name: str
    bundle: Bundle
    disabled: bool = False
    version: int = 1
    create_time: datetime = _NEVER
    update_time: datetime = _NEVER
    revision: int = field(default=1, compare=False)
    trial_id: str = ""

    @property
    def key(self) -> str:
        """What names its bundle, and no other: one that is only tried has the name of its trial."""
        return self.trial_id or f"{self.policy_id}:{self.version}"


@dataclass(frozen=True, slots=True)
class Decision:
    """A recorded decision. `input` is a PolicyInput as it travels."""

    policy_decision_id: str
    organization_id: str
    request_id: str
    principal_id: str
    input: bytes
    allowed: bool
    policy_ids: tuple[str, ...]
    denying_policy_id: str
    reason: str
    decide_time: datetime
    duration_micros: int


class Policies:
    """The operations on policies."""

    def __init__(self, store: Store, clock: Clock, judge: PolicyJudge) -> None:
        self._store = store
        self._clock = clock
        self._judge = judge

    async def create(self, wanted: Policy, request_id: str) -> Policy:
        """Store a policy that compiles; a repeat with the same `request_id` gives the first one.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT naming the field, FAILED_PRECONDITION for one too many.
        """
        fields.check_request_id(request_id)
        fields.check_display_name(wanted.display_name, "policy.display_name")
        await self._check_bundle(wanted.organization_id, wanted.bundle)
        now = self._clock.now()
        organization_id = wanted.organization_id
        new = replace(wanted, policy_id=new_id("policy", clock=self._clock), create_time=now, update_time=now)
        async with self._store.transaction() as stored:
            await existing(stored, organization_id, lock=True)
            if first := await stored.creations.claim(organization_id, "CreatePolicy", request_id, new.policy_id, now):
                return await self._policy(stored, organization_id, first)
            if len(await stored.policies.page(organization_id, None, _POLICIES)) >= _POLICIES:
                raise PlatformError(
                    Reason.FAILED_PRECONDITION, description=f"An organization has at most {_POLICIES} policies."
                )
            await stored.policies.add(new)
            # Who is bound by policies is known to everybody who remembers a principal.
            await stored.revoke("organization_id", organization_id)
        return new

    async def get(self, organization_id: str, policy_id: str) -> Policy:
        """One policy. Raises PlatformError(NOT_FOUND)."""
        async with self._store.transaction() as stored:
            return await self._policy(stored, organization_id, policy_id)

    async def list(self, organization_id: str, after: TimePlace | None, limit: int) -> list[Policy]:
        """Up to `limit` policies that come after `after`."""
        async with self._store.transaction() as stored:
            await existing(stored, organization_id)
            return await stored.policies.page(organization_id, after, limit)

    async def update(self, wanted: Policy, changed: Collection[str], etag: str) -> Policy:
        """Change the fields `changed` of a policy to the values of `wanted`.

        Raises PlatformError: NOT_FOUND, INVALID_ARGUMENT, FAILED_PRECONDITION for another etag.
        """
        organization_id, policy_id = wanted.organization_id, wanted.policy_id
        before = await self.get(organization_id, policy_id)
        await self._store.settle()
        bundle = Bundle(
            wanted.bundle.modules if "modules" in changed else before.bundle.modules,
            wanted.bundle.data_json if "data_json" in changed else before.bundle.data_json,
        )
        if bundle != before.bundle:
            await self._check_bundle(organization_id, bundle)
        async with self._store.transaction() as stored:
            current = await self._policy(stored, organization_id, policy_id, lock=True)
            check_etag(etag, current.revision, "policy.etag")
            if current.bundle != before.bundle:
                raise PlatformError(Reason.FAILED_PRECONDITION, description="The policy was changed meanwhile.")
            new = replace(
                current,
                display_name=wanted.display_name if "display_name" in changed else current.display_name,
                disabled=wanted.disabled if "disabled" in changed else current.disabled,
                bundle=bundle,
                version=current.version + (bundle != current.bundle),
            )
            fields.check_display_name(new.display_name, "policy.display_name")
            if new == current:
                return current
            await stored.revoke("organization_id", organization_id)
            return await stored.policies.change(replace(new, update_time=self._clock.now()))

    async def delete(self, organization_id: str, policy_id: str, etag: str) -> None:
        """Remove a policy. Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION for another etag."""
        async with self._store.transaction() as stored:
            current = await self._policy(stored, organization_id, policy_id, lock=True)
            check_etag(etag, current.revision, "etag")
            await stored.policies.remove(organization_id, policy_id)
            await stored.revoke("organization_id", organization_id)

    async def problems(self, organization_id: str, bundle: Bundle) -> Sequence[Problem]:
        """What is wrong with a bundle; nothing if it can be stored."""
        try:
            _check_size(bundle)
        except PlatformError as error:
            return [Problem("", 0, error.message)]
        return await self._judge.problems(organization_id, bundle)

    async def decisions(
        self,
        organization_id: str,
        before: TimePlace | None,
        limit: int,
        start_time: datetime | None,
        end_time: datetime | None,
        *,
        denied_only: bool = False,
        principal_id: str = "",
    ) -> Sequence[Decision]:
        """Up to `limit` recorded decisions, newest first; of the last day, where no time is given."""
        now = self._clock.now()
        async with self._store.transaction() as stored:
            return await stored.policy_decisions.page(
                organization_id,
                before,
                limit,
                start_time or now - _DAY,
                end_time or now,
                denied_only=denied_only,
                principal_id=principal_id,
            )

    async def recorded(
        self, organization_id: str, start_time: datetime | None, end_time: datetime | None, most: int
    ) -> AsyncIterator[Sequence[Decision]]:
        """The newest recorded decisions, in batches."""
        before = None
        end_time = end_time or self._clock.now()
        while most > 0:
            batch = await self.decisions(organization_id, before, min(most, _BATCH), start_time, end_time)
            if batch:
                yield batch
            if len(batch) < min(most, _BATCH):
                return
            most -= len(batch)
            before = TimePlace(batch[-1].decide_time, batch[-1].policy_decision_id)

    async def _check_bundle(self, organization_id: str, bundle: Bundle) -> None:
        _check_size(bundle)
        if problems := await self._judge.problems(organization_id, bundle):
            first = problems[0]
            place = f"{first.path}, line {first.line}: " if first.path else ""
            raise fields.invalid("policy.modules", f"does not compile: {place}{first.message}")

    async def _policy(self, stored: Transaction, organization_id: str, policy_id: str, *, lock: bool = False) -> Policy:
        policy = await stored.policies.get(organization_id, policy_id, lock=lock)
        if policy is None:
            raise PlatformError(Reason.NOT_FOUND)
        return policy


def _check_size(bundle: Bundle) -> None:
    paths = [path for path, _ in bundle.modules]
    if not 1 <= len(paths) <= _MODULES:
        raise fields.invalid("policy.modules", f"must hold 1 to {_MODULES} modules")
    fields.check_once(paths, "policy.modules")
    if bundle.length > _BUNDLE_LENGTH:
        raise fields.invalid("policy.modules", f"must have at most {_BUNDLE_LENGTH} characters with the data")
    for path, source in bundle.modules:
        if not 1 <= len(path) <= _PATH_LENGTH or not path.isprintable():
            raise fields.invalid("policy.modules.path", f"must have 1 to {_PATH_LENGTH} printable characters")
        if len(source) > _SOURCE_LENGTH or "\0" in source:
            raise fields.invalid("policy.modules.source", f"must have at most {_SOURCE_LENGTH} characters without NUL")
    if bundle.data_json:
        if len(bundle.data_json) > _DATA_LENGTH or "\0" in bundle.data_json:
            raise fields.invalid("policy.data_json", f"must have at most {_DATA_LENGTH} characters")
        try:
            is_object = isinstance(msgspec.json.decode(bundle.data_json), dict)
        except (msgspec.DecodeError, RecursionError):
            is_object = False
        if not is_object:
            raise fields.invalid("policy.data_json", "must be a JSON object")
