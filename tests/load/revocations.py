"""How long two routers still let a key in that was revoked, and let it stream; over all ways, over one, over none.

    TRIALS=200 python -m tests.load.revocations

Prints a table against the bar and ends with status 1 if a line is missed. It never measures what a request costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from aiaas.identity.v1 import api_key_service_pb2 as api_keys_pb2
from aiaas.identity.v1 import organization_service_pb2 as organizations_pb2
from aiaas.router.v1 import backend_service_pb2, model_service_pb2, price_service_pb2
from aiaas.router.v1.backend_service_pb2_grpc import BackendServiceStub
from aiaas.router.v1.inference_service_pb2 import InferRequest, ListServedModelsRequest
from aiaas.router.v1.inference_service_pb2_grpc import InferenceServiceStub
from aiaas.router.v1.model_service_pb2_grpc import ModelServiceStub
from aiaas.router.v1.price_service_pb2_grpc import PriceServiceStub
from aiaas.type.v1.usage_event_pb2 import ENDPOINT_CHAT_COMPLETIONS
from deploy.local.ports import free_port
from deploy.local.servers import HOST, Postgres, Valkey
from deploy.local.state import State
from deploy.local.supervisor import Supervisor
from tests.load.identity import Calls, identity_environment, run, running_identity
from tests.load.native import CHECKOUT, MODEL, LoadError, chat_body, fake_engine
from tests.load.verdict import Verdict

TRIALS, STREAM_TRIALS, UNTOLD_TRIALS = 200, 20, 5
MOST_S, MOST_STREAM_S, MOST_UNTOLD_S = 1.0, 5.0, 60.0
_POLL_S = 0.005
_BODY, _SHORT = (json.dumps(chat_body(tokens=tokens, pace_ms=20)).encode() for tokens in (100_000, 1))
_PRICE = price_service_pb2.Price(
    prompt_micros_per_million=0, cached_prompt_micros_per_million=0, completion_micros_per_million=0
)
_START_S = 30.0
# A router that nobody tells anything: it has the age of what it remembers and nothing else.
_UNTOLD = """
import asyncio, runpy, sys
from mesh import revocations
async def never(*_):
    await asyncio.Event().wait()
