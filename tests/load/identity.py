"""identity with very many organizations, people and keys: how long it takes to judge a key, to change something and to
turn the pages of a list. It never asks for the same key twice within a cache's life, so nothing is cached anywhere.

    ORGANIZATIONS=20000 USERS=200000 API_KEYS=500000 python -m tests.load.identity

Prints a table against the bar and ends with status 1 if a line is missed. identity has a core of its own; PostgreSQL,
Valkey and this load share the other.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from statistics import quantiles
from typing import Any

import asyncpg
import grpc

from aiaas.identity.v1 import api_key_service_pb2 as api_keys_pb2
from aiaas.identity.v1 import organization_service_pb2 as organizations_pb2
from aiaas.identity.v1 import user_service_pb2 as users_pb2
from aiaas.identity.v1.api_key_service_pb2_grpc import ApiKeyServiceStub
from aiaas.identity.v1.auth_service_pb2 import AuthenticateRequest
from aiaas.identity.v1.auth_service_pb2_grpc import AuthServiceStub
from aiaas.identity.v1.organization_service_pb2_grpc import OrganizationServiceStub
from aiaas.identity.v1.user_service_pb2_grpc import UserServiceStub
from deploy.local.ports import free_port
from deploy.local.servers import HOST, Postgres, Valkey
from deploy.local.state import State
from deploy.local.supervisor import Supervisor
from mesh.process import spare_collector
from tests.load.native import CHECKOUT, LoadError, pin
from tests.load.population import Population, populate
from tests.load.targets import TARGET_CORE, take_core
from tests.load.verdict import Verdict

ORGANIZATIONS, USERS, API_KEYS = 20_000, 200_000, 500_000
AUTHENTICATE_PER_S, AUTHENTICATE_S, MOST_AUTHENTICATE_P99_MS = 500, 40, 5.0
CHANGES_PER_S, CHANGES_S, MOST_CHANGE_P99_MS = 20, 30, 500.0
PAGE_SIZE, MOST_PAGE_MS = 100, 100.0
_WARM_S = 5
_START_S = 30.0


@dataclass(frozen=True)
class Calls:
    """identity as its administrator calls it."""

    auth: AuthServiceStub
    organizations: OrganizationServiceStub
    users: UserServiceStub
    api_keys: ApiKeyServiceStub
    target: str
    metadata: tuple[tuple[str, str], ...]

    async def ask(self, method: Any, request: Any) -> Any:
        """The answer to a call of the administrator's."""
        return await method(request, metadata=self.metadata, timeout=10)


@asynccontextmanager
async def running_identity(state: State, postgres: Postgres, valkey: Valkey) -> AsyncIterator[Calls]:
    """identity as a process on TARGET_CORE, over a database that is migrated already."""
    port = free_port()
    environment = identity_environment(postgres, valkey) | {
        "AIAAS_IDENTITY_GRPC_ADDRESS": f"{HOST}:{port}",
        "AIAAS_IDENTITY_OPS_ADDRESS": f"{HOST}:{free_port()}",
    }
    made = json.loads(run(environment, "bootstrap"))
    with (state.root / "identity.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "identity", env=environment, cwd=CHECKOUT, stderr=log
        )
    try:
        pin(process.pid, TARGET_CORE)
        async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            async with asyncio.timeout(_START_S):
                await channel.channel_ready()
            yield Calls(
                AuthServiceStub(channel),
                OrganizationServiceStub(channel),
                UserServiceStub(channel),
                ApiKeyServiceStub(channel),
                f"{HOST}:{port}",
                (("authorization", f"Bearer {made['secret']}"),),
            )
    finally:
        process.terminate()
        await process.wait()


def identity_environment(postgres: Postgres, valkey: Valkey) -> dict[str, str]:
    key = base64.b64encode(os.urandom(32)).decode()
    return os.environ | {
        "AIAAS_IDENTITY_DATABASE_URL": postgres.url("identity"),
        "AIAAS_IDENTITY_REDIS_URL": valkey.url,
        "AIAAS_IDENTITY_AMQP_URL": "amqp://127.0.0.1:1/",
        "AIAAS_IDENTITY_AUDIT_KEY": key,
        "AIAAS_IDENTITY_SECRET_KEY": key,
        "AIAAS_IDENTITY_PUBLIC_URL": "https://platform.example",
    }


