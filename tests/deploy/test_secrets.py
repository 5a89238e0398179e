"""Secrets of a deployment: the example and the page name those that the chart asks for, and what the page says of
rotation holds on real servers."""

import re
import subprocess
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
import yaml
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError

from deploy.local.servers import Postgres, Valkey
from deploy.local.state import State
from deploy.local.supervisor import Supervisor
from identity.stores import open_database
from mesh.database import Database
from mesh.migrate import migrate
from tests.deploy.tools import ROOT, binary, pod_specs, render
from tests.deploy.values import EVERYTHING

PAGE = (ROOT / "docs" / "secrets.md").read_text()
Secrets = dict[str, set[str]]


@pytest.fixture
def wanted(tmp_path: Path) -> Secrets:
    """The keys of every secret that a pod of the chart reads a variable from."""
    found: Secrets = defaultdict(set)
    for spec in pod_specs(render(EVERYTHING, tmp_path)).values():
        for container in spec["containers"]:
            for variable in container.get("env", []):
                if source := variable.get("valueFrom", {}).get("secretKeyRef"):
                    found[source["name"]].add(source["key"])
    return dict(found)


def test_sealed_secrets_have_the_names_and_keys_of_the_chart(wanted: Secrets) -> None:
    folder = ROOT / "deploy" / "kustomize" / "sealed-secrets"
    done = subprocess.run(
        [binary("kubectl"), "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    sealed = list(yaml.safe_load_all(done.stdout))
    assert {one["kind"] for one in sealed} == {"SealedSecret"}
    assert {one["metadata"]["name"]: set(one["spec"]["encryptedData"]) for one in sealed} == wanted
    assert all(one["spec"]["template"]["metadata"]["name"] == one["metadata"]["name"] for one in sealed)
    # Nothing that could open is in Git.
    assert {text for one in sealed for text in one["spec"]["encryptedData"].values()} == {"AgREPLACE"}


def test_page_names_every_secret_and_its_rotation(wanted: Secrets) -> None:
    named: Secrets = defaultdict(set)
    for name, key in re.findall(r"^\| `([\w-]+)` \| `([\w-]+)` \| ", PAGE, re.MULTILINE):
        named[name].add(key)
    assert named == wanted


@pytest.fixture
async def supervisor() -> AsyncIterator[tuple[State, Supervisor]]:
    """For servers whose users are changed, which no other test may share."""
    with State.temporary() as state:
        async with Supervisor(state) as running:
            yield state, running


async def test_a_second_role_takes_over_a_database(supervisor: tuple[State, Supervisor]) -> None:
    postgres = Postgres(supervisor[0])
    await postgres.start(supervisor[1])
    (statements,) = re.findall(r"((?:    (?:CREATE|ALTER) ROLE router_2 .*\n)+)", PAGE)
    for service in ("identity", "router", "analytics"):
        former = await postgres.database(service)
        administrator = await asyncpg.connect(postgres.admin_url)
        await administrator.execute(statements.replace("router", service).replace("...", "new"))
        host = urlsplit(former).netloc.partition("@")[2]
        new = urlsplit(former)._replace(netloc=f"{service}_2:new@{host}").geturl()
        # What it makes belongs to the first, so either may be the next.
        await migrate(new, f"{service}.migrations")
        owners = "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'"
        connection = await asyncpg.connect(new)
        assert [row[0] for row in await connection.fetch(owners)] == [service]
        await connection.close()
        await administrator.execute(f'ALTER ROLE "{service}" PASSWORD NULL')
        await administrator.close()
        database = open_database(new) if service == "identity" else Database(new)
        works_as = await database.fetchval("SELECT current_user")
        await database.close()
        assert works_as == ("aiaas_identity" if service == "identity" else service)
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(former)


async def test_redis_takes_two_passwords_for_as_long_as_it_is_told(supervisor: tuple[State, Supervisor]) -> None:
    valkey = Valkey(supervisor[0])
    await valkey.start(supervisor[1])
    old = urlsplit(valkey.url).password or ""
    add, remove = re.findall(r"^    (ACL SETUSER default [><]\w+)", PAGE, re.MULTILINE)
    async with (
        Redis.from_url(valkey.url) as former,
        Redis.from_url(valkey.url.replace(old, "new")) as new,
    ):
        await former.execute_command(*add.replace("NEW", "new").split())  # type: ignore[no-untyped-call]
        assert await new.ping()
        assert await former.ping()
        await new.execute_command(*remove.replace("OLD", old).split())  # type: ignore[no-untyped-call]
        assert await new.ping()
    async with Redis.from_url(valkey.url) as refused:
        with pytest.raises(AuthenticationError):
            await refused.ping()
