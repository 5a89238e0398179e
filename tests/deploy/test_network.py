"""The network policies allow the arrows of network.yaml, all of them and nothing else; every pair and port is asked."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.drawing import drawing
from tests.deploy.tools import CHART, NAMESPACE, ROOT, Manifest, of_kind, one, pod_specs, pod_templates, render
from tests.deploy.values import APART, EVERYTHING, PEERS

TABLE = yaml.safe_load((CHART / "network.yaml").read_text())
DNS_PORT = 53


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return render({**EVERYTHING, "network": APART}, tmp_path_factory.mktemp("values"))


def labels_of(manifests: list[Manifest]) -> dict[str, dict[str, str]]:
    """The labels of every pod of the release, by component."""
    labels = [template["metadata"]["labels"] for template in pod_templates(manifests).values()]
    return {of["app.kubernetes.io/component"]: of for of in labels}


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "the test knows no other selector"
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def is_one_of(places: list[dict[str, Any]], other: Any) -> bool:
    """Whether a pod (namespace, labels) or an address is among NetworkPolicyPeers."""
    import ipaddress

    for place in places:
        if "ipBlock" in place:
            if isinstance(other, str):
                address = ipaddress.ip_address(other)
                block = place["ipBlock"]
                if address in ipaddress.ip_network(block["cidr"]) and not any(
                    address in ipaddress.ip_network(cidr) for cidr in block.get("except", [])
                ):
                    return True
        elif not isinstance(other, str):
            namespace, labels = other
            there = (
                selects(place["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
                if "namespaceSelector" in place
                else namespace == NAMESPACE
            )
            if there and selects(place.get("podSelector", {}), labels):
                return True
    return False


def allows(policies: list[Manifest], way: str, pod: dict[str, str], other: Any, port: int, protocol: str) -> bool:
    """What the Kubernetes API says that policies do: the union of those that select the pod."""
    bound = [policy["spec"] for policy in policies if selects(policy["spec"]["podSelector"], pod)]
    bound = [spec for spec in bound if way.title() in spec["policyTypes"]]
    if not bound:
        return True
    key = "from" if way == "ingress" else "to"
    return any(
        {"protocol": protocol, "port": port} in rule["ports"] and is_one_of(rule[key], other)
        for spec in bound
        for rule in spec.get(way) or []
    )


def passes(manifests: list[Manifest], sender: str, receiver: str, port: int, protocol: str = "TCP") -> bool:
    policies = of_kind(manifests, "NetworkPolicy")
    pods = labels_of(manifests)

    def place(name: str) -> Any:
        return (NAMESPACE, pods[name]) if name in pods else PEERS[name]

    leaves = sender not in pods or allows(policies, "egress", pods[sender], place(receiver), port, protocol)
    enters = receiver not in pods or allows(policies, "ingress", pods[receiver], place(sender), port, protocol)
    return leaves and enters


def test_every_pair_of_pods_and_peers_on_every_port(manifests: list[Manifest]) -> None:
    drawn = {(arrow["from"], arrow["to"], port) for arrow in TABLE["arrows"] for port in arrow["ports"]}
    ports = {port for _, _, port in drawn} | {22, 80, 7000, 9090}
    pods = labels_of(manifests)
    assert set(pods) == set(TABLE["pods"])
    asked = 0
    for sender, receiver in itertools.product((*pods, *PEERS), repeat=2):
        if sender not in pods and receiver not in pods:
            continue
        for port in ports:
            asked += 1
            # A name of the mail server is one of the internet's as well, where nobody says otherwise.
            expected = (sender, receiver, port) in drawn
            assert passes(manifests, sender, receiver, port) is expected, f"{sender} to {receiver}:{port}"
        for protocol in ("TCP", "UDP"):
            expected = sender in pods and receiver == "dns"
            assert passes(manifests, sender, receiver, DNS_PORT, protocol) is expected
    assert asked > 3_000


def test_arrows_lead_to_ports_that_are_listened_on(manifests: list[Manifest]) -> None:
    listening = {
        spec["containers"][0]["name"]: {port["containerPort"] for port in spec["containers"][0].get("ports", [])}
        for spec in pod_specs(manifests).values()
    }
    reached: dict[str, set[int]] = {name: set() for name in listening}
    for arrow in TABLE["arrows"]:
        if arrow["to"] in TABLE["pods"]:
            reached[arrow["to"]] |= set(arrow["ports"])
    assert reached == listening


def test_all_pods_of_the_namespace_are_denied_everything_first(manifests: list[Manifest]) -> None:
    deny = one(manifests, "NetworkPolicy", "aiaas-default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_a_managed_database_may_have_a_port_of_its_own(tmp_path: Path) -> None:
    peer = {"at": [{"ipBlock": {"cidr": "192.0.2.7/32"}}], "port": 26555}
    rendered = render({"network": {"policies": True, "peers": {"postgres": peer}}}, tmp_path)
    egress = one(rendered, "NetworkPolicy", "aiaas-router")["spec"]["egress"]
    assert {"to": peer["at"], "ports": [{"protocol": "TCP", "port": 26555}]} in egress


def test_documentation_draws_the_table() -> None:
    assert drawing() in (ROOT / "docs" / "deployment.md").read_text()
