"""What a backend is, and the registry of backends, models and prices in memory; it never sends a request.

The registry's content comes from PostgreSQL; what a router knows by itself of a backend, its health and the requests it
has in flight there, lives in a `BackendState` that outlasts every reload.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Protocol

from aiaas.router.v1.backend_service_pb2 import EngineKind
from mesh.clock import Clock, SystemClock
from mesh.errors import PlatformError, Reason
from mesh.fields import refuse
from router import metrics
from router.breaker import Breaker
from router.models import Model
from router.prices import Price, PriceSchedule, schedules
from router.routing_policies import DEFAULT, RoutingPolicy

logger = logging.getLogger(__name__)

WEIGHT = 100
"""The weight of a backend that was given none."""

CREDENTIAL_PREFIX = "AIAAS_ENGINE_"
"""What the name of a variable with an engine's key begins with; else an administrator could send any secret of the
router to an address of his choice."""

FAILURES_TO_UNHEALTHY = 2
"""So many failures in a row take a backend out; one success brings it back."""

_ID = re.compile(r"[a-z0-9-]{1,64}")
_MODEL_ID = re.compile(r"[a-zA-Z0-9._:/-]{1,128}")
_CREDENTIAL_VARIABLE = re.compile(rf"{CREDENTIAL_PREFIX}[A-Z0-9_]{{1,100}}")
_BASE_URL = re.compile(
    r"https?://(?P<host>[A-Za-z0-9](?:[A-Za-z0-9._-]{0,253})|\[[0-9A-Fa-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*)/?"
)
_BASE_URL_LENGTH = 512
_UPSTREAM_MODEL_LENGTH = 256
_MODELS = 256
_LIMIT_REQUESTS = 1_000_000
_FIRST_BYTE_TIMEOUT_MILLIS = 3_600_000
_NEVER = datetime.fromtimestamp(0, UTC)
_SYSTEM_CLOCK = SystemClock()


@dataclass(frozen=True, slots=True)
class BackendModel:
    """A model as one backend serves it: the registered id, and the name that the engine knows it by."""

    model_id: str
    upstream_model: str = ""


@dataclass(frozen=True, slots=True)
class Backend:
    """An engine that serves models. The times and the etag are the store's; they are empty until it is stored."""

    backend_id: str
    base_url: str = ""
    engine: int = EngineKind.ENGINE_KIND_UNSPECIFIED
    models: tuple[BackendModel, ...] = ()
    weight: int = WEIGHT
    limit_concurrent_requests: int = 0
    draining: bool = False
    first_byte_timeout_millis: int = 0
    credential_variable: str = ""
    create_time: datetime = field(default=_NEVER, compare=False)
    update_time: datetime = field(default=_NEVER, compare=False)
    etag: str = field(default="", compare=False)


def check_backend(backend: Backend) -> None:
    """Hold a backend to the contract's rules. Raises PlatformError(INVALID_ARGUMENT) that names the fields."""
    refuse(_problems(backend))


def _problems(backend: Backend) -> Iterator[PlatformError]:
    if not _ID.fullmatch(backend.backend_id):
        yield _invalid("backend.backend_id", "must be 1 to 64 of a-z 0-9 -")
    if wrong := _wrong_with(backend.base_url):
        yield _invalid("backend.base_url", wrong)
    if backend.engine not in (EngineKind.ENGINE_KIND_VLLM, EngineKind.ENGINE_KIND_LLAMACPP):
        yield _invalid("backend.engine", "must be ENGINE_KIND_VLLM or ENGINE_KIND_LLAMACPP")
    if len(backend.models) > _MODELS:
        yield _invalid("backend.models", f"may hold {_MODELS} models")
    seen = set()
    for index, model in enumerate(backend.models[:_MODELS]):
        place = f"backend.models[{index}]"
        if not _MODEL_ID.fullmatch(model.model_id):
            yield _invalid(f"{place}.model_id", "must be the id of a registered model")
        if model.model_id in seen:
            yield _invalid(f"{place}.model_id", "repeats a model")
        seen.add(model.model_id)
        if len(model.upstream_model) > _UPSTREAM_MODEL_LENGTH or not model.upstream_model.isprintable():
            yield _invalid(f"{place}.upstream_model", f"must be at most {_UPSTREAM_MODEL_LENGTH} printable characters")
    if not 1 <= backend.weight <= 1000:
        yield _invalid("backend.weight", "must be 1 to 1000")
    if not 0 <= backend.limit_concurrent_requests <= _LIMIT_REQUESTS:
        yield _invalid("backend.limit_concurrent_requests", f"must be 0 to {_LIMIT_REQUESTS}")
    if not 0 <= backend.first_byte_timeout_millis <= _FIRST_BYTE_TIMEOUT_MILLIS:
        yield _invalid("backend.first_byte_timeout_millis", f"must be 0 to {_FIRST_BYTE_TIMEOUT_MILLIS}")
    if backend.credential_variable and not _CREDENTIAL_VARIABLE.fullmatch(backend.credential_variable):
        yield _invalid("backend.credential_variable", f"must be empty or {CREDENTIAL_PREFIX} and A-Z 0-9 _")


