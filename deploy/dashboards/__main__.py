"""Writes the dashboards as Grafana imports them: `python -m deploy.dashboards FOLDER`; it never asks a Grafana."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.dashboards import identity, infrastructure, models, money, system, usage

DASHBOARDS = {
    "system": system.DASHBOARD,
    "usage": usage.DASHBOARD,
    "models": models.DASHBOARD,
    "infrastructure": infrastructure.DASHBOARD,
    "money": money.DASHBOARD,
    "identity": identity.DASHBOARD,
}


def documents() -> Mapping[str, dict[str, Any]]:
    """Every dashboard as a document, by its name."""
    return {name: json.loads(JSONEncoder().encode(one.build())) for name, one in DASHBOARDS.items()}


def write(folder: Path) -> None:
    """Write each to NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in documents().items():
        text = json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True)
        (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
