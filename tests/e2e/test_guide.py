"""The guide for newcomers, line by line, as it stands in docs/guides: it works with the command line alone."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Platform

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "quickstart.md"
WITHIN_S = 240


def lines() -> list[str]:
    """The lines of the guide's sh blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def executed(commands: list[str], folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """What each line wrote, in one shell; fails with what the first line wrote that failed."""
    check = 'ended=$?; [ $ended -eq 0 ] || { echo; echo "::status $ended::"; exit 1; }'
    steps = "".join(f"printf '\\n::{number}::\\n'\n{line}\n{check}\n" for number, line in enumerate(commands))
    (folder / "guide.sh").write_text(steps)
    ran = subprocess.run(
        ["sh", str(folder / "guide.sh")],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    parts = re.split(r"^::(\d+)::\n", ran.stdout, flags=re.MULTILINE)[1:]
    wrote = {commands[int(number)]: text for number, text in zip(parts[::2], parts[1::2], strict=True)}
    last = list(wrote)[-1]
    assert ran.returncode == 0, f"{last}\n{wrote[last]}"
    assert len(wrote) == len(set(commands))
    return wrote


@pytest.mark.once
@pytest.mark.timeout(300)
def test_newcomer_gets_from_nothing_to_a_bill(platform: Platform, tmp_path: Path) -> None:
    commands = lines()
    for needed in (
        "orgs create",
        "invites create",
        "keys create",
        "budgets create",
        "backends create",
        " chat ",
        "csv",
    ):
        assert any(needed in line for line in commands), needed
    assert all("curl" not in line for line in commands)

    shim = tmp_path / "bin" / "aiaas"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m cli "$@"\n')
    shim.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AIAAS_")}
    environment["PATH"] = f"{shim.parent}:{environment['PATH']}"
    environment["AIAAS_STATE_DIR"] = str(platform.state)
    environment["AIAAS_CONFIG_DIR"] = str(tmp_path / "config")
    wrote = executed(commands, tmp_path, environment)

    key = (tmp_path / "acme.key").read_text().strip()
    everything = "".join(wrote.values())
    assert key.startswith("aias_")
    assert key not in everything
    assert platform.admin_key not in everything
    listed = next(text for line, text in wrote.items() if line == "aiaas users list")
    assert "ada@acme.example" in listed

    rows = list(csv.DictReader((tmp_path / "usage.csv").read_text().splitlines()))
    assert {row["model"] for row in rows} == {"smollm2"}
    assert {row["outcome"] for row in rows} == {"OUTCOME_SUCCEEDED"}
    assert sum(int(row["cost_micros"]) for row in rows) > 0
    exported = list(csv.DictReader((tmp_path / "export.csv").read_text().splitlines()))
    assert {row["request_id"] for row in exported} >= {row["request_id"] for row in rows}
    with httpx.Client(base_url=platform.base_url, trust_env=False) as client:
        models = client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert models.status_code == 200
