"""The composition of the local stack: what is started, in which order, in which environment; never how a part works."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from deploy.local import engines
from deploy.local.certificates import issue
from deploy.local.engines import HOST, Engine, http_probe, python_paths
from deploy.local.errors import LocalError
from deploy.local.ports import free_port, require_free
from deploy.local.servers import Postgres, RabbitMQ, SeaweedFS, Valkey
from deploy.local.state import State
from deploy.local.supervisor import Event, Program, Supervisor, run_to_end

# Each has a database of its own.
STORING_SERVICES = ("identity", "router", "analytics")
# Whom each calls. The gateway is the edge and the router in one process.
PEERS = {
    "identity": (),
    "router": ("identity",),
    "analytics": ("identity",),
    "edge": STORING_SERVICES,
    "gateway": ("identity", "analytics"),
}
OWNER = "local"
# Of each model, in micro-dollars per million tokens: 5 cents, 2.5 and 20.
PRICE = {
    "prompt_micros_per_million": 50_000,
    "cached_prompt_micros_per_million": 25_000,
    "completion_micros_per_million": 200_000,
}
KEY_FILE = "secrets/platform-key.json"
HEALTHY_LIMIT_S = 30.0

Report = Callable[[Event], None]


@dataclass(frozen=True)
class Stack:
    """A stack that runs."""

    # The public address.
    base_url: str
    organization_id: str
    # A key of the first platform administrator.
    platform_key: str
    engines: tuple[Engine, ...]
    supervisor: Supervisor
    postgres: Postgres
    valkey: Valkey
    rabbitmq: RabbitMQ
    seaweedfs: SeaweedFS
    # host:port of the gRPC servers, by service.
    grpc: Mapping[str, str]
    # host:port of /health, /ready and /metrics, by service.
    ops: Mapping[str, str]
    # What makes a process one of the services, or "tool", to the others: the variables of its certificate.
    certificates: Mapping[str, Mapping[str, str]]


@contextlib.asynccontextmanager
async def running(
    state: State,
    *,
    port: int | None = None,
    engine: str = "llamacpp",
    chat_replicas: int = 1,
    one_process: bool = False,
    settings: Mapping[str, str] | None = None,
    report: Report = lambda event: None,
) -> AsyncIterator[Stack]:
    """Starts everything, yields it once it serves, and ends everything with the block.

    `port` is the public one (None: a free one), `one_process` has the edge and the router share one, `settings` are
    variables added to every service's environment. Starting again in the same state folder keeps data and key. Raises
    LocalError with what to do.
    """
    async with Supervisor(state, report) as supervisor:
        if port is not None:
            # Only now, as what a killed stack left behind may have held it.
            require_free(port)
        try:
            stack = await _Composition(
                state, supervisor, free_port() if port is None else port, one_process, settings or {}, report
            ).start(engine, chat_replicas)
        except ExceptionGroup as group:
            raise _cause(group) from None
        yield stack


@dataclass
class _Composition:
    state: State
    supervisor: Supervisor
    port: int
    one_process: bool
    settings: Mapping[str, str]
    report: Report
    grpc: dict[str, str] = field(default_factory=lambda: {name: f"{HOST}:{free_port()}" for name in STORING_SERVICES})

    def __post_init__(self) -> None:
        self.ops = {name: f"{HOST}:{free_port()}" for name in STORING_SERVICES} | {"edge": f"{HOST}:{self.port}"}
        self.front = ("gateway",) if self.one_process else ("router", "edge")
        self.postgres = Postgres(self.state)
        self.valkey = Valkey(self.state)
        self.rabbitmq = RabbitMQ(self.state)
        self.seaweedfs = SeaweedFS(self.state)
        self.account = self.state.account_for(*python_paths())
        self.certificates = issue(self.state)

    async def start(self, engine: str, chat_replicas: int) -> Stack:
        backends: list[Engine] = []

        async def start_engines() -> None:
            with self._step("models"):
                backends.extend(await engines.prepare(engine, self.state, chat_replicas=chat_replicas))
            await _together(self.supervisor.start(backend.program) for backend in backends)

        async def start_services() -> None:
            await _together((self.postgres.start(self.supervisor), self.valkey.start(self.supervisor)))
            with self._step("migrations"):
                for name in STORING_SERVICES:
                    await self.postgres.database(name)
                await _together(self._run(name, "migrate") for name in STORING_SERVICES)
            await _together((self.supervisor.start(self._program("identity")), self._make_key()))
            await _together(self.supervisor.start(self._program(name)) for name in ("analytics", *self.front))

        await _together(
            (
                start_engines(),
                start_services(),
                self.rabbitmq.start(self.supervisor),
                self.seaweedfs.start(self.supervisor),
            )
        )
        key = self.state.load(KEY_FILE)
        stack = Stack(
            base_url=f"http://{HOST}:{self.port}",
            organization_id=key["organization_id"],
            platform_key=key["secret"],
            engines=tuple(backends),
            supervisor=self.supervisor,
            postgres=self.postgres,
            valkey=self.valkey,
            rabbitmq=self.rabbitmq,
            seaweedfs=self.seaweedfs,
            grpc=self.grpc,
            ops=self.ops,
            certificates=self.certificates,
        )
        with self._step("backends"):
            await register(stack)
        return stack

    async def _make_key(self) -> None:
        """The first platform administrator and a key, once; it is kept, so that starting again keeps it."""
        if self.state.load(KEY_FILE) is None:
            with self._step("administrator"):
                # A key that was made before and is not here was never seen by anybody.
                made = await self._run("identity", "bootstrap", "--rotate")
                self.state.save(KEY_FILE, json.loads(made.splitlines()[-1]))

    async def _run(self, service: str, *arguments: str) -> str:
        return await run_to_end(
            *(sys.executable, "-m", service, *arguments),
            folder=self.state.folder(service),
            account=self.account,
            environment=self._environment(service),
        )

    def _program(self, service: str) -> Program:
        stores = () if service == "edge" else ("postgres", "valkey", "rabbitmq")
        ops = self.ops["edge" if service == "gateway" else service]
        return Program(
            name=service,
            command=(sys.executable, "-m", service, "serve"),
            folder=self.state.folder(service),
            account=self.account,
            environment=self._environment(service),
            probe=http_probe(int(ops.rpartition(":")[2]), "/ready"),
            needs=(*stores, *PEERS[service]),
        )

    def _environment(self, service: str) -> dict[str, str]:
        """What the service's config.py reads."""
        if service == "gateway":
            return self._environment("router") | self._environment("edge") | self.certificates["gateway"]
        upper = service.upper()
        own = {f"AIAAS_{upper}_{peer.upper()}_TARGET": self.grpc[peer] for peer in PEERS[service]}
        if service == "edge":
            own["AIAAS_EDGE_ADDRESS"] = f"{HOST}:{self.port}"
        else:
            own |= {
                f"AIAAS_{upper}_GRPC_ADDRESS": self.grpc[service],
                f"AIAAS_{upper}_OPS_ADDRESS": self.ops[service],
                f"AIAAS_{upper}_DATABASE_URL": self.postgres.url(service),
                f"AIAAS_{upper}_REDIS_URL": self.valkey.url,
                f"AIAAS_{upper}_AMQP_URL": self.rabbitmq.url,
            }
        if service == "identity":
            own["AIAAS_IDENTITY_AUDIT_KEY"] = self.state.key("identity-audit")
            own["AIAAS_IDENTITY_SECRET_KEY"] = self.state.key("identity")
            own["AIAAS_IDENTITY_PUBLIC_URL"] = f"http://{HOST}:{self.port}"
        if service == "router":
            own["AIAAS_ROUTER_JOURNAL_PATH"] = str(self.state.folder("router") / "journal")
        if service == "analytics":
            own |= {
                # It asks routers once an hour, and starts without them.
                "AIAAS_ANALYTICS_ROUTER_TARGET": self.grpc["router"],
                "AIAAS_ANALYTICS_SECRET_KEY": self.state.key("analytics"),
                "AIAAS_ANALYTICS_S3_URL": self.seaweedfs.url,
                "AIAAS_ANALYTICS_S3_BUCKET": self.seaweedfs.bucket,
                "AIAAS_ANALYTICS_S3_ACCESS_KEY": self.seaweedfs.access_key,
                "AIAAS_ANALYTICS_S3_SECRET_KEY": self.seaweedfs.secret_key,
                # Whoever tries webhooks here receives them here.
                "AIAAS_ANALYTICS_WEBHOOK_ALLOW_PRIVATE": "true",
            }
        own |= self.certificates[service]
        return {"AIAAS_LOG_LEVEL": "INFO", f"AIAAS_{upper}_DRAIN_S": "5", **own, **self.settings}

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        """Reports work that is no program of its own."""
        began = time.monotonic()
        self.report(Event(name, "starting"))
        yield
        self.report(Event(name, "done", time.monotonic() - began))


