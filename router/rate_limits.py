"""Rate limits at admission: requests, tokens per minute, concurrency; it never fails a request because Redis is away.

Redis judges (rate_limits.lua): all limits of all scopes in one round trip, all or nothing. A scope is an organization,
a principal, or one of these with one model. While Redis is away the router judges by itself, with the same arithmetic
and its share of each limit, which is the limit divided by the live routers that it knew of last.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

from mesh.auth import ModelRateLimits, Principal, RateLimits
from mesh.clock import Clock
from mesh.errors import PlatformError, Reason
from mesh.scripts import Call, Script, Scripts
from router import metrics

logger = logging.getLogger(__name__)

_LEASE_S = 15.0
_ROUND_S = 3.0
_ROUTERS_KEY = b"limits:routers"
_PLANS = 4096
_RENEWALS = 64
_SLACK = 1e-6
_MOST = 1 << 62

_KINDS = ("none", "requests", "tokens", "concurrency", "size")
_REQUESTS, _TOKENS, _CONCURRENCY, _SIZE = 1, 2, 3, 4

RATE_LIMITS = Script(resources.files("router").joinpath("rate_limits.lua").read_text())
"""What Redis must know to judge."""

ROUTERS = Script("""
local time = redis.call('TIME')
local now = tonumber(time[1])
redis.call('ZADD', KEYS[1], now + ARGV[1], ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('EXPIRE', KEYS[1], 3600)
return redis.call('ZCARD', KEYS[1])
""")
"""Counts the live routers, of which the caller is one for so many seconds."""

_Answer: TypeAlias = list[int]
"""As rate_limits.lua gives it to an admission."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Limits of an organization and of a principal where none are set; no `tokens_per_minute` means no such limit."""

    requests_per_second: float = 100.0
    burst_requests: int = 200
    concurrent_requests: int = 64
    tokens_per_minute: int | None = None


class _InUse:
    """What this router knows of a scope by itself. `running` is always kept; the rest is of outages only."""

    __slots__ = ("__weakref__", "requests", "running", "tokens", "written_us")

    def __init__(self) -> None:
        self.running = 0
        self.written_us = 0.0
        self.requests = 0.0
        self.tokens = 0.0


@dataclass(frozen=True, slots=True)
class _Scope:
    """Limits and their bearer, named as an error names it; 0 means that there is no such limit here."""

    name: str
    requests_per_second: float
    burst: int
    tokens_per_minute: int
    slots: int
    in_use: _InUse


class _Plan:
    """All that an admission of one principal to one model needs, made once; a request adds its name and its tokens."""

    __slots__ = ("admit", "arguments", "in_use", "keys", "largest", "model", "principal", "scopes", "settle")

    def __init__(self, principal: Principal, model: str, scopes: tuple[_Scope, ...], keys: list[bytes]) -> None:
        # It keeps the principal, so that no other can have its id() as long as the plan is remembered.
        self.principal = principal
        self.model = model
        self.scopes = scopes
        self.in_use = tuple(scope.in_use for scope in scopes)
        self.keys = keys
        self.largest = min((scope.tokens_per_minute or _MOST for scope in scopes), default=_MOST)
        self.arguments = [b"%d" % (_LEASE_S * 1e6)]
        for scope in scopes:
            limits = (scope.requests_per_second, scope.burst, scope.tokens_per_minute, scope.slots)
            self.arguments += [repr(limit).encode() for limit in limits]
        self.admit = RATE_LIMITS.call(keys, [b"admit", *self.arguments], more=2)
        self.settle = RATE_LIMITS.call(keys, [b"settle", *self.arguments], more=2)


class Permit:
    """An admitted request. It holds its slots until it is settled."""

    __slots__ = ("_answer", "_limiter", "_local", "_plan", "_reserved", "_round", "_settled", "name")

    def __init__(
        self, limiter: RateLimiter, plan: _Plan, name: bytes, reserved: int, answer: _Answer, local: bool, round_: int
    ) -> None:
        self.name = name
        self._limiter = limiter
        self._plan = plan
        self._reserved = reserved
        self._answer = answer
        self._local = local
        self._round = round_
        self._settled = False

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """OpenAI's x-ratelimit-* headers: of requests, and of tokens where they are limited, each of the scope that
        has the fewest left."""
        return _headers(self._plan, self._answer)

    def settle(self, tokens: int) -> None:
        """Free the slots, and correct the reserved tokens to those that were used; a second call does nothing.

        Returns at once and raises nothing. If Redis does not hear of it, the slots are free when the lease ends and the
        tokens count as reserved.
        """
        if not self._settled:
            self._settled = True
            self._limiter._settle(self, max(0, tokens) - self._reserved)


class RateLimiter:
    """Judges every inference of this router, as long as `run()` runs.

    `router_id` is a new one (`mesh.ids`) at each start of a router: what it names in Redis is of this life alone.
    """

    def __init__(
        self, scripts: Scripts, clock: Clock, router_id: str, defaults: Defaults, *, round_s: float = _ROUND_S
    ) -> None:
        self._scripts = scripts
        self._clock = clock
        self._defaults = defaults
        self._round_s = round_s
        self._prefix = f"{router_id}:".encode()
        self._admitted = 0
        self._plans: dict[tuple[int, str], _Plan] = {}
        self._in_use: WeakValueDictionary[bytes, _InUse] = WeakValueDictionary()
        self._running: set[Permit] = set()
        self._round = 0
        self._routers = 1
        self._heartbeat = ROUTERS.call([_ROUTERS_KEY], [], more=2)
        self._router_id = router_id.encode()
        self._decisions = {
            (kind, local): metrics.RATE_LIMIT_DECISIONS.labels(
                "refused" if kind else "admitted", name, "local" if local else "redis"
            )
            for kind, name in enumerate(_KINDS)
            for local in (False, True)
        }

    async def admit(self, principal: Principal, model: str, ceiling_tokens: int) -> Permit:
        """Reserve one request, `ceiling_tokens` and a slot in every scope, or nothing. `model` is its public id.

        Raises PlatformError(RATE_LIMIT_EXCEEDED), which names the limit that will refuse longest and has the
        x-ratelimit-* headers in its details.
        """
        # The authenticator keeps principals, so the usual request comes with one that is known here.
        plan = self._plans.get((id(principal), model))
        if plan is None:
            plan = self._make_plan(principal, model)
        if ceiling_tokens > plan.largest:
            self._decisions[_SIZE, False].inc()
            raise _too_large(plan, ceiling_tokens)
        self._admitted += 1
        # Not the request's id: clients may choose that, and two requests of one name would share a slot.
        name = b"%b%x" % (self._prefix, self._admitted)
        local = False
        try:
            answer: _Answer = await self._scripts.run(plan.admit, name, b"%d" % ceiling_tokens)
        except PlatformError:
            local = True
            answer = _judge(plan, ceiling_tokens, self._clock.monotonic() * 1e6, self._routers)
        except asyncio.CancelledError:
            self._tell(plan.settle, name, b"%d" % -ceiling_tokens)
            raise
        kind = answer[0]
        self._decisions[kind, local].inc()
        if kind:
            raise _refusal(plan, answer)
        for in_use in plan.in_use:
            in_use.running += 1
        permit = Permit(self, plan, name, ceiling_tokens, answer, local, self._round)
        self._running.add(permit)
        return permit

    async def run(self) -> None:
        """Every few seconds: count the live routers, renew the leases of long requests. After an outage, or when Redis
        may have lost them, those of all requests. Until cancelled."""
        connections = 0
        try:
            while True:
                await self._scripts.connected()
                renew_all = self._scripts.connections != connections
                connections = self._scripts.connections
                try:
                    seconds = math.ceil(3 * self._round_s)
                    self._routers = await self._scripts.run(self._heartbeat, b"%d" % seconds, self._router_id)
                    metrics.RATE_LIMIT_ROUTERS.set(self._routers)
                    await self._renew(young=renew_all)
                except PlatformError:
                    connections = 0
                await asyncio.sleep(self._round_s)
        finally:
            # The other routers' shares grow at once.
            self._tell(self._heartbeat, b"0", self._router_id)

    async def _renew(self, *, young: bool) -> None:
        """Renew what has run for a round, or all; many at once, but never so many that others wait."""
        self._round += 1
        by_plan: defaultdict[_Plan, list[Permit]] = defaultdict(list)
        for permit in self._running:
            if young or permit._round < self._round - 1:
                by_plan[permit._plan].append(permit)
        for count, (plan, permits) in enumerate(by_plan.items(), 1):
            for start in range(0, len(permits), _RENEWALS):
                # One that was settled in the meantime must not come back.
                names = [permit.name for permit in permits[start : start + _RENEWALS] if not permit._settled]
                if names:
                    self._scripts.tell(RATE_LIMITS.call(plan.keys, [b"renew", *plan.arguments, *names]))
            if count % _RENEWALS == 0:
                await asyncio.sleep(0)

    def _settle(self, permit: Permit, correction: int) -> None:
        plan = permit._plan
        self._running.discard(permit)
        for in_use in plan.in_use:
            in_use.running -= 1
        if permit._local:
            _correct(plan, correction, self._clock.monotonic() * 1e6, self._routers)
            # Redis knows it if a round has renewed it, but not its tokens.
            correction = 0
        self._tell(plan.settle, permit.name, b"%d" % correction)

    def _tell(self, call: Call, *more: bytes) -> None:
        try:
            self._scripts.tell(call, *more)
        except PlatformError:
            pass
        except Exception:
            # It is called where a request ends, in whatever way.
            logger.exception("Redis could not be told")

    def _make_plan(self, principal: Principal, model: str) -> _Plan:
        actor_id = principal.api_key_id or principal.id
        tag = f"limits:{{{principal.organization_id}}}:"
        kind = principal.kind.replace("_", " ").replace("api", "API")
        scopes: list[_Scope] = []
        keys: list[bytes] = []
        for name, key, limits in (
            (f"organization {principal.organization_id}", f"{tag}organization", principal.organization_limits),
            (f"{kind} {actor_id}", f"{tag}{principal.kind}:{actor_id}", principal.principal_limits),
        ):
            scopes.append(_scope(name, self._in_use_of(key), limits, self._defaults))
            keys += _keys(key)
            for of_model in limits.models:
                if of_model.model == model:
                    key_of_model = f"{key}:model:{model}"
                    scopes.append(_scope_of_model(name, self._in_use_of(key_of_model), of_model, self._defaults))
                    keys += _keys(key_of_model)
        if len(self._plans) >= _PLANS:
            del self._plans[next(iter(self._plans))]
        plan = self._plans[id(principal), model] = _Plan(principal, model, tuple(scopes), keys)
        return plan

    def _in_use_of(self, key: str) -> _InUse:
        # Plans of the same organization share it; it is forgotten with the last of them.
        return self._in_use.setdefault(key.encode(), _InUse())


def _keys(key: str) -> tuple[bytes, bytes]:
    return key.encode(), f"{key}:leases".encode()


def _scope(name: str, in_use: _InUse, limits: RateLimits, defaults: Defaults) -> _Scope:
    # Falsy is absent: identity refuses limits of zero.
    rate = limits.requests_per_second or defaults.requests_per_second
    return _Scope(
        name=name,
        requests_per_second=rate,
        burst=limits.burst_requests or _default_burst(rate, defaults),
        tokens_per_minute=limits.tokens_per_minute or defaults.tokens_per_minute or 0,
        slots=limits.concurrent_requests or defaults.concurrent_requests,
        in_use=in_use,
    )


def _scope_of_model(name: str, in_use: _InUse, limits: ModelRateLimits, defaults: Defaults) -> _Scope:
    rate = limits.requests_per_second or 0.0
    return _Scope(
        name=name,
        requests_per_second=rate,
        burst=_default_burst(rate, defaults) if rate else 0,
        tokens_per_minute=limits.tokens_per_minute or 0,
        slots=limits.concurrent_requests or 0,
        in_use=in_use,
    )


def _default_burst(rate: float, defaults: Defaults) -> int:
    """As many seconds' worth as the platform's burst is of its rate; a slow rate would else begin with a flood."""
    return max(1, math.floor(rate * defaults.burst_requests / defaults.requests_per_second))


def _judge(plan: _Plan, cost: int, now_us: float, routers: int) -> _Answer:
    """What rate_limits.lua does on admission, for a router alone and its share of the limits.

    A share has room for one request at least, and for one of any size that the whole limit allows: it waits until
    nothing is in use, and pays later.
    """
    kind, refusing, wait_ms = 0, 0, -1.0
    found: list[tuple[float, float, float, float, float, float]] = []
    for index, scope in enumerate(plan.scopes, 1):
        in_use = scope.in_use
        rate, per_minute = scope.requests_per_second / routers, scope.tokens_per_minute / routers
        burst, room = max(scope.burst / routers, 1), max(per_minute, cost)
        requests, tokens = _still_in_use(in_use, now_us, rate, per_minute)
        found.append((requests, tokens, rate, burst, per_minute, room))
        if rate > 0 and requests + 1 > burst + _SLACK:
            until_free_ms = (requests + 1 - burst) / rate * 1000
            if until_free_ms > wait_ms:
                kind, refusing, wait_ms = _REQUESTS, index, until_free_ms
        if per_minute > 0 and tokens + cost > room + _SLACK:
            until_free_ms = (tokens + cost - room) / per_minute * 60000
            if until_free_ms > wait_ms:
                kind, refusing, wait_ms = _TOKENS, index, until_free_ms
        if scope.slots and in_use.running >= max(scope.slots // routers, 1) and wait_ms < 0:
            kind, refusing, wait_ms = _CONCURRENCY, index, 0.0

    answer = [kind, refusing, math.ceil(max(wait_ms, 0)), 0, 0, 0, 0, 0, 0]
    for index, (scope, (requests, tokens, rate, burst, per_minute, _)) in enumerate(
        zip(plan.scopes, found, strict=True), 1
    ):
        if kind == 0:
            requests, tokens = requests + 1, tokens + cost
            in_use = scope.in_use
            in_use.written_us, in_use.requests, in_use.tokens = now_us, requests, tokens
        if rate > 0:
            left = max(0, math.floor(burst - requests + _SLACK))
            if answer[3] == 0 or left < answer[4]:
                answer[3:6] = index, left, math.ceil(requests / rate * 1000)
        if per_minute > 0:
            left = max(0, math.floor(per_minute - tokens + _SLACK))
            if answer[6] == 0 or left < answer[7]:
                answer[6:9] = index, left, math.ceil(tokens / per_minute * 60000)
    return answer


def _correct(plan: _Plan, correction: int, now_us: float, routers: int) -> None:
    """What rate_limits.lua does on settlement, for a router alone."""
    for scope in plan.scopes:
        if correction and scope.tokens_per_minute:
            in_use = scope.in_use
            rate, per_minute = scope.requests_per_second / routers, scope.tokens_per_minute / routers
            requests, tokens = _still_in_use(in_use, now_us, rate, per_minute)
            in_use.written_us, in_use.requests, in_use.tokens = now_us, requests, max(0.0, tokens + correction)


def _still_in_use(in_use: _InUse, now_us: float, rate: float, per_minute: float) -> tuple[float, float]:
    elapsed_us = max(0.0, now_us - in_use.written_us)
    requests = max(0.0, in_use.requests - elapsed_us * rate / 1e6)
    return requests, max(0.0, in_use.tokens - elapsed_us * per_minute / 6e7)


def _headers(plan: _Plan, answer: _Answer) -> tuple[tuple[str, str], ...]:
    _, _, _, requests_scope, requests, requests_ms, tokens_scope, tokens, tokens_ms = answer
    of_requests = (
        ("x-ratelimit-limit-requests", str(plan.scopes[requests_scope - 1].burst)),
        ("x-ratelimit-remaining-requests", str(requests)),
        ("x-ratelimit-reset-requests", _duration(requests_ms)),
    )
    if not tokens_scope:
        return of_requests
    return (
        *of_requests,
        ("x-ratelimit-limit-tokens", str(plan.scopes[tokens_scope - 1].tokens_per_minute)),
        ("x-ratelimit-remaining-tokens", str(tokens)),
        ("x-ratelimit-reset-tokens", _duration(tokens_ms)),
    )


def _duration(millis: int) -> str:
    """As Go writes a duration, and with it OpenAI: 20ms, 1.5s, 6m0s, 1h0m0s."""
    if 0 < millis < 1000:
        return f"{millis}ms"
    seconds, fraction = divmod(millis, 1000)
    minutes, seconds = divmod(seconds, 60)
    text = f"{seconds}s" if not fraction else f"{seconds}.{fraction:03}".rstrip("0") + "s"
    if not minutes:
        return text
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}"


def _refusal(plan: _Plan, answer: _Answer) -> PlatformError:
    kind, refusing, wait_ms = answer[:3]
    scope = plan.scopes[refusing - 1]
    if kind == _REQUESTS:
        limit = f"requests per second: Limit {scope.requests_per_second:g}, burst {scope.burst}"
    elif kind == _TOKENS:
        limit = f"tokens per minute: Limit {scope.tokens_per_minute}"
    else:
        limit = f"concurrent requests: Limit {scope.slots}"
    again = "when a running request has ended" if kind == _CONCURRENCY else f"in {_duration(wait_ms)}"
    details: dict[str, Any] = {"limit": _KINDS[kind], **dict(_headers(plan, answer))}
    return PlatformError(
        Reason.RATE_LIMIT_EXCEEDED,
        description=f"Rate limit reached for {plan.model} in {scope.name} on {limit}. Please try again {again}.",
        retry_after_s=None if kind == _CONCURRENCY else wait_ms / 1000,
        **details,
    )


def _too_large(plan: _Plan, tokens: int) -> PlatformError:
    """No wait would help, so a client is told not to try again."""
    scope = next(scope for scope in plan.scopes if scope.tokens_per_minute == plan.largest)
    details: dict[str, Any] = {"x-should-retry": "false", "x-ratelimit-limit-tokens": str(plan.largest)}
    return PlatformError(
        Reason.RATE_LIMIT_EXCEEDED,
        description=(
            f"Request too large for {plan.model} in {scope.name} on tokens per minute: Limit {plan.largest}, "
            f"Requested {tokens}. The input or output tokens must be reduced in order to run successfully."
        ),
        limit=_KINDS[_SIZE],
        **details,
    )