def _wrong_with(base_url: str) -> str | None:
    """What keeps a text from being an http(s) address of host, port and plain path; no credentials, query, fragment,
    dots or escapes in the path, so that what is appended to it is what the engine sees."""
    parts = _BASE_URL.fullmatch(base_url) if len(base_url) <= _BASE_URL_LENGTH else None
    if parts is None:
        return 'must be an address such as "http://127.0.0.1:8000", without credentials or query'
    if parts["host"].startswith("["):
        try:
            ipaddress.IPv6Address(parts["host"][1:-1])
        except ValueError:
            return "holds a wrong IPv6 address"
    if parts["port"] is not None and not 1 <= int(parts["port"]) <= 65535:
        return "must have a port of 1 to 65535"
    if parts["path"].endswith("/v1"):
        return "must not end with /v1; the router adds it"
    return None


def unknown_model(index: int) -> PlatformError:
    """The error for the model at `index` of a backend's list, which is not registered."""
    return _invalid(f"backend.models[{index}].model_id", "is not a registered model")


def _invalid(field_name: str, rule: str) -> PlatformError:
    return PlatformError(Reason.INVALID_ARGUMENT, field=field_name, description=f"'{field_name}' {rule}.")


class BackendState:
    """What this router knows of one backend by itself: its health and the requests it has in flight there."""

    def __init__(self, backend_id: str) -> None:
        self.backend_id = backend_id
        self.probed = False
        self.healthy = False
        self.health_reason = ""
        self.in_flight = 0
        self._failures = 0
        self._breakers: dict[str, Breaker] = {}
        metrics.REQUESTS_IN_FLIGHT.labels(backend_id).set_function(lambda: self.in_flight)
        self._healthy_gauge = metrics.BACKEND_HEALTHY.labels(backend_id)
        self._healthy_gauge.set(0)

    def succeeded(self) -> None:
        """A probe was answered well: one success makes it healthy."""
        if not self.healthy:
            logger.info("backend %s is healthy", self.backend_id)
        self.probed = self.healthy = True
        self.health_reason = ""
        self._failures = 0
        self._healthy_gauge.set(1)

    def failed(self, reason: str) -> None:
        """A probe failed or a connection was refused: the second failure in a row makes it unhealthy."""
        self._failures += 1
        if self.probed and self._failures < FAILURES_TO_UNHEALTHY:
            return
        if self.healthy or not self.probed:
            logger.warning("backend %s is unhealthy: %s", self.backend_id, reason)
        self.probed = True
        self.healthy = False
        self.health_reason = reason
        self._healthy_gauge.set(0)

    def heard(self) -> None:
        """It has begun an answer: it lives, even if this router was too busy to take its answer to a probe in time."""
        self._failures = 0

    def start_request(self) -> None:
        """Count a request that is sent to it."""
        self.in_flight += 1

    def end_request(self) -> None:
        """Count a request that has ended there."""
        self.in_flight -= 1

    def breaker(self, model_id: str) -> Breaker:
        """What leaves it alone while it fails for a model."""
        breaker = self._breakers.get(model_id)
        if breaker is None:
            breaker = self._breakers[model_id] = Breaker(metrics.BREAKER_OPEN.labels(self.backend_id, model_id))
        return breaker

    def forget(self) -> None:
        """Take its children out of the metrics, as the backend is gone."""
        for model_id in self._breakers:
            metrics.BREAKER_OPEN.remove(self.backend_id, model_id)
        metrics.REQUESTS_IN_FLIGHT.remove(self.backend_id)
        metrics.BACKEND_HEALTHY.remove(self.backend_id)


@dataclass(frozen=True, slots=True)
class Served:
    """A backend that serves a model, under the name the engine knows it by, with what the router knows of it."""

    backend: Backend
    upstream_model: str
    state: BackendState
    breaker: Breaker = field(default_factory=Breaker)


