"""Reads the declared verdicts; it never makes one."""

from pathlib import Path

VERDICTS: dict[str, list[str]] = {
    name: who.split()
    for name, who in (
        line.split(": ")
        for line in (Path(__file__).parent / "verdicts.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
}
"""Who is let in, by the name of an RPC ("BudgetService/GetBudget") or a route ("GET /v1/models")."""