async def register(stack: Stack) -> None:
    """Tells the router of the engines and waits until it finds each of them healthy.

    Private ports are new at each start, so addresses are updated. A model that has a price keeps it. A backend of ours
    that no longer runs is removed; those that somebody else registered stay. Raises LocalError with the router's own
    words.
    """
    headers = {"Authorization": f"Bearer {stack.platform_key}"}
    async with aiohttp.ClientSession(stack.base_url, headers=headers) as session:
        for model in {model.model_id: model for engine in stack.engines for model in engine.models}.values():
            await _call(
                session,
                "PATCH",
                f"/admin/v1/models/{model.model_id}?allow_missing=true",
                {"owner": OWNER, "context_tokens": model.context_tokens, "endpoints": model.endpoints},
            )
            prices = f"/admin/v1/models/{model.model_id}/prices"
            if not (await _call(session, "GET", prices))["prices"]:
                await _call(session, "POST", prices, PRICE)
        for engine in stack.engines:
            await _call(
                session,
                "PATCH",
                f"/admin/v1/backends/{engine.backend_id}?allow_missing=true",
                {
                    "base_url": engine.base_url,
                    "engine": f"ENGINE_KIND_{engine.kind.upper()}",
                    "models": [
                        {"model_id": model.model_id, "upstream_model": model.upstream_model} for model in engine.models
                    ],
                },
            )
        ours = {engine.backend_id for engine in stack.engines}
        for backend in await _backends(session):
            name = str(backend["backend_id"])
            if name not in ours and name.startswith(engines.BACKEND_PREFIXES):
                await _call(session, "DELETE", f"/admin/v1/backends/{name}")
        await _healthy(session, ours)


