"""The platform under test in a process of its own: a whole local stack whose only chat backend is the fake engine, a
tenant that no limit stops, and the gateway where there is one; it never measures anything.

    python tests/load/host.py ENGINE_PORT ROOT SETTINGS < pipe

It prints one line of JSON once everything serves, a second one with what it saw at the end, and ends with its input.
Services come from the checkout at ROOT, and so does `deploy.local` when ROOT is on PYTHONPATH. SETTINGS, a JSON object,
are variables that all services get.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from deploy.local.engines import HOST, http_probe, python_paths
from deploy.local.errors import LocalError
from deploy.local.ports import free_port
from deploy.local.processes import family
from deploy.local.stack import Stack, running
from deploy.local.state import State
from deploy.local.supervisor import Program

MODEL = "m"
BACKEND_ID = "fake-engine"
HEALTHY_LIMIT_S = 30.0
# Far above what one core can do, and still there: every request is checked against them.
LIMITS = {
    "limit_requests_per_second": 1_000_000,
    "burst_requests": 1_000_000,
    "limit_tokens_per_minute": 100_000_000_000,
    "limit_concurrent_requests": 1_000_000,
}
# Micro-dollars per million tokens.
PRICE = {
    "prompt_micros_per_million": 150_000,
    "cached_prompt_micros_per_million": 75_000,
    "completion_micros_per_million": 600_000,
}
# What works off what requests leave behind: it yields to load and engine, with which it shares a core.
BACKGROUND = ("analytics", "postgres")
BACKGROUND_NICENESS = 19


@dataclass(frozen=True)
class Tenant:
    """Whose requests the load are."""

    organization_id: str
    secret: str


class OtlpSink(trace_service_pb2_grpc.TraceServiceServicer):
    """A collector of traces that counts spans and forgets them, so that tracing is on."""

    def __init__(self) -> None:
        self.spans = 0

    async def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Counts."""
        self.spans += sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextlib.asynccontextmanager
async def listening(sink: OtlpSink) -> AsyncIterator[str]:
    """Receives spans over OTLP/gRPC until the end of the block; yields the endpoint."""
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(sink, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        yield f"http://{HOST}:{port}"
    finally:
        await server.stop(None)


async def main(engine_port: int, root: Path, more: dict[str, str]) -> None:
    """Serves until standard input ends."""
    over = asyncio.Event()

    def read_input() -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            over.set()

    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), read_input)
    sink = OtlpSink()
    async with listening(sink) as endpoint:
        settings = {
            "PYTHONPATH": f"{root}:{root / 'gen' / 'python'}",
            "AIAAS_OTLP_ENDPOINT": endpoint,
            "AIAAS_TRACE_RATIO": "0.01",
        } | more
        with State.temporary() as state:
            # Without a model for chat; that for embeddings idles.
            async with running(state, engine="llamacpp", chat_replicas=0, settings=settings) as stack:
                await serve(stack, state, settings, sink, engine_port, root, over)


async def serve(
    stack: Stack,
    state: State,
    settings: dict[str, str],
    sink: OtlpSink,
    engine_port: int,
    root: Path,
    over: asyncio.Event,
) -> None:
    """Prepares the stack, says so and waits."""
    headers = {"Authorization": f"Bearer {stack.platform_key}"}
    async with aiohttp.ClientSession(stack.base_url, headers=headers) as session:
        await register(session, engine_port, root)
        tenant = await make_tenant(session)
    gateway_port = await start_gateway(stack, state, settings, root)
    for name in BACKGROUND:
        for process in family(stack.supervisor.pid(name) or 0):
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, process.pid, BACKGROUND_NICENESS)
    ready = {
        "state": str(state.root),
        "port": int(stack.base_url.rpartition(":")[2]),
        "gateway_port": gateway_port,
        "router_ops": stack.ops["router"],
        "admin_key": stack.platform_key,
        "organization_id": tenant.organization_id,
        "secret": tenant.secret,
    }
    print(json.dumps(ready), flush=True)
    await over.wait()
    print(json.dumps({"spans": sink.spans}), flush=True)


