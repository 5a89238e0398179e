"""The network policies of the chart and of all environments, in force in this machine's kernel: nftables between
network namespaces lets through what docs/deployment.md draws and nothing else, and the real platform works over that.

Every pair of pods, and of a pod and a peer, is tried on every port.
"""

import asyncio
import copy
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from deploy.local.certificates import Authority
from deploy.local.servers import Postgres, RabbitMQ, Valkey
from deploy.local.state import State
from deploy.local.supervisor import Supervisor
from tests.deploy.netns import TCP, UDP, Connection, Network
from tests.deploy.nft_policies import Place, compiled, selects
from tests.deploy.node import Node
from tests.deploy.release import SERVICES, bootstrap, priced, secrets_of
from tests.deploy.test_environments import ENVIRONMENTS, values
from tests.deploy.tools import NAMESPACE, ROOT, Manifest, of_kind, one, pod_specs, pod_templates, render
from tests.deploy.values import APART, ENGINES, PEERS
from tests.doubles.scripted_backend import ScriptedBackend, chat_document

# One worker has all of it.
pytestmark = pytest.mark.xdist_group("network")

VALUES: dict[str, Any] = {
    "engines": ENGINES,
    "registration": {"existingSecret": "platform-key"},
    "backup": {"enabled": True},
    "ingress": {"grpc": {"enabled": True}},
    "network": APART,
}
COMPONENT = "app.kubernetes.io/component"
# What listens on them is not drawn: a shell, names of other protocols, Prometheus itself.
UNDRAWN_PORTS = {22, 80, 7000, 9090}
STORED = {"postgres": 5432, "redis": 6379, "rabbitmq": 5672}
# Where the chart's own values look for peers, the data servers are one namespace, and so are what watches; mail and
# storage are anywhere outside.
TOGETHER = {
    "data": ("postgres", "redis", "rabbitmq", "rabbitmq-management"),
    "monitoring": ("monitoring", "traces"),
    "internet": ("internet", "mail", "storage"),
}
SHARED_PEERS = {
    **{name: PEERS[name] for name in ("ingress", "monitoring", "dns", "internet", "stranger", "metadata", "neighbour")},
    "data": ("data", {"app": "postgres"}),
    "scheduler": ("kube-system", {"app": "scheduler"}),
}


def drawn() -> tuple[set[Connection], set[str]]:
    """What the documentation says may be, by the names of its drawing, and all of those."""
    text = (ROOT / "docs" / "deployment.md").read_text()
    pods = re.findall(r"^  \w+\[([\w-]+)\]$", text, re.MULTILINE)
    peers = re.findall(r"^  \w+\(\[([\w-]+)\]\)$", text, re.MULTILINE)
    rows = re.findall(r"^\| ([\w-]+) \| ([\w-]+) \| ([\d, ]+) \|", text, re.MULTILINE)
    assert "All pods may also ask the cluster's DNS." in text
    connections = {(sender, receiver, int(port), TCP) for sender, receiver, ports in rows for port in ports.split(",")}
    return connections | {(pod, "dns", 53, way) for pod in pods for way in (TCP, UDP)}, {*pods, *peers}


DRAWN, NAMES = drawn()
PORTS = {port for _, _, port, _ in DRAWN} | UNDRAWN_PORTS
# Where ingress.grpc is enabled, and no environment has it so.
GRPC_OF_CLIENTS = {arrow for arrow in DRAWN if arrow[0] == "ingress" and arrow[2] in (7021, 7023, 7025)}