def run(environment: dict[str, str], *arguments: str, service: str = "identity") -> str:
    """What a command of a service prints."""
    command = [sys.executable, "-m", service, *arguments]
    return subprocess.run(command, env=environment, cwd=CHECKOUT, check=True, stdout=subprocess.PIPE, text=True).stdout


@dataclass
class Times:
    """Of each call but those of the first seconds, in ms: the time it took from when it was due, and how late this load
    sent it, which is a part of that."""

    took: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)


async def on_schedule(per_s: int, duration_s: int, call: Callable[[int], Awaitable[None]]) -> Times:
    """Make calls at a fixed rate, however long each takes."""
    times = Times()

    async def one(number: int, due: float) -> None:
        sent = time.perf_counter()
        await call(number)
        if number >= per_s * _WARM_S:
            times.took.append((time.perf_counter() - due) * 1000)
            times.late.append((sent - due) * 1000)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as calls:
        for number in range(per_s * (_WARM_S + duration_s)):
            due = began + number / per_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            calls.create_task(one(number, due))
    return times


async def judges_keys(identity: Calls, population: Population, verdict: Verdict) -> None:
    """Each call is of a key that nobody has asked for yet."""

    async def call(number: int) -> None:
        await identity.auth.Authenticate(AuthenticateRequest(credential=population.secrets[number]), timeout=10)

    times = await on_schedule(AUTHENTICATE_PER_S, AUTHENTICATE_S, call)
    _report(verdict, f"Authenticate, {AUTHENTICATE_PER_S}/s, nothing cached", times, MOST_AUTHENTICATE_P99_MS)


async def changes_things(identity: Calls, population: Population, random: Random, verdict: Verdict) -> None:
    """People, keys and organizations come, change and go, each change with its audit entry."""

    async def key_comes_and_goes(organization_id: str) -> None:
        wanted = api_keys_pb2.ApiKey(display_name="New", scopes=["inference.create"])
        made = await identity.ask(
            identity.api_keys.CreateApiKey,
            api_keys_pb2.CreateApiKeyRequest(organization_id=organization_id, api_key=wanted),
        )
        await identity.ask(
            identity.api_keys.RevokeApiKey,
            api_keys_pb2.RevokeApiKeyRequest(organization_id=organization_id, api_key_id=made.api_key.api_key_id),
        )

    async def user_comes(organization_id: str) -> None:
        wanted = users_pb2.User(email=f"{random.getrandbits(64):x}@example.com", role_ids=["developer"])
        await identity.ask(
            identity.users.CreateUser, users_pb2.CreateUserRequest(organization_id=organization_id, user=wanted)
        )

    async def organization_is_renamed(organization_id: str) -> None:
        named = organizations_pb2.Organization(display_name=f"{random.getrandbits(64):x}")
        await identity.ask(
            identity.organizations.UpdateOrganization,
            organizations_pb2.UpdateOrganizationRequest(organization_id=organization_id, organization=named),
        )

    kinds = (key_comes_and_goes, user_comes, organization_is_renamed)

    async def call(number: int) -> None:
        big = number % 2 == 0
        organization_id = population.big_organization_id if big else random.choice(population.organization_ids)
        await kinds[number % len(kinds)](organization_id)

    times = await on_schedule(CHANGES_PER_S, CHANGES_S, call)
    _report(verdict, f"changes, {CHANGES_PER_S}/s, half of them in one organization", times, MOST_CHANGE_P99_MS)


