"""Who calls and whether they may: principals, their cache, and the check of an RPC's policy; it never reads a database.

The rules come from the contracts: each RPC declares its `aiaas.type.v1.policy`, and `authorize` holds a call to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Mapping
from contextvars import Context
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from google.protobuf import descriptor_pool, timestamp_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from opentelemetry import context as otel_context

from aiaas.identity.v1 import auth_service_pb2
from aiaas.type.v1 import limits_pb2, options_pb2, principal_pb2
from mesh import context, tokens
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason, from_rpc_error
from mesh.tallies import HotCounter, Tally

if TYPE_CHECKING:
    from aiaas.identity.v1.auth_service_pb2_grpc import AuthServiceStub

logger = logging.getLogger(__name__)

_LOOKUPS = HotCounter("aiaas_authentications_total", "Credentials resolved, by where the answer came from.", ["source"])
# Bound once: finding a child by its label costs more than all else that a hit does.
_FROM_CACHE, _FROM_SOURCE, _FROM_STALE = (_LOOKUPS.labels(source) for source in ("cache", "source", "stale"))

_CREDENTIAL_LENGTH = 8192
_REFUSALS = 10_000
# After identity was away, stale entries are served for this long before it is asked again.
_AWAY_S = 1.0
# So far may the clock of a machine be off.
_CLOCK_ERROR_S = 90.0
# What a refusal by the source means: the credential was judged. Every other failure says nothing about it.
_VERDICTS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

# What a revocation can name that a principal holds, by the same name in both.
_SUBJECTS = ("api_key_id", "user_id", "service_account_id", "organization_id")

_KINDS = {
    principal_pb2.PRINCIPAL_KIND_USER: "user",
    principal_pb2.PRINCIPAL_KIND_SERVICE_ACCOUNT: "service_account",
    principal_pb2.PRINCIPAL_KIND_API_KEY: "api_key",
}
_KIND_NUMBERS = {kind: number for number, kind in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class ModelRateLimits:
    """Narrower limits for one model; None means the platform's default."""

    model: str
    requests_per_second: float | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Limits of one scope; None means the platform's default, never "unlimited"."""

    requests_per_second: float | None = None
    burst_requests: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    models: tuple[ModelRateLimits, ...] = ()

    @classmethod
    def from_proto(cls, message: limits_pb2.RateLimits) -> RateLimits:
        """The limits that travelled in `message`."""
        return cls(
            requests_per_second=_optional(message, "limit_requests_per_second"),
            burst_requests=_optional(message, "burst_requests"),
            tokens_per_minute=_optional(message, "limit_tokens_per_minute"),
            concurrent_requests=_optional(message, "limit_concurrent_requests"),
            models=tuple(
                ModelRateLimits(
                    model=model.model,
                    requests_per_second=_optional(model, "limit_requests_per_second"),
                    tokens_per_minute=_optional(model, "limit_tokens_per_minute"),
                    concurrent_requests=_optional(model, "limit_concurrent_requests"),
                )
                for model in message.models
            ),
        )

    def to_proto(self) -> limits_pb2.RateLimits:
        """The limits as they travel."""
        return limits_pb2.RateLimits(
            limit_requests_per_second=self.requests_per_second,
            burst_requests=self.burst_requests,
            limit_tokens_per_minute=self.tokens_per_minute,
            limit_concurrent_requests=self.concurrent_requests,
            models=[
                limits_pb2.ModelRateLimits(
                    model=model.model,
                    limit_requests_per_second=model.requests_per_second,
                    limit_tokens_per_minute=model.tokens_per_minute,
                    limit_concurrent_requests=model.concurrent_requests,
                )
                for model in self.models
            ],
        )


