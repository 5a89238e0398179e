"""What the compiler of network policies makes of them means in the kernel what Kubernetes' documentation says."""

from collections.abc import Iterable

import pytest

from tests.deploy.netns import TCP, Connection, Network
from tests.deploy.nft_policies import Place, compiled
from tests.deploy.tools import Manifest

NEIGHBOURS = {
    "web": Place("10.244.0.1", "one", {"app": "web"}, {"http": 80}),
    "db": Place("10.244.0.2", "one", {"app": "db", "tier": "data"}, {"http": 81}),
    "far": Place("10.244.0.3", "two", {"app": "web"}),
    "near": Place("10.9.8.7"),
    "beside": Place("10.9.9.7"),
}
ALL = {80, 81, 82}
OPEN = {name: ALL for name in NEIGHBOURS if name != "web"}


def tried(network: Network) -> set[Connection]:
    """What gets through of everything from and to the pod "web"."""
    into = [connection for name in OPEN for connection in network.connections(name, ["web"])]
    return network.allowed([*into, *network.connections("web", OPEN)])


def by_label(key: str, operator: str, *values: str) -> Manifest:
    return {"matchExpressions": [{"key": key, "operator": operator, **({"values": values} if values else {})}]}


def on(names: Iterable[str], *ports: int) -> dict[str, set[int]]:
    return {name: set(ports) for name in names}


def entering(rule: Manifest) -> Manifest:
    return {"policyTypes": ["Ingress"], "ingress": [rule]}


def leaving(rule: Manifest) -> Manifest:
    return {"policyTypes": ["Egress"], "egress": [rule]}


# What a policy of the pod "web" says, by whom it is then reached and whom it reaches, on which ports.
MEANINGS: list[tuple[Manifest, dict[str, set[int]], dict[str, set[int]]]] = [
    ({}, {}, OPEN),
    ({"egress": []}, {}, {}),
    ({"policyTypes": ["Egress"]}, OPEN, {}),
    (entering({}), OPEN, OPEN),
    (entering({"from": [{"podSelector": {}}]}), {"db": ALL}, OPEN),
    (entering({"from": [{"podSelector": by_label("tier", "DoesNotExist")}]}), {}, OPEN),
    (entering({"from": [{"namespaceSelector": {}, "podSelector": by_label("app", "In", "web")}]}), {"far": ALL}, OPEN),
    (
        entering({"from": [{"namespaceSelector": by_label("kubernetes.io/metadata.name", "NotIn", "one")}]}),
        {"far": ALL},
        OPEN,
    ),
    (entering({"from": [{"podSelector": {}}, {"ipBlock": {"cidr": "10.9.8.7/32"}}]}), {"db": ALL, "near": ALL}, OPEN),
    (entering({"ports": [{"port": 80, "endPort": 81}]}), on(OPEN, 80, 81), OPEN),
    (entering({"ports": [{"port": "http"}]}), on(OPEN, 80), OPEN),
    (entering({"ports": [{"port": 80, "protocol": "UDP"}, {"protocol": "UDP"}]}), {}, OPEN),
    (leaving({}), OPEN, OPEN),
    (leaving({"to": [{"podSelector": by_label("tier", "Exists")}], "ports": [{"port": "http"}]}), OPEN, {"db": {81}}),
    (
        leaving({"ports": [{"port": "http"}, {"port": 82}]}),
        OPEN,
        on(OPEN, 82) | {"db": {81, 82}},
    ),
    (leaving({"to": [{"ipBlock": {"cidr": "10.9.0.0/16", "except": ["10.9.9.0/24"]}}]}), OPEN, {"near": ALL}),
    (leaving({"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"protocol": "TCP"}]}), OPEN, OPEN),
]


def test_policies_mean_what_kubernetes_says(root: None) -> None:
    with Network(NEIGHBOURS, ALL, []) as network:
        for said, reached_by, reaches in MEANINGS:
            spec = {"podSelector": {"matchLabels": {"app": "web"}}, **said}
            network.enforce(compiled([{"metadata": {"namespace": "one"}, "spec": spec}], NEIGHBOURS.values()))
            expected = {(name, "web", port, TCP) for name, ports in reached_by.items() for port in ports}
            expected |= {("web", name, port, TCP) for name, ports in reaches.items() for port in ports}
            assert tried(network) == expected, said


def test_rules_of_policies_add_up(root: None) -> None:
    specs = [
        entering({"from": [{"ipBlock": {"cidr": f"10.9.{part}.7/32"}}], "ports": [{"port": 80}]}) for part in (8, 9)
    ]
    policies = [{"metadata": {"namespace": "one"}, "spec": {"podSelector": {}, **spec}} for spec in specs]
    with Network(NEIGHBOURS, ALL, []) as network:
        network.enforce(compiled(policies, NEIGHBOURS.values()))
        into = {connection for connection in tried(network) if connection[1] == "web"}
    assert into == {("near", "web", 80, TCP), ("beside", "web", 80, TCP)}


@pytest.mark.parametrize(
    "spec",
    [
        {"podSelector": {}, "priority": 1},
        {"podSelector": {"matchFields": {}}},
        {"podSelector": {}, "ingress": [{"from": [{"serviceSelector": {}}]}]},
        {"podSelector": by_label("app", "Like", "w")},
    ],
)
def test_what_is_not_known_of_a_policy_is_refused(spec: Manifest) -> None:
    with pytest.raises(ValueError, match="no such"):
        compiled([{"metadata": {"namespace": "one"}, "spec": spec}], NEIGHBOURS.values())
