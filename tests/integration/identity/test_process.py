"""identity as a process: bootstrap, outages, announcements, readiness."""

import asyncio
import json
import os
import socket
import sys
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import httpx
import pytest
from redis.asyncio import Redis

from aiaas.identity.v1 import api_key_service_pb2, organization_service_pb2, role_service_pb2
from aiaas.identity.v1.auth_service_pb2 import WatchRevocationsResponse
from identity.roles import ALL_PERMISSIONS
from mesh.errors import PlatformError, Reason
from mesh.migrate import migrate
from mesh.revocations import CHANNEL
from tests.doubles.tcp_gate import TcpGate
from tests.integration.identity.harness import (
    AUDIT_KEY,
    NO_BROKER,
    SECRET_KEY,
    Identity,
    bootstrapped,
    running_identity,
)

MIGRATIONS = sorted(
    file.name for file in resources.files("identity.migrations").iterdir() if file.name.endswith(".sql")
)


async def run(environment: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "identity", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], **environment},
    )
    output, errors = await process.communicate()
    return process.returncode or 0, output.decode(), errors.decode()


async def test_bootstrap_makes_the_administrator_once(postgres_url: str) -> None:
    environment = {
        "AIAAS_IDENTITY_DATABASE_URL": postgres_url,
        "AIAAS_IDENTITY_AMQP_URL": NO_BROKER,
        "AIAAS_IDENTITY_AUDIT_KEY": AUDIT_KEY,
        "AIAAS_IDENTITY_SECRET_KEY": SECRET_KEY,
    }
    status, output, _ = await run(environment, "migrate")
    assert (status, output) == (0, "".join(f"applied {name}\n" for name in MIGRATIONS))
    status, output, errors = await run(environment, "bootstrap", "--display-name", "Our platform")
    first = json.loads(output)
    assert status == 0
    assert first["organization_id"] == "org_platform"
    assert first["secret"].startswith("aias_")
    assert first["secret"] not in errors
    status, output, _ = await run(environment, "bootstrap", "--display-name", "Our platform")
    assert (status, json.loads(output)) == (0, first | {"secret": None})


async def test_bootstraps_at_the_same_time_make_one_administrator(database_url: str) -> None:
    made = await asyncio.gather(*(bootstrapped(database_url) for _ in range(4)))
    assert len({(one.service_account_id, one.api_key_id) for one in made}) == 1
    assert sorted(one.secret is None for one in made) == [False, True, True, True]


async def test_rotation_makes_a_new_key_and_ends_the_old_one(identity: Identity, database_url: str) -> None:
    rotated = await bootstrapped(database_url, rotate=True)
    assert rotated.secret is not None
    assert rotated.service_account_id == identity.platform.service_account_id
    assert set((await identity.authenticate(rotated.secret)).permissions) == ALL_PERMISSIONS
    assert await identity.is_refused(identity.admin)


async def test_wrong_configuration_is_named_and_its_secret_is_not() -> None:
    status, _, errors = await run({"AIAAS_IDENTITY_OPS_ADDRESS": "nowhere"}, "check-config")
    assert status == 2
    assert "AIAAS_IDENTITY_DATABASE_URL" in errors
    assert "AIAAS_IDENTITY_AMQP_URL" in errors
    assert "AIAAS_IDENTITY_AUDIT_KEY" in errors
    assert "AIAAS_IDENTITY_SECRET_KEY" in errors
    assert "AIAAS_IDENTITY_OPS_ADDRESS" in errors
    status, _, errors = await run({}, "bootstrap")
    assert status == 2
    assert "AIAAS_IDENTITY_DATABASE_URL" in errors


async def test_bootstrap_without_a_database_says_so() -> None:
    status, output, errors = await run(
        {
            "AIAAS_IDENTITY_DATABASE_URL": "postgresql://app:hidden-password@127.0.0.1:1/identity",
            "AIAAS_IDENTITY_AMQP_URL": NO_BROKER,
            "AIAAS_IDENTITY_AUDIT_KEY": AUDIT_KEY,
            "AIAAS_IDENTITY_SECRET_KEY": SECRET_KEY,
        },
        "bootstrap",
    )
    assert (status, output) == (1, "")
    assert "unavailable" in errors
    assert "hidden-password" not in errors
    assert "Traceback" not in errors


async def test_process_serves_until_it_is_told_to_stop(database_url: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        ops_address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "identity", "serve"),
        env={
            "PATH": os.environ["PATH"],
            "AIAAS_IDENTITY_GRPC_ADDRESS": f"unix:{tmp_path}/identity.sock",
            "AIAAS_IDENTITY_OPS_ADDRESS": ops_address,
            "AIAAS_IDENTITY_DATABASE_URL": database_url,
            "AIAAS_IDENTITY_AMQP_URL": NO_BROKER,
            "AIAAS_IDENTITY_AUDIT_KEY": AUDIT_KEY,
            "AIAAS_IDENTITY_SECRET_KEY": SECRET_KEY,
        },
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(20), httpx.AsyncClient(trust_env=False) as client:
            while True:
                assert process.returncode is None
                try:
                    if (await client.get(f"http://{ops_address}/ready")).json() == {
                        "status": "ready",
                        "checks": {"database": "ok"},
                    }:
                        break
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
            async with grpc.aio.insecure_channel(f"unix:{tmp_path}/identity.sock") as channel:
                await channel.channel_ready()
            process.terminate()
            _, errors = await process.communicate()
        assert await process.wait() == 0
        assert "Traceback" not in errors.decode()
    finally:
        if process.returncode is None:
            process.kill()