@dataclass(frozen=True, slots=True)
class RegistryContent:
    """What the store holds, all of one moment; prices in the order of (model_id, valid_from)."""

    revision: int
    models: tuple[Model, ...]
    backends: tuple[Backend, ...]
    prices: tuple[Price, ...] = ()
    policies: tuple[RoutingPolicy, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The registry at one revision, indexed for requests: models by every name, who serves each of them, what each
    costs, and how its requests find a backend."""

    models: Mapping[str, Model]
    names: Mapping[str, Model]
    backends: Mapping[str, Backend]
    served: Mapping[str, tuple[Served, ...]]
    prices: Mapping[str, PriceSchedule] = field(default_factory=dict)
    policies: Mapping[str, RoutingPolicy] = field(default_factory=dict)

    def find_model(self, name: str, allowed_models: tuple[str, ...]) -> Model:
        """The model of that id or alias. Raises PlatformError(MODEL_NOT_FOUND), also for one that is not allowed."""
        model = self.names.get(name)
        if model is None or not is_allowed(model, allowed_models):
            raise PlatformError(Reason.MODEL_NOT_FOUND, field="model", model=name)
        return model

    def price_of(self, model_id: str, at: datetime) -> Price | None:
        """The price of a model that holds at a moment; None where it has none then, and so must not be used."""
        schedule = self.prices.get(model_id)
        return None if schedule is None else schedule.at(at)

    def policy_of(self, model_id: str) -> RoutingPolicy:
        """How requests for a model find a backend."""
        return self.policies.get(model_id, DEFAULT)

    def unpriced_models(self, at: datetime) -> list[str]:
        """The ids of the models that have no price at a moment."""
        return [model_id for model_id in self.models if self.price_of(model_id, at) is None]


def is_allowed(model: Model, allowed_models: tuple[str, ...]) -> bool:
    """Whether a principal with these allowed models may use the model; none at all means every model."""
    return not allowed_models or model.model_id in allowed_models or any(a in allowed_models for a in model.aliases)


class RegistryStore(Protocol):
    """Where the registry's content lies."""

    async def revision(self) -> int:
        """The number that grows with each change. Raises PlatformError(UNAVAILABLE)."""

    async def load(self) -> RegistryContent:
        """Everything, of one moment. Raises PlatformError(UNAVAILABLE)."""


class Registry:
    """Keeps the last known content in memory: polled, and refreshed at once after a change through this router."""

    def __init__(self, store: RegistryStore, *, clock: Clock = _SYSTEM_CLOCK, poll_s: float = 1.0) -> None:
        self._store = store
        self._clock = clock
        self._poll_s = poll_s
        self._revision: int | None = None
        self._lock = asyncio.Lock()
        self._states: dict[str, BackendState] = {}
        self.snapshot = Snapshot({}, {}, {}, MappingProxyType({}))
        self.content: RegistryContent | None = None
        """What was read last; None before."""
        self.changed = asyncio.Event()
        """Set whenever the content has changed; whoever waits for it clears it."""

    @property
    def loaded(self) -> bool:
        """Whether the content was read at least once, now or by a former run."""
        return self.content is not None

    async def check_loaded(self) -> None:
        """For readiness. Raises PlatformError(UNAVAILABLE) until the first load."""
        if not self.loaded:
            raise PlatformError(Reason.UNAVAILABLE, description="The registry has not been loaded yet.")

    def state(self, backend_id: str) -> BackendState | None:
        """What this router knows of a backend; None where it is not in the registry, or not yet."""
        return self._states.get(backend_id)

    def probe_targets(self) -> list[tuple[Backend, BackendState]]:
        """Every backend with its state."""
        return [(backend, self._states[backend.backend_id]) for backend in self.snapshot.backends.values()]

    async def refresh(self) -> None:
        """Read the content if its revision has moved. Raises PlatformError(UNAVAILABLE), and keeps what is known."""
        async with self._lock:
            if await self._store.revision() != self._revision:
                content = await self._store.load()
                self._replace(content)
                self._revision = content.revision
                self.changed.set()
                if unpriced := self.snapshot.unpriced_models(self._clock.now()):
                    logger.warning("models without a price cannot be used: %s", ", ".join(unpriced))

    def restore(self, content: RegistryContent) -> None:
        """Begin with what a former run has read, until it can be read anew."""
        self._replace(content)

    async def run(self) -> None:
        """Poll for changes until cancelled. While PostgreSQL is away, the last known content goes on serving."""
        away = False
        while True:
            try:
                await self.refresh()
                if away:
                    logger.info("the registry can be read again")
                away = False
            except PlatformError as error:
                if not away:
                    logger.warning("the registry cannot be read, the last known one serves: %s", error.reason.value)
                away = True
            # Not only when something changed, since prices begin at their own time.
            metrics.UNPRICED_MODELS.set(len(self.snapshot.unpriced_models(self._clock.now())))
            await asyncio.sleep(self._poll_s)

    def _replace(self, content: RegistryContent) -> None:
        self.content = content
        before = self.snapshot.backends
        backends = {backend.backend_id: backend for backend in content.backends}
        for backend_id in self._states.keys() - backends.keys():
            self._states.pop(backend_id).forget()
        for backend in content.backends:
            known = before.get(backend.backend_id)
            if known is None or (known.base_url, known.engine) != (backend.base_url, backend.engine):
                # At another address it is another engine, of which nothing is known yet; what is in flight at the
                # old one keeps its own state.
                self._states[backend.backend_id] = BackendState(backend.backend_id)
        served: dict[str, list[Served]] = {}
        for backend in content.backends:
            for model in backend.models:
                upstream_model = model.upstream_model or model.model_id
                state = self._states[backend.backend_id]
                entry = Served(backend, upstream_model, state, state.breaker(model.model_id))
                served.setdefault(model.model_id, []).append(entry)
        names = {alias: model for model in content.models for alias in model.aliases}
        models = {model.model_id: model for model in content.models}
        self.snapshot = Snapshot(
            models=models,
            names=names | models,
            backends=backends,
            served={model_id: tuple(entries) for model_id, entries in served.items()},
            prices=schedules(content.prices),
            policies={policy.model_id: policy for policy in content.policies},
        )