def pods_of(namespace: str, manifests: list[Manifest]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Name, namespace and labels of a release's pods: two of whatever may have many, one of each job."""
    for name, template in pod_templates(manifests).items():
        kind, workload = name.split("/")
        for number in range(1 if kind.endswith("Job") else 2):
            yield f"{namespace}/{workload}-{number}", namespace, template["metadata"]["labels"]
    # Somebody else's, which is there as well.
    yield f"{namespace}/squatter", namespace, {"app": "x"}


def placed(releases: Mapping[str, list[Manifest]], peers: Mapping[str, Any]) -> dict[str, Place]:
    """All pods and peers, with addresses."""
    pods = [pod for namespace, manifests in releases.items() for pod in pods_of(namespace, manifests)]
    pods += [(name, *place) for name, place in peers.items() if not isinstance(place, str)]
    # Of another namespace, but labelled as an edge is.
    pods.append(("twin", "strangers", next(labels for _, _, labels in pods if labels.get(COMPONENT) == "edge")))
    places = {
        name: Place(f"10.244.0.{number}", namespace, labels) for number, (name, namespace, labels) in enumerate(pods, 1)
    }
    return places | {name: Place(address) for name, address in peers.items() if isinstance(address, str)}


def policies_of(releases: Mapping[str, list[Manifest]]) -> list[Manifest]:
    """All network policies, each with the namespace that it is installed in."""
    return [
        {**policy, "metadata": {**policy["metadata"], "namespace": namespace}}
        for namespace, manifests in releases.items()
        for policy in of_kind(manifests, "NetworkPolicy")
    ]


@dataclass
class Cluster:
    """Namespaces with pods and peers in them, what each is in the drawing, and the arrows that have to be there."""

    network: Network
    releases: dict[str, list[Manifest]]
    together: Mapping[str, Iterable[str]]
    arrows: set[Connection]

    def enforce(self, policies: list[Manifest]) -> None:
        self.network.enforce(compiled(policies, self.network.places.values()))

    def address(self, name: str) -> str:
        return self.network.places[name].address

    def drawn_as(self, name: str, release: str) -> Iterable[str]:
        """What a place is in the drawing of one release; nothing, where it is a stranger to it."""
        place = self.network.places[name]
        if place.namespace in self.releases:
            return [place.labels.get(COMPONENT, "")] if place.namespace == release else []
        return self.together.get(name, [name])

    def connections(self, names: Iterable[str] = ()) -> list[Connection]:
        """All that may be tried of these pods, or of all pods: from and to everybody, on every port."""
        places = self.network.places
        names = set(names) or {name for name in places if places[name].namespace in self.releases}
        return [
            connection
            for sender in places
            for connection in self.network.connections(sender, places if sender in names else names)
        ]

    def wrong(self, names: Iterable[str] = ()) -> set[Connection]:
        """Those that get through and are not drawn, or the other way round."""
        tried = self.connections(names)
        return self.network.allowed(tried) ^ {connection for connection in tried if self.of_drawing(connection)}

    def of_drawing(self, connection: Connection) -> set[Connection]:
        """What a connection is in the drawings."""
        sender, receiver, port, protocol = connection
        return {
            (first, second, port, protocol)
            for release in self.releases
            for first in self.drawn_as(sender, release)
            for second in self.drawn_as(receiver, release)
        } & self.arrows


@dataclass
class Platform:
    """The cluster of one release, whose services run."""

    cluster: Cluster
    policies: list[Manifest]
    base_url: str
    key: str
    engine: ScriptedBackend


@contextmanager
def stored(network: Network, name: str, make: Callable[[State], Postgres | Valkey | RabbitMQ]) -> Iterator[Any]:
    """Starts a data server in the namespace of its place; yields a function that waits for it and tells its address."""
    with (
        State.temporary() as state,
        network.namespaces[name].portal() as portal,
        portal.wrap_async_context_manager(Supervisor(state)) as supervisor,
    ):
        server = make(state)
        network.expose(name, STORED[name], server.port)

        async def start() -> None:
            if isinstance(server, Postgres):
                await server.prepare()
                admit_pods(state.root / "postgres" / "data" / "pg_hba.conf")
            await server.start(supervisor)

        started = portal.start_task_soon(start)

        def url(database: str = "") -> str:
            started.result()
            private = portal.call(server.database, database) if isinstance(server, Postgres) else server.url
            return private.replace(f"127.0.0.1:{server.port}", f"{network.places[name].address}:{STORED[name]}")

        yield url


def admit_pods(path: Path) -> None:
    """Lets PostgreSQL take what comes from pods."""
    path.write_text(f"{path.read_text()}host all all 10.244.0.0/16 scram-sha-256\n")


def pod_name(workload: str) -> str:
    return f"{NAMESPACE}/aiaas-{workload}-0"


@asynccontextmanager
async def serving(
    cluster: Cluster, manifests: list[Manifest], folder: Path, secrets: dict[str, dict[str, str]]
) -> AsyncIterator[str]:
    """The services of the chart, each in its namespace, migrated and with engines registered; yields the first key."""
    specs = pod_specs(manifests)
    secrets["aiaas-engines"] = one(manifests, "ConfigMap", "aiaas-engines")["data"]

    def prefix(workload: str) -> tuple[str, ...]:
        return cluster.network.namespaces[pod_name(workload)].prefix()

    async with Node(folder, secrets) as node:
        for service in SERVICES:
            node.name(f"aiaas-{service}.{NAMESPACE}.svc.cluster.local", cluster.address(pod_name(service)))
        for engine in ENGINES:
            host = f"aiaas-engine-{engine}-0.aiaas-engine-{engine}.{NAMESPACE}.svc.cluster.local"
            node.name(host, cluster.address(pod_name(f"engine-{engine}")))
        node.name("http://aiaas-edge", f"http://{cluster.address(pod_name('edge'))}:8080")
        jobs = [f"migrate-{service}" for service in ("identity", "router", "analytics")]
        migrations = [await node.start(job, specs[f"Job/aiaas-{job}"], prefix=prefix(job)) for job in jobs]
        for migration in migrations:
            assert await migration.ended() == 0, migration.log.read_text()
        pods = [
            await node.start(
                f"aiaas-{service}-0",
                specs[f"{'StatefulSet' if service == 'router' else 'Deployment'}/aiaas-{service}"],
                cluster.address(pod_name(service)),
                prefix(service),
            )
            for service in SERVICES
        ]
        await asyncio.gather(*(pod.started() for pod in pods))
        key = await bootstrap(node, specs, prefix("migrate-identity"))
        node.secret("platform-key", {"key": key})
        registration = await node.start("registration", specs["Job/aiaas-registration"], prefix=prefix("registration"))
        assert await registration.ended() == 0, registration.log.read_text()
        yield key


@pytest.fixture(scope="module")
def platform(root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Everything is started under the policies."""
    folder = tmp_path_factory.mktemp("network")
    manifests = render(VALUES, folder)
    releases = {NAMESPACE: manifests}
    policies = policies_of(releases)
    served = {
        pod_name(template["metadata"]["labels"][COMPONENT]): [
            port["containerPort"] for port in template["spec"]["containers"][0]["ports"]
        ]
        for template in pod_templates(manifests).values()
        if template["metadata"]["labels"][COMPONENT] in SERVICES
    }
    with ExitStack() as stack:
        network = stack.enter_context(Network(placed(releases, PEERS), PORTS, [53], served))
        cluster = Cluster(network, releases, {}, DRAWN)
        cluster.enforce(policies)
        postgres, redis, rabbitmq = (
            stack.enter_context(stored(network, name, make))
            for name, make in (("postgres", Postgres), ("redis", Valkey), ("rabbitmq", RabbitMQ))
        )
        portal = stack.enter_context(network.namespaces[pod_name("engine-smollm2")].portal())
        engine = stack.enter_context(portal.wrap_async_context_manager(ScriptedBackend(chat_document("Hello"))))
        network.expose(pod_name("engine-smollm2"), 8000, engine.port)
        urls = {service: postgres(service) for service in ("identity", "router", "analytics")}
        portal = stack.enter_context(network.node.portal())
        key = stack.enter_context(
            portal.wrap_async_context_manager(
                serving(cluster, manifests, folder, secrets_of(manifests, Authority.make(), urls, redis(), rabbitmq()))
            )
        )
        yield Platform(cluster, policies, f"http://{cluster.address(pod_name('edge'))}:8080", key, engine)


def test_platform_serves_over_what_is_drawn(platform: Platform) -> None:
    network = platform.cluster.network

    async def ask() -> None:
        headers = {"Authorization": f"Bearer {platform.key}"}
        async with aiohttp.ClientSession(platform.base_url, headers=headers) as session:
            await priced(session)

    async def scrape() -> None:
        async with aiohttp.ClientSession() as session:
            for service, port in (("edge", 8080), ("identity", 7011), ("router", 7013), ("analytics", 7015)):
                url = f"http://{platform.cluster.address(pod_name(service))}:{port}/metrics"
                async with session.get(url) as answer:
                    assert answer.status == 200, service

    platform.cluster.enforce(platform.policies)
    with network.namespaces["ingress"].portal() as portal:
        portal.call(ask)
    assert platform.engine.received[-1].headers["Authorization"] == "Bearer of-the-engine"
    with network.namespaces["monitoring"].portal() as portal:
        portal.call(scrape)
    with network.namespaces["stranger"].portal() as portal, pytest.raises(aiohttp.ClientConnectorError):
        portal.call(ask)


def test_what_is_drawn_gets_through_and_nothing_else(platform: Platform) -> None:
    cluster = platform.cluster
    cluster.enforce(platform.policies)
    assert cluster.wrong() == set()
    # Every arrow was gone along, and every name of the drawing is somebody here.
    assert {arrow for tried in cluster.connections() for arrow in cluster.of_drawing(tried)} == DRAWN
    assert {kind for name in cluster.network.places for kind in cluster.drawn_as(name, NAMESPACE)} >= NAMES


def test_without_policies_everything_gets_through(platform: Platform) -> None:
    platform.cluster.enforce([])
    tried = platform.cluster.connections()
    assert len(tried) > 20_000
    assert platform.cluster.network.allowed(tried) == set(tried)


def changes(policy: Manifest) -> Iterator[tuple[str, list[Manifest]]]:
    """Ways in which a policy may be wrong, and what is then in its place."""
    yield "left out", []
    # Pods' ports are guarded at both ends: to other pods, one end more of them gives nothing away.
    for way, at in (("ingress", ("from",)), ("egress", ("ports",)), ("egress", ("to", 0, "ipBlock", "except"))):
        for number, rule in enumerate(policy["spec"].get(way) or []):
            if way == "egress" and set(rule["to"][0]) == {"podSelector"}:
                continue
            wider = copy.deepcopy(policy)
            *path, last = at
            part = wider["spec"][way][number]
            for step in path:
                part = part[step] if isinstance(step, int) else part.get(step, {})
            if last in part:
                del part[last]
                yield f"{way} {number} without {last}", [wider]


def test_a_policy_that_is_left_out_or_widened_is_found_out(platform: Platform) -> None:
    cluster, unseen = platform.cluster, []
    for policy in platform.policies:
        others = [other for other in platform.policies if other is not policy]
        names = [
            name
            for name, place in cluster.network.places.items()
            if place.namespace == NAMESPACE and selects(policy["spec"]["podSelector"], place.labels)
        ]
        for change, instead in changes(policy):
            cluster.enforce([*others, *instead])
            if not cluster.wrong(names):
                unseen.append((policy["metadata"]["name"], change))
    assert not unseen


def test_environments_in_one_cluster_allow_what_is_drawn_and_never_meet(root: None, tmp_path: Path) -> None:
    releases = {f"aiaas-{environment}": render(values(environment), tmp_path) for environment in ENVIRONMENTS}
    with Network(placed(releases, SHARED_PEERS), PORTS, [53]) as network:
        cluster = Cluster(network, releases, TOGETHER, DRAWN - GRPC_OF_CLIENTS)
        cluster.enforce(policies_of(releases))
        assert len(cluster.connections()) > 40_000
        assert cluster.wrong() == set()
