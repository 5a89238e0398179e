"""Draws the network of a deployment from the table that its policies are rendered from; it never reads a policy.

python -m deploy.drawing    prints what docs/deployment.md holds
"""

from pathlib import Path

import yaml

_TABLE = Path(__file__).parent / "helm" / "aiaas" / "network.yaml"


def drawing() -> str:
    """A Mermaid graph of all arrows, and a table of why they are there."""
    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    lines = ["```mermaid", "flowchart LR"]
    lines += [f"  {_id(name)}[{name}]" for name in table["pods"]]
    lines += [f"  {_id(name)}([{name}])" for name in table["peers"]]
    for arrow in table["arrows"]:
        lines.append(f"  {_id(arrow['from'])} -->|{_ports(arrow)}| {_id(arrow['to'])}")
    lines += ["```", "", "| from | to | port | why |", "| --- | --- | --- | --- |"]
    lines += [f"| {arrow['from']} | {arrow['to']} | {_ports(arrow)} | {arrow['why']} |" for arrow in table["arrows"]]
    return "\n".join(lines) + "\n"


def _ports(arrow: dict[str, list[int]]) -> str:
    return ", ".join(str(port) for port in arrow["ports"])


def _id(name: str) -> str:
    return name.replace("-", "_")


if __name__ == "__main__":
    print(drawing(), end="")
