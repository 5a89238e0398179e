"""Alerts: each fires and stays silent where it should, names metrics that there are, and leads to its runbook."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.reference.__main__ import PACKAGES
from deploy.reference.sources import find_metrics
from tests.doubles.prometheus import MONITORING, ROOT, RULES, binary

RUNBOOKS = ROOT / "docs/runbooks.md"
# Of Prometheus itself, and of kube-state-metrics.
FOREIGN = {
    "up",
    "ALERTS",
    "kube_cronjob_created",
    "kube_cronjob_status_last_successful_time",
    "kube_deployment_status_replicas_available",
}
METRIC = re.compile(r"\b(?:aiaas|kube)_\w+")


def rules(kind: str) -> list[dict[str, Any]]:
    """All rules that have a name of this kind, alert or record."""
    files = [yaml.safe_load(path.read_text()) for path in RULES]
    return [rule for file in files for group in file["groups"] for rule in group["rules"] if kind in rule]


def anchors() -> set[str]:
    """Of the sections of the runbooks, as the documentation builder makes them."""
    titles = re.findall(r"^#+ (.+)$", RUNBOOKS.read_text(), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title)).strip("-").lower() for title in titles}


def run(*command: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=60, cwd=folder
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rules and their tests in one folder, to change."""
    for path in [*RULES, *Path(__file__).parent.glob("*.test.yaml")]:
        shutil.copy(path, tmp_path)
    return tmp_path


def judged(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    return run(binary("promtool"), "test", "rules", f"{name}.test.yaml", folder=folder)


def test_rules_are_well_formed() -> None:
    told = run(binary("promtool"), "check", "rules", *RULES)
    assert told.returncode == 0, told.stderr


@pytest.mark.parametrize("name", [path.stem for path in RULES])
def test_alerts_fire_and_stay_silent_where_they_should(folder: Path, name: str) -> None:
    told = judged(folder, name)
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("platform", "age_seconds > 300", "age_seconds > 30000"),
        ("platform", "age_seconds > 300", "age_seconds > 3"),
        ("slo", "{slo: reconciliation}, expr: vector(0.01)", "{slo: reconciliation}, expr: vector(1)"),
        ("slo", "and aiaas:slo_burn:30m > 6", ""),
    ],
)
def test_a_wrong_threshold_is_noticed(folder: Path, name: str, right: str, wrong: str) -> None:
    text = (folder / f"{name}.yaml").read_text()
    assert right in text
    (folder / f"{name}.yaml").write_text(text.replace(right, wrong))
    assert judged(folder, name).returncode != 0


def test_every_alert_is_expected_by_a_test() -> None:
    expected = "".join(path.read_text() for path in Path(__file__).parent.glob("*.test.yaml"))
    missing = [rule["alert"] for rule in rules("alert") if not re.search(rf"\b{rule['alert']}\b", expected)]
    assert missing == []


def test_every_alert_says_what_it_is_and_leads_to_its_runbook() -> None:
    objectives = {rule["labels"]["slo"] for rule in rules("record") if "slo" in rule.get("labels", {})}
    assert len(objectives) == 6
    for rule in rules("alert"):
        said = rule["annotations"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert said["summary"]
        assert said["description"]
        page, _, anchor = said["runbook_url"].partition("#")
        assert ROOT / page == RUNBOOKS
        wanted = objectives if anchor == "{{ $labels.slo }}" else {rule["alert"].lower()}
        assert anchor in ("{{ $labels.slo }}", *wanted)
        assert wanted <= anchors(), rule["alert"]


@pytest.mark.parametrize("path", [*RULES, RUNBOOKS], ids=lambda path: path.name)
def test_every_metric_that_is_named_is_one_that_the_code_makes(path: Path) -> None:
    made = {metric.name for package in PACKAGES for metric in find_metrics(ROOT, package)} | FOREIGN
    named = METRIC.findall(path.read_text())
    assert named
    unknown = {name for name in named if name not in made and re.sub(r"_(count|sum|bucket)$", "", name) not in made}
    assert unknown == set()


def test_every_command_of_the_runbooks_is_one_of_the_command_line() -> None:
    known = (ROOT / "tests/unit/cli/snapshots/commands.txt").read_text().splitlines()
    named = {
        command.strip()
        for command in re.findall(r"(?:`|    )aiaas ([a-z -]+?)(?= --| [A-Z]|`|\n)", RUNBOOKS.read_text())
    }
    assert len(named) > 10
    assert named - set(known) == set()


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        (["severity=critical"], "slack-critical"),
        (["severity=critical", "namespace=aiaas-production"], "slack-critical"),
        (["severity=critical", "namespace=aiaas-staging"], "slack-warning"),
        (["severity=warning"], "slack-warning"),
        (["alertname=Watchdog", "severity=none"], "nobody"),
    ],
)
def test_alerts_go_to_the_channel_of_their_severity(labels: list[str], receiver: str) -> None:
    config = MONITORING / "alertmanager.yaml"
    told = run(binary("amtool"), "config", "routes", "test", f"--config.file={config}", *labels)
    assert (told.returncode, told.stdout.strip()) == (0, receiver), told.stderr


def test_alertmanager_takes_its_configuration_and_has_the_webhook_from_a_file() -> None:
    config = MONITORING / "alertmanager.yaml"
    told = run(binary("amtool"), "check-config", config)
    assert told.returncode == 0, told.stderr
    webhook = Path(yaml.safe_load(config.read_text())["global"]["slack_api_url_file"])
    stack = yaml.safe_load((ROOT / "deploy/argocd/values/kube-prometheus-stack.yaml").read_text())
    assert webhook.parent.name in stack["alertmanager"]["alertmanagerSpec"]["secrets"]
    assert "hooks.slack.com" not in config.read_text()