async def test_outage_of_the_database_is_unavailable_and_never_unauthenticated(
    database_url: str, tmp_path: Path
) -> None:
    address = urlsplit(database_url)
    assert address.hostname is not None
    assert address.port is not None
    async with (
        TcpGate(address.hostname, address.port) as gate,
        running_identity(database_url.replace(f":{address.port}/", f":{gate.port}/"), tmp_path) as identity,
    ):
        organization_id = await identity.organization()
        made = await identity.key(organization_id)
        await gate.shut()
        for secret in (made.secret, identity.admin):
            with pytest.raises(PlatformError) as raised:
                await identity.authenticate(secret)
            assert raised.value.reason is Reason.AUTH_UNAVAILABLE
        assert await identity.is_refused("aias_garbage")
        for method, request in (
            (
                identity.organizations.GetOrganization,
                organization_service_pb2.GetOrganizationRequest(organization_id=organization_id),
            ),
            (
                identity.api_keys.ListApiKeys,
                api_key_service_pb2.ListApiKeysRequest(organization_id=organization_id),
            ),
        ):
            error = await identity.refused(method, request)
            assert error.entry.http == 503
        await gate.open()
        async with asyncio.timeout(10):
            while True:
                if not await is_away(identity, made.secret):
                    break
                await asyncio.sleep(0.05)
        assert (await identity.authenticate(made.secret)).organization_id == organization_id


async def is_away(identity: Identity, secret: str) -> bool:
    """Whether nobody can judge a credential at the moment."""
    try:
        await identity.authenticate(secret)
    except PlatformError as error:
        if error.reason is Reason.AUTH_UNAVAILABLE:
            return True
        raise
    return False


async def test_revocations_are_announced_after_they_are_committed(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    listener: Redis = Redis.from_url(redis_url)
    async with running_identity(database_url, tmp_path, redis_url) as identity, listener, listener.pubsub() as channel:
        await channel.subscribe(CHANNEL)
        await channel.get_message(timeout=5)
        organization_id = await identity.organization()
        made = await identity.key(organization_id)
        ids = {"organization_id": organization_id, "api_key_id": made.api_key.api_key_id}
        await identity.call(identity.api_keys.RevokeApiKey, api_key_service_pb2.RevokeApiKeyRequest(**ids))
        message = await channel.get_message(timeout=5)
        revocation = WatchRevocationsResponse.FromString(message["data"])
        assert revocation.api_key_id == made.api_key.api_key_id
        assert await identity.is_refused(made.secret)
        suspend = organization_service_pb2.SuspendOrganizationRequest(organization_id=organization_id)
        await identity.call(identity.organizations.SuspendOrganization, suspend)
        message = await channel.get_message(timeout=5)
        later = WatchRevocationsResponse.FromString(message["data"])
        assert later.organization_id == organization_id
        assert later.revision > revocation.revision


async def test_changed_role_is_announced_for_its_organization(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    listener: Redis = Redis.from_url(redis_url)
    async with running_identity(database_url, tmp_path, redis_url) as identity, listener, listener.pubsub() as channel:
        await channel.subscribe(CHANNEL)
        await channel.get_message(timeout=5)
        organization_id = await identity.organization()
        wanted = role_service_pb2.Role(display_name="Reader", permissions=["usage.query", "users.get"])
        create = role_service_pb2.CreateRoleRequest(organization_id=organization_id, role=wanted)
        role = (await identity.call(identity.roles.CreateRole, create)).role
        narrowed = role_service_pb2.UpdateRoleRequest(organization_id=organization_id, role_id=role.role_id)
        narrowed.role.permissions.append("users.get")
        await identity.call(identity.roles.UpdateRole, narrowed)
        message = await channel.get_message(timeout=5)
        revocation = WatchRevocationsResponse.FromString(message["data"])
        assert revocation.organization_id == organization_id


async def test_revocation_without_redis_is_a_revocation_all_the_same(database_url: str, tmp_path: Path) -> None:
    async with running_identity(database_url, tmp_path, "redis://127.0.0.1:1") as identity:
        organization_id = await identity.organization()
        made = await identity.key(organization_id)
        ids = {"organization_id": organization_id, "api_key_id": made.api_key.api_key_id}
        await identity.call(identity.api_keys.RevokeApiKey, api_key_service_pb2.RevokeApiKeyRequest(**ids))
        assert await identity.is_refused(made.secret)


async def test_migrations_apply_once(postgres_url: str) -> None:
    assert await migrate(postgres_url, "identity.migrations") == MIGRATIONS
    assert await migrate(postgres_url, "identity.migrations") == []
