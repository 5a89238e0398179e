"""The version before this one beside this one, under load: an upgrade service by service, and back again on the new
schema. Nobody is refused, no answer is cut, and each request is counted once."""

import signal
from pathlib import Path

from tests.conftest import Servers
from tests.deploy.versions import installed, previous_version, under_load
from tests.load.guard import tree_of
from tests.load.native import CHECKOUT

ORDER = ("identity", "router", "analytics", "edge")
REPLICAS = dict.fromkeys(ORDER, 2)


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