async def _healthy(session: aiohttp.ClientSession, backend_ids: set[str]) -> None:
    deadline = time.monotonic() + HEALTHY_LIMIT_S
    while True:
        backends = [backend for backend in await _backends(session) if backend["backend_id"] in backend_ids]
        waiting = [backend for backend in backends if backend["health"] != "BACKEND_HEALTH_HEALTHY"]
        if not waiting:
            return
        if time.monotonic() > deadline:
            reasons = "; ".join(f"{backend['backend_id']}: {backend['health_reason']}" for backend in waiting)
            raise LocalError(f"The router does not find every engine healthy: {reasons}.")
        await asyncio.sleep(0.1)


async def _backends(session: aiohttp.ClientSession) -> list[dict[str, Any]]:
    answer = await _call(session, "GET", "/admin/v1/backends?page_size=500")
    backends: list[dict[str, Any]] = answer["backends"]
    return backends


async def _call(session: aiohttp.ClientSession, verb: str, path: str, body: object = None) -> dict[str, Any]:
    async with session.request(verb, path, json=body) as answer:
        if answer.status != 200:
            raise LocalError(f"{verb} {path} answers {answer.status}: {await answer.text()}")
        document: dict[str, Any] = await answer.json()
        return document


async def _together(work: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Does all of it at once; the first failure ends the rest."""
    async with asyncio.TaskGroup() as group:
        for one in work:
            group.create_task(one)


def _cause(error: BaseException) -> BaseException:
    """The first failure of a tree of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