revocations.listen = revocations.watch = never
sys.argv = ["router"]
runpy.run_module("router", run_name="__main__")
"""


@dataclass(frozen=True)
class Router:
    """One router, as the administrator and as holders of keys call it."""

    channel: grpc.aio.Channel

    async def accepts(self, secret: str) -> bool:
        """Whether a key is let in. Raises grpc.aio.AioRpcError for anything but a verdict."""
        try:
            await InferenceServiceStub(self.channel).ListServedModels(
                ListServedModelsRequest(), metadata=_bearer(secret), timeout=10
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise
        return True

    async def time_until_refused(self, secret: str) -> float:
        """When a key is let in no more, in the seconds of time.perf_counter."""
        while await self.accepts(secret):
            await asyncio.sleep(_POLL_S)
        return time.perf_counter()

    async def time_until_ended(self, secret: str, begun: asyncio.Event) -> float:
        """When a stream without end is ended by the router."""
        request = InferRequest(endpoint=ENDPOINT_CHAT_COMPLETIONS, body=_BODY)
        try:
            async for _ in InferenceServiceStub(self.channel).Infer(request, metadata=_bearer(secret), timeout=60):
                begun.set()
        except grpc.aio.AioRpcError:
            return time.perf_counter()
        raise LoadError("A stream ended by itself.")


@asynccontextmanager
async def running_router(
    state: State, name: str, identity: Calls, postgres: Postgres, valkey: Valkey, *, untold: bool = False
) -> AsyncIterator[Router]:
    """A router as a process, over a database that is migrated already."""
    port = free_port()
    environment = _environment(state, name, identity, postgres, valkey) | {
        "AIAAS_ROUTER_GRPC_ADDRESS": f"{HOST}:{port}",
        "AIAAS_ROUTER_OPS_ADDRESS": f"{HOST}:{free_port()}",
    }
    command = ("-c", _UNTOLD) if untold else ("-m", "router")
    with (state.root / f"{name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, env=environment, cwd=CHECKOUT, stderr=log
        )
    try:
        async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            async with asyncio.timeout(_START_S):
                await channel.channel_ready()
            yield Router(channel)
    finally:
        process.kill()
        await process.wait()


def _environment(state: State, name: str, identity: Calls, postgres: Postgres, valkey: Valkey) -> dict[str, str]:
    return os.environ | {
        "AIAAS_ROUTER_DATABASE_URL": postgres.url("router"),
        "AIAAS_ROUTER_REDIS_URL": valkey.url,
        "AIAAS_ROUTER_AMQP_URL": "amqp://127.0.0.1:1/",
        "AIAAS_ROUTER_IDENTITY_TARGET": identity.target,
        "AIAAS_ROUTER_JOURNAL_PATH": str(Path(state.root) / f"journal-{name}"),
    }


def _bearer(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


class Trials:
    """Keys that are made, used and revoked."""

    def __init__(self, identity: Calls, organization_id: str, verdict: Verdict) -> None:
        self._identity = identity
        self._organization_id = organization_id
        self._verdict = verdict

    async def new_key(self) -> tuple[str, str]:
        """The id and the text of a new key."""
        wanted = api_keys_pb2.ApiKey(display_name="Trial", scopes=["inference.*"])
        request = api_keys_pb2.CreateApiKeyRequest(organization_id=self._organization_id, api_key=wanted)
        made = await self._identity.ask(self._identity.api_keys.CreateApiKey, request)
        return made.api_key.api_key_id, made.secret

    async def revoke(self, api_key_id: str) -> None:
        """Returns once it is committed."""
        request = api_keys_pb2.RevokeApiKeyRequest(organization_id=self._organization_id, api_key_id=api_key_id)
        await self._identity.ask(self._identity.api_keys.RevokeApiKey, request)

    async def refusals(self, what: str, routers: Sequence[Router], count: int, most_s: float) -> None:
        """How long revoked keys are let in, counted from the call that revokes."""
        took: list[float] = []
        for _ in range(count):
            api_key_id, secret = await self.new_key()
            if not all([await router.accepts(secret) for router in routers]):
                raise LoadError("A new key is refused.")
            began = time.perf_counter()
            await self.revoke(api_key_id)
            refused = await asyncio.gather(*(router.time_until_refused(secret) for router in routers))
            took += [moment - began for moment in refused]
        self._report(what, took, most_s)

    async def streams(self, what: str, routers: Sequence[Router], count: int, most_s: float) -> None:
        """How long streams of revoked keys go on."""
        took: list[float] = []
        for _ in range(count):
            api_key_id, secret = await self.new_key()
            begun = [asyncio.Event() for _ in routers]
            ended = [
                asyncio.create_task(router.time_until_ended(secret, event))
                for router, event in zip(routers, begun, strict=True)
            ]
            async with asyncio.timeout(_START_S):
                for event in begun:
                    await event.wait()
            began = time.perf_counter()
            await self.revoke(api_key_id)
            took += [moment - began for moment in await asyncio.gather(*ended)]
        self._report(what, took, most_s)

    def _report(self, what: str, took: list[float], most_s: float) -> None:
        took.sort()
        text = f"{len(took)} times: median {took[len(took) // 2] * 1000:.0f} ms, slowest {took[-1] * 1000:.0f} ms"
        self._verdict.line(what, text, took[-1] <= most_s)


async def measure(trials: int, stream_trials: int, untold_trials: int, verdict: Verdict) -> None:
    """Everything, on servers of its own."""
    with State.temporary() as state:
        postgres, valkey = Postgres(state), Valkey(state)
        async with Supervisor(state) as supervisor, AsyncExitStack() as stack:
            await postgres.start(supervisor)
            await valkey.start(supervisor)
            for name in ("identity", "router"):
                await postgres.database(name)
            await asyncio.to_thread(run, identity_environment(postgres, valkey), "migrate")
            identity = await stack.enter_async_context(running_identity(state, postgres, valkey))
            environment = _environment(state, "first", identity, postgres, valkey)
            await asyncio.to_thread(run, environment, "migrate", service="router")
            routers = [
                await stack.enter_async_context(running_router(state, name, identity, postgres, valkey))
                for name in ("first", "second")
            ]
            wanted = organizations_pb2.CreateOrganizationRequest(
                organization=organizations_pb2.Organization(display_name="Trials")
            )
            made = await identity.ask(identity.organizations.CreateOrganization, wanted)
            found = Trials(identity, made.organization.organization_id, verdict)
            await found.refusals("refused, told over Redis and the watch", routers, trials, MOST_S)
            engine = stack.enter_context(fake_engine())
            await _add_model(routers[0], identity, engine.base_url)
            await _until_served(routers, (await found.new_key())[1])
            await found.streams("running streams ended", routers, stream_trials, MOST_STREAM_S)
            await supervisor.stop("valkey")
            await found.refusals("refused, Redis dead: told over the watch", routers, trials, MOST_S)
            await found.streams("running streams ended, Redis dead", routers, stream_trials, MOST_STREAM_S)
            if not untold_trials:
                return
            untold = await stack.enter_async_context(
                running_router(state, "untold", identity, postgres, valkey, untold=True)
            )
            await found.refusals("refused, nobody told", [untold], untold_trials, MOST_UNTOLD_S)


async def _add_model(router: Router, identity: Calls, base_url: str) -> None:
    model = model_service_pb2.Model(model_id=MODEL, endpoints=[ENDPOINT_CHAT_COMPLETIONS])
    stubs = ModelServiceStub(router.channel), PriceServiceStub(router.channel), BackendServiceStub(router.channel)
    await identity.ask(stubs[0].CreateModel, model_service_pb2.CreateModelRequest(model=model))
    price = price_service_pb2.CreatePriceRequest(model_id=MODEL, price=_PRICE)
    await identity.ask(stubs[1].CreatePrice, price)
    backend = backend_service_pb2.Backend(
        backend_id="engine",
        base_url=base_url,
        engine=backend_service_pb2.ENGINE_KIND_VLLM,
        models=[backend_service_pb2.BackendModel(model_id=MODEL)],
    )
    await identity.ask(stubs[2].CreateBackend, backend_service_pb2.CreateBackendRequest(backend=backend))


async def _until_served(routers: Sequence[Router], secret: str) -> None:
    request = InferRequest(endpoint=ENDPOINT_CHAT_COMPLETIONS, body=_SHORT)
    async with asyncio.timeout(_START_S):
        for router in routers:
            while True:
                try:
                    async for _ in InferenceServiceStub(router.channel).Infer(
                        request, metadata=_bearer(secret), timeout=10
                    ):
                        pass
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.2)


def main() -> None:
    """Raises SystemExit: 0 when every line is met, 1 when one is missed, 2 when it cannot run."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.load.revocations", description="Revoked keys; docs/benchmark.md."
    )
    parser.add_argument("--trials", type=int, default=os.environ.get("TRIALS") or TRIALS)
    arguments = parser.parse_args()
    verdict = Verdict()
    try:
        print("| revoked keys at two routers | found | |\n| --- | --- | --- |", flush=True)
        asyncio.run(measure(arguments.trials, STREAM_TRIALS, UNTOLD_TRIALS, verdict))
    except LoadError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if verdict.met else 1)


if __name__ == "__main__":
    main()