def _optional(message: limits_pb2.RateLimits | limits_pb2.ModelRateLimits, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a call, as identity resolved it; it never holds the credential.

    `kind` is "user", "service_account" or "api_key", `id` the id of that actor. No `allowed_models` means all,
    no `allowed_networks` (CIDR) means anywhere, no `expire_time` means never. `platform` may act on every organization.
    With `signature_required`, each request needs a right signature (mesh.request_signatures), with `policy_bound` each
    call is judged by policies as well (mesh.policies).
    """

    kind: str
    id: str
    organization_id: str
    api_key_id: str = ""
    user_id: str = ""
    service_account_id: str = ""
    permissions: frozenset[str] = frozenset()
    allowed_models: tuple[str, ...] = ()
    platform: bool = False
    expire_time: datetime | None = None
    organization_limits: RateLimits = RateLimits()
    principal_limits: RateLimits = RateLimits()
    allowed_networks: tuple[str, ...] = ()
    signature_required: bool = False
    policy_bound: bool = False

    @classmethod
    def from_proto(cls, message: principal_pb2.Principal) -> Principal:
        """The principal that travelled in `message`. Raises PlatformError(INTERNAL) if its kind is unknown."""
        kind = _KINDS.get(message.kind)
        if kind is None:
            raise PlatformError(Reason.INTERNAL)
        return cls(
            kind=kind,
            id=message.principal_id,
            organization_id=message.organization_id,
            api_key_id=message.api_key_id,
            user_id=message.user_id,
            service_account_id=message.service_account_id,
            permissions=frozenset(message.permissions),
            allowed_models=tuple(message.allowed_models),
            platform=message.platform,
            expire_time=message.expire_time.ToDatetime(UTC) if message.HasField("expire_time") else None,
            organization_limits=RateLimits.from_proto(message.organization_limits),
            principal_limits=RateLimits.from_proto(message.principal_limits),
            allowed_networks=tuple(message.allowed_networks),
            signature_required=message.signature_required,
            policy_bound=message.policy_bound,
        )

    def to_proto(self) -> principal_pb2.Principal:
        """The principal as it travels."""
        expire_time = None
        if self.expire_time is not None:
            expire_time = timestamp_pb2.Timestamp()
            expire_time.FromDatetime(self.expire_time)
        return principal_pb2.Principal(
            kind=_KIND_NUMBERS[self.kind],
            principal_id=self.id,
            organization_id=self.organization_id,
            api_key_id=self.api_key_id,
            user_id=self.user_id,
            service_account_id=self.service_account_id,
            permissions=sorted(self.permissions),
            allowed_models=self.allowed_models,
            platform=self.platform,
            expire_time=expire_time,
            organization_limits=self.organization_limits.to_proto(),
            principal_limits=self.principal_limits.to_proto(),
            allowed_networks=self.allowed_networks,
            signature_required=self.signature_required,
            policy_bound=self.policy_bound,
        )


class Authenticator(Protocol):
    """Turns a credential into a principal."""

    async def authenticate(self, credential: str) -> Principal:
        """The principal behind `credential`.

        Raises PlatformError: API_KEY_INVALID for a credential that was judged and refused, AUTH_UNAVAILABLE when
        nobody could judge it.
        """


class RemoteAuthenticator:
    """Asks identity. One call for each credential, so it belongs behind a `CachedAuthenticator`."""

    def __init__(self, stub: AuthServiceStub, *, timeout_s: float = 2.0) -> None:
        self._stub = stub
        self._timeout_s = timeout_s

    async def authenticate(self, credential: str) -> Principal:
        """The principal behind `credential`, as identity sees it now; raises the error that identity raised."""
        request = auth_service_pb2.AuthenticateRequest(credential=credential)
        try:
            response = await self._stub.Authenticate(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return Principal.from_proto(response.principal)


@dataclass(slots=True)
class _Entry:
    """A remembered principal. Both times are monotonic seconds; `fresh_until` is `expires_at`, or the principal's own
    end where that comes first."""

    principal: Principal
    expires_at: float
    fresh_until: float


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A principal, and when its source confirmed it last, in seconds since the epoch."""

    principal: Principal
    confirmed_at: float


class CachedAuthenticator:
    """Remembers principals, so that identity is asked once a minute for each credential and not once a request.

    Entries are keyed by the SHA-256 of the whole credential, live `ttl_s` less a jitter of up to a fifth, and are the
    least recently used `max_entries`. Refusals live `negative_ttl_s` in a cache of their own, so that guessed keys
    cannot push out good ones. However many calls miss at the same time on one credential, the source sees one. While
    the source is away, an entry serves for `stale_s` beyond its end; after that the answer is AUTH_UNAVAILABLE.
    """

    def __init__(
        self,
        source: Authenticator,
        clock: Clock,
        random: Random,
        *,
        ttl_s: float = 60.0,
        negative_ttl_s: float = 5.0,
        stale_s: float = 60.0,
        max_entries: int = 100_000,
        timeout_s: float = 5.0,
    ) -> None:
        self._source = source
        self._clock = clock
        self._random = random
        self._ttl_s = ttl_s
        self._negative_ttl_s = negative_ttl_s
        self._stale_s = stale_s
        self._max_entries = max_entries
        self._timeout_s = timeout_s
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._digests: dict[str, set[bytes]] = {}  # by API key id; two while a rotated key's old text is accepted
        self._refusals: OrderedDict[bytes, tuple[PlatformError, float]] = OrderedDict()
        self._flights: dict[bytes, asyncio.Task[Principal | PlatformError]] = {}
        self._tasks: set[asyncio.Task[Principal | PlatformError]] = set()
        self._invalidations = 0
        self._away_until = float("-inf")
        # By digest, since they were taken last; None is forgotten. None at all while nobody takes them.
        self._changes: dict[bytes, Confirmed | None] | None = None
        self._forgot = asyncio.Event()
        self.revision = 0
        """Of identity's log of revocations: up to there everybody whom it names was forgotten. 0 is not known."""

    @property
    def invalidations(self) -> int:
        """How often something that was remembered came into doubt; as long as it stays, nobody's standing changed."""
        return self._invalidations

    def cached(self, credential: str) -> Principal | None:
        """The principal behind a credential, if it is remembered and fresh; None says nothing: then `authenticate`.

        Until it changes it is the same object, so that others may keep what they made of it by its id().
        """
        if len(credential) > _CREDENTIAL_LENGTH or not credential.isascii():
            return None
        digest = tokens.digest_of(credential)
        entry = self._entries.get(digest)
        if entry is None or self._clock.monotonic() >= entry.fresh_until:
            return None
        self._entries.move_to_end(digest)
        _FROM_CACHE.inc()
        return entry.principal

    async def authenticate(self, credential: str) -> Principal:
        """The principal behind an API key, or behind any other credential that the source understands.

        Raises PlatformError: MISSING_CREDENTIALS, API_KEY_INVALID (or another verdict of the source), AUTH_UNAVAILABLE.
        """
        principal = self.cached(credential)
        if principal is not None:
            return principal
        if not credential:
            raise PlatformError(Reason.MISSING_CREDENTIALS)
        if len(credential) > _CREDENTIAL_LENGTH or not credential.isascii():
            raise PlatformError(Reason.API_KEY_INVALID)
        digest = tokens.digest_of(credential)
        now = self._clock.monotonic()
        entry = self._entries.get(digest)
        if entry is not None and now < entry.expires_at:
            # Not fresh and yet not over: it is the principal that ends here, and the time of day that says so.
            return self._current(entry.principal, _FROM_CACHE)
        refusal = self._refusals.get(digest)
        if refusal is not None and now < refusal[1]:
            raise _again(refusal[0])
        for kind in tokens.CREDENTIALS:
            if credential.startswith(kind.prefix):
                kind.parse(credential)
        stale = entry if entry is not None and now < entry.expires_at + self._stale_s else None
        if stale is not None and now < self._away_until:
            return self._current(stale.principal, _FROM_STALE)
        outcome = await self._look_up(digest, credential)
        if isinstance(outcome, Principal):
            return self._current(outcome, _FROM_SOURCE)
        kept = self._entries.get(digest)
        if outcome.reason is Reason.AUTH_UNAVAILABLE and stale is not None and kept is not None:
            return self._current(kept.principal, _FROM_STALE)
        raise _again(outcome)

    def invalidate(self, revocation: auth_service_pb2.WatchRevocationsResponse) -> None:
        """Forget at once the principals that a revocation concerns, and no others; all refusals go as well.

        Whom a role concerns, or a subject that is not known here, cannot be told: then everything expires. A look-up
        that is under way is neither joined nor remembered any more.
        """
        subject = revocation.WhichOneof("subject")
        if subject not in _SUBJECTS:
            self.expire_all()
            return
        self._doubt()
        subject_id = getattr(revocation, subject)
        if subject == "api_key_id":
            concerned = list(self._digests.get(subject_id, ()))
        else:
            concerned = [
                digest for digest, entry in self._entries.items() if getattr(entry.principal, subject) == subject_id
            ]
        for digest in concerned:
            self._forget(digest)

    def expire_all(self) -> None:
        """Ask again for every credential when it comes next; while identity is away, what is known serves as stale."""
        self._doubt()
        now = self._clock.monotonic()
        for entry in self._entries.values():
            entry.expires_at = min(entry.expires_at, now)
            entry.fresh_until = min(entry.fresh_until, now)

    def restore(self, known: Mapping[bytes, Confirmed], revision: int) -> None:
        """Begin with principals by the digests of their credentials, none of which serves before the source was asked,
        unless that is away. From now on changes are kept for `take_changes`.

        `revision` is that of the log of revocations which they are true for.
        """
        monotonic, now = self._clock.monotonic(), self._clock.now().timestamp()
        self._changes = {}
        self.revision = revision
        for digest, entry in known.items():
            age_s = now - entry.confirmed_at
            expires_at = min(monotonic, monotonic + self._ttl_s - age_s)
            # What was confirmed in a future that no clock of ours may be in has an age that nobody knows.
            is_over = expires_at + self._stale_s <= monotonic or age_s < -_CLOCK_ERROR_S
            if is_over or len(self._entries) >= self._max_entries:
                self._changes[digest] = None
                continue
            self._entries[digest] = _Entry(entry.principal, expires_at, expires_at)
            if entry.principal.api_key_id:
                self._digests.setdefault(entry.principal.api_key_id, set()).add(digest)

    def take_changes(self) -> dict[bytes, Confirmed | None]:
        """What was confirmed (or, None, forgotten) since this was called last, by the credentials' digests."""
        taken = self._changes or {}
        if taken:
            self._changes = {}
        self._forgot.clear()
        return taken

    async def wait_for_change(self, timeout_s: float) -> None:
        """Returns when something was forgotten, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._forgot.wait()

    async def close(self) -> None:
        """End the look-ups that are still under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _doubt(self) -> None:
        """Keep nothing of what was asked before now; a refusal does not tell whom it concerned, so all of them go."""
        self._invalidations += 1
        self._flights.clear()
        self._refusals.clear()

    def _current(self, principal: Principal, lookups: Tally) -> Principal:
        if principal.expire_time is not None and principal.expire_time <= self._clock.now():
            raise PlatformError(Reason.API_KEY_INVALID)
        lookups.inc()
        return principal

    async def _look_up(self, digest: bytes, credential: str) -> Principal | PlatformError:
        flight = self._flights.get(digest)
        if flight is None:
            # A context of its own: the look-up serves many calls and must not die of the deadline of the first.
            own_context = Context()
            own_context.run(context.request_id.set, context.request_id.get())
            own_context.run(otel_context.attach, otel_context.get_current())
            flight = asyncio.create_task(self._ask(digest, credential), context=own_context)
            self._flights[digest] = flight
            self._tasks.add(flight)
            flight.add_done_callback(self._tasks.discard)
        return await asyncio.shield(flight)

    async def _ask(self, digest: bytes, credential: str) -> Principal | PlatformError:
        invalidations = self._invalidations
        outcome: Principal | PlatformError
        try:
            async with asyncio.timeout(self._timeout_s):
                outcome = await self._source.authenticate(credential)
        except PlatformError as error:
            outcome = error if error.entry.grpc in _VERDICTS else self._unavailable(error)
        except Exception as error:
            outcome = self._unavailable(error)
        finally:
            if self._flights.get(digest) is asyncio.current_task():
                del self._flights[digest]
        if isinstance(outcome, PlatformError) and outcome.reason is not Reason.AUTH_UNAVAILABLE:
            self._forget(digest)
        if invalidations == self._invalidations:
            return self._remember(digest, outcome)
        return outcome

    def _unavailable(self, error: Exception) -> PlatformError:
        if not isinstance(error, PlatformError) or error.reason is not Reason.INTERNAL:
            self._away_until = self._clock.monotonic() + _AWAY_S
        reason = error.reason.value if isinstance(error, PlatformError) else type(error).__name__
        logger.warning("a credential could not be checked: %s", reason)
        retry_after_s = error.retry_after_s if isinstance(error, PlatformError) else None
        return PlatformError(Reason.AUTH_UNAVAILABLE, retry_after_s=retry_after_s)

    def _remember(self, digest: bytes, outcome: Principal | PlatformError) -> Principal | PlatformError:
        """Keep an outcome; returns it, as the object that is kept."""
        now = self._clock.monotonic()
        if isinstance(outcome, PlatformError):
            if outcome.reason is not Reason.AUTH_UNAVAILABLE:
                self._refusals[digest] = (outcome, now + self._negative_ttl_s)
                if len(self._refusals) > min(_REFUSALS, self._max_entries):
                    self._refusals.popitem(last=False)
            return outcome
        self._away_until = float("-inf")
        self._refusals.pop(digest, None)
        known = self._entries.get(digest)
        if known is not None and known.principal == outcome:
            outcome = known.principal
        self._drop(digest)
        # Jitter only shortens: a revocation whose push was lost must not outlive the TTL.
        expires_at = fresh_until = now + self._ttl_s * self._random.uniform(0.8, 1.0)
        if outcome.expire_time is not None:
            # In monotonic seconds, once, as a look at the time of day for each request costs as much as the look-up.
            left_s = (outcome.expire_time - self._clock.now()).total_seconds()
            fresh_until = min(expires_at, now + left_s)
        self._entries[digest] = _Entry(outcome, expires_at, fresh_until)
        if self._changes is not None:
            self._changes[digest] = Confirmed(outcome, self._clock.now().timestamp())
        if outcome.api_key_id:
            self._digests.setdefault(outcome.api_key_id, set()).add(digest)
        if len(self._entries) > self._max_entries:
            self._forget(next(iter(self._entries)))
        return outcome

    def _forget(self, digest: bytes) -> None:
        if self._changes is not None and digest in self._entries:
            self._changes[digest] = None
            self._forgot.set()
        self._drop(digest)

    def _drop(self, digest: bytes) -> None:
        entry = self._entries.pop(digest, None)
        if entry is None or not entry.principal.api_key_id:
            return
        digests = self._digests[entry.principal.api_key_id]
        digests.remove(digest)
        if not digests:
            del self._digests[entry.principal.api_key_id]


def _again(error: PlatformError) -> PlatformError:
    # One exception raised for many calls would gather the traceback, and so the locals, of each of them.
    return PlatformError(error.reason, description=error.message, retry_after_s=error.retry_after_s)


def credential_of(authorization: str) -> str:
    """The credential in the value of an Authorization header or metadata entry.

    Raises PlatformError(MISSING_CREDENTIALS) if there is none or the scheme is not Bearer.
    """
    scheme, _, credential = authorization.strip().partition(" ")
    credential = credential.strip()
    if scheme.lower() != "bearer" or not credential:
        raise PlatformError(Reason.MISSING_CREDENTIALS)
    return credential


def find_method(rpc: str) -> MethodDescriptor:
    """The descriptor of an RPC, named as gRPC ("/aiaas.router.v1.ModelService/GetModel") or as protobuf names it.

    Raises KeyError if no imported stub has it.
    """
    return descriptor_pool.Default().FindMethodByName(rpc.lstrip("/").replace("/", "."))


def policy_of(method: MethodDescriptor) -> options_pb2.MethodPolicy:
    """The policy that the contract declares for an RPC; empty, and so refused by `authorize`, if it declares none."""
    return method.GetOptions().Extensions[options_pb2.policy]


def authorize(principal: Principal | None, policy: options_pb2.MethodPolicy, request: Message) -> None:
    """Hold a call to its policy: first the permission, then the organization it acts on.

    A request's `organization_id`, its own or that of a message directly in it, is the principal's unless the principal
    is of the platform, or the policy is `across_organizations`; where the REST path holds it, it cannot be empty.

    Raises PlatformError: MISSING_CREDENTIALS, PERMISSION_DENIED (naming the permission), ORGANIZATION_MISMATCH,
    INVALID_ARGUMENT (naming the field).
    """
    access = policy.WhichOneof("access")
    if access is None or not getattr(policy, access):
        raise PlatformError(Reason.PERMISSION_DENIED)
    if access in ("public", "internal"):
        return
    if principal is None:
        raise PlatformError(Reason.MISSING_CREDENTIALS)
    if access == "permission" and policy.permission not in principal.permissions:
        raise PlatformError(
            Reason.PERMISSION_DENIED,
            description=f"You have insufficient permissions for this operation. Missing permission: "
            f"{policy.permission}.",
            permission=policy.permission,
        )
    own, inner = _organization_fields(request.DESCRIPTOR)
    if own and not request.organization_id and "{organization_id}" in policy.rest.path:  # type: ignore[attr-defined]
        raise PlatformError(
            Reason.INVALID_ARGUMENT, field="organization_id", description="'organization_id' is required."
        )
    if principal.platform or policy.across_organizations:
        return
    named = [request.organization_id] if own else []  # type: ignore[attr-defined]
    named += [getattr(request, name).organization_id for name in inner if request.HasField(name)]
    if any(organization_id not in ("", principal.organization_id) for organization_id in named):
        raise PlatformError(Reason.ORGANIZATION_MISMATCH)


@cache
def _organization_fields(descriptor: Descriptor) -> tuple[bool, tuple[str, ...]]:
    """Whether a request names an organization itself, and which of its message fields do."""
    inner = tuple(
        field.name
        for field in descriptor.fields
        if field.message_type is not None and not field.is_repeated and _names_organization(field.message_type)
    )
    return _names_organization(descriptor), inner


def _names_organization(descriptor: Descriptor) -> bool:
    field = descriptor.fields_by_name.get("organization_id")
    return field is not None and field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated
