"""What the image is made of: a valid CycloneDX document with every locked package and its hashes."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.sbom import SbomError, document, main, read
from tests.deploy.tools import CHECKS_PYTHON, ROOT

LOCK = ROOT / "deploy" / "locks" / "runtime.lock"
# The reference library's own validator, which the environment of checkov has.
VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read())
sys.exit(str(error)[:2000] if error else 0)
"""


def made() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.sbom", str(LOCK)], capture_output=True, text=True, check=True, timeout=60
    )
    return dict(json.loads(done.stdout))


def refused(found: dict[str, Any]) -> str:
    """What the schema says against a document, nothing if it is valid."""
    done = subprocess.run(
        [CHECKS_PYTHON, "-c", VALIDATE],
        input=json.dumps(found),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0 or done.stderr, "the validator did not run"
    return done.stderr


def test_document_is_valid_and_the_same_each_time() -> None:
    found = made()
    assert refused(found) == ""
    assert made() == found
    found["components"][0]["type"] = "thing"
    assert "'thing' is not one of" in refused(found)


def test_every_locked_package_is_in_it_with_its_hashes() -> None:
    # Read another way than the module reads it.
    locked: dict[str, set[str]] = {}
    for line in LOCK.read_text().splitlines():
        if pinned := re.match(r"([\w.-]+)==([^\s;]+)", line):
            hashes = locked.setdefault(f"pkg:pypi/{pinned[1].lower().replace('_', '-')}@{pinned[2]}", set())
        elif digest := re.search(r"sha256:(\w+)", line):
            hashes.add(digest[1])
    found = {
        component["purl"]: {digest["content"] for digest in component["externalReferences"][0]["hashes"]}
        for component in made()["components"]
        if component["type"] == "library"
    }
    assert found == locked
    assert len(found) > 50


def test_dependencies_lead_from_the_project_to_every_package() -> None:
    found = made()
    needs = {entry["ref"]: entry["dependsOn"] for entry in found["dependencies"]}
    reached: set[str] = set()
    waiting = [found["metadata"]["component"]["bom-ref"]]
    while waiting:
        ref = waiting.pop()
        if ref not in reached:
            reached.add(ref)
            waiting += needs.get(ref, [])
    unreached = {component["name"] for component in found["components"] if component["bom-ref"] not in reached}
    # Locked for the first releases of Python 3.11 alone.
    assert unreached <= {"async-timeout"}


def test_every_package_says_its_license() -> None:
    assert [component["name"] for component in made()["components"] if not component["licenses"]] == []


def test_what_is_installed_and_not_locked_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = LOCK.read_text()
    for changed, wrong in (
        (re.sub(r"^yarl==\S+", "yarl==0.0.1", text, flags=re.MULTILINE), "yarl 0.0.1 is locked, and"),
        (text.replace("yarl==", "yarl-which-is-nowhere=="), "is locked and not installed"),
        (text + "yarl>=1\n", "not a pinned package with its hashes: yarl>=1"),
    ):
        with pytest.raises(SbomError, match=re.escape(wrong)):
            document(read(changed))
    lock = tmp_path / "lock"
    lock.write_text("yarl>=1\n")
    assert main([str(lock)]) == 1
    assert capsys.readouterr().out == ""
