"""checkov finds nothing in the chart but what deploy/checkov.yaml leaves out, with a reason for each."""

import json
import os
import subprocess
from pathlib import Path

import yaml

from tests.deploy.tools import CHECKOV, ROOT, render
from tests.deploy.values import EVERYTHING

EXCEPTIONS = ROOT / "deploy" / "checkov.yaml"
DIGEST = "@sha256:" + "0" * 64


def failed(manifests: Path, config: Path) -> set[str]:
    done = subprocess.run(
        [CHECKOV, "--config-file", str(config), "--file", str(manifests), "--output", "json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "CHECKOV_RUN_SCA_PACKAGE_SCAN": "false"},
    )
    document = json.loads(done.stdout)
    assert document["summary"]["passed"] > 100
    assert document["summary"]["parsing_errors"] == 0
    return {check["check_id"] for check in document["results"]["failed_checks"]}


def test_nothing_is_found_but_what_is_explained(tmp_path: Path) -> None:
    values = {
        **EVERYTHING,
        "engineDefaults": {"image": f"vllm/vllm-openai{DIGEST}"},
        "backup": {"enabled": True, "image": f"postgres{DIGEST}"},
    }
    manifests = tmp_path / "manifests.yaml"
    manifests.write_text(yaml.safe_dump_all(render(values, tmp_path)))
    assert failed(manifests, EXCEPTIONS) == set()

    config = yaml.safe_load(EXCEPTIONS.read_text())
    excepted = set(config.pop("skip-check"))
    without = tmp_path / "without.yaml"
    without.write_text(yaml.safe_dump(config))
    assert failed(manifests, without) == excepted, "an exception that nothing needs"


def test_every_exception_has_its_reason() -> None:
    lines = [line.strip() for line in EXCEPTIONS.read_text().splitlines()]
    for number, line in enumerate(lines):
        if line.startswith("- CKV"):
            assert lines[number - 1].startswith(("#", "- CKV")), line
