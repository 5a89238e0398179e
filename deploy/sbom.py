"""Writes what the image is made of as a CycloneDX document; it never looks into what Debian brings.

python -m deploy.sbom LOCK    prints it: each package of LOCK, as it is installed for this interpreter

The same lock and interpreter give the same bytes. Fails if what is installed is not what is locked.
"""

import json
import platform
import re
import sys
import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_PROJECT = "aiaas"
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)((?:\s*\\\n\s+--hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE)
_LONGEST_LICENSE_NAME = 100


class Locked(NamedTuple):
    """A package of a lock, and the SHA-256 of each file that it may be installed from."""

    name: str
    version: str
    sha256: tuple[str, ...]

    @property
    def purl(self) -> str:
        """Its package URL."""
        return f"pkg:pypi/{self.name}@{self.version}"


class SbomError(Exception):
    """What is installed is not what is locked."""


def read(lock: str) -> list[Locked]:
    """The packages of a lock. Raises SbomError for a line that pins none."""
    found = [
        Locked(canonicalize_name(name), version, tuple(re.findall(r"sha256:([0-9a-f]{64})", hashes)))
        for name, version, hashes in _REQUIREMENT.findall(lock)
    ]
    if rest := _REQUIREMENT.sub("", lock).strip():
        raise SbomError(f"not a pinned package with its hashes: {rest.splitlines()[0]}")
    return found


def document(locked: list[Locked]) -> dict[str, Any]:
    """The whole document. Raises SbomError."""
    purls = {package.name: package.purl for package in locked}
    components = [_component(package, _installed(package)) for package in locked]
    python = f"pkg:generic/cpython@{platform.python_version()}"
    components.append(
        {
            "type": "platform",
            "bom-ref": python,
            "name": "cpython",
            "version": platform.python_version(),
            "purl": python,
            "licenses": [{"license": {"id": "PSF-2.0"}}],
        }
    )
    itself = distribution(_PROJECT)
    root = f"pkg:pypi/{_PROJECT}@{itself.version}"
    dependencies = [{"ref": root, "dependsOn": sorted([*_needs(itself, purls), python])}]
    dependencies += [
        {"ref": package.purl, "dependsOn": sorted(set(_needs(_installed(package), purls)))} for package in locked
    ]
    content = {
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": root,
                "name": _PROJECT,
                "version": itself.version,
                "purl": root,
                "licenses": _licenses(itself),
            }
        },
        "components": components,
        "dependencies": dependencies,
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        **content,
    }


def _installed(package: Locked) -> Distribution:
    try:
        found = distribution(package.name)
    except PackageNotFoundError:
        raise SbomError(f"{package.name} {package.version} is locked and not installed") from None
    if found.version != package.version:
        raise SbomError(f"{package.name} {package.version} is locked, and {found.version} is installed")
    return found


def _component(package: Locked, installed: Distribution) -> dict[str, Any]:
    return {
        "type": "library",
        "bom-ref": package.purl,
        "name": package.name,
        "version": package.version,
        "purl": package.purl,
        "licenses": _licenses(installed),
        "externalReferences": [
            {
                "type": "distribution",
                "url": package.purl,
                "comment": "files that it may be installed from, one for each hash",
                "hashes": [{"alg": "SHA-256", "content": digest} for digest in package.sha256],
            }
        ],
    }


def _licenses(installed: Distribution) -> list[dict[str, Any]]:
    """As its metadata say: an expression of SPDX, else a name."""
    metadata = installed.metadata
    if "License-Expression" in metadata:
        return [{"expression": metadata["License-Expression"]}]
    classifiers = metadata.get_all("Classifier") or []
    names = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License :: ")]
    text = next(iter(metadata.get_all("License") or ()), "")
    # Some put the whole text of it there.
    if text and len(text) <= _LONGEST_LICENSE_NAME:
        names = [text]
    return [{"license": {"name": name}} for name in names]


def _needs(installed: Distribution, purls: Mapping[str, str]) -> Iterator[str]:
    """Those of the locked packages that it asks for."""
    for line in installed.requires or ():
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name in purls and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            yield purls[name]


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        found = document(read(Path(arguments[0]).read_text(encoding="utf-8")))
    except SbomError as error:
        print(error, file=sys.stderr)
        return 1
    json.dump(found, sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