async def register(session: aiohttp.ClientSession, engine_port: int, root: Path) -> None:
    """Makes the fake engine a backend, and waits until the router finds it healthy."""
    await call(
        session,
        "PATCH",
        f"/admin/v1/models/{MODEL}?allow_missing=true",
        {"owner": "load", "context_tokens": 8192, "endpoints": ["ENDPOINT_CHAT_COMPLETIONS"]},
    )
    # An older checkout, to compare with, may know no prices.
    if (root / "router" / "price_service.py").exists():
        await call(session, "POST", f"/admin/v1/models/{MODEL}/prices", PRICE)
    await call(
        session,
        "PATCH",
        f"/admin/v1/backends/{BACKEND_ID}?allow_missing=true",
        {
            "base_url": f"http://{HOST}:{engine_port}",
            "engine": "ENGINE_KIND_VLLM",
            "models": [{"model_id": MODEL, "upstream_model": MODEL}],
        },
    )
    async with asyncio.timeout(HEALTHY_LIMIT_S):
        while True:
            answer = await call(session, "GET", "/admin/v1/backends?page_size=500")
            if any(
                backend["backend_id"] == BACKEND_ID and backend["health"] == "BACKEND_HEALTH_HEALTHY"
                for backend in answer["backends"]
            ):
                return
            await asyncio.sleep(0.1)


async def make_tenant(session: aiohttp.ClientSession) -> Tenant:
    """An organization and a key, both with limits."""
    answer = await call(session, "POST", "/admin/v1/organizations", {"display_name": "Load", "rate_limits": LIMITS})
    organization_id = answer["organization"]["organization_id"]
    key = await call(
        session,
        "POST",
        f"/admin/v1/organizations/{organization_id}/api-keys",
        {"display_name": "Load", "rate_limits": LIMITS},
    )
    return Tenant(organization_id, key["secret"])


async def start_gateway(stack: Stack, state: State, settings: dict[str, str], root: Path) -> int | None:
    """Starts edge and router in one process beside those of the stack; its port, or None where there is none."""
    if not (root / "gateway" / "__main__.py").exists():
        return None
    port, grpc_port, ops_port = free_port(), free_port(), free_port()
    environment = {
        "AIAAS_LOG_LEVEL": "INFO",
        "AIAAS_EDGE_ADDRESS": f"{HOST}:{port}",
        "AIAAS_EDGE_DRAIN_S": "5",
        "AIAAS_EDGE_IDENTITY_TARGET": stack.grpc["identity"],
        "AIAAS_EDGE_ROUTER_TARGET": f"{HOST}:{grpc_port}",
        "AIAAS_EDGE_ANALYTICS_TARGET": stack.grpc["analytics"],
        "AIAAS_ROUTER_GRPC_ADDRESS": f"{HOST}:{grpc_port}",
        "AIAAS_ROUTER_OPS_ADDRESS": f"{HOST}:{ops_port}",
        "AIAAS_ROUTER_DRAIN_S": "5",
        "AIAAS_ROUTER_IDENTITY_TARGET": stack.grpc["identity"],
        "AIAAS_ROUTER_JOURNAL_PATH": "journal",
        "AIAAS_ROUTER_DATABASE_URL": stack.postgres.url("router"),
        "AIAAS_ROUTER_REDIS_URL": stack.valkey.url,
        "AIAAS_ROUTER_AMQP_URL": stack.rabbitmq.url,
    }
    program = Program(
        name="gateway",
        command=(sys.executable, "-m", "gateway", "serve"),
        folder=state.folder("gateway"),
        account=state.account_for(*python_paths()),
        # An older checkout, to compare with, may know no certificates.
        environment=environment | dict(getattr(stack, "certificates", {}).get("gateway", {})) | settings,
        probe=http_probe(port, "/ready"),
        needs=("identity", "postgres", "valkey", "rabbitmq"),
    )
    try:
        await stack.supervisor.start(program)
    except LocalError as error:
        print(error, file=sys.stderr)
        return None
    return port


async def call(session: aiohttp.ClientSession, verb: str, path: str, body: object = None) -> dict[str, Any]:
    """One admin call. Raises LocalError with the answer unless it is 200."""
    async with session.request(verb, path, json=body) as answer:
        if answer.status != 200:
            raise LocalError(f"{verb} {path} answers {answer.status}: {await answer.text()}")
        document: dict[str, Any] = await answer.json()
        return document


if __name__ == "__main__":
    try:
        asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])))
    except LocalError as error:
        sys.exit(str(error))
