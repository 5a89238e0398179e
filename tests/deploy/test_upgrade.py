"""The version before this one beside this one, under load: an upgrade service by service, and back again on the new
schema. Nobody is refused, no answer is cut, and each request is counted once."""

import signal
import subprocess
import sys
from pathlib import Path

from tests.conftest import Servers
from tests.deploy.versions import code_of, installed, previous_version, under_load
from tests.load.guard import tree_of
from tests.load.native import CHECKOUT

ORDER = ("identity", "router", "analytics", "edge")
REPLICAS = dict.fromkeys(ORDER, 2)


def test_each_version_runs_its_own_code(tmp_path: Path) -> None:
    with tree_of(previous_version()) as previous:
        for tree in (previous, CHECKOUT):
            done = subprocess.run(
                [sys.executable, "-c", "import aiaas, router; print(router.__file__, *aiaas.__path__)"],
                env={"PYTHONPATH": code_of(tree)},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=True,
            )
            code, contracts, *_ = done.stdout.split()
            assert code == str(tree / "router" / "__init__.py")
            assert contracts == str(tree / "gen" / "python" / "aiaas")


async def test_upgrade_and_rollback_under_load_lose_nothing(servers: Servers, amqp_url: str, tmp_path: Path) -> None:
    with tree_of(previous_version()) as previous:
        async with installed(servers, previous, REPLICAS, tmp_path) as platform, under_load(platform) as load:
            await platform.migrate(CHECKOUT)
            await load.turned()
            for tree in (CHECKOUT, previous):
                for service in ORDER:
                    await platform.replace(tree, service)
                    await load.turned()
                    assert load.faults() == [], (tree, service)
            await load.ended()
            assert load.faults() == []
            assert await platform.disagreements(load.client.seen) == []


async def test_router_that_does_not_drain_is_noticed(servers: Servers, amqp_url: str, tmp_path: Path) -> None:
    counts = {"identity": 1, "router": 2, "analytics": 1, "edge": 1}
    async with installed(servers, CHECKOUT, counts, tmp_path) as platform, under_load(platform) as load:
        assert load.faults() == []
        await load.streaming()
        await platform.stop("router", signal.SIGKILL)
        await load.turned()
        assert load.faults()