async def turns_pages(identity: Calls, population: Population, verdict: Verdict) -> None:
    """Every page of the longest lists, one after the other to the end."""
    big = population.big_organization_id
    lists: dict[str, Callable[[str], Awaitable[tuple[int, str]]]] = {}

    async def organizations(token: str) -> tuple[int, str]:
        request = organizations_pb2.ListOrganizationsRequest(page_size=PAGE_SIZE, page_token=token)
        page = await identity.ask(identity.organizations.ListOrganizations, request)
        return len(page.organizations), page.next_page_token

    async def users(token: str) -> tuple[int, str]:
        request = users_pb2.ListUsersRequest(organization_id=big, page_size=PAGE_SIZE, page_token=token)
        page = await identity.ask(identity.users.ListUsers, request)
        return len(page.users), page.next_page_token

    async def api_keys(token: str) -> tuple[int, str]:
        request = api_keys_pb2.ListApiKeysRequest(organization_id=big, page_size=PAGE_SIZE, page_token=token)
        page = await identity.ask(identity.api_keys.ListApiKeys, request)
        return len(page.api_keys), page.next_page_token

    lists = {"organizations": organizations, "people of one": users, "keys of one": api_keys}
    for name, turn in lists.items():
        took, found, token = [], 0, ""
        while True:
            began = time.perf_counter()
            count, token = await turn(token)
            took.append((time.perf_counter() - began) * 1000)
            found += count
            if not token:
                break
        last = took[-len(took) // 10 :]
        text = f"{found:,} in {len(took)} pages: worst {max(took):.1f} ms, of the last tenth {max(last):.1f} ms"
        verdict.line(f"pages of {PAGE_SIZE} {name}", text, max(took) < MOST_PAGE_MS)


def _report(verdict: Verdict, what: str, times: Times, most_ms: float) -> None:
    cuts, late = quantiles(times.took, n=100), quantiles(times.late, n=100)
    text = (
        f"{len(times.took):,} calls: p50 {cuts[49]:.2f} ms, p99 {cuts[98]:.2f} ms, worst {max(times.took):.1f} ms;"
        f" of that sent late: p50 {late[49]:.2f} ms, p99 {late[98]:.2f} ms"
    )
    verdict.line(what, text, cuts[98] <= most_ms)


async def measure(organizations: int, users: int, api_keys: int, seed: int, verdict: Verdict) -> None:
    """Everything, on servers of its own."""
    random = Random(seed)
    with State.temporary() as state:
        postgres, valkey = Postgres(state), Valkey(state)
        async with Supervisor(state) as supervisor:
            await postgres.start(supervisor)
            await valkey.start(supervisor)
            await postgres.database("identity")
            await asyncio.to_thread(run, identity_environment(postgres, valkey), "migrate")
            connection = await asyncpg.connect(postgres.admin_url.removesuffix("postgres") + "identity")
            began = time.perf_counter()
            try:
                population = await populate(
                    connection,
                    random,
                    organizations=organizations,
                    users=users,
                    api_keys=api_keys,
                    sampled=AUTHENTICATE_PER_S * (_WARM_S + AUTHENTICATE_S),
                )
                size = await connection.fetchval("SELECT pg_database_size('identity')")
            finally:
                await connection.close()
            verdict.line("loaded", f"in {time.perf_counter() - began:.0f} s, {size / 2**20:.0f} MiB")
            # What was loaded stays; a look at all of it would hold up the load by more than the bar.
            spare_collector()
            async with running_identity(state, postgres, valkey) as identity:
                await judges_keys(identity, population, verdict)
                await changes_things(identity, population, random, verdict)
                await turns_pages(identity, population, verdict)


def main() -> None:
    """Raises SystemExit: 0 when every line is met, 1 when one is missed, 2 when it cannot run."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.load.identity", description="identity with very many rows; docs/benchmark.md."
    )
    for name, default in (("organizations", ORGANIZATIONS), ("users", USERS), ("api_keys", API_KEYS), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=os.environ.get(name.upper()) or default)
    arguments = parser.parse_args()
    verdict = Verdict()
    try:
        take_core()
        print(
            f"| {arguments.organizations:,} organizations, {arguments.users:,} people, {arguments.api_keys:,} keys"
            " | found | |\n| --- | --- | --- |",
            flush=True,
        )
        asyncio.run(measure(arguments.organizations, arguments.users, arguments.api_keys, arguments.seed, verdict))
    except LoadError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if verdict.met else 1)


if __name__ == "__main__":
    main()
