"""The documentation: its reference is what contracts and code make, all of it builds, and no link of it is broken."""

import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from aiaas.type.v1 import options_pb2
from deploy.reference.__main__ import CONFIGURATIONS, PACKAGES, pages
from deploy.reference.sources import find_metrics
from tests.doubles.throw_away_contract import with_throw_away

ROOT = Path(options_pb2.__file__).parents[5]
REFERENCE = ROOT / "docs/reference"
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def built(folder: Path) -> subprocess.CompletedProcess[str]:
    """What the documentation builder says of a copy of the documentation in `folder`."""
    shutil.copy(ROOT / "mkdocs.yml", folder)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(folder / "mkdocs.yml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A copy of the documentation to change."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


def test_committed_pages_are_what_contracts_and_code_make() -> None:
    made = pages((ROOT / "gen/descriptors.binpb").read_bytes())
    committed = {str(path.relative_to(REFERENCE)): path.read_text() for path in REFERENCE.rglob("*.md")}
    assert made.keys() == committed.keys(), "run 'make generate' and commit the result"
    stale = [name for name, content in made.items() if committed[name] != content]
    assert stale == [], "run 'make generate' and commit the result"


def test_new_contract_is_documented_without_a_line_for_it(site: Path) -> None:
    made = pages(with_throw_away(site))
    page = made["grpc/thing.md"]
    assert "# ThingService" in page
    assert "### ThingService.UpdateThing\n\nChanges a thing. And more is said.\n" in page
    assert "| REST | `PATCH /admin/v1/things/{thing_id}` |" in page
    assert "| Answer | a stream of [`Thing`](#thing) |" in page
    assert "| `square` | [`Mood`](#mood) | One of `kind`. Square. |" in page
    assert "### WatchThingsRequest.Filter" in page
    assert "| `PATCH /admin/v1/things/{thing_id}` | Changes a thing | `things.update` |" in made["rest.md"]
    assert "`things.update`" in made["permissions.md"]
    assert "[`ThingService`](thing.md#thingservice)" in made["grpc/index.md"]
    for name, content in made.items():
        (site / "docs/reference" / name).write_text(content)
    told = built(site)
    assert told.returncode == 0, told.stderr
    assert "ThingService.UpdateThing" in (site / "site/reference/grpc/thing/index.html").read_text()


@pytest.mark.parametrize("link", ["no-such-page.md", "money.md#no-such-heading", "../README.md", "/money/"])
def test_broken_link_fails_the_build(site: Path, link: str) -> None:
    (site / "docs/broken.md").write_text(f"# Broken\n\n[here]({link})\n")
    told = built(site)
    assert told.returncode == 1
    assert "broken.md" in told.stderr


def test_links_between_files_of_the_repository_lead_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in ROOT.glob("*.md")
        for target in LINK.findall(page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def test_every_metric_that_is_counted_is_documented() -> None:
    for package in PACKAGES:
        module = importlib.import_module(package)
        for found in pkgutil.walk_packages(module.__path__, f"{package}."):
            if not found.name.endswith(".__main__"):
                importlib.import_module(found.name)
    counted = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in REGISTRY.collect()
        # Other tests in this process count their own.
        if family.name.startswith("aiaas_") and not family.name.startswith("aiaas_test_")
    }
    documented = {metric.name for package in PACKAGES for metric in find_metrics(ROOT, package)}
    assert counted == documented
    assert len(counted) > 30


def test_metric_that_is_not_written_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    source = "from prometheus_client import Counter\nname = 'aiaas_odd'\nODD = Counter(name, 'Odd.')\n"
    (tmp_path / "odd/metrics.py").write_text(source)
    with pytest.raises(ValueError, match=r"metrics\.py:3"):
        list(find_metrics(tmp_path, "odd"))


def test_every_variable_that_a_service_reads_is_documented() -> None:
    documented = set(re.findall(r"^\| `(AIAAS_\w+)`", (REFERENCE / "variables.md").read_text(), re.MULTILINE))
    named = {
        variable
        for package in (*CONFIGURATIONS, "mesh")
        for path in (ROOT / package).rglob("*.py")
        for variable in re.findall(r'"(AIAAS_\w*[A-Z0-9])"', path.read_text())
    }
    assert named == documented
    assert len(documented) > 50
