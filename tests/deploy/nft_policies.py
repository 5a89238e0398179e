"""Compiles NetworkPolicy manifests into rules of nftables, as the Kubernetes API says what they mean; it never reads
where they came from, and refuses what it does not know.

The rules belong where pods' packets are routed: what one of two pods may not send, or the other not receive, is
rejected (ICMP, administratively prohibited); answers to what was let through pass.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from tests.deploy.tools import Manifest

_NAME = "kubernetes.io/metadata.name"


@dataclass(frozen=True)
class Place:
    """A pod, with the ports that it names; or, without a namespace, an address outside of the cluster."""

    address: str
    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)


def compiled(policies: Iterable[Manifest], places: Iterable[Place]) -> str:
    """A ruleset for `nft -f` that takes the place of the one before. Policies name their namespace. Raises ValueError
    for what it does not know of a policy."""
    specs = [(policy["metadata"]["namespace"], _known(policy["spec"], _SPEC)) for policy in policies]
    places = list(places)
    chains, jumps = [], []
    for way, own in (("Egress", "saddr"), ("Ingress", "daddr")):
        verdicts = []
        for place in places:
            bound = [
                (namespace, spec)
                for namespace, spec in specs
                if namespace == place.namespace and selects(spec["podSelector"], place.labels) and way in _types(spec)
            ]
            if not bound:
                continue
            chain = f"{way.lower()}_{place.address.replace('.', '_')}"
            rules = [
                line
                for namespace, spec in bound
                for rule in spec.get(way.lower()) or []
                for line in _rules(rule, way, namespace, place, places)
            ]
            lines = [*(f"{rule} return" for rule in rules), "reject with icmp admin-prohibited"]
            chains.append(f"chain {chain} {{\n" + "\n".join(lines) + "\n}")
            verdicts.append(f"{place.address} : jump {chain}")
        if verdicts:
            jumps.append(f"ip {own} vmap {{ {', '.join(verdicts)} }}")
    hook = ["type filter hook forward priority filter; policy accept;", "ct state established,related accept", *jumps]
    base = "chain forward {\n" + "\n".join(hook) + "\n}"
    return "flush ruleset\ntable ip policies {\n" + "\n".join([*chains, base]) + "\n}\n"


def selects(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """Whether a label selector fits; an empty one fits everything."""
    _known(selector, {"matchLabels", "matchExpressions"})
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        _fits(expression, labels) for expression in selector.get("matchExpressions", [])
    )


_SPEC = {"podSelector", "policyTypes", "ingress", "egress"}


def _known(manifest: Manifest, names: set[str]) -> Manifest:
    if unknown := manifest.keys() - names:
        raise ValueError(f"no such fields of a policy: {', '.join(sorted(unknown))}")
    return manifest


def _types(spec: Manifest) -> list[str]:
    return list(spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])])


def _fits(expression: Manifest, labels: Mapping[str, str]) -> bool:
    value = labels.get(expression["key"])
    match expression["operator"]:
        case "In":
            return value in expression["values"]
        case "NotIn":
            return value not in expression["values"]
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case operator:
            raise ValueError(f"no such operator: {operator}")


def _rules(rule: Manifest, way: str, namespace: str, own: Place, places: list[Place]) -> Iterator[str]:
    """The matches of one rule: those of every port, for every kind of peer."""
    key, other = ("from", "saddr") if way == "Ingress" else ("to", "daddr")
    _known(rule, {key, "ports"})
    peers = rule.get(key) or []
    pods = [place for place in places if any(_is(peer, place, namespace) for peer in peers)]
    who = [*(_block(peer["ipBlock"], other) for peer in peers if "ipBlock" in peer), *_set(pods, other)]
    if not peers:
        who, pods = [""], places
    for port in rule.get("ports") or [{}]:
        _known(port, {"protocol", "port", "endPort"})
        protocol, number = port.get("protocol", "TCP").lower(), port.get("port")
        if isinstance(number, str):
            # It names a port of the pod that is connected to.
            for place in [own] if way == "Ingress" else pods:
                if number in place.ports:
                    ends = who if way == "Ingress" else _set([place], other)
                    yield from (f"{end} {protocol} dport {place.ports[number]}" for end in ends)
            continue
        match = f"{protocol} dport {number}" if number else f"meta l4proto {protocol}" if port else ""
        match += f"-{port['endPort']}" if "endPort" in port else ""
        yield from (f"{end} {match}" for end in who)


def _set(places: list[Place], side: str) -> list[str]:
    return [f"ip {side} {{ {', '.join(place.address for place in places)} }}"] if places else []


def _block(block: Manifest, side: str) -> str:
    _known(block, {"cidr", "except"})
    excepted = f" ip {side} != {{ {', '.join(block['except'])} }}" if block.get("except") else ""
    return f"ip {side} {block['cidr']}{excepted}"


def _is(peer: Manifest, place: Place, namespace: str) -> bool:
    """Whether a pod is among those of a NetworkPolicyPeer."""
    _known(peer, {"podSelector", "namespaceSelector", "ipBlock"})
    if "ipBlock" in peer or not place.namespace:
        return False
    there = (
        selects(peer["namespaceSelector"], {_NAME: place.namespace})
        if "namespaceSelector" in peer
        else place.namespace == namespace
    )
    return there and selects(peer.get("podSelector", {}), place.labels)
